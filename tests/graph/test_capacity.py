# SPDX-License-Identifier: Apache-2.0
"""Planned widths: how wide, and what is packed."""

import math

import pytest
import torch
from interop.nets import make
from torch import Tensor

import l0kernels as l0
from l0kernels.functional import open_lists
from l0kernels.gates import capacity
from l0kernels.gates.capacity import Plan, capacities


@pytest.mark.parametrize(
    ("mean", "variance", "size", "expected"),
    [
        (160.0, 80.0, 320, 208),  # 160 + 35.8
        (60.0, 4.0, 320, 80),  # 60 + 8
        (64.0, 0.0, 320, 64),
        (64.1, 0.0, 320, 80),
        (0.0, 0.0, 320, 16),
        (0.0, 0.0, 12, 12),
        (310.0, 9.0, 320, 320),
        (math.nan, 1.0, 320, 320),
        (1.0, math.nan, 320, 320),
        (0.5, 0.2, 1, 1),
    ],
)
def test_capacity(mean: float, variance: float, size: int, expected: int):
    assert capacity.capacity(mean, variance, size) == expected


def wide() -> l0.gates.HardConcrete:
    gates = l0.gates.HardConcrete({"a": 200, "b": 100})
    layers = [
        l0.nn.GatedLinear(3, 200, out_gate=gates["a"]),
        l0.nn.GatedLinear(200, 100, in_gate=gates["a"], out_gate=gates["b"]),
        l0.nn.GatedLinear(100, 2, in_gate=gates["b"]),
    ]
    gates.attach(torch.nn.Sequential(*layers))
    return gates


def test_capacities_follow_the_moments():
    gates = wide()
    with torch.no_grad():
        gates.log_alpha[:200] = -3.0
        gates.log_alpha[200:] = 9.0
    p = gates.open_probability()
    mean = float(p[:200].sum())
    wanted = mean + 4 * math.sqrt(float((p[:200] * (1 - p[:200])).sum()))
    assert capacities(gates) == [math.ceil(wanted / 16) * 16, 100] and wanted < 100
    with torch.no_grad():
        gates.log_alpha[:50] = 2.0
    gates.freeze()
    assert gates.open_now()["a"] == 50
    assert capacities(gates) == [64, 100]


def test_plans_that_are_kept():
    gates = wide()
    plan = Plan(gates, [160, 80], torch.zeros(()))
    assert plan.serves([160, 80]) and plan.serves([160, 70])
    assert not plan.serves([160, 81]) and not plan.serves([144, 80])


def packed_by_hand(z: Tensor, size: int, room: int) -> list[int]:
    is_open = (z != 0).tolist()
    dummies = [i for i in range(size) if not is_open[i]][: max(0, room - sum(is_open))]
    return sorted([i for i in range(size) if is_open[i]] + dummies)


def test_what_is_packed(device: torch.device):
    """The open units and the first closed ones, ascending; cut off where they do not fit."""
    gates = wide().to(device)
    flag = torch.zeros((), device=device)
    plan = Plan(gates, [112, 48], flag)
    for part, fits in ((0.0, True), (0.3, True), (0.9, False), (1.0, False)):
        flag.zero_()
        z = torch.cat((torch.rand(300) < part, torch.ones(1).bool())).float().to(device)
        lists = plan.lists(z, open_lists(z, gates.layout))
        assert bool(flag == 0) == fits
        for port, (start, width) in enumerate(zip(gates.port_starts, plan.widths, strict=True)):
            size, room = ((200, 112), (100, 48))[port]
            values = z[:200] if port == 0 else z[200:300]
            found = lists.index[start : start + width].tolist()
            assert width == room and found == packed_by_hand(values, size, room)[:room]
            assert len(set(found)) == width and 0 <= min(found) <= max(found) < size


def test_the_flag_stays_up(device: torch.device):
    gates = wide().to(device)
    flag = torch.zeros((), device=device)
    plan = Plan(gates, [112, 48], flag)
    for part in (1.0, 0.0):
        z = torch.full((301,), part, device=device)
        z[-1] = 1
        plan.lists(z, open_lists(z, gates.layout))
        assert bool(flag == 1)


def test_mistakes_that_kernels_count_raise_the_flag():
    gates = wide()
    flag = torch.zeros(())
    plan = Plan(gates, [112, 48], flag)
    z = torch.cat((torch.zeros(300), torch.ones(1)))
    lists = open_lists(z, gates.layout)
    plan.lists(z, lists._replace(counts=torch.full_like(lists.counts, -1)))
    assert bool(flag == 1)


def test_groups_whose_features_have_other_gates_are_whole():
    """The 40 features that fc1 reads have the gates of conv2, 4 each, and one of their own."""
    net = make("lenet", granularity="input")
    with torch.no_grad():
        net.l0.log_alpha.fill_(-9.0)
    sizes = dict(zip(net.l0.names, net.l0.sizes, strict=True))
    found = dict(zip(net.l0.names, capacities(net.l0), strict=True))
    extra = [name for name, size in sizes.items() if size == 40]
    assert extra and all(found[name] == 40 for name in extra)


def test_closed_inputs_may_hold_anything():
    gates = l0.gates.HardConcrete({"inputs": 6, "a": 8})
    layers = [
        l0.nn.GatedLinear(6, 8, in_gate=gates["inputs"], out_gate=gates["a"]),
        l0.nn.GatedLinear(8, 2, in_gate=gates["a"]),
    ]
    net = gates.attach(torch.nn.Sequential(*layers))
    x = torch.randn(3, 6)
    z = torch.ones(14)
    z[:3] = z[8:10] = 0
    x[:, :3] = torch.nan
    with gates.using(z):
        expected = net(x)
    with gates.at_capacity(Plan(gates, [5, 8], torch.zeros(()))), gates.using(z):
        assert net.l0.current_draw().widths[0] == 5
        torch.testing.assert_close(net(x), expected)


def test_what_closed_units_hold_does_not_matter():
    """Also in groups that are packed whole: the host does not know whether all are open."""
    net = make("lenet")
    x = torch.randn(2, 3, 4, 4)
    z = torch.ones(net.l0.count)
    closed = [where.start for _, where in net.l0.slices()]
    z[closed] = 0
    with net.l0.at_capacity(Plan(net.l0, net.l0.sizes, torch.zeros(()))), net.l0.using(z):
        expected = net(x)
        with torch.no_grad():
            net.conv1.weight[0] = net.conv2.weight[0] = net.fc1.weight[0] = torch.nan
            net.conv1.bias[0] = torch.inf
        assert net(x).equal(expected) and bool(expected.isfinite().all())
