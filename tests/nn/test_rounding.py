# SPDX-License-Identifier: Apache-2.0
"""Packed widths rounded up, as on a GPU: the same results, only where the order allows it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from interop.nets import NETS, assert_closed_get_nothing, batch, gradients, make, objective
from torch import nn

import l0kernels as l0
from l0kernels.gates.rounding import Rounding, Units

MULTIPLE = 4


@pytest.fixture(params=[False, True], ids=["layer by layer", "together"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0.gates.Gates, "_multiple", MULTIPLE)
    monkeypatch.setattr(l0.gates.Gates, "_together", request.param)


def exact_copy(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    twin.l0._multiple = 1
    return twin


def step(net: nn.Module) -> dict[str, torch.Tensor]:
    x, y = batch()
    x = x.double().requires_grad_()
    loss = objective(net, x, y)
    loss.backward()
    buffers = {name: buffer.detach() for name, buffer in net.named_buffers()}
    return {"loss": loss.detach(), "x": x.grad, **gradients(net), **buffers}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("log_alpha", [-1.0, -2.5, -9.0, 9.0])
def test_no_result_changes(kind: str, log_alpha: float, rounds: None):
    net = make(kind).double()
    nn.init.normal_(net.l0.log_alpha, log_alpha, 0.5)
    twin = exact_copy(net)
    mine, exact = step(net), step(twin)
    assert mine.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-10, msg=name)
    if log_alpha < 0:  # else none is closed
        assert_closed_get_nothing(net)
    with torch.no_grad():
        outputs = [n.eval()(batch()[0].double()) for n in (net, twin)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_widths_are_multiples_and_references_stay_exact(rounds: None):
    net = make("norm")
    nn.init.constant_(net.l0.log_alpha, -1.0)
    with l0.hold(net):
        net(batch()[0])
        draw, gates = net.l0.current_draw(), net.l0
        assert draw.widths != draw.counts
        for port, units in enumerate(gates.rounding.ports):
            assert units is not None
            packed = draw.widths[port] // units.repeat
            assert packed == units.size or packed % MULTIPLE == 0
            assert draw.counts[port] <= draw.widths[port] == draw.index[port].numel()
            listed = draw.index[port]
            assert listed.unique().numel() == listed.numel()
        for name in gates.names:
            is_open = gates[name].z.nonzero()[:, 0]
            assert gates[name].count == gates[name].index.numel() >= len(is_open)
            assert set(is_open.tolist()) <= set(gates[name].index.tolist())
            assert gates[name].index.equal(gates[name].index.sort().values)
            if len(is_open) >= 2:
                assert gates[name].index.equal(is_open)


def test_what_closed_units_hold_does_not_matter(rounds: None):
    net = make("lenet")
    nn.init.constant_(net.l0.log_alpha, -1.5)
    x, y = batch()
    with l0.hold(net):
        loss = F.cross_entropy(net(x), y)
        closed = net.l0["conv1"].z == 0
        assert bool(closed.any())
        with torch.no_grad():
            net.conv1.weight[closed] = torch.nan
            net.conv1.bias[closed] = torch.inf
            net.conv2.weight[:, closed] = torch.nan
        assert torch.equal(F.cross_entropy(net(x), y), loss)


def test_groups_whose_features_meet_others_stay_exact():
    sizes = {0: 3, 3: 4, 7: 2}
    none = 9
    a, b, c = torch.arange(3), 3 + torch.arange(4), 7 + torch.arange(2)

    def port(*born: torch.Tensor) -> torch.Tensor:
        made = torch.cat(born)
        return torch.stack([made, torch.full_like(made, none)])

    maps = [
        port(a),
        port(b),
        port(c),
        port(a, torch.tensor([none]), c),
        port(b.repeat_interleave(3)),
    ]
    found = Rounding.of(maps, [False] * 5, sizes).ports
    assert found == [None, Units(4, 1), None, None, Units(4, 3)]
    # Pixels before channels, a part of a group, and gates beside those of the producer.
    for other, selects in ((port(b.repeat(3)), False), (port(b[1:3]), False), (port(b), True)):
        assert Rounding.of([port(b), other], [False, selects], sizes).ports == [None, None]


def test_widths():
    maps = [torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 40, dtype=torch.int64)]
    rounding = Rounding(maps, [Units(20, 1), Units(20, 2)])
    for count, width in ((2, 16), (16, 16), (17, 20), (20, 20)):
        assert rounding.widths([count, 2 * count], [16, 16]) == [width, 2 * width]
    assert Rounding(maps, [None, Units(20, 2)]).widths([5, 10], [1, 16]) == [5, 32]


def test_on_a_cpu_wide_groups_of_convolutions_are_rounded():
    """To 16 from 128 units on, to 8 from 64 on; those of linear layers from 1024 on."""
    widths = (200, 128, 127, 64, 63)
    channels = zip((3, *widths[:-1]), widths, strict=True)
    layers = [layer for c in channels for layer in (nn.Conv2d(*c, 1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1))
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(2, 3, 4, 4),))
    assert [net.l0.multiple_of(size) for size in widths] == [16, 16, 8, 8, 1]
    nn.init.constant_(net.l0.log_alpha, -1.0)
    with l0.hold(net):
        draw = net.l0.current_draw()
        rounded = [-(-n // m) * m for n, m in zip(draw.counts, (16, 16, 8, 8, 1), strict=False)]
        assert draw.widths[:5] == rounded != draw.counts[:5]
        packed = net(torch.ones(1, 3, 4, 4))
        with l0.use_impl("reference"):
            torch.testing.assert_close(packed, net(torch.ones(1, 3, 4, 4)))
    linear = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 2))
    l0.convert(linear, "hard_concrete", example_inputs=(torch.randn(2, 6),))
    assert linear.l0.multiple_of(256) == 1
    assert [linear.l0.multiple_of(size) for size in (1023, 1024)] == [1, 16]


class Meets(nn.Module):
    """A few units meet the input one by one, beside a group that is wide."""

    def __init__(self, units: int = 2) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(units, units, 1)
        self.wide = nn.Conv2d(units, 96, 1)
        self.head = nn.Conv2d(96, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.wide(F.relu(x + self.narrow(x)))))


@pytest.mark.parametrize("multiple", [None, 16])
def test_units_that_are_all_packed_keep_their_order(multiple: int | None, monkeypatch):
    monkeypatch.setattr(l0.gates.Gates, "_multiple", multiple)
    net = l0.convert(Meets(), "hard_concrete", example_inputs=(torch.randn(2, 2, 3, 3),)).double()
    assert net.l0.sizes == [2, 96] and net.l0.multiple_of(96) > 1
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    for values in ([0.0, 0.7], [0.7, 0.0], [0.0, 0.0], [0.4, 0.7]):
        z = torch.cat((torch.tensor(values), torch.ones(96))).double()
        z[2:40:2] = 0
        with net.l0.using(z):
            draw = net.l0.current_draw()
            assert draw.index[net.l0.port_of(net.l0["narrow"])].tolist() == [0, 1]
            assert net.l0["narrow"].index.tolist() == [0, 1]  # never fewer than two
            packed = net(x)
            with l0.use_impl("reference"):
                torch.testing.assert_close(packed, net(x), rtol=1e-10, atol=1e-10)


def test_convert_refuses_what_only_full_widths_make_right(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l0.gates.Gates, "_multiple", 16)
    net = Meets(units=6)
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(2, 6, 3, 3),))
    assert net.l0.names == ["wide"] and "narrow" in l0.report(net).ungated
