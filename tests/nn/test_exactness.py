# SPDX-License-Identifier: Apache-2.0
"""Every gated layer against the masked reference, and against plain layers and a product."""

import copy
from collections.abc import Callable

import pytest
import torch
from nn.draws import PATTERNS, STRIDES, gate_values, upstream
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import l0kernels as l0
from l0kernels.nn import (
    GatedBatchNorm1d,
    GatedConv1d,
    GatedConv2d,
    GatedConvTranspose2d,
    GatedLayer,
    GatedLinear,
    GatedPReLU,
    gated_class,
)

Layers = Callable[[l0.gates.HardConcrete, int], list[nn.Module]]


def conv1d(g, units: int) -> list[nn.Module]:
    return [
        GatedConv1d(2, units, 3, bias=False, out_gate=g["a"]),
        GatedBatchNorm1d(units, out_gate=g["a"]),
        nn.ReLU(),
        GatedConv1d(units, 3, 3, stride=2, padding=1, in_gate=g["a"]),
    ]


def conv1d_circular(g, units: int) -> list[nn.Module]:
    return [
        GatedConv1d(2, units, 3, padding=1, padding_mode="circular", out_gate=g["a"]),
        nn.Softplus(),
        GatedConv1d(units, 3, 3, padding=2, dilation=2, bias=False, in_gate=g["a"]),
    ]


def conv1d_depthwise(g, units: int) -> list[nn.Module]:
    return [
        GatedConv1d(2, units, 3, out_gate=g["a"]),
        GatedConv1d(units, units, 3, padding=1, groups=units, out_gate=g["a"]),
        nn.GELU(),
        GatedConv1d(units, 3, 1, in_gate=g["a"]),
    ]


def transposed(g, units: int) -> list[nn.Module]:
    return [
        GatedConvTranspose2d(2, units, (3, 2), stride=2, padding=(1, 0), out_gate=g["a"]),
        nn.ReLU(),
        GatedConvTranspose2d(
            units, 3, 3, stride=(2, 3), padding=1, output_padding=1, dilation=2, in_gate=g["a"]
        ),
    ]


def transposed_depthwise(g, units: int) -> list[nn.Module]:
    return [
        GatedConv2d(2, units, 3, out_gate=g["a"]),
        GatedConvTranspose2d(units, units, 3, stride=2, groups=units, out_gate=g["a"]),
        nn.ReLU(),
        GatedConvTranspose2d(units, 3, 1, bias=False, in_gate=g["a"]),
    ]


def prelu(g, units: int) -> list[nn.Module]:
    return [
        GatedConv2d(2, units, 3, out_gate=g["a"]),
        GatedPReLU(units, out_gate=g["a"]),
        GatedConv2d(units, 3, 3, in_gate=g["a"]),
    ]


def prelu_of_neurons(g, units: int) -> list[nn.Module]:
    return [
        GatedLinear(5, units, out_gate=g["a"]),
        GatedPReLU(units, out_gate=g["a"]),
        GatedLinear(units, 3, in_gate=g["a"]),
    ]


def hf_conv1d(g, units: int) -> list[nn.Module]:
    pytest.importorskip("transformers")
    from l0kernels.nn.hf import GatedConv1D

    layers = [
        GatedConv1D(units, 5, out_gate=g["a"]),
        nn.GELU(),
        GatedConv1D(3, units, in_gate=g["a"]),
    ]
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layers


CASES: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "conv1d": (conv1d, (2, 11)),
    "conv1d circular": (conv1d_circular, (2, 11)),
    "conv1d depthwise": (conv1d_depthwise, (2, 11)),
    "transposed": (transposed, (2, 4, 5)),
    "transposed depthwise": (transposed_depthwise, (2, 5, 5)),
    "prelu": (prelu, (2, 7, 7)),
    "prelu of neurons": (prelu_of_neurons, (5,)),
    "hf conv1d": (hf_conv1d, (4, 5)),
}


def make(case: str, units: int, device: torch.device | str = "cpu") -> nn.Sequential:
    gates = l0.gates.HardConcrete({"a": units})
    net = nn.Sequential(*CASES[case][0](gates, units))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, GatedPReLU):
                layer.weight.uniform_(0.1, 0.5)
    gates.attach(net)
    return net.double().to(device)


