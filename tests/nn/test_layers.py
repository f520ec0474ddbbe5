# SPDX-License-Identifier: Apache-2.0
"""Gated layers one by one: arguments, edge widths and batches, Inf and NaN."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import l0kernels as l0


def conv_pair(units: int, **second) -> nn.Module:
    gates = l0.gates.HardConcrete({"a": units})
    net = nn.Sequential(
        l0.nn.GatedConv2d(2, units, 3, out_gate=gates["a"]),
        l0.nn.GatedBatchNorm2d(units, out_gate=gates["a"]),
        nn.ReLU(),
        l0.nn.GatedConv2d(units, 4, 3, in_gate=gates["a"], **second),
    )
    return gates.attach(net)


def both(net: nn.Module, z: Tensor, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of the masked reference and of the packed run."""
    found = []
    for impl in ("reference", "auto"):
        net.zero_grad()
        leaf, inputs = z.clone().requires_grad_(), x.clone().requires_grad_()
        with l0.use_impl(impl), net.l0.using(leaf):
            out = net(inputs)
            out.square().sum().backward()
        result = {"out": out.detach(), "x": inputs.grad, "z": torch.where(z != 0, leaf.grad, 0.0)}
        result |= {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        found.append(result)
    return found[0], found[1]


def assert_same(masked: dict[str, Tensor], packed: dict[str, Tensor]) -> None:
    assert set(masked) == set(packed)
    for name, expected in masked.items():
        torch.testing.assert_close(packed[name], expected, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("units", [1, 2, 3, 17])
@pytest.mark.parametrize("pattern", ["closed", "open", "one", "half"])
@pytest.mark.parametrize("batch", [1, 4])
def test_any_width_and_pattern(units: int, pattern: str, batch: int, device: torch.device):
    net = conv_pair(units).double().to(device)
    z = torch.linspace(0.3, 1.0, units, dtype=torch.float64, device=device)
    if pattern == "closed":
        z = torch.zeros_like(z)
    if pattern == "one":
        z[torch.arange(units) != units // 2] = 0.0
    if pattern == "half":
        z[::2] = 0.0
    x = torch.randn(batch, 2, 7, 7, dtype=torch.float64).to(device)
    assert_same(*both(net, z, x))
    with net.l0.using(z):
        opened = int((z != 0).sum())
        assert net.l0["a"].count == max(opened, min(2, units))


def test_empty_batch():
    net = conv_pair(5).double().eval()
    z = torch.tensor([0.5, 0, 1, 0, 0.2], dtype=torch.float64)
    masked, packed = both(net, z, torch.randn(0, 2, 7, 7, dtype=torch.float64))
    assert packed["out"].shape == (0, 4, 3, 3)
    assert_same(masked, packed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 2, "dilation": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (1, 2), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "replicate", "bias": False},
    ],
)
def test_convolution_options(options: dict, layout: torch.memory_format):
    net = conv_pair(6, **options).double().to(memory_format=layout)
    z = torch.tensor([0.5, 0, 1, 0, 0.2, 0.9], dtype=torch.float64)
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64).contiguous(memory_format=layout)
    assert_same(*both(net, z, x))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_in_closed_units_stay_there(value: float):
    net = conv_pair(4).double()
    z = torch.tensor([0.5, 0.0, 0.0, 0.7], dtype=torch.float64)
    x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    _, clean = both(net, z, x)
    with torch.no_grad():
        for unit in (1, 2):
            net[0].weight[unit] = value
            net[0].bias[unit] = value
            net[1].weight[unit] = value
            net[1].bias[unit] = value
            net[3].weight[:, unit] = value
    leaf = z.clone().requires_grad_()
    net.zero_grad()
    with net.l0.using(leaf):
        out = net(x)
        out.square().sum().backward()
    assert out.equal(clean["out"])
    for name, p in net.named_parameters():
        if p.grad is not None:
            assert p.grad.equal(clean[name]), name
    assert leaf.grad[z != 0].equal(clean["z"][z != 0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_of_closed_units_stay_there_when_all_are_closed(value: float):
    net = conv_pair(4).double()
    with torch.no_grad():
        for p in (net[0].weight, net[0].bias, net[1].weight, net[1].bias, net[3].weight):
            p.fill_(value)
    with net.l0.using(torch.zeros(4, dtype=torch.float64)):
        out = net(torch.randn(2, 2, 7, 7, dtype=torch.float64))
        out.sum().backward()
    torch.testing.assert_close(out, net[3].bias.view(1, 4, 1, 1).expand_as(out))
    assert bool((net[0].weight.grad == 0).all() and (net[3].weight.grad == 0).all())


def test_open_nan_is_seen_as_in_the_reference():
    net = conv_pair(4).double()
    with torch.no_grad():
        net[3].weight[1, 3] = float("nan")
    z = torch.tensor([0.5, 0.0, 0.0, 0.7], dtype=torch.float64)
    masked, packed = both(net, z, torch.randn(2, 2, 7, 7, dtype=torch.float64))
    assert packed["out"].isnan().equal(masked["out"].isnan())
    assert bool(packed["out"].isnan().any())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_norm_options(affine: bool, options: dict):
    gates = l0.gates.HardConcrete({"a": 6})
    net = nn.Sequential(
        l0.nn.GatedLinear(3, 6, out_gate=gates["a"]),
        l0.nn.GatedBatchNorm1d(6, affine=affine, out_gate=gates["a"], **options),
        l0.nn.GatedLinear(6, 2, in_gate=gates["a"]),
    )
    gates.attach(net).double()
    plain = nn.BatchNorm1d(6, affine=affine, **options).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    z = torch.tensor([0.5, 0.0, 1.0, 0.2, 0.0, 0.9], dtype=torch.float64)
    for step in range(3):
        with net.l0.using(z):
            net(x)
        plain(F.linear(x, net[0].weight, net[0].bias))
        if plain.running_mean is not None:
            opened = z != 0
            torch.testing.assert_close(net[1].running_mean[opened], plain.running_mean[opened])
            torch.testing.assert_close(net[1].running_var[opened], plain.running_var[opened])
            assert bool((net[1].running_mean[~opened] == 0).all()), step
            assert net[1].num_batches_tracked == plain.num_batches_tracked
    assert_same(*both(net, z, x))


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_scope_gathers_nothing_twice(affine: bool):
    net = conv_pair(9).eval()
    if not affine:
        net[1].weight = net[1].bias = None
    x = torch.randn(2, 2, 7, 7)
    with torch.no_grad(), l0.frozen(net):
        first = net(x)
        assert net(x).equal(first)
        with Recorder() as frozen:
            net(x)
    kinds = ["convolution", "native_batch_norm", "relu", "convolution"]
    found = [name for name in frozen.names if "aten.empty" not in name]
    assert len(found) == 4, found
    assert all(kind in name for kind, name in zip(kinds, found, strict=True)), found


def test_a_norm_in_training_mode_updates_its_statistics_in_a_frozen_scope():
    net = conv_pair(9).eval()
    net[1].train()
    x = torch.randn(4, 2, 7, 7)
    found = []
    for impl in ("reference", "auto"):
        twin = copy.deepcopy(net)
        with torch.no_grad(), l0.use_impl(impl), l0.frozen(twin):
            for _ in range(2):
                twin(x)
        found.append(twin[1].state_dict())
    assert int(found[0]["num_batches_tracked"]) == 2
    torch.testing.assert_close(*found)


def test_masked_and_packed_statistics_do_not_mix_in_a_frozen_scope():
    net = conv_pair(9).eval()
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.linspace(-4.0, 4.0, 9))
        net[1].running_mean.normal_()
    x = torch.randn(2, 2, 7, 7)
    with torch.no_grad(), l0.frozen(net):
        packed = net(x)
        with l0.use_impl("reference"):
            torch.testing.assert_close(net(x), packed)
        assert net(x).equal(packed)


def test_ungated_layers_are_plain():
    x = torch.randn(3, 2, 5, 5)
    conv = l0.nn.GatedConv2d(2, 3, 3)
    assert conv(x).equal(F.conv2d(x, conv.weight, conv.bias))
    linear = l0.nn.GatedLinear(5, 2)
    assert linear(x).equal(F.linear(x, linear.weight, linear.bias))
    norm = l0.nn.GatedBatchNorm2d(2)
    assert norm(x).equal(nn.BatchNorm2d(2)(x))


def test_references_are_checked():
    g = l0.gates.HardConcrete({"a": 4, "b": 6})
    other = l0.gates.HardConcrete({"a": 4})
    with pytest.raises(ValueError, match="expected out_gate of 5 features, got 4"):
        l0.nn.GatedLinear(3, 5, out_gate=g["a"])
    with pytest.raises(ValueError, match="expected in_gate of 3 features, got 6"):
        l0.nn.GatedConv2d(3, 4, 1, in_gate=g["b"])
    with pytest.raises(ValueError, match="need the same gates"):
        l0.nn.GatedLinear(6, 4, in_gate=g["b"], out_gate=other["a"])
    with pytest.raises(ValueError, match="got groups=2"):
        l0.nn.GatedConv2d(4, 6, 1, groups=2, out_gate=g["b"])
    with pytest.raises(ValueError, match="expected 4 features, got 6"):
        g["a"] * g["b"]
    with pytest.raises(ValueError, match="same gates"):
        g["a"] * other["a"]
    with pytest.raises(ValueError, match="at most 2 per feature, got 3"):
        g["a"] * g["a"] * g["a"]
    with pytest.raises(ValueError, match="positive integer, got 0"):
        g["a"].expand(0)
    with pytest.raises(ValueError, match="at least one GateRef"):
        l0.cat(3, 4)


REFERENCES = {
    "extra * produced": lambda g: g["i"] * g["p"],
    "produced * extra": lambda g: g["p"] * g["i"],
    "extra * cat with ungated": lambda g: g["w"] * l0.cat(g["p"], 3),
    "cat with ungated * extra": lambda g: l0.cat(g["p"], 3) * g["w"],
    "cat of extra and product": lambda g: l0.cat(g["i"], g["p"] * g["j"]),
    "cat of product and extra": lambda g: l0.cat(g["p"] * g["j"], g["i"]),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_combination_of_references_multiplies_its_gates(name: str, impl: str):
    g = l0.gates.HardConcrete({"p": 4, "i": 4, "j": 4, "w": 7})
    ref = REFERENCES[name](g)
    maker = l0.nn.GatedLinear(5, 4, out_gate=g["p"])
    reader = l0.nn.GatedLinear(ref.features, 3, in_gate=ref)
    g.attach(nn.Sequential(maker, reader)).double()
    z = torch.tensor(
        [0, 0.5, 0.9, 0, 0.7, 0, 0.2, 0.6, 0.3, 0.4, 0, 0.8, 1, 0, 0.1, 0.2, 0, 0.9, 1]
    )
    z = z.double()
    x = torch.randn(2, 5, dtype=torch.float64)
    beside = torch.randn(2, ref.features - 4, dtype=torch.float64)
    first = name.startswith("cat of extra")

    def place(h: Tensor) -> Tensor:
        return torch.cat((beside, h) if first else (h, beside), 1)

    with l0.use_impl(impl), g.using(z):
        got = reader(place(maker(x)))
        scale = ref.z
    full = place(F.linear(x, maker.weight, maker.bias)) * scale
    torch.testing.assert_close(got, F.linear(full, reader.weight, reader.bias))


def test_two_gates_without_a_producer_on_one_feature_are_refused():
    g = l0.gates.HardConcrete({"a": 4, "b": 4})
    net = nn.Sequential(l0.nn.GatedLinear(4, 2, in_gate=g["a"] * g["b"]))
    with pytest.raises(ValueError, match="one gate without a producer, got two"):
        g.attach(net)


@pytest.mark.parametrize("width", [8, 10])
def test_input_gates_check_the_width_too(width: int):
    g = l0.gates.HardConcrete({"x": 9})
    net = g.attach(nn.Sequential(l0.nn.GatedLinear(9, 2, in_gate=g["x"])))
    with pytest.raises(ValueError, match=f"expected 9 input features, got {width}"):
        net(torch.randn(3, width))


def test_two_producers_on_one_feature_are_refused():
    g = l0.gates.HardConcrete({"a": 4, "b": 4})
    net = nn.Sequential(
        l0.nn.GatedLinear(3, 4, out_gate=g["a"]),
        l0.nn.GatedLinear(3, 4, out_gate=g["b"]),
        l0.nn.GatedLinear(4, 2, in_gate=g["a"] * g["b"]),
    )
    with pytest.raises(ValueError, match="at most one producer's gate per feature"):
        g.attach(net)


def test_attach_wants_layers_with_its_gates():
    gates = l0.gates.HardConcrete({"a": 4})
    with pytest.raises(ValueError, match="layers that use these gates, got none"):
        gates.attach(nn.Sequential(nn.Linear(2, 2)))


def test_wrong_input_width_says_expected_and_got():
    net = conv_pair(6).eval()
    z = torch.tensor([0.5, 0, 1, 0, 0.2, 0.9])
    with net.l0.using(z), pytest.raises(ValueError, match="expected 4 input features, got 6"):
        net[3](torch.randn(1, 6, 9, 9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("open_features", [0, 1, 3])
def test_closed_input_features_may_hold_anything(value: float, open_features: int):
    """With fewer than two open, closed ones fill up: what they hold must not spread."""
    net = nn.Module()
    net.l0 = l0.gates.HardConcrete({"x": 6})
    net.fc = l0.nn.GatedLinear(6, 4, in_gate=net.l0["x"])
    net.conv = l0.nn.GatedConv2d(6, 4, 3, in_gate=net.l0["x"])
    net.l0.attach(net)
    z = (torch.arange(6) < open_features).float()
    x, image = torch.randn(5, 6), torch.randn(2, 6, 5, 5)
    with net.l0.using(z):
        expected = net.fc(x), net.conv(image)
        x[:, open_features:], image[:, open_features:] = value, value
        got = net.fc(x), net.conv(image)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
