# SPDX-License-Identifier: Apache-2.0
"""Figures of the benchmarks, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l0kernels._files import write_whole

from . import models
from .figures import OURS, Figure, Sheet
from .timing import Spread, middle_run
from .work import work_left

if TYPE_CHECKING:
    from .step import Report, Row
    from .where import Report as WhereReport

# Okabe and Ito's palette; every line has its own marker as well.
STYLES = {
    "S as written": ("#E69F00", "s"),
    "S best": ("#0072B2", "o"),
    "S dense": ("#999999", "P"),
    "S compiled": ("#F0E442", "X"),
    "R": ("#009E73", "o"),
    "R oneDNN": ("#332288", "*"),
    "R rounded": ("#D55E00", "D"),
    "ours / index-select": ("#CC79A7", "^"),
    "index-select / oracle": ("#56B4E9", "v"),
    "ours / torch-prune": ("#882255", "<"),
    "ours / torch-pruning": ("#117733", ">"),
}
ORACLE = ("#009E73", "D")
KIND_COLOURS = (
    "#F0E442", "#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#999999", "#333333",
)  # fmt: skip
OPERATORS = ("#0072B2", "o")
IDEAL = {"color": "0.4", "linestyle": ":", "label": "ideal"}


def plot_step(report: Report, path: Path) -> Path:
    """Draw speed-up and distance from the oracle against the open fraction, quartiles as bars.

    Beside ours there is what the oracle would gain over the mask at its best, and the ideal: the
    inverse of the work that the open units leave. The crossover is marked.

    Args:
        report: figures from `step.measure`.
        path: PNG file to write.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, canvas = new_figure(9, 4)
    speed, distance = figure.subplots(1, 2)
    rows = sorted(report.rows, key=lambda row: row.keep)
    for axes, gains in ((speed, True), (distance, False)):
        for name, style in STYLES.items():
            if name.startswith("S ") == gains and name in rows[0].ratios:
                draw_line(axes, name, style, [(row.keep, row.ratios[name]) for row in rows])
    draw_oracle_and_ideal(speed, rows, report.setting.model)
    if "S best" in rows[0].ratios:
        mark_crossover(speed, [(row.keep, row.ratios["S best"].median) for row in rows])
    by_powers_of_two(speed)
    speed.set(title="Speed-up over other training", ylabel="other / ours")
    distance.set(title="Distance from the oracle", ylabel="ratio of step times")
    finish(figure, (speed, distance))
    setting = report.setting
    figure.suptitle(f"{setting.model}, batch {setting.batch}, {report.environment['device']}")
    write_whole(path, canvas.print_png)
    return path


def draw_oracle_and_ideal(axes: Any, rows: Sequence[Row], model: str) -> None:
    if {"masked-best", "oracle"} <= rows[0].times[0].keys():
        gains = [(row.keep, middle_run(row.times, "masked-best", "oracle")) for row in rows]
        draw_line(axes, "oracle over S best", ORACLE, gains)
    network = models.network(model)
    axes.plot([r.keep for r in rows], [1 / work_left(network, r.keep) for r in rows], **IDEAL)


def plot_ops(sheet: Sheet, path: Path) -> Path:
    """Draw the speed-up of operators over plain PyTorch, a panel for each problem and pass.

    Args:
        sheet: figures from `operators.measure`.
        path: PNG file to write.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels: dict[tuple[str, ...], list[Figure]] = {}
    for found in sheet.figures:
        name = (found.op, found.part, found.dtype, found.shape)
        panels.setdefault(name, []).append(found)
    columns = min(4, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure, canvas = new_figure(3.6 * columns, 2.8 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, figures) in zip(grid, panels.items(), strict=False):
        draw_operator(axes, figures)
        axes.set_title(" ".join(name), fontsize=8)
    finish(figure, grid[: len(panels)])
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    write_whole(path, canvas.print_png)
    return path


def plot_memory(sheet: Sheet, path: Path) -> Path:
    """Draw the peak memory of every arm, a panel for each open fraction.

    Args:
        sheet: figures from `memory.measure`.
        path: PNG file to write.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    keeps = list(dict.fromkeys(found.open for found in sheet.figures))
    picture, canvas = new_figure(4.5 * max(1, len(keeps)), 3.5)
    for axes, keep in zip(
        picture.subplots(1, max(1, len(keeps)), squeeze=False)[0], keeps, strict=False
    ):
        bars = [(f.impl, f.peak_mb) for f in sheet.figures if f.open == keep]
        axes.barh(*zip(*bars, strict=True), color=OPERATORS[0])
        axes.invert_yaxis()
        axes.set(title=f"{sheet.figures[0].shape}, open {keep:g}", xlabel="peak [MB]")
    write_whole(path, canvas.print_png)
    return path


