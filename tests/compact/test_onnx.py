# SPDX-License-Identifier: Apache-2.0
"""The exported graph computes what the model does, and is written only then."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
pytest.importorskip("onnxscript", reason="needs the extra export")


def run(path, feed: dict[str, Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: t.numpy() for name, t in feed.items()})


def small_lenet() -> tuple[nn.Module, Tensor]:
    network = models.network("lenet5")
    x = network.example(3)[0]
    net = l0.convert(network.build(), "hard_concrete", example_inputs=(x,))
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.randn(net.l0.count) * 4 - 2)
    return l0.compact(net, (x,)), x


def test_lenet_with_any_batch(tmp_path):
    small, x = small_lenet()
    error = l0.export_onnx(small, (x,), tmp_path / "net.onnx")
    assert 0 <= error < 1e-5
    assert small.training and list(tmp_path.iterdir()) == [tmp_path / "net.onnx"]
    batch = torch.randn(7, 1, 28, 28)
    (found,) = run(tmp_path / "net.onnx", {"x": batch})
    torch.testing.assert_close(torch.from_numpy(found), small.eval()(batch).detach())


class Mixed(nn.Module):
    """Several inputs, keyword arguments, nested outputs, batch norm in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor | None = None, power: int = 1):
        y = F.relu(self.norm(self.conv(x))).mean((2, 3))
        y = self.fc(y) + shift
        y = y if scale is None else y * scale**power
        return {"logits": y, "more": (y.sum(1), y.argmax(1))}


def mixed_inputs() -> dict[str, object]:
    x, scale = torch.randn(3, 2, 5, 5), torch.rand(3, 1) + 0.5
    return {"scale": scale, "x": x, "power": 2, "shift": torch.randn(4)}


def test_keyword_arguments_and_nested_outputs(tmp_path):
    model, inputs = Mixed(), mixed_inputs()
    assert l0.export_onnx(model, inputs, tmp_path / "m.onnx") < 1e-5
    assert model.norm.num_batches_tracked == 0 and model.training
    wide = {k: torch.cat((t, t)) if k in ("x", "scale") else t for k, t in inputs.items()}
    found = run(tmp_path / "m.onnx", {k: t for k, t in wide.items() if k != "power"})
    expected = model.eval()(**wide)
    assert [array.shape for array in found] == [(6, 4), (6,), (6,)]
    torch.testing.assert_close(torch.from_numpy(found[0]), expected["logits"].detach())
    assert torch.equal(torch.from_numpy(found[2]), expected["more"][1])


def test_positional_arguments(tmp_path):
    inputs = mixed_inputs()
    assert l0.export_onnx(Mixed(), (inputs["x"], inputs["shift"]), tmp_path / "m.onnx") < 1e-5


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 4) * 2


def test_a_model_of_one_batch_size_is_exported_with_it(tmp_path):
    l0.export_onnx(FixedBatch(), (torch.randn(3, 4),), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == [3, 4]


class Wrong:
    """A runtime whose results are off by a factor."""

    def __init__(self, session: object, factor: float) -> None:
        self.session, self.factor = session, factor

    def get_inputs(self) -> list:
        return self.session.get_inputs()

    def run(self, names: None, feed: dict) -> list:
        return [self.factor * array for array in self.session.run(names, feed)]


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf")])
def test_a_difference_is_found_and_nothing_written(factor, tmp_path, monkeypatch):
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: Wrong(real(*a, **k), factor)
    )
    with pytest.raises(RuntimeError, match="expected outputs .* to agree to 1e-04, got"):
        l0.export_onnx(nn.Linear(4, 3), (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class Masked(nn.Module):
    """Logits of two classes are masked, in the first and in the last output."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.fc, self.value = nn.Linear(4, 5), value
        self.register_buffer("closed", torch.tensor([False, True, False, False, True]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.fc(x)
        masked = y.masked_fill(self.closed, self.value)
        return masked, y, masked * 2


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_masked_logits_are_equal(value, tmp_path):
    x = torch.randn(2, 4)
    assert l0.export_onnx(Masked(value), (x,), tmp_path / "m.onnx") < 1e-5
    found = run(tmp_path / "m.onnx", {"x": x})[0]
    assert (np.isfinite(found) == [True, False, True, True, False]).all()


class Spoiled(Wrong):
    """A runtime that gives one element of one output another value."""

    def __init__(self, session: object, output: int, value: float) -> None:
        super().__init__(session, 1.0)
        self.output, self.value = output, value

    def run(self, names: None, feed: dict) -> list:
        arrays = [array.copy() for array in super().run(names, feed)]
        arrays[self.output][0, 1] = self.value
        return arrays


@pytest.mark.parametrize(
    ("output", "value"), [(0, float("nan")), (0, 0.0), (1, float("nan")), (2, float("inf"))]
)
def test_one_element_that_differs_beside_masked_logits(output, value, tmp_path, monkeypatch):
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: Spoiled(real(*a, **k), output, value)
    )
    with pytest.raises(RuntimeError, match="expected outputs .* to agree to 1e-04, got"):
        l0.export_onnx(Masked(float("-inf")), (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path, monkeypatch):
    path, x = tmp_path / "m.onnx", torch.randn(2, 4)
    net = nn.Linear(4, 3)
    with pytest.raises(TypeError, match="export_onnx: expected a torch.nn.Module"):
        l0.export_onnx(len, (x,), path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="as a tuple .* or a mapping .*, got Tensor"):
        l0.export_onnx(net, x, path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"floating tensors in torch.float32, got \['torch.float64"):
        l0.export_onnx(nn.Linear(4, 3).double(), (x,), path)
    gated = l0.convert(
        nn.Sequential(net, nn.ReLU(), nn.Linear(3, 2)), "hard_concrete", example_inputs=(x,)
    )
    with pytest.raises(ValueError, match="expected a plain model, got one with gates"):
        l0.export_onnx(gated, (x,), path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript.*pip install 'l0kernels\[export\]'"):
        l0.export_onnx(nn.Linear(4, 3), (x,), path)
    assert list(tmp_path.iterdir()) == []
