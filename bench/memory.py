# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench memory`: peak memory of a training step, each arm in a process of its own."""

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import models
from .arms import (
    Oracle,
    Task,
    ready_arm,
    require_agreement,
    require_closeness,
    require_variants,
    why_not,
)
from .figures import Figure, Sheet, markdown, shown, write_texts
from .operators import options_of
from .resident import elsewhere, reset_peak, resident, trim_heap
from .timing import environment

BASE = "masked-best"
STEPS = 2  # that are measured, after as many that allocate what a step keeps
CONTENT = (
    "Peak resident memory of a process that does training steps, in 10^6 bytes, Python, PyTorch "
    "and the optimizer's state included; freed blocks go back to the system at once. Every arm has "
    "a process of its own. Errors: after measuring, see `l0kernels bench step`."
)


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        model: name as in `models.network`.
        batch: examples per step.
        keep: open fractions.
        variants: which of `arms.ALL_VARIANTS`.
        seed: of weights, data and gates.
        threads: of the CPU; None: torch's choice.
    """

    model: str = "wrn-28-10"
    batch: int = 128
    keep: tuple[float, ...] = (0.5,)
    variants: tuple[str, ...] = (
        "dense", "masked-nchw", "masked-best", "index-select", "oracle", "ours",
    )  # fmt: skip
    seed: int = 0
    threads: int | None = None


def measure(setting: Setting) -> Sheet:
    """Measure every variant at every open fraction.

    Raises:
        ValueError: unknown model or variant, or numbers out of range.
        RuntimeError: a variant failed or computes something else, or the system does not tell
            the memory of a process.
    """
    task = check(setting)
    sheet = Sheet(command(setting), environment(), [])
    for keep in setting.keep:
        for variant in setting.variants:
            reason = why_not(task, variant)
            if reason:
                sheet.notes.append(f"{variant} is left out: {reason}")
                continue
            words = [variant, f"{keep:g}", json.dumps(asdict(setting))]
            peak, error = elsewhere("l0kernels.bench.memory", words)
            what = ("memory", "step", variant, "f32", f"{setting.model} batch {setting.batch}")
            sheet.figures.append(Figure(*what, keep, peak_mb=peak / 1e6, error=error))
    sheet.environment["load_average_after"] = environment()["load_average"]
    return sheet


def check(setting: Setting) -> Task:
    """Return what every variant does.

    Raises:
        ValueError: see `measure`.
        RuntimeError: the system does not tell the memory of a process.
    """
    require_variants(setting.variants)
    if not setting.keep or any(not 0 < keep <= 1 for keep in setting.keep):
        raise ValueError(f"expected open fractions in (0, 1], got {list(setting.keep)}")
    if setting.batch < 1:
        raise ValueError(f"expected batch >= 1, got {setting.batch}")
    if resident("VmHWM") is None:
        raise RuntimeError("expected /proc/self/status with the peak of resident memory")
    network = models.network(setting.model)
    return Task(network, setting.batch, torch.device("cpu"), setting.seed)


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench memory", *options_of(setting, Setting())])


def peak_of(task: Task, variant: str, keep: float) -> tuple[int, float]:
    """Return the peak of resident memory during steps, in bytes, and the error after them."""
    arm = ready_arm(task, variant, keep)
    for _ in range(STEPS):
        arm.step()
    gc.collect()
    trim_heap()
    reset_peak()
    for _ in range(STEPS):
        arm.step()
    peak = resident("VmHWM")
    assert peak is not None
    if variant == "ours" and not isinstance(arm, Oracle):
        return peak, require_agreement(task, arm.net, [variant])[variant]
    return peak, require_closeness(task, {variant: arm})[variant]


def peaks_of(sheet: Sheet) -> Iterator[tuple[Figure, float | None]]:
    """Give every peak, and how many times that of the mask at its best it is."""
    base = sheet.find(BASE)
    for figure in sheet.figures:
        if figure.op == "memory" and figure.peak_mb is not None:
            other = base.get(figure.problem)
            yield figure, figure.peak_mb / other.peak_mb if other and other.peak_mb else None


def table(sheet: Sheet) -> str:
    """Return the figures as a Markdown table with what they mean."""
    rows = []
    for figure, ratio in peaks_of(sheet):
        cells = (shown(figure.peak_mb, ".0f"), shown(ratio, ".2f"), shown(figure.error, ".1e"))
        rows.append((figure.shape, f"{figure.open:g}", figure.impl, *cells))
    head = ("network", "open", "variant", "peak [MB]", f"/ {BASE}", "error")
    notes = "\n".join(f"- {note}" for note in sheet.notes)
    parts = (f"`{sheet.command}`", markdown(head, rows, 3), notes, CONTENT)
    return "\n\n".join(part for part in parts if part)


def write(sheet: Sheet, folder: Path) -> list[Path]:
    """Write memory.md, memory.json, memory.csv and memory.png into a folder."""
    from .plot import plot_memory

    texts = {"memory.md": table(sheet) + "\n", "memory.csv": sheet.to_csv()}
    texts["memory.json"] = json.dumps(sheet.to_dict(), indent=1) + "\n"
    return [*write_texts(folder, texts), plot_memory(sheet, folder / "memory.png")]


def main() -> None:
    """Print peak and error of one variant, as `measure` reads them."""
    variant, keep, text = sys.argv[1:]
    found: dict[str, Any] = json.loads(text)
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    setting = Setting(**found)
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    print(json.dumps(peak_of(check(setting), variant, float(keep))))


if __name__ == "__main__":
    main()
