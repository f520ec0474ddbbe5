# SPDX-License-Identifier: Apache-2.0
"""What is gated, how much of it is open, and why the rest is not gated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.compact.inputs import check_inputs
from l0kernels.gates.base import Gates
from l0kernels.nn import GatedLayer, MaskedLayer, gated_class
from l0kernels.speed import Speed, measure
from l0kernels.training import gates_of, root_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from l0kernels.convert.tensors import Inputs

PACKED = "packed"
GATHERED = "gathered at the input"
MASKED = "masked reference"
DENSE = "dense"
PER_EXAMPLE = "dense, gates per example"
BY_WEIGHT = "masked weight by weight"


@dataclass(frozen=True)
class GroupRow:
    """One group.

    Args:
        name: the group.
        producers: layers that make its units; several for a product of features (GLU,
            squeeze-and-excite) or attention heads, none for gates of input features.
        consumers: layers that read them, whose inputs the gates multiply.
        units: number of units.
        expected_open: expected number of open units under the training law.
        test_open: open units of the deterministic gate.
        path: how its layers run now: "packed" (only open units are made and read), "gathered at
            the input" (units that no gated layer makes: the reader drops the closed ones),
            "dense" (all units are computed and what is read is multiplied by the gates: with the
            units that are expected to be open, and the rows that came in last, skipping would
            cost more than it saves), "dense, gates per example" (``scope="example"``: nothing is
            skipped in training, eval mode is packed), "masked reference" (asked for with
            ``use_impl`` or ``L0K_IMPL``), or "masked weight by weight" (at most outputs and inputs
            are left out of which all weights are closed; the units are the weights of one layer,
            its producer).
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    expected_open: float
    test_open: int
    path: str


class Filters(NamedTuple):
    """The weights of a gated layer, and which are open at test.

    Args:
        name: of the layer.
        weight: [outputs, inputs, height, width], of linear layers [outputs, inputs, 1, 1]; inputs
            are those of a group where the layer is grouped.
        is_open: bool, of the same shape.
    """

    name: str
    weight: Tensor
    is_open: Tensor


