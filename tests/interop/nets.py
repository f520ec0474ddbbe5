# SPDX-License-Identifier: Apache-2.0
"""Small networks, their data, and what every test here compares."""

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0

IMAGE = (3, 4, 4)
CLASSES = 5


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(48, 20)
        self.fc2 = nn.Linear(20, 14)
        self.fc3 = nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.fc1 = nn.Linear(10 * 4, 16)
        self.fc2 = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.max_pool2d(F.relu(self.conv1(x)), 2)))
        return self.fc2(F.relu(self.fc1(y.flatten(1))))


class Net(nn.Module):
    """Convolution, norm, flatten and linear layers; ``wrap`` runs the inner block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 10, 3, padding=1)
        self.fc1 = nn.Linear(10 * 16, 24)
        self.fc2 = nn.Linear(24, CLASSES)
        self.wrap: Callable[..., Tensor] = lambda block, x: block(x)

    def block(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(F.relu(self.norm(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.wrap(self.block, x).flatten(1))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {
    "mlp": Mlp,
    "lenet": LeNet,
    "norm": Net,
    "residual": Residual,
}


@cache
def _converted(kind: str, granularity: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"example_inputs": (torch.randn(2, *IMAGE),), "granularity": granularity}
    if method == "scl":
        # The mean of normalised gradients is another one; some connections close.
        options |= {"norm": "none", "initial": 0.04}
    return l0.convert(NETS[kind](), method, lam=1e-3, **options)


def make(
    kind: str = "norm", seed: int = 0, granularity: str = "unit", method: str = "hard_concrete"
) -> nn.Module:
    """A converted network with fixed weights; ``seed`` keys its gates."""
    net = copy.deepcopy(_converted(kind, granularity, method))
    net.l0.seed.fill_(seed)
    return net


def batch(size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, *IMAGE, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def objective(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    found = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: t.detach().clone() for name, t in found.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert set(a) == set(b) and len(a) > 0
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=0, equal_nan=True, msg=name
        )


def norms_in_eval(net: nn.Module) -> nn.Module:
    """Gates in training mode, norms not: a batch may be split without changing anything."""
    net.eval()
    net.l0.train()
    return net


def assert_closed_get_nothing(net: nn.Module) -> None:
    """Gradients of closed rows and columns are zero, of full shape."""
    closed = 0
    for name, layer in net.named_modules():
        if not isinstance(layer, l0.nn.GatedLayer) or layer.weight is None:
            continue
        grad = layer.weight.grad
        assert grad is not None and grad.shape == layer.weight.shape, name
        if layer.out_gate is not None:
            assert bool((grad[layer.out_gate.z == 0] == 0).all()), name
            closed += int((layer.out_gate.z == 0).sum())
        if layer.in_gate is not None:
            assert bool((grad[:, layer.in_gate.z == 0] == 0).all()), name
    assert closed > 0
