# SPDX-License-Identifier: Apache-2.0
"""The same bits every time: what races would change (test list T9)."""

import pytest
import torch
from ops.gated import GatedContract, gradients
from ops.gated import Problem as GatedProblem

from l0kernels.functional import packed_norm, sample_gates
from l0kernels.ops.sample_gates.reference import GateLayout

pytestmark = pytest.mark.gpu
REPEATS = 250


class Linear(GatedContract):
    SHAPE = ((300, 520), (1031,), None)


class Conv2d(GatedContract):
    SHAPE = ((136, 72, 3, 3), (5, 33, 30), (1, 1, 1))


def all_equal(function):
    first = function()
    for _ in range(REPEATS):
        assert all(map(torch.equal, first, function()))


@pytest.mark.parametrize("layer", [Linear, Conv2d], ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gated_layers(gpu_impl, layer, dtype):
    problem = layer().problem(layer.SHAPE, 0.5, (dtype, torch.float32), activation="relu")
    upstream = layer().upstream(problem).cuda()
    fields = {k: v.cuda() if torch.is_tensor(v) else v for k, v in vars(problem).items()}
    there = GatedProblem(**fields)
    all_equal(lambda: gradients(there, there.run, upstream))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_packed_norm(gpu_impl, layout):
    channels = 90
    x = torch.randn(60, channels, 31, 33, device="cuda").to(memory_format=layout).requires_grad_()
    index = torch.arange(channels, device="cuda")
    maps = torch.stack([index, torch.full_like(index, channels)])
    z = (torch.arange(channels + 1, device="cuda") % 3 != 1).float()
    weight, bias = (torch.randn(channels, device="cuda").requires_grad_() for _ in range(2))
    upstream = torch.randn_like(x)

    def run():
        running = torch.zeros_like(bias).detach(), torch.ones_like(bias).detach()
        y = packed_norm(x, weight, bias, *running, index, z, maps, True, 0.1, 1e-5, "relu")
        return y, *running, *torch.autograd.grad(y, (x, weight, bias), upstream)

    all_equal(run)


def test_sample_gates(gpu_impl):
    sizes = [40_000, 3, 1, 20_000]
    ends = torch.tensor([0, *sizes]).cumsum(0).cuda()
    gates = int(ends[-1])
    features = torch.arange(gates, device="cuda")
    layout = GateLayout(ends, torch.stack([features, torch.full_like(features, gates)]), ends)
    log_alpha = torch.randn(gates, device="cuda").requires_grad_()
    cost, key = torch.rand(gates, device="cuda"), torch.tensor([7, 3], device="cuda")
    upstream = torch.randn(gates + 1, device="cuda")

    def run():
        z, expected, lists = sample_gates(log_alpha, key, cost, layout, "hard_concrete")
        outputs, seeds = (z, expected), (upstream, torch.ones_like(expected))
        (grad,) = torch.autograd.grad(outputs, log_alpha, seeds)
        return z, expected, *lists, grad

    all_equal(run)
