# SPDX-License-Identifier: Apache-2.0
"""What a finished run says: numbers, and a table to paste."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from l0kernels._version import __version__
from l0kernels.recipes.arm import MASKED, PACKED
from l0kernels.recipes.loop import Plan
from l0kernels.recipes.recipe import Recipe

MIB = 2**20
MOST_GROUPS = 16
TITLES = {PACKED: "packed", MASKED: "masked"}


@dataclass(frozen=True)
class Result:
    """A finished seed.

    Args:
        plan: what was trained.
        history: one record per epoch, as ``Run`` makes them.
        layout: memory format of the masked reference, or None.
    """

    plan: Plan
    history: list[dict[str, Any]]
    layout: str | None

    def series(self, arm: str, key: str) -> list[Any]:
        """One entry of one arm over all epochs."""
        return [record["arms"][arm][key] for record in self.history]

    @property
    def compared(self) -> bool:
        """Whether the masked reference ran beside."""
        return self.plan.compare


def arm_summary(result: Result, arm: str) -> dict[str, Any]:
    """Final numbers of one arm, plain values.

    Args:
        result: a finished seed.
        arm: ``"packed"`` or ``"masked"``.
    """
    first, last = result.history[0]["arms"][arm], result.history[-1]["arms"][arm]
    total = last["weights_total"]
    measured = [m for m in result.series(arm, "step_memory") if m is not None]
    return {
        "accuracy": last["accuracy"],
        "open_units": _units(last["open_units"], result.plan.recipe),
        "weights_total": total,
        "left_expected": last["weights_expected"] / total,
        "left_realised": last["weights_realised"] / total,
        "left_test": last["weights_test"] / total,
        "loss": last["loss"],
        "data_loss": last["data_loss"],
        "step_ms_first": first["step_ms"],
        "step_ms_last": last["step_ms"],
        "seconds": sum(result.series(arm, "seconds")),
        "step_memory_first": measured[0],
        "step_memory_last": measured[-1],
    }


def _units(counts: list[int], recipe: Recipe) -> str:
    if recipe.options.get("granularity") == "weight":
        return f"{sum(counts):,} weights"
    return "-".join(map(str, counts)) if len(counts) <= MOST_GROUPS else f"{sum(counts):,}"


def comparison(result: Result) -> dict[str, float]:
    """How the two arms of a seed compare, plain values.

    Args:
        result: a finished seed with both arms.
    """
    packed, masked = result.series(PACKED, "seconds"), result.series(MASKED, "seconds")
    speed = [m / p for p, m in zip(packed, masked, strict=True)]
    accuracies = result.series(PACKED, "accuracy")[-1], result.series(MASKED, "accuracy")[-1]
    return {
        "speed_up_first": speed[0],
        "speed_up_last": speed[-1],
        "speed_up_best": max(speed),
        "speed_up": sum(masked) / sum(packed),
        "loss_difference": _largest_difference(result, "loss"),
        "data_loss_difference": _largest_difference(result, "data_loss"),
        "data_loss_difference_absolute": max(
            abs(p - m)
            for p, m in zip(
                result.series(PACKED, "data_loss"), result.series(MASKED, "data_loss"), strict=True
            )
        ),
        "accuracy_difference": abs(accuracies[0] - accuracies[1]),
    }


def phases(result: Result) -> list[dict[str, Any]]:
    """How each phase of a run ended, plain values.

    Args:
        result: a finished run.
    """
    found = []
    for phase in result.plan.phases:
        entries = [r["arms"][PACKED] for r in result.history if r["phase"] == phase.name]
        last = entries[-1]
        found.append(
            {
                "phase": phase.name,
                "epochs": phase.epochs,
                "accuracy": last["accuracy"],
                "left_test": last["weights_test"] / last["weights_total"],
                "step_ms": last["step_ms"],
                "seconds": sum(entry["seconds"] for entry in entries),
            }
        )
    return found


def _largest_difference(result: Result, key: str) -> float:
    pairs = zip(result.series(PACKED, key), result.series(MASKED, key), strict=True)
    return max(abs(p - m) / abs(m) if m else abs(p) for p, m in pairs)


def to_dict(results: list[Result]) -> dict[str, Any]:
    """Everything the table says, ready for JSON."""
    plan = results[0].plan
    return {
        "recipe": plan.recipe.name,
        "data": plan.images.name,
        "n_train": len(plan.images.train_y),
        "n_test": len(plan.images.test_y),
        "settings": plan.settings.to_dict(),
        "machine": _machine(plan.device),
        "seeds": [
            {
                "seed": result.plan.seed,
                "initial": result.plan.settings.initial,
                "reference_layout": result.layout,
                "arms": {arm: arm_summary(result, arm) for arm in _arms(result)},
                "phases": phases(result),
                **({"compared": comparison(result)} if result.compared else {}),
            }
            for result in results
        ],
        "published": [asdict(row) for row in plan.recipe.rows],
    }


def markdown(results: list[Result]) -> str:
    """The tables at the end of a run."""
    plan = results[0].plan
    lines = [
        _heading(plan),
        "",
        "| seed | arm | test accuracy % | open units | weights left % expected / drawn / test "
        "| ms per step first / last epoch | step memory MiB first / last epoch |",
        "|---:|---|---:|---|---:|---:|---:|",
    ]
    lines += [_arm_row(result, arm) for result in results for arm in _arms(result)]
    if results[0].compared:
        lines += [
            "",
            "| seed | speed-up first epoch | last | best | whole run | largest difference of "
            "epoch losses: total % / data % / data | accuracy difference, points |",
            "|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_comparison_row(result) for result in results]
    if len(plan.phases) > 1:
        lines += [
            "",
            "| seed | phase | epochs | test accuracy % at its end | weights left % test "
            "| ms per step, last epoch | seconds |",
            "|---:|---|---:|---:|---:|---:|---:|",
        ]
        lines += [row for result in results for row in _phase_rows(result)]
    return "\n".join([*lines, "", *_published(plan), "", _legend(results[0])])


def _heading(plan: Plan) -> str:
    settings, machine = plan.settings, _machine(plan.device)
    return (
        f"**{plan.recipe.name}** on {plan.images.name}: {len(plan.images.train_y):,} train, "
        f"{len(plan.images.test_y):,} test; {plan.epochs} epochs of {plan.steps} steps, "
        f"batch {settings.batch}, lr {settings.lr:g}, gate lr {settings.gate_lr:g}, "
        f"lam {_numbers(settings.lam)} / {settings.penalty_n or plan.images.whole:,}; "
        f"l0kernels {machine['l0kernels']}, torch {machine['torch']}, "
        + (machine["gpu"] or f"{machine['threads']} threads")
    )


def _phase_rows(result: Result) -> list[str]:
    return [
        f"| {result.plan.label} | {p['phase']} | {p['epochs']} | {p['accuracy']:.2f} "
        f"| {100 * p['left_test']:.1f} | {p['step_ms']:.2f} | {p['seconds']:.0f} |"
        for p in phases(result)
    ]


def _published(plan: Plan) -> list[str]:
    """The published figures as a table, or that there are none."""
    if not plan.recipe.rows:
        return ["No published result of this recipe is at hand."]
    lines = [
        "| published | test accuracy % | open units | weights left % | source |",
        "|---|---:|---|---:|---|",
    ]
    for row in plan.recipe.rows:
        doubt = "" if row.confirmed else " (not confirmed)"
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2f}{doubt}"
        left = "" if row.left is None else f"{row.left:.2f}{doubt}"
        units = row.units and f"{row.units}{doubt}"
        lines.append(f"| {row.what} | {accuracy} | {units} | {left} | {row.source} |")
    return lines


def _arms(result: Result) -> list[str]:
    return [PACKED, MASKED] if result.compared else [PACKED]


def _arm_row(result: Result, arm: str) -> str:
    s = arm_summary(result, arm)
    title = TITLES[arm] + (f" ({result.layout})" if arm == MASKED else "")
    left = " / ".join(f"{100 * s[f'left_{kind}']:.1f}" for kind in ("expected", "realised", "test"))
    steps = f"{s['step_ms_first']:.2f} / {s['step_ms_last']:.2f}"
    memory = f"{s['step_memory_first'] / MIB:.1f} / {s['step_memory_last'] / MIB:.1f}"
    return (
        f"| {result.plan.label} | {title} | {s['accuracy']:.2f} | {s['open_units']} | {left} "
        f"| {steps} | {memory} |"
    )


def _comparison_row(result: Result) -> str:
    c = comparison(result)
    return (
        f"| {result.plan.label} | {c['speed_up_first']:.2f} | {c['speed_up_last']:.2f} "
        f"| {c['speed_up_best']:.2f} | {c['speed_up']:.2f} "
        f"| {100 * c['loss_difference']:.2f} / {100 * c['data_loss_difference']:.2f} / "
        f"{c['data_loss_difference_absolute']:.4f} "
        f"| {c['accuracy_difference']:.2f} |"
    )


def _legend(result: Result) -> str:
    lines = [
        "Weights of convolutions and linear layers left of all "
        f"{result.history[-1]['arms'][PACKED]['weights_total']:,}: expected under the training "
        "gates, drawn (mean over the last epoch's steps), with the test gates. ms per step: median "
        "of an epoch; draw, penalty, forward, backward, optimizer and averaging. Step memory: peak "
        "of PyTorch's allocator in one step beyond parameters and optimizer state."
    ]
    if result.compared:
        lines.append(
            "Masked: the same network, draws and batches, computed densely; its memory format is "
            "the faster of two, measured. Speed-up: masked / packed seconds of training steps. The "
            "arms differ by rounding, which training amplifies; total: data loss plus penalty."
        )
    return " ".join(lines)


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "l0kernels": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _numbers(values: tuple[float, ...]) -> str:
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return f"[{', '.join(f'{v:g}' for v in values)}]"
