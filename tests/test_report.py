# SPDX-License-Identifier: Apache-2.0
"""The report: rows, paths, weights, Markdown, JSON and the picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import l0kernels as l0
from l0kernels._report_plot import MAX_NOTES
from l0kernels.nn import (
    GatedBatchNorm2d,
    GatedConv2d,
    GatedConvTranspose2d,
    GatedLinear,
    GatedPReLU,
)
from l0kernels.recipes.models import LeNet5
from l0kernels.report import GroupRow, Report


class Net(nn.Module):
    """A product of two producers, passages, a transposed convolution, gated inputs of a head."""

    def __init__(self) -> None:
        super().__init__()
        g = l0.gates.HardConcrete({"c": 6, "up": 5, "head.in": 7, "glu": 8})
        self.conv = GatedConv2d(3, 6, 3, out_gate=g["c"])
        self.norm = GatedBatchNorm2d(6, out_gate=g["c"])
        self.depth = GatedConv2d(6, 6, 3, groups=6, out_gate=g["c"])
        self.act = GatedPReLU(6, out_gate=g["c"])
        self.up = GatedConvTranspose2d(6, 5, (2, 3), in_gate=g["c"], out_gate=g["up"])
        self.last = GatedConv2d(5, 7, 1, in_gate=g["up"])
        self.gate = GatedLinear(7, 8, in_gate=g["head.in"], out_gate=g["glu"])
        self.value = GatedLinear(7, 8, in_gate=g["head.in"], out_gate=g["glu"])
        self.out = GatedLinear(8, 2, in_gate=g["glu"])
        self.plain = nn.Linear(2, 2)
        g.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depth(self.norm(self.conv(x))))
        x = self.last(F.relu(self.up(x))).mean((2, 3))
        return self.plain(self.out(self.gate(x).sigmoid() * self.value(x)))


@pytest.fixture
def net() -> Net:
    net = Net()
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.linspace(-1, 5, net.l0.count))
        net.l0.log_alpha[1::3] = -6.0
    net.l0.refused = {"plain": "its units reach an output | of the model"}
    return net


def test_rows_name_producers_and_readers(net: Net):
    rows = {r.name: (r.producers, r.consumers, r.units) for r in l0.report(net).groups}
    assert rows == {
        "c": (("conv",), ("up",), 6),
        "up": (("up",), ("last",), 5),
        "head.in": ((), ("gate", "value"), 7),
        "glu": (("gate", "value"), ("out",), 8),
    }


def test_open_units_are_those_of_the_gates(net: Net):
    for row in l0.report(net).groups:
        where = dict(net.l0.slices())[row.name]
        assert row.test_open == int((net.l0.deterministic()[where] != 0).sum())
        assert row.expected_open == pytest.approx(float(net.l0.open_probability()[where].sum()))
        assert 0 < row.test_open < row.units


def test_the_path_is_what_the_layers_do(net: Net):
    expected = {"c": "packed", "up": "packed", "head.in": "gathered at the input", "glu": "packed"}
    assert {r.name: r.path for r in l0.report(net).groups} == expected
    with l0.use_impl("reference"):
        assert {r.path for r in l0.report(net).groups} == {"masked reference"}
    # As told, the arriving features of gate and value are all there, and are gathered.
    seen = []
    net.last.register_forward_hook(lambda *a: seen.append(a[2].shape[1]))
    net.eval()(torch.randn(2, 3, 8, 8))
    assert seen == [7]


def test_weights_open_at_test_are_those_that_are_packed(net: Net):
    net.eval()(torch.randn(2, 3, 8, 8))
    layers = [m for m in net.modules() if isinstance(m, l0.nn.GatedLayer) and m.weight.dim() > 1]
    draw = net.l0.current_draw()
    packed = sum(layer.packed_parameters(draw)[0].numel() for layer in layers)
    counted = l0.report(net).weights_open()
    assert counted["test"] == packed + net.plain.weight.numel()
    assert counted["total"] == sum(m.weight.numel() for m in (*layers, net.plain))


def test_expected_weights_of_a_transposed_convolution(net: Net):
    with torch.no_grad():
        net.l0.log_alpha.fill_(50.0)
    full = l0.report(net).weights_open()
    assert full["expected"] == pytest.approx(full["total"])
    with torch.no_grad():
        net.l0.log_alpha[6:11] = -50.0  # all of up
    left = l0.report(net).weights_open()
    lost = 6 * 5 * 6 + 5 * 7
    assert left["expected"] == pytest.approx(left["total"] - lost)
    assert left["test"] == left["total"] - lost


def test_weights_of_transformers_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    gated = l0.nn.gated_class(conv1d)
    g = l0.gates.HardConcrete({"a": 4})
    net = nn.Sequential(gated(4, 9, out_gate=g["a"]), gated(6, 4, in_gate=g["a"]), conv1d(2, 6))
    g.attach(net)
    with torch.no_grad():
        g.log_alpha.copy_(torch.tensor([-50.0, 50.0, 50.0, 50.0]))
    counted = l0.report(net).weights_open()
    assert counted["total"] == 9 * 4 + 4 * 6 + 6 * 2
    assert counted["test"] == counted["total"] - 9 - 6
    assert counted["expected"] == pytest.approx(counted["test"])


def test_markdown_tables_are_whole(net: Net):
    text = str(l0.report(net))
    assert "| head.in | input | gate, value | 7 |" in text
    assert "| glu | gate, value | out | 8 |" in text
    assert r"| plain | its units reach an output \| of the model |" in text
    cells = [line.replace(r"\|", "").count("|") for line in text.splitlines() if "|" in line]
    assert cells == [8] * 6 + [3] * 3


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  ", "\u2028"])
def test_a_reason_of_several_lines_stays_in_its_row(net: Net, end: str):
    net.l0.refused["stem"] = f"the forward fails:{end}expected | 3{end}"
    lines = str(l0.report(net)).splitlines()
    assert lines[-1] == r"| stem | the forward fails: expected \| 3 |"
    assert l0.report(net).ungated["stem"].endswith(end)


def test_a_group_that_nothing_reads_says_so():
    g = l0.gates.HardConcrete({"a": 4})
    net = g.attach(nn.Sequential(GatedLinear(3, 4, out_gate=g["a"])))
    assert "| a | 0 | none | 4 |" in str(l0.report(net))


def test_the_dictionary_goes_into_json(net: Net):
    found = json.loads(json.dumps(l0.report(net).to_dict()))
    assert found["ungated"] == {"plain": "its units reach an output | of the model"}
    assert set(found["weights"]) == {"expected", "test", "total"}
    row = found["groups"][3]
    assert (row["producers"], row["consumers"]) == (["gate", "value"], ["out"])
    assert (row["name"], row["units"], row["path"]) == ("glu", 8, "packed")


def test_nothing_imports_matplotlib():
    code = "import sys, l0kernels; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_matplotlib_the_error_names_the_extra(net: Net, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'l0kernels\[bench\]'"):
        l0.report(net).plot()


def many(groups: int, ungated: dict[str, str]) -> Report:
    rows = tuple(
        GroupRow(f"model.blocks.{i}.mlp.fc1", (f"{i}",), ("x",), 10 + i, 5.0, i % 10, "packed")
        for i in range(groups)
    )
    return Report(rows, ungated, {"expected": 10.0, "test": 9.0, "total": 20.0})


class TestPicture:
    @pytest.fixture(autouse=True)
    def needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_bars_and_markers_show_the_numbers(self, net: Net):
        report = l0.report(net)
        axes = report.plot().axes[0]
        closed, opened = ([bar.get_width() for bar in c] for c in axes.containers)
        assert closed == [1.0] * 4
        assert opened == pytest.approx([r.expected_open / r.units for r in report.groups])
        marks = axes.collections[0].get_offsets()[:, 0].tolist()
        assert marks == pytest.approx([r.test_open / r.units for r in report.groups])
        assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "up", "head.in", "glu"]
        written = {t.get_text() for t in axes.texts}
        assert {f"{r.expected_open:.1f}" for r in report.groups} <= written

    @pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
    def test_it_is_saved_in_the_format_of_the_path(
        self, net: Net, tmp_path: Path, suffix: str, magic: bytes
    ):
        path = tmp_path / f"report.{suffix}"
        l0.report(net).plot(path)
        assert path.read_bytes().startswith(magic)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_an_unknown_format_leaves_no_file(self, net: Net, tmp_path: Path):
        with pytest.raises(ValueError, match="xyz"):
            l0.report(net).plot(str(tmp_path / "report.xyz"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("groups", [1, 5, 60])
    @pytest.mark.parametrize("ungated", [0, 3, 100])
    def test_nothing_overlaps_or_leaves_the_figure(self, groups: int, ungated: int):
        reasons = {
            f"model.blocks.{i}.proj": f"reason no{i}x, at length: {'why ' * 60}"
            for i in range(ungated)
        }
        figure = many(groups, reasons).plot()
        figure.canvas.draw()
        axes, page = figure.axes[0], figure.bbox
        notes = figure.texts[1:]
        texts = [*figure.texts, *axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
        boxes = [t.get_window_extent() for t in texts] + [figure.legends[0].get_window_extent()]
        for box in boxes:
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert page.y0 <= box.y0 and box.y1 <= page.y1
        rows = sorted((t.get_window_extent() for t in notes), key=lambda box: -box.y0)
        ticks = axes.get_xticklabels()[0].get_window_extent()
        for above, below in zip([ticks, *rows], rows, strict=False):
            assert above.y0 >= below.y1
        assert len(notes) == {0: 0, 3: 4, 100: MAX_NOTES + 1}[ungated]

    def test_layers_with_one_kind_of_reason_share_a_line(self):
        reasons = {
            f"blocks.{i}.proj": f"its units are joined with those of blocks.{i + 1}.proj, stem "
            f"before blocks.{i}.fc (residual stream)"
            for i in range(8)
        }
        notes = [t.get_text() for t in many(3, reasons | {"stem": "it is frozen"}).plot().texts[1:]]
        assert notes == [
            "not gated: 9 layers",
            "blocks.0.proj, blocks.1.proj and 6 more: its units are joined with those of … "
            "before … (residual stream)",
            "stem: it is frozen",
        ]


class TestFilters:
    @pytest.fixture(autouse=True)
    def needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.fixture
    def lenet(self) -> nn.Module:
        """LeNet-5 with gates on units and input features, some of each group closed."""
        net = LeNet5()
        x = torch.rand(2, 1, 28, 28)
        l0.convert(net, "hard_concrete", example_inputs=(x,), granularity="input")
        with torch.no_grad():
            net.l0.log_alpha.fill_(5.0)
            for name, where in net.l0.slices():
                net.l0.log_alpha[where][SHUT[name]] = -5.0
            for parameter in (net.conv1.weight, net.conv2.weight, net.fc1.weight, net.fc2.weight):
                # Nothing is so small that it looks white.
                parameter.copy_(torch.where(parameter < 0, -1.0, 1.0) * (0.5 + torch.rand(())))
        return net

    def test_every_weight_has_its_colour(self, lenet: nn.Module, tmp_path: Path):
        path = tmp_path / "filters.png"
        figure = l0.report(lenet).plot_filters(path)
        page = np.asarray(Image.open(path).convert("RGB"))
        assert page.shape[:2] == tuple(int(round(v)) for v in figure.bbox.size[::-1])
        for axes, name in zip(figure.axes, ("conv1", "conv2", "fc1", "fc2"), strict=True):
            weight = getattr(lenet, name).weight.detach()
            outputs, inputs = weight.shape[:2]
            is_open = torch.ones(outputs, inputs, dtype=torch.bool)
            is_open[OUTPUTS[name]] = False
            is_open[:, INPUTS[name]] = False
            colours = _colours(page, axes, weight.reshape(outputs, inputs, *_kernel(weight)))
            grey = (colours == np.array((184, 184, 184))).all(-1)
            assert np.array_equal(grey, ~np.broadcast_to(_as_kernel(is_open), grey.shape))
            # Blue where negative, orange where positive.
            negative = (weight < 0).reshape(grey.shape).numpy() & ~grey
            positive = ~negative & ~grey
            assert (colours[negative][:, 2] > colours[negative][:, 0] + 50).all()
            assert (colours[positive][:, 0] > colours[positive][:, 2] + 50).all()
            assert negative.any() and positive.any() and grey.any()

    def test_single_weights_are_greyed_one_by_one(self, tmp_path: Path):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
        x = torch.rand(2, 3, 8, 8)
        l0.convert(net, "cs", example_inputs=(x,), granularity="weight")
        is_open = torch.rand(net.l0.count) < 0.5
        with torch.no_grad():
            net.l0.log_alpha.copy_(torch.where(is_open, 1.0, -1.0))
            for layer in (net[0], net[2]):
                layer.weight.fill_(1.0)
        figure = l0.report(net).plot_filters(tmp_path / "filters.png")
        page = np.asarray(Image.open(tmp_path / "filters.png").convert("RGB"))
        sizes = [net[0].weight.numel(), net[2].weight.numel()]
        for axes, layer, part in zip(
            figure.axes, (net[0], net[2]), is_open.split(sizes), strict=True
        ):
            shape = (*layer.weight.shape[:2], *_kernel(layer.weight))
            colours = _colours(page, axes, layer.weight.detach().reshape(shape))
            grey = (colours == np.array((184, 184, 184))).all(-1)
            assert np.array_equal(grey, ~part.view(shape).numpy())

    def test_layers_can_be_chosen(self, lenet: nn.Module):
        figure = l0.report(lenet).plot_filters(layers=["fc2", "conv1"])
        titles = [text.get_text() for text in figure.texts]
        assert titles == [
            "conv1: 18 of 20 outputs (across), 1 of 1 inputs (down) open",
            "fc2: 10 of 10 outputs (down), 497 of 500 inputs (across) open",
        ]
        with pytest.raises(ValueError, match=r"layers: expected names among .* got \['conv9'\]"):
            l0.report(lenet).plot_filters(layers=["conv9"])
        with pytest.raises(ValueError, match="expected the report of a model"):
            many(2, {}).plot_filters()

    def test_all_kinds_of_layers(self, net: Net):
        figure = l0.report(net).plot_filters()
        names = [text.get_text().split(":")[0] for text in figure.texts]
        assert names == ["conv", "depth", "up", "last", "gate", "value", "out"]
        figure.canvas.draw()
        boxes = [axes.get_window_extent() for axes in figure.axes]
        boxes += [text.get_window_extent() for text in figure.texts]
        page = figure.bbox
        for box in boxes:
            assert page.x0 <= box.x0 and box.x1 <= page.x1
            assert page.y0 <= box.y0 and box.y1 <= page.y1

    def test_all_closed_and_all_open(self, lenet: nn.Module):
        for value, grey_share in ((-5.0, 1.0), (5.0, 0.0)):
            with torch.no_grad():
                lenet.l0.log_alpha.fill_(value)
            figure = l0.report(lenet).plot_filters(layers=["fc1"])
            picture = figure.axes[0].images[0].get_array()
            assert (picture == 184).all(-1).mean() == grey_share


SHUT = {"conv1": [3, 19], "conv2": [0, 7, 49], "fc1.in": [20, 21, 799], "fc1": [0, 250, 499]}
OUTPUTS = {"conv1": [3, 19], "conv2": [0, 7, 49], "fc1": [0, 250, 499], "fc2": []}
INPUTS = {
    "conv1": [],
    "conv2": [3, 19],
    # Channels 0, 7 and 49 of conv2 are 16 inputs each.
    "fc1": [*range(16), *range(112, 128), *range(784, 800), 20, 21],
    "fc2": [0, 250, 499],
}


def _kernel(weight: Tensor) -> tuple[int, int]:
    return tuple(weight.shape[2:]) or (1, 1)  # pyright: ignore


def _as_kernel(is_open: Tensor) -> np.ndarray:
    return is_open.numpy()[:, :, None, None]


def _colours(page: np.ndarray, axes, weight: Tensor) -> np.ndarray:
    """Colours of the pixels in the middle of each weight, by output, input, row and column."""
    outputs, inputs, height, width = weight.shape
    gap = int(max(height, width) > 1)
    o, i, r, c = (torch.arange(n) for n in weight.shape)
    o, i, r, c = o.view(-1, 1, 1, 1), i.view(-1, 1, 1), r.view(-1, 1), c
    across = outputs * width >= inputs * height
    x = (o if across else i) * (width + gap) + c
    y = (i if across else o) * (height + gap) + r
    x, y = (value.expand(weight.shape).numpy() for value in (x, y))
    points = np.stack((x.ravel(), y.ravel()), 1)
    places = axes.transData.transform(points)
    columns = np.floor(places[:, 0]).astype(int)
    rows = np.floor(len(page) - places[:, 1]).astype(int)
    return page[rows, columns].reshape(*weight.shape, 3).astype(int)