@dataclass(frozen=True)
class Report:
    """See :func:`report`.

    Args:
        groups: one row per group.
        ungated: layer -> why it has no gates.
        weights: see :meth:`weights_open`.
        speed: of a step, predicted and measured; None without inputs.
        model: without wrappers around it, for `plot_filters`.
    """

    groups: tuple[GroupRow, ...]
    ungated: dict[str, str]
    weights: dict[str, float]
    speed: Speed | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def weights_open(self) -> dict[str, float]:
        """Weights of convolutions and linear layers (no biases): ``expected`` open under the
        training law, open at ``test``, ``total``.
        """
        return dict(self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "groups": [asdict(row) for row in self.groups],
            "ungated": dict(self.ungated),
            "weights": dict(self.weights),
            "speed": None if self.speed is None else self.speed.to_dict(),
        }

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw one bar per group: its units, expected open and open at test; then what is ungated.

        Args:
            path: where to save it too; the suffix names the format (.png, .svg, .pdf).

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib does not write the format.
        """
        from l0kernels._report_plot import draw, save

        figure = draw(self)
        if path is not None:
            save(figure, Path(path))
        return figure

    def plot_filters(
        self, path: str | PathLike[str] | None = None, layers: Sequence[str] | None = None
    ) -> Figure:
        """Draw the weights of gated layers as they are now, with those that are closed in grey.

        One picture per layer, the longer side across: every filter of a convolution, one tile for
        each output and input, every neuron of a linear layer as a line of its inputs. Negative
        weights are blue, positive ones orange, by their size among the open ones of the layer. In
        a saved file a weight is a square of whole pixels.

        Args:
            path: where to save it too; the suffix names the format (.png, .svg, .pdf).
            layers: names of the layers to draw; None for all that gates close outputs, inputs or
                weights of.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: unknown names, matplotlib does not write the format, or the report was not
                made from a model.
        """
        from l0kernels._report_plot import DOTS, draw_filters, save

        figure = draw_filters(self._filters(layers))
        if path is not None:
            save(figure, Path(path), DOTS)
        return figure

    def _filters(self, layers: Sequence[str] | None) -> list[Filters]:
        if self.model is None:
            raise ValueError("plot_filters: expected the report of a model, got one made by hand")
        gated = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, GatedLayer) and _has_open_weights(layer)
        }
        unknown = sorted(set(layers or ()) - set(gated))
        if unknown:
            raise ValueError(f"layers: expected names among {list(gated)}, got {unknown}")
        gates = gates_of(self.model)
        with torch.no_grad():
            z = torch.cat((gates.deterministic().cpu() != 0, torch.ones(1, dtype=torch.bool)))
            names = [name for name in gated if layers is None or name in layers]
            return [_filters_of(name, gated[name], z) for name in names]

    def __str__(self) -> str:
        lines = [
            "| group | made by | read by | units | open, expected | open, test | path |",
            "|---|---|---|---:|---:|---:|---|",
        ]
        lines += [
            _row(
                r.name,
                ", ".join(r.producers) or "input",
                ", ".join(r.consumers) or "none",
                str(r.units),
                f"{r.expected_open:.1f}",
                str(r.test_open),
                r.path,
            )
            for r in self.groups
        ]
        total = self.weights["total"]
        lines += [
            "",
            f"weights: {total:,.0f}; expected open {self.weights['expected'] / total:.1%}, "
            f"open at test {self.weights['test'] / total:.1%}",
        ]
        if self.speed is not None:
            lines += ["", *_speed_lines(self.speed)]
        if self.ungated:
            lines += ["", "| not gated | why |", "|---|---|"]
            lines += [_row(name, why) for name, why in self.ungated.items()]
        return "\n".join(lines)


def _speed_lines(speed: Speed) -> list[str]:
    lines = [
        f"forward and backward: {speed.packed:.1f} ms, masked {speed.masked:.1f} ms: "
        f"{speed.measured_speedup:.2f} times as fast; predicted {speed.predicted_speedup:.2f}",
        "",
        "| group | share of masked step | its layers' speed-up, predicted | if little gain, why |",
        "|---|---:|---:|---|",
    ]
    return lines + [
        _row(name, f"{group.share:.0%}", f"{group.speedup:.2f}", group.why)
        for name, group in speed.groups.items()
    ]


def _row(*cells: str) -> str:
    """A line of a Markdown table: one line, whatever the cells hold."""
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def report(model: nn.Module, example_inputs: Inputs | None = None) -> Report:
    """Describe the gates of a model: ``print(l0kernels.report(net))`` gives Markdown tables.

    With a training batch it also says what a step gains: measured, beside the masked reference,
    and predicted from timings of the single layers at their full and at their expected open
    widths; and for each group why its layers are not faster, where they are not. That takes some
    dozen steps of a copy of the model; the model itself is not run.

    Args:
        model: a converted model, or a wrapper around one.
        example_inputs: arguments as `convert` takes them, a tuple or a mapping, of the size and on
            the device of a training batch, for the converted module itself, without wrappers around
            it. None: nothing is timed.

    Raises:
        ValueError: the model has no gates; with inputs: it cannot be copied, or no output depends
            on its parameters. TypeError: the inputs are no tuple or mapping.
    """
    gates = gates_of(model)
    root = root_of(model, gates)
    named = {n: m for n, m in root.named_modules() if isinstance(m, GatedLayer)}
    masked = {m.gate.name: (n,) for n, m in named.items() if isinstance(m, MaskedLayer) and m.gate}
    expected, test = gates.expected_open(), gates.open_now()
    speed = None
    if example_inputs is not None:
        if gates.scope == "example" and not gates.frozen:
            raise ValueError(
                "report: expected gates that a batch shares to time, got gates per example, which "
                "skip nothing in training; leave example_inputs out"
            )
        check_inputs("report", model, example_inputs)
        speed = measure(root, example_inputs)
    rows = tuple(
        GroupRow(
            name=name,
            producers=masked.get(name) or _users(named, "out_gate", where),
            consumers=_users(named, "in_gate", where),
            units=where.stop - where.start,
            expected_open=expected[name],
            test_open=test[name],
            path=BY_WEIGHT if name in masked else _path(named, gates, group, where),
        )
        for group, (name, where) in enumerate(gates.slices())
    )
    return Report(rows, dict(gates.refused), _count_weights(root, gates), speed, root)


def _users(named: dict[str, GatedLayer], side: str, where: slice) -> tuple[str, ...]:
    """Layers with two-dimensional or larger weights that use a range of gates on one side."""
    found = []
    for name, layer in named.items():
        ref = getattr(layer, side)
        weight = getattr(layer, "weight", None)
        if ref is None or weight is None or weight.dim() < 2 or layer.depthwise:
            continue
        if any(_meets(m, where) for m in ref.maps):
            found.append(name)
    return tuple(found)


def _meets(gate_map: Tensor, where: slice) -> bool:
    return bool(((gate_map >= where.start) & (gate_map < where.stop)).any())


def _path(named: dict[str, GatedLayer], gates: Gates, group: int, where: slice) -> str:
    """How the layers that use a range of gates run, from the ports that they work with."""
    if current_impl() == "reference":
        return MASKED
    if gates.scope == "example" and not gates.frozen:
        return PER_EXAMPLE
    if gates.runs_dense(group, float(gates.open_probability()[where].mean())):
        return DENSE
    paths = set()
    for layer in named.values():
        for port in (layer.in_port, layer.out_port):
            if port >= 0 and layer.gates is gates:
                made, extra = gates.port_maps[port]
                paths |= {PACKED} if _meets(made, where) else set()
                paths |= {GATHERED} if _meets(extra, where) else set()
    return ", ".join(sorted(paths, reverse=True))


@torch.no_grad()
def _count_weights(root: nn.Module, gates: Gates) -> dict[str, float]:
    """Open weights of all layers; gates are independent, so expectations multiply."""
    p = torch.cat((gates.open_probability().cpu(), torch.ones(1, dtype=torch.float64)))
    z = torch.cat((gates.deterministic().cpu() != 0, torch.ones(1, dtype=torch.bool))).double()
    total = expected = test = 0.0
    for module in root.modules():
        weights = _weights(module)
        total += weights
        if isinstance(module, GatedLayer) and weights:
            expected += _open_weights(module, p)
            test += _open_weights(module, z)
        else:
            expected += weights
            test += weights
    return {"expected": expected, "test": test, "total": total}


def _weights(module: nn.Module) -> int:
    """Size of a layer's weight; it is not read, which would run a parametrization."""
    if isinstance(module, nn.modules.conv._ConvNd):
        pairs = module.in_channels * module.out_channels // module.groups
        return pairs * math.prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    ours = isinstance(module, GatedLayer) or gated_class(type(module)) is not None
    weight = module._parameters.get("weight") if ours else None
    return 0 if weight is None or weight.dim() < 2 else weight.numel()


