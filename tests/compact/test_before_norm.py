# SPDX-License-Identifier: Apache-2.0
"""`compact` of models with gates before a norm: what closed units leave behind stays, exactly."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models
from l0kernels.nn import GatedLayer


class Net(nn.Module):
    """a -> norm -> activation -> b with padding, side without; c reads b's units flattened."""

    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(8, 4, 2)
        self.c = nn.Linear(96, 4, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        y = self.act(self.norm2(self.b(self.act(h))))
        return self.c(y.flatten(1)) + self.side(torch.cos(h)).mean((2, 3))


@torch.no_grad()
def converted(net: nn.Module, x: Tensor, closed: float) -> nn.Module:
    """In eval mode, with norms away from the identity and a part of the test gates closed."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)
    l0.convert(net, "hard_concrete", example_inputs=(x,), place="before_norm")
    for _, where in net.l0.slices():
        size = where.stop - where.start
        values = torch.linspace(-1, 1, size)[torch.randperm(size)]
        least = torch.quantile(values, closed)
        net.l0.log_alpha[where] = torch.where(values < least, -5.0, values)
        if closed == 1:
            net.l0.log_alpha[where] = -5.0
    return net.eval()


def masked(net: nn.Module, x: Tensor) -> Tensor:
    with l0.use_impl("reference"), torch.no_grad():
        return net(x)


@pytest.mark.parametrize(
    "act", [F.relu, torch.sigmoid, torch.tanh], ids=["relu", "sigmoid", "tanh"]
)
@pytest.mark.parametrize("closed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_one_closed_unit_for_each_reader_stands_for_all(act, closed: float, bias: bool):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = converted(Net(act, bias).double(), x, closed)
    opened = net.l0.open_now()
    small = l0.compact(net, (x,))
    assert not any(isinstance(m, GatedLayer) for m in small.modules())
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(net, x), atol=1e-10, rtol=1e-10)
        other = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(small(other), masked(net, other), atol=1e-10, rtol=1e-10)
    # Two layers read the first group, one the second.
    assert small.a.out_channels <= max(2, opened["a"] + 2)
    assert small.b.out_channels <= max(2, opened["b"] + 1)
    if closed == 0.5:
        assert small.a.out_channels > opened["a"] or act is F.relu
        with torch.no_grad():
            small.b.weight.mul_(1.01)
            assert not torch.allclose(small(x), masked(net, x))


def test_constants_that_are_zero_leave_nothing():
    """ReLU of a negative number: closed units are dropped as behind an activation."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1)
    )
    net = converted(net, x, 0.5)
    with torch.no_grad():
        net[1].bias.fill_(-4.0)
    small = l0.compact(net, (x,))
    assert small[0].out_channels == net.l0.open_now()["0"] == 4
    torch.testing.assert_close(small(x), masked(net, x), atol=1e-5, rtol=1e-5)


class Awkward(nn.Module):
    """One reader is called by keyword, one in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 2, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.sigmoid(self.norm(self.a(x)))
        y = self.b(input=h)
        return (y, self.head(h)) if self.training else y


def test_readers_called_by_keyword_or_in_training_only():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = converted(Awkward().double(), x, 0.5)
    assert set(l0.report(net).groups[0].consumers) == {"b", "head"}
    small = l0.compact(net, (x,))
    assert small.a.out_channels == net.l0.open_now()["a"] + 1
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(net, x), atol=1e-10, rtol=1e-10)


def test_padding_behind_the_norm_is_refused():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.ZeroPad2d(1),
        nn.Conv2d(8, 2, 3),
    )
    net = converted(net, x, 0.5)
    with pytest.raises(ValueError, match="the same at all pixels where 4 reads them, got others"):
        l0.compact(net, (x,))


def test_wrn_16_4():
    torch.manual_seed(0)
    network = models.network("wrn-16-4")
    x = network.example(2)[0][:, :, :12, :12]
    net = converted(network.build(), x, 0.75)
    small = l0.compact(net, (x,))
    for name, count in net.l0.open_now().items():
        assert count <= small.get_submodule(name).out_channels <= count + 1
    expected = masked(copy.deepcopy(net).double(), x.double())
    errors = [(m(x).double() - expected).abs().max() for m in (small, lambda x: masked(net, x))]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * expected.abs().max()
