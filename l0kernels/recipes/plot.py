# SPDX-License-Identifier: Apache-2.0
"""Curves of a run as a PNG."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from l0kernels._files import write_whole
from l0kernels.recipes.arm import MASKED, PACKED
from l0kernels.recipes.errors import optional
from l0kernels.recipes.summary import TITLES, Result

# Okabe and Ito's colours can be told apart with any colour vision; line styles differ as well.
COLOURS = {PACKED: "#0072B2", MASKED: "#D55E00"}
STYLES = {PACKED: "-", MASKED: "--"}
OPEN = {
    "weights_expected": ("expected", "#0072B2", "-"),
    "weights_realised": ("drawn", "#009E73", "--"),
    "weights_test": ("test gates", "#E69F00", ":"),
}


def need() -> None:
    """Check that plots can be drawn, before hours of training.

    Raises:
        InputError: matplotlib is not installed.
    """
    optional("matplotlib", "the plot")


def draw(results: list[Result], path: Path) -> None:
    """Three panels over the epochs: loss, fraction of open weights, milliseconds per step.

    Args:
        results: finished seeds, one line each.
        path: PNG file; it is replaced.
    """
    # Figure without pyplot: no window system, no global state.
    figure_module: Any = optional("matplotlib.figure", "the plot")
    figure = figure_module.Figure(figsize=(12, 3.6), layout="constrained")
    losses, opened, times = figure.subplots(1, 3)
    for number, result in enumerate(results):
        epochs = [record["epoch"] for record in result.history]
        # Labels once, for the legend.
        first = number == 0
        for arm in (PACKED, MASKED) if result.compared else (PACKED,):
            look = {
                "color": COLOURS[arm],
                "linestyle": STYLES[arm],
                "label": TITLES[arm] if first else None,
            }
            losses.plot(epochs, result.series(arm, "loss"), **look)
            times.plot(epochs, result.series(arm, "step_ms"), **look)
        for start in _starts(result):
            for axes in (losses, opened, times):
                axes.axvline(start + 0.5, color="#cccccc", linewidth=0.8, zorder=0)
        for key, (label, colour, style) in OPEN.items():
            total = result.history[0]["arms"][PACKED]["weights_total"]
            left = [value / total for value in result.series(PACKED, key)]
            opened.plot(epochs, left, color=colour, linestyle=style, label=label if first else None)
    _finish(losses, "loss (data + penalty)", log=True)
    _finish(opened, "fraction of weights open", log=False)
    _finish(times, "ms per step (median)", log=False)
    figure.suptitle(_title(results))
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _finish(axes: Any, label: str, log: bool) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _starts(result: Result) -> list[int]:
    """Epochs after which a new phase begins."""
    lengths = [phase.epochs for phase in result.plan.phases]
    return [*itertools.accumulate(lengths)][:-1]


def _title(results: list[Result]) -> str:
    plan = results[0].plan
    seeds = ", ".join(result.plan.label for result in results)
    word = "seed" if len(results) == 1 else "seeds"
    return f"{plan.recipe.name} on {plan.images.name}, {word} {seeds}"
