# SPDX-License-Identifier: Apache-2.0
"""The picture of a report."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l0kernels._files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from l0kernels.report import Filters, GroupRow, Report

# Okabe and Ito's blue and vermilion are told apart with any colour vision.
EXPECTED, TEST, CLOSED = "#0072B2", "#D55E00", "#e3e6ea"
INK, FAINT = "#222222", "#666666"

# Inches.
WIDTH = 10.0
MARGIN = 0.15
HEADER = 0.9
ROW = 0.22
AXIS = 0.45
NOTE_ROW = 0.17
LETTER = 0.061
NUMBERS = 1.75

# Of pictures of weights; pixels.
NEGATIVE, POSITIVE, GREY = (0, 114, 178), (213, 94, 0), (184, 184, 184)
DOTS = 100
LONGEST_SIDE = 640
LARGEST_SQUARE = 12
TITLE = 26
EDGE = 12
# Of the open weights, the part that is shown in full colour or less.
FULL = 0.99

LONGEST_NAME = 52
LONGEST_NOTE = 150
MAX_NOTES = 16


def draw(report: Report) -> Figure:
    """One horizontal bar per group, as parts of its units, and the ungated layers below.

    Args:
        report: what to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    notes = _notes(report)
    bars, foot = ROW * len(report.groups), AXIS + NOTE_ROW * len(notes)
    height = HEADER + bars + foot
    # Figure without pyplot: no window system, no global state.
    figure = _matplotlib("matplotlib.figure").Figure(figsize=(WIDTH, height))
    left = 2 * MARGIN + LETTER * max(len(_short(row.name)) for row in report.groups)
    box = (left / WIDTH, foot / height, (WIDTH - left - NUMBERS) / WIDTH, bars / height)
    axes = figure.add_axes(box)
    _draw_bars(axes, report.groups)
    _draw_numbers(axes, report.groups)
    _draw_header(figure, axes, _title(report), height)
    for line, note in enumerate(notes):
        y = NOTE_ROW * (len(notes) - line - 0.3) / height
        colour = FAINT if line else INK
        figure.text(MARGIN / WIDTH, y, note, color=colour, fontsize=7.5, va="center")
    return figure


def save(figure: Figure, path: Path, dots: int = 150) -> None:
    """Write a figure in the format of the path's suffix (PNG where it has none).

    Args:
        figure: what to write.
        path: the file; it is replaced.
        dots: per inch.
    """
    kind = path.suffix[1:] or "png"
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=dots))


def draw_filters(layers: Sequence[Filters]) -> Figure:
    """One picture per layer, below each other, each weight a square of whole pixels at ``DOTS``.

    Args:
        layers: what to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures = [_tiles(layer) for layer in layers]
    sizes = [(p.shape[0] * s, p.shape[1] * s) for p in pictures for s in [_square(p)]]
    width = max([LONGEST_SIDE, *(across for _, across in sizes)]) + 2 * EDGE
    height = sum(down + TITLE for down, _ in sizes) + EDGE
    figure_module = _matplotlib("matplotlib.figure")
    figure = figure_module.Figure(figsize=(width / DOTS, height / DOTS), dpi=DOTS)
    top = height
    for layer, picture, (down, across) in zip(layers, pictures, sizes, strict=True):
        title = {"fontsize": 8, "color": INK, "va": "center"}
        figure.text(EDGE / width, (top - TITLE / 2) / height, _caption(layer), **title)
        top -= TITLE + down
        box = (EDGE / width, top / height, across / width, down / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(picture, interpolation="nearest", aspect="auto")
    return figure


def _square(picture: np.ndarray) -> int:
    """Pixels of a weight's side."""
    return max(1, min(LARGEST_SQUARE, LONGEST_SIDE // max(picture.shape[:2])))


def _across(layer: Filters) -> bool:
    """Whether outputs go across, and inputs down."""
    outputs, inputs, height, width = layer.weight.shape
    return outputs * width >= inputs * height


def _caption(layer: Filters) -> str:
    outputs, inputs = (int(layer.is_open.flatten(2).any(2).any(d).sum()) for d in (1, 0))
    total_out, total_in = layer.weight.shape[:2]
    way = ("across", "down") if _across(layer) else ("down", "across")
    return (
        f"{layer.name}: {outputs:,} of {total_out:,} outputs ({way[0]}), "
        f"{inputs:,} of {total_in:,} inputs ({way[1]}) open"
    )


def _tiles(layer: Filters) -> np.ndarray:
    """Colours of all weights, uint8 [rows, columns, 3], a white line between filters."""
    weight, is_open = layer.weight.float().numpy(), layer.is_open.numpy()
    size = np.abs(weight)
    full = np.quantile(size[is_open], FULL) if is_open.any() else 1.0
    strength = np.minimum(size / max(full, np.finfo(np.float32).tiny), 1)[..., None]
    end = np.where(weight[..., None] < 0, NEGATIVE, POSITIVE)
    colours = np.where(is_open[..., None], 255 + (end - 255) * strength, GREY).round()
    if max(weight.shape[2:]) > 1:
        room = [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)]
        colours = np.pad(colours, room, constant_values=255)
    order = (1, 2, 0, 3, 4) if _across(layer) else (0, 2, 1, 3, 4)
    tiles = colours.transpose(order).astype(np.uint8)
    rows, height, columns, width, _ = tiles.shape
    return tiles.reshape(rows * height, columns * width, 3)


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            "report.plot: expected matplotlib, which is not installed; "
            "pip install 'l0kernels[bench]'"
        ) from error