def _open_weights(module: GatedLayer, openness: Tensor) -> float:
    if isinstance(module, MaskedLayer) and module.gate is not None:
        start = module.gate.gates.starts[module.gate.name]
        return float(openness[start : start + module.weight.numel()].sum())
    rows, columns, elements = module.shape_out_in()
    if module.out_gate is not None:
        rows = _open_features(module.out_gate.maps, openness)
    if module.in_gate is not None:
        columns = _open_features(module.in_gate.maps, openness)
    return float(rows * columns * elements)


def _open_features(maps: tuple[Tensor, ...], openness: Tensor) -> float:
    return float(_are_open(maps, openness).sum())


def _are_open(maps: tuple[Tensor, ...], openness: Tensor) -> Tensor:
    features = openness[maps[0]]
    for extra in maps[1:]:
        features = features * openness[extra]
    return features


def _has_open_weights(layer: GatedLayer) -> bool:
    """Whether gates close weights of a layer that has a matrix of them."""
    weight = layer._parameters.get("weight")
    gated = layer.in_gate is not None or layer.out_gate is not None
    if isinstance(layer, MaskedLayer):
        gated = layer.gate is not None
    return gated and weight is not None and weight.dim() > 1


def _filters_of(name: str, layer: GatedLayer, z: Tensor) -> Filters:
    """The weights of a layer.

    Args:
        name: of the layer.
        layer: with gates.
        z: which gates are open, and True for what has none, bool [gates + 1].
    """
    weight = layer._out_in(layer.weight).detach().cpu()
    outputs, inputs, *kernel = weight.shape
    is_open = torch.ones_like(weight, dtype=torch.bool)
    if isinstance(layer, MaskedLayer) and layer.gate is not None:
        start = layer.gate.gates.starts[layer.gate.name]
        is_open = z[start : start + weight.numel()].view(weight.shape)
    if layer.out_gate is not None:
        rows = _are_open(layer.out_gate.maps, z).view(-1, *[1] * (weight.dim() - 1))
        is_open = is_open & rows
    if layer.in_gate is not None:
        columns = _are_open(layer.in_gate.maps, z).view(1, -1, *[1] * len(kernel))
        is_open = is_open & columns
    shape = outputs, inputs, *[1] * (2 - len(kernel)), *kernel
    return Filters(name, weight.reshape(shape), is_open.reshape(shape))
