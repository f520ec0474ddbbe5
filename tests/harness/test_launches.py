# SPDX-License-Identifier: Apache-2.0
"""How many kernels a training step launches, counted by the launch macro.

The counts do not depend on widths, so a narrow network stands for WRN-28-10 here. The full one:
`L0K_LAUNCHES=wrn-28-10 python -m pytest tests/harness/test_launches.py` (a minute or so).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wired import wired

import l0kernels as l0
from harness import build, ops
from l0kernels.bench.models import network

NAME = os.environ.get("L0K_LAUNCHES", "wrn-28-1")
COUNTED = ("sample_gates", "pack_weight")


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network whose gates and weights run the CUDA sources, in the order of eager GPU steps."""
    if build.why_not():
        pytest.skip(f"CUDA sources cannot run on this CPU: {build.why_not()}")
    ops.build_libraries(COUNTED)
    for patch in ops.patches(loaded=COUNTED):
        if patch[0].__name__.split(".")[-2] in COUNTED:
            monkeypatch.setattr(*patch)
    ops.set_schedule(-1)
    monkeypatch.setattr(l0.gates.Gates, "_together", True)
    monkeypatch.setattr(l0.gates.Gates, "_multiple", 16)
    return wired(network(NAME)).to(memory_format=torch.channels_last)


def launched() -> dict[str, int]:
    counts = ops.launches(reset=True)
    return {stem: counts[stem] for stem in COUNTED}


@pytest.mark.parametrize("autocast", [False, True])
def test_launches_of_a_step(net: nn.Module, autocast: bool):
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 7])
    x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.1), momentum=0.9)
    layers = [m for m in net.modules() if isinstance(m, l0.nn.GatedConv2d) and m.gates is net.l0]
    assert len(layers) == 24
    for _ in range(2):  # the first step as every other
        launched()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)
        forward = launched()
        loss.backward()
        backward = launched()
        optimizer.step()
        assert all(p.grad is not None for p in net.parameters())
        # One to draw; one to pack. Gradients of packed weights, then of the gates that scaled them.
        assert forward == {"sample_gates": 1, "pack_weight": 1}
        assert backward == {"sample_gates": 1, "pack_weight": 2}
        optimizer.zero_grad()


def test_launches_of_a_penalty_with_other_weights(net: nn.Module):
    launched()
    penalty = l0.penalty(net, lam=2.0)
    assert launched() == {"sample_gates": 1, "pack_weight": 0}
    penalty.backward()
    assert launched() == {"sample_gates": 1, "pack_weight": 0}