def inputs_of(case: str, batch: int = 3) -> Tensor:
    return torch.randn(batch, *CASES[case][1], dtype=torch.float64)


def plain_copy(net: nn.Sequential) -> nn.Sequential:
    """The layers before their swap."""
    layers = []
    for name, layer in net.named_children():
        if name == "l0":
            continue
        twin = copy.deepcopy(layer)
        if isinstance(twin, GatedLayer):
            twin.__class__ = twin.plain_class
        layers.append(twin)
    return nn.Sequential(*layers)


def run_plain(net: nn.Sequential, z: Tensor, x: Tensor, grad: Tensor | None = None):
    """Plain layers; a hook multiplies the input of every reader."""
    plain = plain_copy(net)
    leaf, inputs = z.clone().requires_grad_(), x.clone().requires_grad_()
    for twin, layer in zip(plain, net, strict=False):
        if getattr(layer, "in_gate", None) is not None:
            scale = leaf if type(twin).__name__ in ("Linear", "Conv1D") else None
            scale = leaf.view(-1, *[1] * (x.dim() - 2)) if scale is None else scale
            twin.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale,))
    out = plain(inputs)
    out.backward(out.detach() if grad is None else grad)
    return collected(plain, out, inputs, leaf)


def run_gated(
    net: nn.Sequential, z: Tensor, x: Tensor, impl: str = "auto", grad: Tensor | None = None
):
    net.zero_grad()
    leaf, inputs = z.clone().requires_grad_(), x.clone().requires_grad_()
    with l0.use_impl(impl), net.l0.using(leaf):
        out = net(inputs)
        out.backward(out.detach() if grad is None else grad)
    return collected(net, out, inputs, leaf)


def collected(net: nn.Module, out: Tensor, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    # The gradient of a closed gate needs what packing leaves out.
    found = {"out": out.detach(), "x": x.grad, "z": torch.where(z != 0, z.grad, 0.0)}
    parameters = (item for item in net.named_parameters() if not item[0].startswith("l0."))
    return found | {name: p.grad.clone() for name, p in parameters}


def assert_same(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert set(expected) == set(got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-10, rtol=1e-10, msg=name)


def of_closed(net: nn.Sequential, grads: dict[str, Tensor], z: Tensor) -> dict[str, Tensor]:
    """Those parts of the parameters' gradients that belong to closed units."""
    parts = {}
    for name, layer in net.named_children():
        if not isinstance(layer, GatedLayer):
            continue
        weight = grads[f"{name}.weight"]
        if layer.out_gate is not None:
            parts[f"{name} rows"] = layer._out_in(weight)[z == 0]
            if layer.bias is not None:
                parts[f"{name} bias"] = grads[f"{name}.bias"][z == 0]
        if layer.in_gate is not None:
            parts[f"{name} columns"] = layer._out_in(weight)[:, z == 0]
    return parts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("units", [1, 2, 7])
def test_forward_and_gradients(case: str, pattern: str, units: int, device: torch.device):
    net = make(case, units, device)
    z, x = gate_values(pattern, units).to(device), inputs_of(case).to(device)
    masked, packed = run_gated(net, z, x, "reference"), run_gated(net, z, x)
    assert_same(run_plain(net, z, x), masked)
    assert_same(masked, packed)
    for name, part in of_closed(net, packed, z).items():
        assert bool((part == 0).all()), name


@pytest.mark.parametrize("case", CASES)
def test_packed_widths_and_parameters(case: str):
    net = make(case, 7)
    shapes = []
    for layer in net:
        layer.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    with net.l0.using(gate_values("half", 7)):
        net(inputs_of(case))
        first = net[0].packed_parameters(net.l0.current_draw())[0]
    dim = -1 if len(CASES[case][1]) == 1 or case == "hf conv1d" else 1
    assert {shape[dim] for shape in shapes[:-2]} == {3}
    assert net[0]._out_in(first).shape == (3, *net[0]._out_in(net[0].weight).shape[1:])


@pytest.mark.parametrize("case", CASES)
def test_empty_batch(case: str):
    net = make(case, 5).eval()
    z, x = gate_values("half", 5), inputs_of(case, 0)
    masked, packed = run_gated(net, z, x, "reference"), run_gated(net, z, x)
    assert packed["out"].shape[0] == 0
    assert_same(masked, packed)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("prelu of neurons", "prelu")])
