# SPDX-License-Identifier: Apache-2.0
"""Layers with a gate for every number of their weight, beside other tools of training."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0

CS = l0.gates.ContinuousSparsification


def alone(layer_of, shape, **options):
    """One layer, its gates, and the network that is the layer alone."""
    gates = CS({"w": shape}, **options)
    layer = layer_of(gate=gates["w"])
    net = gates.attach(nn.Sequential(layer))
    nn.init.uniform_(gates.log_alpha, -0.5, 0.5)
    gates.set_progress(0.5)
    return net, gates, layer


def gated(layer, gates):
    """The layer's weight times its gates."""
    gate = 2 * torch.sigmoid(gates.beta * gates.log_alpha).view(layer.weight.shape)
    return layer.weight * gate


CONVS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
    {"groups": 2},
]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_convolutions(options):
    inputs = 4 // options.get("groups", 1)
    make = partial(l0.nn.MaskedConv2d, 4, 6, 3, **options)
    net, gates, layer = alone(make, (6, inputs, 3, 3))
    net.double()
    plain = nn.Conv2d(4, 6, 3, **options).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = plain._conv_forward(x, gated(layer, gates), layer.bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,), (0, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(shape, bias):
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 3, bias), (3, 7))
    net.double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = F.linear(x, gated(layer, gates), layer.bias)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


def test_without_gates_they_are_plain_layers():
    x = torch.randn(2, 4, 5, 5)
    for layer in (l0.nn.MaskedConv2d(4, 3, 3), l0.nn.MaskedLinear(5, 2)):
        assert torch.equal(layer(x), layer.plain_class.forward(layer, x))


@pytest.mark.parametrize("last", [False, True])
def test_channels_last_weights_and_the_order_of_scores(last):
    net, gates, layer = alone(partial(l0.nn.MaskedConv2d, 4, 6, 3), (6, 4, 3, 3))
    net.double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = F.conv2d(x, gated(layer, gates), layer.bias)
    right = torch.autograd.grad(expected.square().sum(), gates.log_alpha)[0]
    if last:
        net.to(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
    y = net(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    (mine,) = torch.autograd.grad(y.square().sum(), gates.log_alpha)
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_implementations(name):
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 3), (3, 7))
    x = torch.randn(5, 7)
    with l0.use_impl(name):
        y = net(x)
    torch.testing.assert_close(y, F.linear(x, gated(layer, gates), layer.bias))


def test_autocast_masks_to_its_dtype():
    net, gates, layer = alone(partial(l0.nn.MaskedConv2d, 4, 6, 3), (6, 4, 3, 3))
    x = torch.randn(2, 4, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        weight = layer.packed_parameters(gates.current_draw())[0]
    assert y.dtype == weight.dtype == torch.bfloat16
    assert torch.equal(weight, gated(layer, gates).bfloat16())
    y.float().sum().backward()
    assert layer.weight.grad.dtype == gates.log_alpha.grad.dtype == torch.float32


def test_the_gates_of_a_weight():
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 3), (3, 7))
    net(torch.randn(2, 7))
    ref = gates["w"]
    assert ref.shape == (3, 7) and repr(ref) == "WeightRef(name='w', shape=[3, 7])"
    torch.testing.assert_close(ref.z * layer.weight, gated(layer, gates))
    net.eval()
    net(torch.randn(2, 7))
    assert torch.equal(ref.z, 2.0 * (gates.log_alpha > 0).view(3, 7))


def test_several_forwards_under_one_draw():
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 3), (3, 7))
    x, y = torch.randn(2, 5, 7)
    (together,) = torch.autograd.grad(net(torch.cat([x, y])).square().sum(), gates.log_alpha)
    with l0.hold(net):
        for part in (x, y):
            net(part).square().sum().backward()
    torch.testing.assert_close(gates.log_alpha.grad, together)
    loss = l0.expected_loss(net, lambda: net(x).square().sum() + net(y).square().sum())
    torch.testing.assert_close(torch.autograd.grad(loss, gates.log_alpha)[0], together)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 7), (7, 7))
    x = torch.randn(5, 7, requires_grad=True)

    def run(function):
        with l0.hold(net):
            leaves = (x, layer.weight, gates.log_alpha)
            for leaf in leaves:
                leaf.grad = None
            function(x).square().sum().backward()
            return [leaf.grad for leaf in leaves]

    plain = run(net)
    again = run(lambda x: checkpoint(net, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))


def test_frozen_evaluation_masks_once(monkeypatch):
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 3), (3, 7))
    net.eval()
    x = torch.randn(5, 7)
    expected = net(x)
    calls = []
    mask = l0.nn.MaskedLayer._pack
    monkeypatch.setattr(
        l0.nn.MaskedLayer, "_pack", lambda self, draw: calls.append(self) or mask(self, draw)
    )
    with l0.frozen(net):
        assert torch.equal(net(x), expected) and torch.equal(net(x), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_one_graph_for_a_whole_round(name):
    net, gates, layer = alone(partial(l0.nn.MaskedLinear, 7, 3), (3, 7))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 7)
    with l0.use_impl(name):
        for t in (0.0, 0.3, 1.0):
            gates.set_progress(t)
            loss = l0.expected_loss(net, lambda: compiled(x).square().sum())
            expected = F.linear(x, gated(layer, gates), layer.bias).square().sum()
            torch.testing.assert_close(loss, expected)
            grads, right = (
                torch.autograd.grad(y, (layer.weight, gates.log_alpha)) for y in (loss, expected)
            )
            for mine, other in zip(grads, right, strict=True):
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_flops_of_weights_are_the_positions_that_use_them():
    gates = CS({"conv": (3, 2, 3, 3), "fc": (5, 12)}, lam=2.0)
    net = nn.Sequential(
        l0.nn.MaskedConv2d(2, 3, 3, gate=gates["conv"]),
        nn.Flatten(),
        l0.nn.MaskedLinear(12, 5, gate=gates["fc"]),
    )
    gates.attach(net, {"0": 4, "2": 1})
    assert l0.penalty(net, per="flop").item() == pytest.approx(2.0 * (4 * 54 + 60))
    assert l0.penalty(net).item() == pytest.approx(2.0 * (54 + 60))


def test_bad_references_are_refused():
    gates = CS({"w": (3, 7)})
    with pytest.raises(
        ValueError, match=r"MaskedLinear: expected gates of shape \[7, 3\], got \[3"
    ):
        l0.nn.MaskedLinear(3, 7, gate=gates["w"])
    with pytest.raises(TypeError, match="MaskedLinear: expected gates of a weight, got GateRef"):
        l0.nn.MaskedLinear(7, 3, gate=CS({"w": 3})["w"])
    with pytest.raises(ValueError, match="attach: expected a model with layers"):
        gates.attach(nn.Sequential(nn.Linear(3, 7)))
    twice = [l0.nn.MaskedLinear(7, 3, gate=gates["w"]) for _ in range(2)]
    with pytest.raises(ValueError, match="attach: expected one layer for each of"):
        gates.attach(nn.Sequential(*twice))
    with pytest.raises(RuntimeError, match="no gates are drawn"):
        twice[0](torch.randn(2, 7))
    with pytest.raises(KeyError, match="no group 'v'"):
        gates["v"]
    assert math.prod(gates["w"].shape) == gates.count
