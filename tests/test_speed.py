# SPDX-License-Identifier: Apache-2.0
"""Predicted and measured speed-up: the arithmetic, what is timed, and that nothing is changed."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels import speed
from l0kernels.nn import GatedConv1d, GatedConv2d, GatedConvTranspose2d, GatedLinear

MASKED, PACKED, WITHOUT, PACKING = 4000.0, 1500.0, 3.0, 10.0


class Net(nn.Module):
    """Groups of 8 and 6 units; a layer without gates at the end, one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.last = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = self.head(self.drop(F.relu(self.conv2(x)).mean((2, 3))))
        return self.last(F.softmax(self.last(x), 1))


@pytest.fixture
def net() -> nn.Module:
    net = l0.convert(Net(), "hard_concrete", example_inputs=(images(),))
    assert net.l0.sizes == [8, 6]
    set_open(net, [0.5, 0.5])
    return net


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def set_open(net: nn.Module, fractions: list[float]) -> None:
    gates = net.l0
    shift = 2 / 3 * torch.tensor(0.1 / 1.1).log()
    with torch.no_grad():
        for (_, where), p in zip(gates.slices(), fractions, strict=True):
            gates.log_alpha[where] = torch.tensor(p).logit() + shift


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Timings that are known: work takes as long as it has multiplications, seen by hooks."""
    pairs = iter([(MASKED, PACKED), (WITHOUT, PACKING)])
    sizes: list[int] = []

    def weights(self, work):
        sizes.clear()
        work()
        return float(sizes[-1])

    def note(module, x, weight, bias):
        sizes.append(weight.numel())
        return compute[type(module)](module, x, weight, bias)

    compute = {cls: cls.compute for cls in (GatedConv2d, GatedLinear)}
    for cls in compute:
        monkeypatch.setattr(cls, "compute", note)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: (sizes.append(w.numel()), linear(x, w, b))[1])
    monkeypatch.setattr(speed.Clock, "of", weights)
    monkeypatch.setattr(
        speed.Clock, "both", lambda self, one, other: (one(), other(), next(pairs))[2]
    )
    yield sizes


def test_what_is_added_up(net: nn.Module, counted: list[int]):
    found = l0.report(net, (images(),)).speed
    assert found is not None
    full = {"conv1": 8 * 3 * 9, "conv2": 6 * 8 * 9, "head": 5 * 6}
    half = {"conv1": 4 * 3 * 9, "conv2": 3 * 4 * 9, "head": 5 * 3}
    last = 2 * 5 * 5  # called twice
    packing = PACKING - WITHOUT
    least = sum(half.values()) + last + packing
    others = MASKED - sum(full.values()) - last
    # Numbers that come in are those of some draw.
    assert least < found.predicted < least + others
    assert (found.masked, found.packed) == (MASKED, PACKED)
    assert found.measured_speedup == MASKED / PACKED
    assert found.predicted_speedup == MASKED / found.predicted
    first = found.groups["conv1"]
    both = full["conv1"] + full["conv2"]
    assert first.share == pytest.approx(both / MASKED)
    assert first.speedup == pytest.approx(both / (half["conv1"] + half["conv2"]))


def test_numbers_between_modules_shrink_with_the_draw(net: nn.Module):
    set_open(net, [0.999999, 0.000001])
    measurement = speed._Measurement(net, (images(),), "auto")
    whole, packed = measurement._numbers("reference"), measurement._numbers("auto")
    before = 4 * (3 + 8 + 8) * 36
    assert whole == before + 4 * (6 + 6)  # what the last layer reads is no part of it
    assert packed == before + 4 * (2 + 2)
    uses = {name: measurement.uses[layer] for name, layer in measurement.layers.items()}
    assert [use.needs_grad for use in uses["conv1"]] == [False]
    assert [use.needs_grad for use in uses["conv2"]] == [True]
    assert [len(measurement.uses[layer]) for layer in measurement.fixed] == [2]


def test_layers_without_gates_get_no_faster(counted: list[int]):
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 4), nn.Linear(4, 900))
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(3, 4),))
    set_open(net, [0.1] * len(net.l0.sizes))
    fixed = [m for m in net if type(m) is nn.Linear]
    found = l0.report(net, (torch.randn(3, 4),)).speed
    assert found.predicted > sum(m.weight.numel() for m in fixed)


def test_reasons(net: nn.Module, counted: list[int]):
    set_open(net, [0.99, 0.5])
    groups = l0.report(net, (images(),)).speed.groups
    assert groups["conv1"].why == "99% of its units are open"
    assert groups["conv2"].why == ""
    assert speed.reason(0.5, 0.8, 0.5) == "at the open widths these layers take 1.25 times as long"
    assert speed.reason(0.01, 2.0, 0.5) == "these layers take 1.0% of a step"
    assert speed.reason(0.0, 1.0, 0.5) == "none of its layers ran"


def test_gates_of_single_weights_save_no_time():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    net = l0.convert(net, "cs", example_inputs=(torch.randn(3, 6),), granularity="weight")
    groups = l0.report(net, (torch.randn(3, 6),)).speed.groups
    assert {group.why for group in groups.values()} == {speed.SINGLE_WEIGHTS}
    assert list(groups) == net.l0.names


def test_frozen_gates_are_as_they_are(net: nn.Module):
    with torch.no_grad():
        net.l0.log_alpha[:8] = -1.7  # closed now and then, the test gate is open
        net.l0.log_alpha[8:] = -9.0
    assert speed.expected_widths(net.l0)[:2] == [4, 2]
    net.l0.freeze()
    assert speed.expected_widths(net.l0)[:2] == [int((net.l0.deterministic()[:8] != 0).sum()), 2]


def test_expected_widths_are_those_of_draws(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    set_open(net, [0.75, 0.5])
    widths = speed.expected_widths(net.l0)
    drawn = []
    for _ in range(400):
        net.l0.draw()
        drawn.append(net.l0._draw.widths)
    means = torch.tensor(drawn, dtype=torch.float64).mean(0)
    assert widths[:2] == [6, 3]
    assert (means - torch.tensor(widths)).abs().max() < 0.5
    monkeypatch.setattr(net.l0, "_multiple", 4)
    assert speed.expected_widths(net.l0)[:2] == [8, 4]


def test_the_report_says_it(net: nn.Module, counted: list[int]):
    report = l0.report(net, (images(),))
    text = str(report)
    assert "1500.0 ms, masked 4000.0 ms: 2.67 times as fast; predicted" in text
    assert "| conv1 | 16% |" in text
    found = report.to_dict()["speed"]
    assert found["measured_speedup"] == MASKED / PACKED
    assert list(found["groups"]) == net.l0.names


def test_without_inputs_nothing_is_timed(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed.Clock, "both", None)
    report = l0.report(net)
    assert report.speed is None and report.to_dict()["speed"] is None
    assert "times as fast" not in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_random_numbers_stay_as_they_are(net: nn.Module, training: bool):
    net(images()).sum().backward()
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert gradients
    x = images()
    state, kept = torch.get_rng_state(), x.clone()
    found = l0.report(net, (x,)).speed
    assert min(found.masked, found.packed, found.predicted) > 0
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    assert net.training == training
    for name, p in net.named_parameters():
        assert (p.grad is None) == (name not in gradients)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    for name, value in net.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[name]), name


def test_inputs_by_name_that_the_model_changes(counted: list[int]):
    def enlarge(module, args, kwargs):
        kwargs["x"].mul_(1e20)

    net = Net()
    net.register_forward_pre_hook(enlarge, with_kwargs=True)
    net = l0.convert(net, "hard_concrete", example_inputs={"x": images() * 1e-20})
    x = images() * 1e-20
    kept = x.clone()
    assert l0.report(net, {"x": x}).speed is not None and torch.equal(x, kept)


def test_refuses(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(TypeError, match="expected example_inputs as a tuple"):
        l0.report(net, images())
    net.kept = net(images())
    with pytest.raises(ValueError, match="expected a model that can be copied"):
        l0.report(net, (images(),))
    del net.kept
    monkeypatch.setattr(speed.Clock, "both", lambda self, one, other: (one(), other()))
    net.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="expected an output that depends on parameters"):
        l0.report(net, (images(),))


LAYERS = {
    "linear": (GatedLinear(7, 5), (2, 7)),
    "conv1d": (GatedConv1d(7, 5, 3), (2, 7, 6)),
    "conv2d": (GatedConv2d(7, 5, 3), (2, 7, 6, 6)),
    "transposed": (GatedConvTranspose2d(7, 5, 3), (2, 7, 6, 6)),
    "depthwise": (GatedConv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_called_at_the_asked_widths(name, dtype, monkeypatch: pytest.MonkeyPatch):
    layer, shape = LAYERS[name]
    seen = []
    compute = type(layer).compute

    def note(self, x, weight, bias):
        seen.append((x, weight, bias))
        return compute(self, x, weight, bias)

    monkeypatch.setattr(type(layer), "compute", note)
    use = speed.Use(shape, len(shape) == 4, dtype, needs_grad=True, trains=True)
    gradients = speed._packed_call(layer, use, 3, 4, None)()
    x, weight, bias = seen[-1]
    channels = 3 if name == "depthwise" else 4
    assert x.shape == (shape[0], channels, *shape[2:]) and bias.shape == (3,)
    expected = {"depthwise": (3, 1), "transposed": (4, 3)}.get(name, (3, 4))
    assert weight.shape[:2] == expected and {t.dtype for t in (x, weight, bias)} == {dtype}
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    if len(shape) == 4:
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    speed._masked_call(layer, use)()
    assert seen[-1][0].shape == shape and seen[-1][1].shape == layer.weight.shape


def test_a_layer_that_drops_features_reads_those_that_arrive(monkeypatch: pytest.MonkeyPatch):
    layer, shape = LAYERS["linear"]
    widths = []
    compute = GatedLinear.compute
    monkeypatch.setattr(
        GatedLinear, "compute", lambda *a: (widths.append(a[1].shape[1]), compute(*a))[1]
    )
    use = speed.Use(shape, False, torch.float32, needs_grad=True, trains=True)
    gradients = speed._packed_call(layer, use, 5, 3, arriving=6)()
    assert widths[-1] == 3 and gradients[0].shape == (2, 6)


def test_calls_without_gradients_are_forwards_only():
    layer, shape = LAYERS["linear"]
    use = speed.Use(shape, False, torch.float32, needs_grad=False, trains=False)
    assert speed._masked_call(layer, use)().grad_fn is None