def _draw_bars(axes: Any, groups: tuple[GroupRow, ...]) -> None:
    places = range(len(groups))
    expected = [row.expected_open / row.units for row in groups]
    test = [row.test_open / row.units for row in groups]
    closed = axes.barh(places, [1.0] * len(groups), height=0.74, color=CLOSED)
    opened = axes.barh(places, expected, height=0.74, color=EXPECTED)
    marker = {"marker": "|", "s": 120, "linewidths": 2.2, "color": TEST}
    marks = axes.scatter(test, places, zorder=3, clip_on=False, **marker)
    for drawn, label in ((opened, "open, expected"), (marks, "open, test"), (closed, "closed")):
        drawn.set_label(label)
    axes.set_yticks(places, [_short(row.name) for row in groups], fontsize=8, color=INK)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.tick_params(axis="x", labelsize=8, colors=FAINT, length=3)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _draw_numbers(axes: Any, groups: tuple[GroupRow, ...]) -> None:
    """Three columns right of the bars."""
    style = {"fontsize": 7.5, "color": FAINT, "ha": "right", "va": "center"}
    for column in range(3):
        offset = (NUMBERS - MARGIN) * 72 * (column + 1) / 3
        for place, row in enumerate((None, *groups), -1):
            cells = ("expected", "test", "units") if row is None else _numbers(row)
            at = {"xytext": (offset, 0), "textcoords": "offset points"}
            axes.annotate(cells[column], (1, place), annotation_clip=False, **at, **style)


def _numbers(row: GroupRow) -> tuple[str, str, str]:
    return f"{row.expected_open:,.1f}", f"{row.test_open:,}", f"{row.units:,}"


def _draw_header(figure: Any, axes: Any, title: str, height: float) -> None:
    figure.text(MARGIN / WIDTH, 1 - 0.24 / height, title, color=INK, fontsize=10, va="center")
    handles, labels = axes.get_legend_handles_labels()
    order = [labels.index(label) for label in ("open, expected", "open, test", "closed")]
    figure.legend(
        handles=[handles[i] for i in order],
        loc="center left",
        bbox_to_anchor=(0.0, 1 - 0.52 / height),
        ncols=3,
        frameon=False,
        fontsize=8,
    )


def _title(report: Report) -> str:
    units = sum(row.units for row in report.groups)
    total = report.weights["total"]
    return (
        f"{_count(len(report.groups), 'group')}, {_count(units, 'unit')} · "
        f"{total:,.0f} weights: {report.weights['expected'] / total:.1%} expected open, "
        f"{report.weights['test'] / total:.1%} open at test"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(name: str) -> str:
    """Leave out the middle of a long name: its beginning and end say most."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 3) // 2
    return f"{name[:half]} … {name[-half:]}"


def _notes(report: Report) -> list[str]:
    """One line per kind of reason, with the layers it holds for, as many as fit."""
    if not report.ungated:
        return []
    known = {*report.ungated, *(n for g in report.groups for n in (*g.producers, *g.consumers))}
    layers: dict[str, list[str]] = {}
    for name, why in report.ungated.items():
        layers.setdefault(_kind(why, known - {name}), []).append(name)
    lines = []
    for kind, names in layers.items():
        # The reason in full where it is one layer's.
        why = kind if len(names) > 1 else report.ungated[names[0]]
        lines.append(_note(names, why))
    kept = lines if len(lines) <= MAX_NOTES else lines[: MAX_NOTES - 1]
    more = [f"and {_count(len(lines) - len(kept), 'reason')} more"] if kept != lines else []
    return [f"not gated: {_count(len(report.ungated), 'layer')}", *kept, *more]


def _kind(why: str, known: set[str]) -> str:
    """A reason without the names of layers: the blocks of a model share their reasons."""
    bare = re.sub(
        r"[\w.-]*\w", lambda m: "…" if m[0] in known or re.search(r"\w\.\w", m[0]) else m[0], why
    )
    return re.sub(r"…(, (…|\.\.\.))+", "…", bare)


def _note(names: list[str], why: str) -> str:
    line = f"{', '.join(names)}: {why}"
    if len(line) > LONGEST_NOTE and len(names) > 2:
        line = f"{names[0]}, {names[1]} and {len(names) - 2} more: {why}"
    return textwrap.shorten(line, LONGEST_NOTE, placeholder=" ...")
