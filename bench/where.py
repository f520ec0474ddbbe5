# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench where`: where the time of a training step goes, by kind of work."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import models
from .arms import Arm, Oracle, Task, ready_arm, require_variants, why_not
from .figures import markdown, write_texts
from .operators import options_of
from .timing import environment, require_passive_wait

# Operators of each kind by the beginnings of their names; the first that fits counts.
KINDS: dict[str, tuple[str, ...]] = {
    "gates": ("l0kernels::sample_gates", "l0kernels::open_lists"),
    "pack, backward": ("l0kernels::pack_weight_backward", "l0kernels::pack_weights_backward"),
    "pack": ("l0kernels::pack_weight",),
    "norms": ("l0kernels::packed_norm", "aten::native_batch_norm", "aten::native_layer_norm"),
    "optimizer": ("aten::_fused_sgd", "l0kernels::sgd_rows", "l0kernels::open_rows"),
    "convolutions, products": (
        "aten::mkldnn_convolution",
        "aten::convolution",
        "aten::_convolution",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::linear",
        "mkldnn::_linear_pointwise",
    ),
    "other operators": ("aten::", "l0kernels::"),
}
HOST = "Python and autograd"
CONTENT = (
    "Time that the operators of each kind take themselves, without what they call, per step, as "
    f"torch.profiler has it; {HOST} is what is left of the profiled step. The profiler adds some "
    "microseconds to each operator, so the parts are for comparing; step is the median without it."
)


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        model: name as in `models.network`.
        batch: examples per step.
        keep: open fraction.
        steps: profiled steps of each variant, after half as many that warm up.
        variants: which of `arms.ALL_VARIANTS`.
        seed: of weights, data and gates.
        threads: of the CPU; None: torch's choice.
    """

    model: str = "lenet5"
    batch: int = 128
    keep: float = 0.5
    steps: int = 50
    variants: tuple[str, ...] = ("masked-best", "oracle", "ours")
    seed: int = 0
    threads: int | None = None


@dataclass
class Part:
    """Milliseconds per step of one variant: of every kind, and of a step without the profiler."""

    variant: str
    kinds: dict[str, float]
    step: float


@dataclass
class Report:
    """All parts and where they come from."""

    setting: Setting
    environment: dict[str, Any]
    parts: list[Part]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "command": command(self.setting), "where": CONTENT}


def kind_of(operator: str) -> str:
    """Return the kind of work of an operator or of another thing that the profiler names."""
    for kind, beginnings in KINDS.items():
        if operator.startswith(beginnings):
            return kind
    return HOST


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench where", *options_of(setting, Setting())])


def check(setting: Setting) -> Task:
    """Return what every variant does.

    Raises:
        ValueError: unknown model or variant, or numbers out of range.
    """
    require_variants(setting.variants)
    if not 0 < setting.keep <= 1:
        raise ValueError(f"expected an open fraction in (0, 1], got {setting.keep}")
    if min(setting.batch, setting.steps) < 1:
        numbers = (setting.batch, setting.steps)
        raise ValueError(f"expected batch >= 1 and steps >= 1, got {numbers}")
    network = models.network(setting.model)
    return Task(network, setting.batch, torch.device("cpu"), setting.seed)


def measure(setting: Setting) -> Report:
    """Profile every variant.

    Raises:
        ValueError: see `check`.
        RuntimeError: the wait policy is not passive.
    """
    require_passive_wait()
    task = check(setting)
    report = Report(setting, environment(), [], [])
    for variant in setting.variants:
        reason = why_not(task, variant)
        if reason:
            report.notes.append(f"{variant} is left out: {reason}")
        else:
            report.parts.append(profiled(ready_arm(task, variant, setting.keep), variant, setting))
    return report


def profiled(arm: Arm | Oracle, variant: str, setting: Setting) -> Part:
    for _ in range(-(-setting.steps // 2)):
        arm.step()
    plain = [timed(arm) for _ in range(setting.steps)]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        whole = sum(timed(arm) for _ in range(setting.steps))
    kinds = dict.fromkeys((*KINDS, HOST), 0.0)
    for event in found.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    kinds[HOST] = max(0.0, whole - sum(t for kind, t in kinds.items() if kind != HOST))
    per_step = {kind: 1e3 * seconds / setting.steps for kind, seconds in kinds.items()}
    return Part(variant, per_step, 1e3 * median(plain))


def timed(arm: Arm | Oracle) -> float:
    start = time.perf_counter()
    arm.step()
    return time.perf_counter() - start


def table(report: Report) -> str:
    """Return the parts as a Markdown table with what they mean."""
    head = ("variant", "step [ms]", *(f"{kind} [ms]" for kind in (*KINDS, HOST)))
    rows = [
        (part.variant, f"{part.step:.2f}", *(f"{ms:.2f}" for ms in part.kinds.values()))
        for part in report.parts
    ]
    where = report.environment
    place = (
        f"`{command(report.setting)}`: {where['cpu']}, {where['threads']} threads, torch "
        f"{where['torch']}, l0kernels {where['l0kernels']} ({where['git']})"
    )
    notes = "\n".join(f"- {note}" for note in report.notes)
    return "\n\n".join(text for text in (place, markdown(head, rows, 1), notes, CONTENT) if text)


def write(report: Report, folder: Path) -> list[Path]:
    """Write where.md, where.json and where.png into a folder."""
    from .plot import plot_where

    texts = {"where.md": table(report) + "\n"}
    texts["where.json"] = json.dumps(report.to_dict(), indent=1) + "\n"
    return [*write_texts(folder, texts), plot_where(report, folder / "where.png")]
