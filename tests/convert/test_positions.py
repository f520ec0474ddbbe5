# SPDX-License-Identifier: Apache-2.0
"""What a converted network's penalty counts per multiply-add, beside PyTorch's own counter."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import l0kernels as l0


class Net(nn.Module):
    """A depthwise convolution with a stride between dense ones, a norm, a head; all are gated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.pointwise(self.depthwise(x).relu()).relu()
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 9, 6)


def multiply_adds(net: nn.Module) -> dict[str, float]:
    """Of one example, by layer."""
    with FlopCounterMode(display=False) as counter:
        net(X)
    found = counter.get_flop_counts()
    return {name: sum(found[f"Net.{name}"].values()) / 2 / len(X) for name in LAYERS}


LAYERS = ["stem", "depthwise", "pointwise", "head"]


@pytest.mark.parametrize("method", ["cs", "scl"])
def test_gates_of_weights(method: str):
    net = Net()
    counted = multiply_adds(copy.deepcopy(net))
    gates = l0.convert(net, method, example_inputs=(X,), granularity="weight").l0
    sums = [float(part.sum()) for part in gates.unit_flops.split(list(gates.sizes))]
    assert gates.names == LAYERS
    assert sums == [counted[name] for name in LAYERS]


def test_gates_of_units():
    net = Net()
    counted = multiply_adds(copy.deepcopy(net))
    gates = l0.convert(net, "dep", example_inputs=(X,)).l0
    every = gates.log_alpha.new_full((gates.count,), math.inf)
    cost = gates._cost_of_open(every, *gates._prices("flop", 1.0))
    assert float(cost) == sum(counted.values())
    unit = l0.convert(Net(), "hard_concrete", example_inputs=(X,)).l0
    stem, pointwise = (int(unit.unit_flops[unit.starts[name]]) for name in ("stem", "pointwise"))
    assert (8 * stem, 12 * pointwise) == (counted["stem"], counted["pointwise"])


@pytest.mark.parametrize("network", ["convolutions", "linear"])
def test_unbatched_inputs_are_one_example(network: str):
    make, x = nn.Conv2d, torch.randn(3, 9, 6)
    layers = [make(3, 8, 3), nn.ReLU(), make(8, 5, 3)]
    if network == "linear":
        layers, x = [nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 5)], torch.randn(7)
    gates = [
        l0.convert(copy.deepcopy(nn.Sequential(*layers)), "hard_concrete", example_inputs=(inputs,))
        for inputs in (x, x[None])
    ]
    unbatched, batched = (net.l0.unit_flops for net in gates)
    assert unbatched.equal(batched) and bool((batched > 0).all())


def test_positions_of_every_weight_are_needed():
    g = l0.gates.HardConcrete({"a": 4})
    layers = nn.Sequential(l0.nn.GatedConv2d(3, 4, 3, out_gate=g["a"]), nn.ReLU())
    with pytest.raises(ValueError, match=r"expected positions of '0' too, got \['1'\]"):
        g.attach(layers, {"1": 10})
