# SPDX-License-Identifier: Apache-2.0
"""Convolutions that pack their weight again in backward give what those give that keep it."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from nn.draws import PATTERNS, STRIDES, gate_values, upstream
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels.nn import GatedConv1d, GatedConv2d, packing, repack

CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": (2, 1), "padding": (0, 2), "bias": False},
}


class Net(nn.Module):
    """Two convolutions, the gates of 6 channels between them."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options) -> None:
        super().__init__()
        gates = l0.gates.HardConcrete({"a": 6, "b": 5}, droprate=0.5, seed=3)
        self.first = GatedConv2d(4, 6, 3, out_gate=gates["a"], padding=1)
        self.second = GatedConv2d(6, 5, 3, in_gate=gates["a"], out_gate=gates["b"], **options)
        self.l0 = gates
        self.to(dtype)
        gates.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(params=[True, False], ids=["together", "apart"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0.gates.Gates, "_together", request.param)


def again(monkeypatch: pytest.MonkeyPatch, yes: bool = True) -> None:
    least = 0 if yes else 1 << 60
    monkeypatch.setattr(repack, "LEAST_PIXELS", least)
    monkeypatch.setattr(repack, "LEAST_NUMBERS", least)


@pytest.fixture
def packed_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the classes of layers that packed again, once for each time."""
    made: list[str] = []
    original = repack.packer

    def watched(layer, *args):
        pack = original(layer, *args)
        return lambda: (made.append(type(layer).__name__), pack())[1]

    monkeypatch.setattr(repack, "packer", watched)
    return made


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4, 9, 8, dtype=torch.float64).to(dtype)


def gradients(
    net: nn.Module, x: Tensor, strides: str = "expanded", amp=nullcontext
) -> list[Tensor]:
    net = copy.deepcopy(net)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with amp():
        y = net(x)
    torch.manual_seed(2)
    y.backward(upstream(strides, y.shape).to(y.dtype))
    found = [y.detach(), x.grad, *(p.grad for p in net.parameters())]
    return [t for t in found if t is not None]


def assert_same(monkeypatch, net: nn.Module, x: Tensor, **how) -> None:
    again(monkeypatch, False)
    expected = gradients(net, x, **how)
    again(monkeypatch)
    got = gradients(net, x, **how)
    assert len(got) == len(expected) >= 5
    for a, b in zip(got, expected, strict=True):
        assert a.stride() == b.stride()
        assert a.equal(b)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_are_the_same_bits(monkeypatch, together, packed_again, name, strides):
    torch.manual_seed(0)
    assert_same(monkeypatch, Net(**CONVOLUTIONS[name]), images(), strides=strides)
    assert packed_again == ["GatedConv2d"] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_layouts(monkeypatch, packed_again, dtype, layout):
    torch.manual_seed(0)
    net = Net(dtype).to(memory_format=layout)
    assert_same(monkeypatch, net, images(dtype).contiguous(memory_format=layout))
    assert packed_again == ["GatedConv2d"] * 2


def test_autocast(monkeypatch, packed_again):
    torch.manual_seed(0)

    def amp():
        return torch.autocast("cpu", torch.bfloat16)

    assert_same(monkeypatch, Net(torch.float32), images(torch.float32), amp=amp)
    assert packed_again == ["GatedConv2d"] * 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_gates(monkeypatch, packed_again, pattern):
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        # The gate is .5 at 0: far from it gates are surely closed or open.
        net.l0.log_alpha.copy_(20.0 * (gate_values(pattern, 11) != 0) - 10.0)
    assert_same(monkeypatch, net, images())
    # With all open the first is not packed; the second has its inputs' gates in its weight.
    assert len(packed_again) == (1 if pattern == "open" else 2)


def test_one_dimension(monkeypatch, packed_again):
    torch.manual_seed(0)
    gates = l0.gates.HardConcrete({"a": 6}, droprate=0.5, seed=3)
    net = nn.Sequential(
        GatedConv1d(4, 6, 3, out_gate=gates["a"]), GatedConv1d(6, 2, 3, in_gate=gates["a"])
    )
    net.add_module("l0", gates)
    net.double()
    gates.attach(net)
    torch.manual_seed(1)
    assert_same(monkeypatch, net, torch.randn(3, 4, 12, dtype=torch.float64))
    assert packed_again == ["GatedConv1d"] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(monkeypatch, packed_again, reentrant):
    torch.manual_seed(0)
    net = Net()
    again(monkeypatch)
    expected = gradients(net, images())
    assert len(packed_again) == 2
    twin, x = copy.deepcopy(net), images().requires_grad_()
    torch.manual_seed(2)
    with l0.hold(twin):
        y = checkpoint(twin, x, use_reentrant=reentrant)
        y.backward(upstream("expanded", y.shape))
    got = [y.detach(), x.grad, *(p.grad for p in twin.parameters())]
    assert len(packed_again) == 4
    for a, b in zip(got, expected, strict=True):
        assert a.equal(b)


def test_packed_weights_do_not_outlive_the_forward(monkeypatch, together):
    """The reason for all this: without it they do."""
    made: list[weakref.ref] = []

    def watched(*args, **kwargs):
        packed = l0.functional.pack_weights(*args, **kwargs)
        made.extend(weakref.ref(tensor) for tensor in packed if tensor.dim() > 1)
        return packed

    def watched_alone(*args, **kwargs):
        packed = l0.functional.pack_weight(*args, **kwargs)
        if packed.dim() > 1:
            made.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(packing, "pack_weights", watched)
    monkeypatch.setattr("l0kernels.nn.base.pack_weight", watched_alone)
    torch.manual_seed(0)
    net = Net()
    for yes, alive in ((True, 0), (False, 2)):
        again(monkeypatch, yes)
        made.clear()
        y = net(images())
        gc.collect()
        assert len(made) == 2
        assert sum(ref() is not None for ref in made) == alive
        y.sum().backward()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("all_gradients", [True, False])
def test_weights_modified_before_backward(monkeypatch, frozen, all_gradients):
    """Also where the gradient of the input alone is asked for: nothing else looks then."""
    torch.manual_seed(0)
    net = Net()
    net.requires_grad_(not frozen)
    again(monkeypatch)
    x = images().requires_grad_()
    y = net(x).sum()
    with torch.no_grad():
        net.second.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="as they were packed, got some modified in place"):
        y.backward() if all_gradients else torch.autograd.grad(y, x)


def test_gradients_of_the_input_are_differentiable(monkeypatch):
    """As in a penalty of gradients; they are functions of the weights and of the gates, too."""
    torch.manual_seed(0)
    net = Net()
    found = []
    for yes in (True, False):
        again(monkeypatch, yes)
        twin, x = copy.deepcopy(net), images().requires_grad_()
        (grad,) = torch.autograd.grad(twin(x).pow(2).sum(), x, create_graph=True)
        grad.sum().backward()
        assert x.grad is not None
        found.append([x.grad, *(p.grad for p in twin.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 6
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_gradient_stays_none(monkeypatch):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            return None

    again(monkeypatch)
    net = Net()
    Nothing.apply(net(images())).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_graph_does_not_keep_the_model(monkeypatch):
    """An output that a hook keeps would close a cycle that is never collected."""

    def keep() -> weakref.ref:
        net = Net()
        net.second.register_forward_hook(lambda layer, _, y: setattr(layer, "last", y.relu()))
        net(images())
        return weakref.ref(net.second)

    again(monkeypatch)
    gone = keep()
    gc.collect()
    assert gone() is None


def test_compiled_code_is_one_graph(monkeypatch):
    """However many pixels and numbers there are: widths below and above the least come up."""
    monkeypatch.setattr(repack, "LEAST_PIXELS", 0)
    monkeypatch.setattr(repack, "LEAST_NUMBERS", 9 * 9)
    torch._dynamo.reset()
    counter = CompileCounter()
    net = Net(torch.float32)
    compiled = torch.compile(net, backend=counter)
    for _ in range(12):
        compiled(images(torch.float32)).sum().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("weights", "inputs", "amp"),
    [
        (torch.float16, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32, None),
        (torch.float64, torch.float64, torch.bfloat16),
    ],
)
def test_dtypes_that_differ_are_left_to_pytorch(monkeypatch, packed_again, weights, inputs, amp):
    """It casts, or refuses, whatever the number of pixels."""
    results = []
    for yes in (True, False):
        again(monkeypatch, yes)
        torch.manual_seed(0)
        net = Net(weights)
        with torch.autocast("cpu", amp, enabled=amp is not None):
            try:
                results.append(net(images(inputs)).dtype)
            except RuntimeError as error:
                results.append(str(error))
    assert results[0] == results[1]
    assert packed_again == []


def test_subclasses_and_parametrizations_compute_what_they_say(monkeypatch, packed_again):
    class Halved(GatedConv2d):
        def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super().compute(x, weight / 2, bias)

    torch.manual_seed(0)
    net = Net()
    net.second.__class__ = Halved
    nn.utils.parametrizations.spectral_norm(net.first)
    assert_same(monkeypatch, net, images())
    assert packed_again == []


@pytest.mark.parametrize(("pixels", "width"), [(repack.LEAST_PIXELS, 0), (0, repack.LEAST_NUMBERS)])
def test_small_ones_keep_their_weight(monkeypatch, packed_again, pixels, width):
    monkeypatch.setattr(repack, "LEAST_PIXELS", pixels)
    monkeypatch.setattr(repack, "LEAST_NUMBERS", width)
    torch.manual_seed(0)
    Net()(images()).sum().backward()
    assert packed_again == []
