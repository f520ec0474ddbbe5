# SPDX-License-Identifier: Apache-2.0
"""Predicted and measured speed-up: the arithmetic, what is timed, and that nothing is changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels import speed
from l0kernels.nn import GatedConv1d, GatedConv2d, GatedConvTranspose2d, GatedLinear

MASKED, PACKED, PACKING, KERNEL = 400.0, 150.0, 7.0, 9


class Net(nn.Module):
    """Two convolutions with a norm, dropout and a head: groups of 8 and 6 units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        return self.head(self.drop(F.relu(self.conv2(x)).mean((2, 3))))


@pytest.fixture
def net() -> nn.Module:
    net = l0.convert(Net(), "hard_concrete", example_inputs=(torch.randn(4, 3, 6, 6),))
    assert net.l0.sizes == [8, 6]
    set_open(net, [0.5, 0.5])
    return net


def set_open(net: nn.Module, fractions: list[float]) -> None:
    gates = net.l0
    shift = 2 / 3 * torch.tensor(0.1 / 1.1).log()
    with torch.no_grad():
        for (_, where), p in zip(gates.slices(), fractions, strict=True):
            gates.log_alpha[where] = torch.tensor(p).logit() + shift


@pytest.fixture
def by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that are known: a layer takes as many milliseconds as it has weights."""

    def of_layer(self, layer, uses, widths):
        assert len(uses) == 1
        return float(widths[0] * widths[1] * (KERNEL if layer.weight.dim() == 4 else 1))

    monkeypatch.setattr(speed.Clock, "layer", of_layer)
    monkeypatch.setattr(speed.Clock, "both", lambda self, one, other: (MASKED, PACKED))
    monkeypatch.setattr(speed.Clock, "packing", lambda self, twin, gates: PACKING)


def test_layers_at_their_open_widths_and_the_rest_by_its_numbers(net: nn.Module, by_size: None):
    x = torch.randn(4, 3, 6, 6)
    found = l0.report(net, (x,)).speed
    assert found is not None
    full = {"conv1": 8 * 3 * 9, "conv2": 6 * 8 * 9, "head": 5 * 6}
    half = {"conv1": 4 * 3 * 9, "conv2": 3 * 4 * 9, "head": 5 * 3}
    # conv1, norm, conv2, dropout and head read these; dropout knows no gates.
    numbers = [4 * 3 * 36, 4 * 8 * 36, 4 * 8 * 36, 4 * 6, 4 * 6]
    kept = (numbers[0] + numbers[1] / 2 + numbers[2] / 2 + numbers[3] + numbers[4] / 2) / sum(
        numbers
    )
    others = max(0.0, MASKED - sum(full.values()))
    assert found.predicted == pytest.approx(sum(half.values()) + others * kept + PACKING)
    assert (found.masked, found.packed) == (MASKED, PACKED)
    assert found.measured_speedup == MASKED / PACKED
    assert found.predicted_speedup == MASKED / found.predicted
    first = found.groups["conv1"]
    assert first.share == pytest.approx((full["conv1"] + full["conv2"]) / MASKED)
    assert first.speedup == pytest.approx(
        (full["conv1"] + full["conv2"]) / (half["conv1"] + half["conv2"])
    )


def test_reasons(net: nn.Module, by_size: None):
    set_open(net, [0.99, 0.5])
    groups = l0.report(net, (torch.randn(4, 3, 6, 6),)).speed.groups
    assert groups["conv1"].why == "99% of its units are open"
    assert groups["conv2"].why == ""
    assert "takes" not in groups["conv2"].why
    assert speed._why(0.5, 1.01, 0.5).startswith("these layers take as long")
    assert speed._why(0.01, 2.0, 0.5) == "these layers take 1.0% of a step"


def test_the_report_says_it(net: nn.Module, by_size: None):
    report = l0.report(net, (torch.randn(4, 3, 6, 6),))
    text = str(report)
    assert "150.0 ms, masked 400.0 ms: 2.67 times as fast; predicted" in text
    assert "| conv1 | 162% |" in text
    found = report.to_dict()["speed"]
    assert found["measured_speedup"] == MASKED / PACKED
    assert list(found["groups"]) == net.l0.names
    assert report.groups[0].speed == report.speed.groups[report.groups[0].name]


def test_without_inputs_nothing_is_timed(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed.Clock, "both", None)
    report = l0.report(net)
    assert report.speed is None and report.to_dict()["speed"] is None
    assert "times as fast" not in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_random_numbers_stay_as_they_are(net: nn.Module, training: bool):
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    gradients = {name: p.grad for name, p in net.named_parameters()}
    state, x = torch.get_rng_state(), torch.randn(4, 3, 6, 6)
    torch.set_rng_state(state)
    kept = x.clone()
    found = l0.report(net, (x,)).speed
    assert min(found.masked, found.packed, found.predicted) > 0
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    assert net.training == training
    assert {name: p.grad for name, p in net.named_parameters()} == gradients
    for name, value in net.state_dict().items():
        same = torch.equal(value, before[name]) if isinstance(value, Tensor) else True
        assert same, name


def test_inputs_by_name(by_size: None):
    net = l0.convert(Net(), "hard_concrete", example_inputs={"x": torch.randn(4, 3, 6, 6)})
    assert l0.report(net, {"x": torch.randn(4, 3, 6, 6)}).speed is not None


def test_an_output_is_needed(net: nn.Module, by_size: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed.Clock, "both", lambda self, one, other: (one(), other()))
    net.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="expected an output that depends on parameters"):
        l0.report(net, (torch.randn(4, 3, 6, 6),))


def test_expected_widths_are_those_of_draws(net: nn.Module):
    set_open(net, [0.75, 0.5])
    widths = speed.expected_widths(net.l0)
    drawn = []
    for _ in range(400):
        net.l0.draw()
        drawn.append(net.l0._draw.widths)
    means = torch.tensor(drawn, dtype=torch.float64).mean(0)
    assert widths[:2] == [6, 3]
    assert (means - torch.tensor(widths)).abs().max() < 0.5


LAYERS = {
    "linear": (GatedLinear(7, 5), (2, 7), F.linear),
    "conv1d": (GatedConv1d(7, 5, 3), (2, 7, 6), F.conv1d),
    "conv2d": (GatedConv2d(7, 5, 3), (2, 7, 6, 6), F.conv2d),
    "transposed": (GatedConvTranspose2d(7, 5, 3), (2, 7, 6, 6), F.conv_transpose2d),
    "depthwise": (GatedConv2d(6, 6, 3, groups=6), (2, 6, 5, 5), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_called_at_the_asked_widths(name: str, monkeypatch: pytest.MonkeyPatch):
    layer, shape, plain = LAYERS[name]
    seen = []

    def compute(self, x, weight, bias):
        seen.append((x.shape, weight.shape, bias.shape))
        return original(self, x, weight, bias)

    original = type(layer).compute
    monkeypatch.setattr(type(layer), "compute", compute)
    use = speed.Use(shape, len(shape) == 4, torch.float32, True)
    speed._call_of(layer, use, 3, 4)()
    x, weight, bias = seen[-1]
    channels = 3 if name == "depthwise" else 4
    assert x == (shape[0], channels, *shape[2:]) and bias == (3,)
    expected = {"depthwise": (3, 1), "transposed": (4, 3)}.get(name, (3, 4))
    assert weight[:2] == expected and len(seen) == 2
    if plain is not None:
        x, weight, bias = (torch.randn(s) for s in seen[-1])
        assert torch.equal(original(layer, x, weight, bias), plain(x, weight, bias))
