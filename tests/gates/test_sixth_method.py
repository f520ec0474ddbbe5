# SPDX-License-Identifier: Apache-2.0
"""A method of one's own is one class: a whole one is defined here."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels._registry import once_differentiable
from l0kernels.gates.examples import uniform
from l0kernels.ops.sample_gates.reference import noise_k

DRAWS = 1_000_000


class StochasticGates(l0.gates.Gates):
    """z = clip(mu + sigma e, 0, 1), e ~ N(0, 1); test gate clip(mu, 0, 1).

    Yamada, Lindenbaum, Negahban, Kluger, 2020, arXiv:1810.04247. ``log_alpha`` holds mu.
    """

    def __init__(self, groups, *, initial: float = 0.5, sigma: float = 0.5, **options) -> None:
        super().__init__(groups, **options)
        self.sigma = sigma
        self.log_alpha = nn.Parameter(torch.full((self.count,), initial))

    def deterministic(self) -> Tensor:
        return self.alpha.clamp(0, 1)

    def open_probability(self) -> Tensor:
        return self._probability(self.alpha.detach())

    def sample(self, cost: Tensor, key: Tensor):
        noise = self.sigma * torch.special.ndtri(uniform(noise_k(key, self.count)))
        z = _Clipped.apply(self.log_alpha, noise)
        z = torch.cat((z, z.new_ones(1)))
        expected = (cost.double() * self._probability(self.log_alpha)).sum().to(cost.dtype)
        return z, expected, l0.functional.open_lists(z.detach(), self.layout)

    def _probability(self, mu: Tensor) -> Tensor:
        return torch.special.ndtr(mu.double() / self.sigma)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, noise: Tensor) -> Tensor:
        z = mu + noise.to(mu.dtype)
        # Not a saved tensor: a draw that is held serves several backward passes.
        ctx.inside = (z > 0) & (z < 1)
        return z.clamp(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return torch.where(ctx.inside, grad, 0.0), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3)
        self.fc1 = nn.Linear(12 * 4, 30)
        self.fc2 = nn.Linear(30, 4)

    def forward(self, x: Tensor, gates: tuple[Any, Any] = (1.0, 1.0)) -> Tensor:
        y = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        return self.fc2(F.relu(self.fc1(y * gates[0])) * gates[1])


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images whose two channels are shifted up or down: four classes."""
    y = torch.arange(count) % 4
    shifts = torch.stack((y % 2, y // 2), 1) * 2.0 - 1
    return torch.randn(count, 2, 6, 6) + shifts[:, :, None, None], y


def converted(**options: Any) -> nn.Module:
    x, _ = data(4)
    return l0.convert(Net(), StochasticGates, example_inputs=(x,), **options)


def objective(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)


@pytest.mark.parametrize("mu", [-0.3, 0.2, 0.5, 1.1])
def test_its_law(mu: float):
    gates = StochasticGates({"a": DRAWS}, initial=mu)
    net = nn.Sequential(l0.nn.GatedLinear(DRAWS, 1, bias=False, in_gate=gates["a"]))
    gates.attach(net)
    gates.draw()
    z, sigma = gates["a"].z.detach().double(), gates.sigma

    def cdf(value: float) -> float:
        return 0.5 * (1 + math.erf(value / math.sqrt(2)))

    closed, full = cdf(-mu / sigma), 1 - cdf((1 - mu) / sigma)
    for share, p in ((z == 0, closed), (z == 1, full)):
        deviation = math.sqrt(p * (1 - p) / DRAWS)
        assert abs(float(share.double().mean()) - p) < 4.5 * deviation
    assert float(gates.open_probability()[0]) == pytest.approx(1 - closed, abs=1e-7)
    # The mean of a clipped normal variable: the integral of P(z > t) over t from 0 to 1.
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    mean = float(torch.special.ndtr((mu - t) / sigma).mean())
    assert abs(float(z.mean()) - mean) < 4.5 * float(z.std()) / math.sqrt(DRAWS)


def test_packed_steps_equal_the_masked_network():
    net = converted(lam=0.02, n_train=10).double()
    plain = Net().double()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("l0.")})
    mu = net.l0.log_alpha.detach().clone().requires_grad_()
    x, y = data()
    x, sizes = x.double(), torch.tensor([2 * 9.0] * 12 + [4.0] * 30, dtype=torch.float64)
    closed = 0
    for step in range(1, 6):
        net.zero_grad()
        loss = objective(net, x, y)
        loss.backward()
        noise = 0.5 * torch.special.ndtri(uniform(noise_k(torch.tensor([0, step]), 42)))
        z = (mu + noise).clamp(0, 1)
        closed += int((z == 0).sum())
        exact = F.cross_entropy(plain(x, (z[:12].repeat_interleave(4), z[12:])), y)
        exact = exact + 0.02 / 10 * (sizes * torch.special.ndtr(mu / 0.5)).sum()
        found = torch.autograd.grad(exact, [*plain.parameters(), mu])
        torch.testing.assert_close(loss, exact, rtol=0, atol=1e-10)
        for (name, parameter), grad in zip(net.named_parameters(), found, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-10, msg=name)
    assert closed > 20


def test_a_held_draw_serves_two_losses():
    net = converted()
    x, y = data()
    with l0.hold(net):
        for half in (slice(0, 32), slice(32, 64)):
            (F.cross_entropy(net(x[half]), y[half]) / 2).backward()
    step, whole = net.l0.step.clone(), net.l0.log_alpha.grad.clone()
    net.zero_grad()
    net.l0.step.copy_(step - 1)
    l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)).backward()
    torch.testing.assert_close(net.l0.log_alpha.grad, whole)


def test_it_trains_reports_and_becomes_a_small_network():
    net = converted(lam=0.006, n_train=10)
    optimizer = torch.optim.Adam(l0.param_groups(net, lr=0.01, gate_lr=0.02))
    x, y = data(256)
    losses = []
    for _ in range(60):
        loss = objective(net, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    left = l0.report(net).weights_open()
    assert 0 < left["test"] < left["total"] and left["expected"] < left["total"]
    counts = net.l0.open_now()
    assert 0 < counts["conv"] <= 12 and 0 < counts["fc1"] < 30
    net.eval()
    small = l0.compact(net, (x,))
    assert small.conv.out_channels == counts["conv"] and small.fc1.out_features == counts["fc1"]
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x))


def test_its_state_goes_round():
    net, x = converted(seed=5), data()[0]
    with torch.no_grad():
        net.l0.log_alpha.add_(torch.randn(42))
    net(x)
    twin = copy.deepcopy(net)
    other = converted()
    other.load_state_dict(net.state_dict())
    for one in (twin, other):
        one(x)
    before = net.l0._draw.z
    net(x)
    assert not before.equal(net.l0._draw.z)
    for one in (twin, other):
        assert one.l0._draw.z.equal(net.l0._draw.z)


def test_what_is_no_method_is_refused():
    for method in ("six", int, nn.Linear):
        with pytest.raises(ValueError, match="method: expected one of .* or a class of gates, got"):
            l0.convert(Net(), method, example_inputs=(data(4)[0],))  # pyright: ignore
