# SPDX-License-Identifier: Apache-2.0
"""Figures of the benchmarks, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from l0kernels._files import write_whole

if TYPE_CHECKING:
    from .step import Report

# Okabe and Ito's palette; every line has its own marker as well.
STYLES = {
    "S as written": ("#E69F00", "s"),
    "S best": ("#0072B2", "o"),
    "R": ("#009E73", "o"),
    "R rounded": ("#D55E00", "D"),
    "ours / index-select": ("#CC79A7", "^"),
    "index-select / oracle": ("#56B4E9", "v"),
}


def plot(report: Report, path: Path) -> Path:
    """Draw speed-up and distance from the oracle against the open fraction, quartiles as bars.

    Args:
        report: figures from `step.measure`.
        path: PNG file to write.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    speed, distance = figure.subplots(1, 2)
    draw_lines(speed, report, [name for name in STYLES if name.startswith("S ")])
    draw_lines(distance, report, [name for name in STYLES if not name.startswith("S ")])
    speed.set(title="Speed-up over masked training", ylabel="masked / ours")
    distance.set(title="Distance from the oracle", ylabel="ratio of step times")
    setting = report.setting
    figure.suptitle(f"{setting.model}, batch {setting.batch}, {report.environment['device']}")
    write_whole(path, canvas.print_png)
    return path


def draw_lines(axes, report: Report, names: list[str]) -> None:
    rows = sorted(report.rows, key=lambda row: row.keep)
    drawn = [name for name in names if name in rows[0].ratios]
    for name in drawn:
        colour, marker = STYLES[name]
        spreads = [row.ratios[name] for row in rows]
        middle = [s.median for s in spreads]
        ends = ([s.median - s.low for s in spreads], [s.high - s.median for s in spreads])
        axes.errorbar(
            [row.keep for row in rows],
            middle,
            yerr=ends,
            color=colour,
            marker=marker,
            capsize=3,
            label=name,
        )
    axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--")
    axes.set_xlabel("open fraction")
    if drawn:
        axes.legend()