def plot_where(report: WhereReport, path: Path) -> Path:
    """Draw where the time of a step goes, a bar for each variant.

    Args:
        report: from `where.measure`.
        path: PNG file to write.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    picture, canvas = new_figure(9, 1.6 + 0.5 * len(report.parts))
    axes = picture.subplots()
    names = [part.variant for part in report.parts]
    ends = [0.0] * len(names)
    kinds = report.parts[0].kinds if report.parts else {}
    for kind, colour in zip(kinds, KIND_COLOURS, strict=False):
        widths = [part.kinds[kind] for part in report.parts]
        axes.barh(names, widths, left=ends, color=colour, edgecolor="white", label=kind)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="profiled step [ms]")
    picture.legend(loc="outside lower center", ncols=4, fontsize=8)
    setting = report.setting
    picture.suptitle(f"{setting.model}, batch {setting.batch}, open {setting.keep:g}")
    write_whole(path, canvas.print_png)
    return path


def draw_operator(axes: Any, figures: Sequence[Figure]) -> None:
    """Draw plain / ours, plain / oracle and the work that is left."""
    by_arm: dict[str, dict[float, Figure]] = {}
    for found in figures:
        by_arm.setdefault(found.impl, {})[found.open] = found
    ours = next((name for name in OURS if name in by_arm), None)
    for name, style in ((ours, OPERATORS), ("oracle", ORACLE)):
        if name in by_arm and "plain" in by_arm:
            gains = gains_over(by_arm["plain"], by_arm[name])
            axes.plot(*zip(*gains, strict=True), color=style[0], marker=style[1], label=name)
            if name == ours:
                mark_crossover(axes, gains)
    if ours is not None:
        work = {keep: f.rate * f.p50_ms for keep, f in by_arm[ours].items() if f.rate and f.p50_ms}
        keeps = sorted(work)
        axes.plot(keeps, [max(work.values()) / work[keep] for keep in keeps], **IDEAL)
    by_powers_of_two(axes)
    axes.set_ylabel("plain / other")


def gains_over(plain: dict[float, Figure], other: dict[float, Figure]) -> list[tuple[float, float]]:
    """Return the ratio of median times by open fraction, ascending."""
    gains = []
    for keep in sorted(plain.keys() & other.keys()):
        over, under = plain[keep].p50_ms, other[keep].p50_ms
        if over and under:
            gains.append((keep, over / under))
    return gains


def crossover(gains: Sequence[tuple[float, float]]) -> float | None:
    """Return the largest open fraction below which a speed-up exceeds 1, None without one.

    Args:
        gains: open fraction and speed-up, ascending; in between, lines of its logarithm.
    """
    pairs = list(zip(gains, gains[1:], strict=False))
    for (x0, y0), (x1, y1) in reversed(pairs):
        if y0 > 1 >= y1:
            return x0 + math.log(y0) / math.log(y0 / y1) * (x1 - x0)
    return None


def mark_crossover(axes: Any, gains: Sequence[tuple[float, float]]) -> None:
    place = crossover(gains)
    if place is not None:
        axes.plot([place], [1.0], marker="|", color="k", markersize=16)
        axes.annotate(f"faster below {place:.2f} ", (place, 1.0), fontsize=8, ha="right", va="top")


def by_powers_of_two(axes: Any) -> None:
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")


def draw_line(
    axes: Any, name: str, style: tuple[str, str], points: Sequence[tuple[float, Spread]]
) -> None:
    spreads = [spread for _, spread in points]
    middle = [s.median for s in spreads]
    ends = ([s.median - s.low for s in spreads], [s.high - s.median for s in spreads])
    colour, marker = style
    axes.errorbar(
        [keep for keep, _ in points],
        middle,
        yerr=ends,
        color=colour,
        marker=marker,
        capsize=3,
        label=name,
    )


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def finish(figure: Any, panels: Sequence[Any]) -> None:
    for axes in panels:
        axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--")
        axes.set_xlabel("open fraction")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
