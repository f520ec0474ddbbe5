# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements: the last ones are computed like the first."""

import math

import pytest
import torch
import torch.nn.functional as F

from l0kernels.functional import (
    gate_apply,
    gated_conv2d,
    gated_linear,
    masked_weight,
    pack_weight,
    packed_norm,
)
from l0kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu
MOST = 1 << 31
MEMORY = 60e9  # bytes that a GPU must have


@pytest.fixture(autouse=True)
def large_gpu(gpu_impl):
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < MEMORY:
        pytest.skip(f"expected a GPU of {MEMORY / 1e9:.0f} GB; got {memory / 1e9:.0f} GB")


def numbers(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def lists(inputs, outputs):
    """Every second input and all but the first output open, one gate per feature."""
    is_open = torch.ones(inputs + outputs, dtype=torch.bool)
    is_open[1:inputs:2] = is_open[inputs] = False
    z = torch.cat([torch.where(is_open, 0.5, 0.0), torch.ones(1)])
    open_in, open_out = is_open[:inputs].nonzero()[:, 0], is_open[inputs:].nonzero()[:, 0]
    index = torch.zeros(inputs + outputs, dtype=torch.int64)
    index[: len(open_in)] = open_in
    index[inputs : inputs + len(open_out)] = open_out
    counts = torch.tensor([len(open_in), len(open_out)])
    maps = torch.stack(
        [torch.arange(inputs + outputs), torch.full((inputs + outputs,), inputs + outputs)]
    )
    tensors = [tensor.cuda() for tensor in (z, index, counts, maps)]
    return *tensors, (0, 0), (inputs, 1)


def check(actual, layer, *inputs):
    """Compares a part of a result with the layer of PyTorch, in float64 and in bfloat16."""
    exact = layer(*(tensor.detach().double() for tensor in inputs))
    plain = layer(*(tensor.detach().bfloat16() for tensor in inputs))
    assert_within_budget(actual, exact, plain)


def test_gated_linear(gpu_impl):
    inputs, outputs = 64, 16
    rows = MOST // inputs + 1000
    x, weight = numbers(rows, inputs), numbers(outputs, inputs)
    arguments = lists(inputs, outputs)
    z, index, counts = arguments[:3]
    n_in, n_out = counts.tolist()
    packed = weight[index[inputs : inputs + n_out]][:, index[:n_in]] * 0.5
    x.requires_grad_()
    y = gated_linear(x, weight, None, *arguments)
    upstream = numbers(rows, outputs)
    (grad,) = torch.autograd.grad(y, x, upstream)
    for part in (slice(0, 100), slice(-100, None)):
        check(y[part, :n_out], F.linear, x[part, :n_in], packed)
        check(grad[part, :n_in], torch.matmul, upstream[part, :n_out], packed)
        assert bool((grad[part, n_in:] == 0).all())


def test_gated_linear_weight_gradient(gpu_impl):
    inputs, outputs = 64, 16
    rows = MOST // inputs + 1000
    # Only the last rows count: 32-bit offsets would not find them.
    x, upstream = numbers(rows, inputs), torch.zeros(rows, outputs, device="cuda").bfloat16()
    upstream[-100:] = numbers(100, outputs)
    weight = numbers(outputs, inputs).requires_grad_()
    arguments = lists(inputs, outputs)
    index, counts = arguments[1], arguments[2]
    n_in, n_out = counts.tolist()
    y = gated_linear(x, weight, None, *arguments)
    (grad,) = torch.autograd.grad(y, weight, upstream)
    found = grad[index[inputs : inputs + n_out]][:, index[:n_in]]
    check(found, torch.matmul, upstream[-100:, :n_out].t() * 0.5, x[-100:, :n_in])


def test_gated_conv2d(gpu_impl):
    inputs, outputs, size = 32, 16, 256
    images = MOST // (inputs * size * size) + 2
    x = torch.empty(
        (images, inputs, size, size),
        device="cuda",
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    ).normal_()
    weight = numbers(outputs, inputs, 3, 3)
    arguments = lists(inputs, outputs)
    index, counts = arguments[1], arguments[2]
    n_in, n_out = counts.tolist()
    packed = weight[index[inputs : inputs + n_out]][:, index[:n_in]] * 0.5
    y = gated_conv2d(x, weight, None, *arguments, padding=1)
    for part in (slice(0, 1), slice(-1, None)):
        check(y[part, :n_out], lambda *t: F.conv2d(*t, padding=1), x[part, :n_in], packed)


def test_pack_weight(gpu_impl):
    size = 46500
    weight = numbers(size, size, dtype=torch.float32)
    places = torch.tensor([0, 1, size - 2, size - 1], device="cuda")
    maps = torch.stack([torch.arange(size), torch.full((size,), size)]).cuda()
    z = torch.full((size + 1,), 0.5, device="cuda")
    z[-1] = 1
    weight.requires_grad_()
    packed = pack_weight(weight, z, places, maps, places, maps)
    expected = weight.detach()[places][:, places] * 0.5
    assert torch.equal(packed, expected)
    (grad,) = torch.autograd.grad(packed, weight, torch.ones_like(packed))
    assert torch.equal(grad[places][:, places], torch.full_like(expected, 0.5))
    assert int(torch.count_nonzero(grad)) == 16


def test_gate_apply(gpu_impl):
    size = 46500
    x = numbers(size, size, dtype=torch.bfloat16)
    z = torch.zeros(size + 1, device="cuda")
    z[-2:] = 1.0
    own = torch.arange(size, device="cuda")
    y = gate_apply(x, z, torch.stack([own, torch.full_like(own, size)]))
    assert torch.equal(y[:, -1], x[:, -1])
    assert int(torch.count_nonzero(y)) == int(torch.count_nonzero(x[:, -1]))


def test_masked_weight(gpu_impl):
    size = 46500
    weight = numbers(size, size, dtype=torch.bfloat16)
    scores = torch.zeros(size, size, device="cuda")
    scores[-1, -2:] = 1.0
    masked = masked_weight(weight, scores, torch.tensor(math.inf, device="cuda"), 2.0)
    assert torch.equal(masked[-1, -2:], 2 * weight[-1, -2:])
    assert int(torch.count_nonzero(masked)) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_packed_norm(gpu_impl, layout):
    channels, size = 64, 128
    images = MOST // (channels * size * size) + 2
    x = torch.empty(
        (images, channels, size, size), device="cuda", dtype=torch.bfloat16, memory_format=layout
    ).normal_()
    x[-1] += 3
    index = torch.arange(channels, device="cuda")
    maps = torch.stack([index, torch.full_like(index, channels)])
    z = torch.ones(channels + 1, device="cuda")
    weight = torch.rand(channels, device="cuda") + 0.5
    bias = torch.randn(channels, device="cuda")
    mean, var = torch.zeros_like(bias), torch.ones_like(bias)
    x.requires_grad_()
    y = packed_norm(x, weight, bias, mean, var, index, z, maps, True, 1.0)
    count = images * size * size
    parts = x.detach().split(16)
    exact, plain = (
        sum(part.sum((0, 2, 3), dtype=dtype) for part in parts) / count
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(mean, exact, plain)
    var = var.double() * (count - 1) / count
    parameters = (exact, var, weight.double(), bias.double())
    last = x.detach()[-1:]
    exact = F.batch_norm(last.double(), *parameters, eps=1e-5)
    plain = F.batch_norm(last, *(tensor.float() for tensor in parameters), eps=1e-5)
    assert_within_budget(y[-1:], exact, plain)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    assert bool(grad[-1].isfinite().all()) and bool(grad[-1].any())
