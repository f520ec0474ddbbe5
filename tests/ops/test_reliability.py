# SPDX-License-Identifier: Apache-2.0
"""Every kind of gated layer through activity, shapes, strides, Inf and NaN, repetition.

The oracle is plain layers whose input is multiplied by the gates, in fp64.
"""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.gates import Gates
from l0kernels.nn import (
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GatedConv2d,
    GatedLayer,
    GatedLinear,
)

Found = dict[str, Tensor]
EXACT = 1e-11


# ---- networks: the layer under test between the one that makes its input and one that reads it


def linear(g: Gates, units: int) -> list[nn.Module]:
    return [
        GatedLinear(4, units, out_gate=g["a"]),
        GatedLinear(units, units, in_gate=g["a"], out_gate=g["b"]),
        GatedLinear(units, 3, in_gate=g["b"]),
    ]


def conv(g: Gates, units: int, kernel: int = 3, **options) -> list[nn.Module]:
    options.setdefault("padding", kernel // 2)
    return [
        GatedConv2d(4, units, 1, out_gate=g["a"]),
        GatedConv2d(units, units, kernel, in_gate=g["a"], out_gate=g["b"], **options),
        GatedConv2d(units, 3, 1, in_gate=g["b"]),
    ]


def depthwise(g: Gates, units: int, kernel: int = 3, **options) -> list[nn.Module]:
    options.setdefault("padding", kernel // 2)
    return [
        GatedConv2d(4, units, 1, out_gate=g["a"]),
        GatedConv2d(units, units, kernel, groups=units, out_gate=g["a"], **options),
        GatedConv2d(units, 3, 1, in_gate=g["a"]),
    ]


def norm1d(g: Gates, units: int) -> list[nn.Module]:
    return [
        GatedLinear(4, units, out_gate=g["a"]),
        GatedBatchNorm1d(units, out_gate=g["a"]),
        GatedLinear(units, 3, in_gate=g["a"]),
    ]


def norm2d(g: Gates, units: int) -> list[nn.Module]:
    return [
        GatedConv2d(4, units, 1, out_gate=g["a"]),
        GatedBatchNorm2d(units, out_gate=g["a"]),
        GatedConv2d(units, 3, 1, in_gate=g["a"]),
    ]


LAYERS: dict[str, Callable[..., list[nn.Module]]] = {
    "linear": linear,
    "conv": conv,
    "depthwise": depthwise,
    "norm1d": norm1d,
    "norm2d": norm2d,
}
SPATIAL = ("conv", "depthwise")
NORMS = ("norm1d", "norm2d")


def make(kind: str, units: int = 17, **options) -> nn.Sequential:
    """The network in fp64, with gates "a" and "b" where the layer has both sides."""
    groups = {"a": units, "b": units} if kind in ("linear", "conv") else {"a": units}
    gates = l0.gates.HardConcrete(groups)
    net = nn.Sequential(*LAYERS[kind](gates, units, **options))
    gates.attach(net).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return net


def inputs(kind: str, batch: int = 5, size: tuple[int, int] = (6, 5)) -> Tensor:
    shape = (batch, 4) if kind in ("linear", "norm1d") else (batch, 4, *size)
    return torch.randn(shape, dtype=torch.float64)


# ---- both runs


def scale_of(layer: nn.Module, z: Tensor) -> Tensor | None:
    ref = layer.in_gate
    return None if ref is None else z[ref.maps[0].to(z.device)]


def upstream(out: Tensor) -> Tensor:
    """A gradient that depends on its position: norms pass on nothing of a constant one."""
    return torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).sin().view_as(out).to(out)


def run_plain(net: nn.Sequential, z: Tensor, x: Tensor, dy: Tensor | None = None) -> Found:
    """Plain layers of the network's dtype, inputs multiplied by their gates."""
    layers = [copy.deepcopy(layer) for layer in net if isinstance(layer, GatedLayer)]
    plain = nn.Sequential(*layers)
    for layer in layers:
        layer.__class__ = layer.plain_class
    leaf, start = z.clone().requires_grad_(), view_of(x)
    h = start
    for layer, gated in zip(layers, net, strict=False):
        scale = scale_of(gated, leaf)
        if scale is not None:
            scale = scale.view(-1, *[1] * (x.dim() - 2))
            h = torch.where(scale == 0, 0.0, h * scale)  # Inf and NaN of closed units end here
        h = layer(h)
    h.backward(upstream(h) if dy is None else dy)
    return collect(plain, h, start, leaf, net, z)


def run_packed(before: nn.Sequential, z: Tensor, x: Tensor, dy: Tensor | None = None) -> Found:
    net = copy.deepcopy(before)
    leaf, start = z.clone().requires_grad_(), view_of(x)
    with net.l0.using(leaf):
        out = net(start)
        out.backward(upstream(out) if dy is None else dy)
    assert_closed_statistics_stay(before, net, z)
    return collect(net, out, start, leaf, net, z)


def assert_closed_statistics_stay(before: nn.Sequential, after: nn.Sequential, z: Tensor) -> None:
    for old, new in zip(before, after, strict=True):
        if isinstance(new, nn.modules.batchnorm._BatchNorm):
            closed = z[new.out_gate.maps[0]] == 0
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(
                    *(getattr(norm, name)[closed] for norm in (new, old)),
                    atol=0.0,
                    rtol=0.0,
                    equal_nan=True,
                )


def view_of(x: Tensor) -> Tensor:
    """The very strides of ``x``, with a gradient."""
    return x.detach().requires_grad_()


def collect(
    model: nn.Module, out: Tensor, x: Tensor, leaf: Tensor, net: nn.Sequential, z: Tensor
) -> Found:
    """Results; where closed units have no say, those of the plain run are left out."""
    found = {"out": out.detach(), "x": x.grad, "z": leaf.grad.masked_fill(z == 0, 0.0)}
    for name, parameter in model.named_parameters():
        if not name.startswith("l0."):
            found[name] = parameter.grad
    for (name, layer), gated in zip(model.named_children(), net, strict=False):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            is_open = z[gated.out_gate.maps[0]] != 0
            for buffer in ("running_mean", "running_var"):
                found[f"{name}.{buffer}"] = getattr(layer, buffer)[is_open]
    return found


def assert_exact(net: nn.Sequential, z: Tensor, x: Tensor, dy: Tensor | None = None):
    """Packed equals plain in fp64, and what belongs to closed units is zero."""
    plain, packed = run_plain(net, z, x, dy), run_packed(net, z, x, dy)
    assert set(plain) == set(packed)
    # Some gradients are zero but for rounding, such as those of biases before a norm.
    floor = 1e-3 * max(size_of(t) for t in plain.values())
    for name, expected in plain.items():
        tolerance = EXACT * max(size_of(expected), floor)
        torch.testing.assert_close(packed[name], expected, atol=tolerance, rtol=0, msg=name)
    assert_closed_zero(net, packed, z)
    return packed


def size_of(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def assert_closed_zero(net: nn.Sequential, found: Found, z: Tensor) -> None:
    for name, layer in net.named_children():
        if not isinstance(layer, GatedLayer):
            continue
        if layer.out_gate is not None:
            closed = z[layer.out_gate.maps[0]] == 0
            assert bool((found[f"{name}.weight"][closed] == 0).all()), name
            assert bool((found[f"{name}.bias"][closed] == 0).all()), name
        if layer.in_gate is not None:
            closed = z[layer.in_gate.maps[0]] == 0
            assert bool((found[f"{name}.weight"][:, closed] == 0).all()), name


def single_errors(net: nn.Sequential, z: Tensor, x: Tensor) -> dict[str, tuple[float, float]]:
    """Relative errors of plain PyTorch and of the packed run, both in fp32, against fp64."""
    exact = run_plain(net, z, x)
    single = copy.deepcopy(net).float()
    runs = [run(single, z.float(), x.float()) for run in (run_plain, run_packed)]
    largest = max(float(t.norm()) for n, t in exact.items() if n not in ("out", "x"))
    found = {}
    for name, true in exact.items():
        size = float(true.norm()) if name in ("out", "x") else max(float(true.norm()), largest)
        plain, packed = (float((run[name] - true).norm()) / (size or 1.0) for run in runs)
        found[name] = (plain, packed)
    return found


def assert_budget(errors: list[dict[str, tuple[float, float]]]) -> None:
    """Over all draws fp32 errs at most twice (gradients: three times) as much as plain PyTorch.

    Root mean squares: the rounding error of a single number, such as the gradient of the only
    open gate, is luck on either side.
    """
    for name in errors[0]:
        plain, packed = (math.hypot(*side) for side in zip(*(e[name] for e in errors), strict=True))
        floor = 2 * torch.finfo(torch.float32).eps * math.sqrt(len(errors))
        assert packed <= (2 if name == "out" else 3) * plain + floor, name


# ---- activity


def random_values(gates: int) -> Tensor:
    return 0.1 + 0.9 * torch.rand(gates, dtype=torch.float64)


def patterns(units: int, groups: int) -> dict[str, Callable[[], Iterator[Tensor]]]:
    number = torch.arange(units).repeat(groups)
    fixed = {
        "all on": number >= 0,
        "all off": number < 0,
        "one on": number == units // 2,
        "one off": number != units // 2,
        "alternating": number % 2 == 0,
        "1 mod 16": number % 16 == 1,
    }

    def one(mask: Tensor) -> Iterator[Tensor]:
        yield random_values(units * groups) * mask

    def fifty() -> Iterator[Tensor]:
        for share in torch.linspace(0.02, 0.98, 50):
            yield random_values(units * groups) * (torch.rand(units * groups) < share)

    found = {name: lambda mask=mask: one(mask) for name, mask in fixed.items()}
    return {**found, "random": fifty}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pattern", patterns(1, 1))
def test_activity(kind: str, pattern: str, op_impl: str):
    errors = []
    for _ in range(1 if pattern == "random" else 12):
        net = make(kind)
        for z in patterns(17, len(net.l0.names))[pattern]():
            x = inputs(kind)
            assert_exact(net, z, x)
            errors.append(single_errors(net, z, x))
    assert_budget(errors)


@pytest.mark.parametrize("kind", LAYERS)
def test_gates_of_one_are_the_plain_layer(kind: str):
    net = make(kind)
    x, ones = inputs(kind), torch.ones(net.l0.count, dtype=torch.float64)
    packed = assert_exact(net, ones, x)
    l0.revert(net.train())
    torch.testing.assert_close(net(x), packed["out"], atol=EXACT, rtol=EXACT)


# ---- shapes


def half_open(net: nn.Sequential) -> Tensor:
    return random_values(net.l0.count) * (torch.arange(net.l0.count) % 2 == 0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("units", [1, 2, 3, 17])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("closed", [False, True])
def test_batches_and_widths(kind: str, units: int, batch: int, closed: bool):
    if kind == "depthwise" and units == 1:
        pytest.skip("a depthwise convolution of one channel is a convolution")
    net = make(kind, units)
    if batch < 2:
        net.eval()  # as in plain PyTorch, one value has no statistics
    z = half_open(net) * (not closed)
    packed = assert_exact(net, z, inputs(kind, batch))
    assert packed["out"].shape[:2] == (batch, 3)


@pytest.mark.parametrize("kind", NORMS)
def test_one_value_per_feature_is_refused_as_in_torch(kind: str):
    net = make(kind, 4)
    x = inputs(kind, 1, (1, 1))
    with (
        pytest.raises(ValueError, match="more than 1 value per channel"),
        net.l0.using(half_open(net)),
    ):
        net(x)


@pytest.mark.parametrize("kind", SPATIAL)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1, 1), {}),
        ((1, 9), {}),
        ((9, 1), {"kernel": 5}),
        ((7, 6), {"kernel": 1}),
        ((7, 6), {"kernel": 1, "stride": 2}),
        ((7, 6), {"kernel": 5}),
        ((7, 6), {"stride": 2}),
        ((8, 7), {"kernel": 5, "stride": 2}),
        ((7, 6), {"dilation": 2, "padding": 2}),
        ((9, 9), {"dilation": (1, 3), "stride": (2, 1), "padding": 0}),
        ((7, 6), {"padding": (0, 2), "padding_mode": "circular"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions(kind: str, size: tuple, options: dict, layout: torch.memory_format):
    net = make(kind, 6, **options).to(memory_format=layout)
    x = inputs(kind, 2, size).contiguous(memory_format=layout)
    for z in (half_open(net), half_open(net) * 0):
        assert_exact(net, z, x)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded batch": lambda t: t[:1].expand_as(t),
    "expanded": lambda t: t.flatten()[0].expand_as(t),
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.t().contiguous().t()
    ),
    "offset view": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
    "every second": lambda t: torch.stack((t, t), -1)[..., 1],
    "part of a batch": lambda t: torch.cat((t, t))[1 : 1 + len(t)],
    "part of the channels": lambda t: torch.cat((t, t), 1)[:, 1 : 1 + t.shape[1]],
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("which", ["x", "dy"])
def test_strides(kind: str, strides: str, which: str):
    net = make(kind, 6)
    z, x = half_open(net), inputs(kind)
    if which == "x":
        if strides == "expanded" and kind in NORMS:
            pytest.skip("equal inputs have no variance: nothing but rounding is left to compare")
        if strides == "expanded batch" and kind == "norm1d":
            pytest.skip("equal examples have no variance: nothing but rounding is left to compare")
        assert_exact(net, z, STRIDES[strides](x))
        return
    dy = torch.randn_like(run_plain(net, z, x)["out"])
    assert_exact(net, z, x, STRIDES[strides](dy))


# ---- Inf and NaN


def poison(net: nn.Sequential, z: Tensor, value: float) -> None:
    """Write a value into every parameter and statistic of closed units."""
    with torch.no_grad():
        for layer in net:
            if not isinstance(layer, GatedLayer):
                continue
            if layer.out_gate is not None:
                closed = z[layer.out_gate.maps[0]] == 0
                layer.weight[closed] = layer.bias[closed] = value
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.running_mean[closed] = layer.running_var[closed] = value
            if layer.in_gate is not None:
                layer.weight[:, z[layer.in_gate.maps[0]] == 0] = value


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("pattern", ["half", "all off", "one on"])
@pytest.mark.parametrize("training", [True, False])
def test_closed_parameters_do_not_matter(kind: str, value: float, pattern: str, training: bool):
    net = make(kind, 6).train(training)
    z = (
        half_open(net)
        * {"half": 1.0, "all off": 0.0, "one on": torch.arange(net.l0.count) == 2}[pattern]
    )
    x = inputs(kind)
    clean = run_packed(net, z, x)
    poison(net, z, value)
    for name, got in run_packed(net, z, x).items():
        assert got.equal(clean[name]), name


def input_gated(kind: str) -> nn.Sequential:
    gates = l0.gates.HardConcrete({"x": 6})
    layer = (
        GatedLinear(6, 3, in_gate=gates["x"])
        if kind == "linear"
        else GatedConv2d(6, 3, 3, padding=1, in_gate=gates["x"])
    )
    return gates.attach(nn.Sequential(layer)).double()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_closed_inputs_do_not_matter(kind: str, value: float):
    net = input_gated(kind)
    z = half_open(net)
    x = torch.randn((5, 6) if kind == "linear" else (5, 6, 4, 4), dtype=torch.float64)
    clean = assert_exact(net, z, x)
    assert bool((clean["x"][:, z == 0] == 0).all())
    x[:, z == 0] = value
    for name, got in run_packed(net, z, x).items():
        assert got.equal(clean[name]), name


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("pattern", ["half", "all off"])
def test_bad_upstream_gradients_reach_open_units_only(kind: str, value: float, pattern: str):
    net = make(kind, 6)
    z, x = half_open(net) * (pattern == "half"), inputs(kind)
    dy = torch.randn_like(run_plain(net, z, x)["out"])
    dy[1, 0] = value
    plain, packed = run_plain(net, z, x, dy), run_packed(net, z, x, dy)
    assert_closed_zero(net, packed, z)
    assert bool((packed["z"][z == 0] == 0).all())
    if pattern == "all off":
        plain["x"].fill_(value)  # what is multiplied by zero does not stop them on the way to x
    for name, expected in plain.items():
        bad = ~packed[name].isfinite()
        assert not bool((bad & expected.isfinite()).any()), name
    assert packed["2.bias"].isfinite().equal(plain["2.bias"].isfinite())
    assert not packed["2.bias"].isfinite().all()
    if pattern == "half":
        assert (
            packed["0.weight"][z[:6] != 0]
            .isfinite()
            .equal(plain["0.weight"][z[:6] != 0].isfinite())
        )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("where", ["x", "maker", "layer", "reader"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_open_inf_and_nan_are_those_of_the_reference(kind: str, where: str, value: float):
    net = make(kind, 6).eval()  # statistics would spread one bad value over the batch
    z, x = half_open(net), inputs(kind)
    poison(net, z, 0.0)  # the reference multiplies what is closed too
    with torch.no_grad():
        if where == "x":
            x[1, 2] = value
        else:
            weight = net[{"maker": 0, "layer": 1, "reader": 2}[where]].weight
            weight[2].view(-1)[0] = value
    plain, packed = run_plain(net, z, x)["out"], run_packed(net, z, x)["out"]
    assert not packed.isfinite().all()
    assert packed.isnan().equal(plain.isnan())
    assert packed.nan_to_num(0.0).sign().equal(plain.nan_to_num(0.0).sign())
    assert packed.isinf().equal(plain.isinf())


# ---- repetition


@pytest.mark.parametrize("kind", LAYERS)
def test_250_repeats_give_the_same_bits(kind: str):
    torch.set_num_threads(2)
    net = make(kind, 33).float()
    z = half_open(net).float()
    x = inputs(kind, 64).float()
    first = run_packed(net, z, x)
    for _ in range(249):
        for name, got in run_packed(net, z, x).items():
            assert got.equal(first[name]), name


# ---- gradients by differences


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pattern", ["half", "all off", "one on"])
def test_gradcheck_with_fixed_gates(kind: str, training: bool, pattern: str):
    net = make(kind, 3).train(training)
    chosen = {"half": [0, 2], "all off": [], "one on": [1]}[pattern]
    opened = torch.tensor([u for u in range(net.l0.count) if u % 3 in chosen], dtype=torch.int64)
    parameters = [p for n, p in net.named_parameters() if not n.startswith("l0.")]
    values = random_values(len(opened)).requires_grad_()
    x = inputs(kind, 3, (2, 2)).requires_grad_()

    def run(x: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        z = values.new_zeros(net.l0.count).index_put((opened,), values)
        with net.l0.using(z):
            return net(x)

    # Closed gates are no input: a step away from zero would open them.
    assert torch.autograd.gradcheck(run, (x, values, *parameters), atol=1e-6, rtol=1e-4)