def test_without_batch(case: str):
    net = make(case, 5).eval()
    if any(isinstance(layer, GatedBatchNorm1d) for layer in net):
        net[1] = nn.Identity()  # it wants a batch
    z, x = gate_values("half", 5), inputs_of(case, 1)[0]
    assert_same(run_gated(net, z, x, "reference"), run_gated(net, z, x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_upstream_gradient(case: str, strides: str):
    net = make(case, 6)
    z, x = gate_values("half", 6), inputs_of(case)
    shape = run_gated(net, z, x)["out"].shape
    grad = upstream(strides, shape)
    assert_same(run_plain(net, z, x, grad), run_gated(net, z, x, grad=grad))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", ["half", "closed"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_in_closed_units_stay_there(case: str, pattern: str, value: float):
    net = make(case, 5)
    z, x = gate_values(pattern, 5), inputs_of(case)
    clean = run_gated(net, z, x)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, GatedLayer) and layer.out_gate is not None:
                layer._out_in(layer.weight)[z == 0] = value
                if layer.bias is not None:
                    layer.bias[z == 0] = value
            if isinstance(layer, GatedLayer) and layer.in_gate is not None:
                layer._out_in(layer.weight)[:, z == 0] = value
    for name, got in run_gated(net, z, x).items():
        assert got.equal(clean[name]), name


@pytest.mark.parametrize("case", CASES)
def test_open_nan_is_seen_as_in_the_reference(case: str):
    net = make(case, 5)
    with torch.no_grad():
        net[0]._out_in(net[0].weight)[1] = float("nan")
    z, x = gate_values("half", 5), inputs_of(case)
    masked, packed = run_gated(net, z, x, "reference"), run_gated(net, z, x)
    assert bool(packed["out"].isnan().any())
    assert packed["out"].isnan().equal(masked["out"].isnan())


@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str):
    """bf16 is no further from fp64 than twice the masked run is."""
    net, units = make(case, 48), 48
    z, x = gate_values("half", units), inputs_of(case, 8)
    exact = run_plain(net, z, x)
    net.float()
    found = {}
    for impl in ("reference", "auto"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[impl] = run_gated(net, z.float(), x.float(), impl)
    for name, masked in found["reference"].items():
        packed = found["auto"][name]
        assert packed.dtype == masked.dtype, name
        error, allowed = ((t.double() - exact[name]).norm() for t in (packed, masked))
        assert error <= 2 * allowed, (name, error, allowed)


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_any_width(case: str):
    net = make(case, 9)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    x = inputs_of(case)
    for opened in (3, 7, 2, 9, 5):
        z = (torch.arange(9) < opened).double()
        with net.l0.using(z):
            torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", CASES)
def test_resized_plain_layers_with_packed_parameters_compute_the_same(case: str):
    net = make(case, 7).eval()
    z, x = gate_values("half", 7), inputs_of(case)
    with net.l0.using(z), torch.no_grad():
        expected = net(x)
        draw = net.l0.current_draw()
        small = plain_copy(net).eval()
        for layer, twin in zip(net, small, strict=False):
            if not isinstance(layer, GatedLayer):
                continue
            weight, bias = layer.packed_parameters(draw)
            count = {True: net.l0["a"].count}
            gated_class(type(twin)).resize(
                twin,
                count.get(layer.in_gate is not None or layer._in_width() == 7, layer._in_width()),
                count.get(layer.out_gate is not None, layer._out_width()),
            )
            twin.weight = nn.Parameter(weight)
            if bias is not None:
                twin.bias = nn.Parameter(bias)
            if isinstance(twin, nn.BatchNorm1d):
                twin.running_mean = twin.running_mean[z != 0]
                twin.running_var = twin.running_var[z != 0]
    torch.testing.assert_close(small(x), expected)
    assert "7" not in str(small), "a width was left as it was"
