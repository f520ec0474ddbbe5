# SPDX-License-Identifier: Apache-2.0
"""Time whole training steps: masked PyTorch, packing in plain PyTorch, the oracle, l0kernels."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from l0kernels._files import write_whole

from . import models
from .arms import VARIANTS, Arm, Oracle, Task, make_arm, require_agreement
from .timing import Spread, environment, interleave, paired, require_passive_wait, spread

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Name in tables: (over, under).
RATIOS = {
    "S as written": ("masked-nchw", "ours"),
    "S best": ("masked-best", "ours"),
    "R": ("ours", "oracle"),
    "R rounded": ("ours", "oracle-rounded"),
    "ours / index-select": ("ours", "index-select"),
    "index-select / oracle": ("index-select", "oracle"),
}
CONTENT = (
    "A step is gate draw + penalty + forward + backward + optimizer (SGD, Nesterov momentum .9, "
    "weight decay 5e-4, torch's fused implementation for every variant); gates are redrawn every "
    "step. The oracle is the network at the widths that ours draws in a round: it ends the round, "
    "rebuilt and warmed up outside the clock after ours has run, so that ours pays for what oneDNN "
    "prepares at widths it has not met, as in training. oracle-rounded, after it, is built once at "
    "round(open fraction * width), where widths are often multiples of 16, which CPU convolutions "
    "are fastest at. Neither has gates to draw. The others take turns in being first. "
    "oracle-rounded and index-select, which draws widths of its own, prepare some widths for ours "
    "too (--variants leaves variants out). S = masked / ours, R = ours / oracle: medians of ratios "
    "paired round by round, quartiles in brackets."
)


@dataclass(frozen=True)
class Setting:
    """One benchmark run.

    Args:
        model: name as in `models.network`.
        batch: examples per step.
        keep: open fractions.
        rounds: timed rounds per open fraction.
        warmup: untimed rounds before them.
        variants: which of `arms.VARIANTS` to time.
        device: "cpu", "cuda" or "cuda:N".
        seed: of weights, data and gates.
        amp: autocast around forward and loss: "none", "bf16" or "fp16" (without loss scaling).
    """

    model: str = "wrn-28-10"
    batch: int = 32
    keep: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    rounds: int = 15
    warmup: int = 3
    variants: tuple[str, ...] = VARIANTS
    device: str = "cpu"
    seed: int = 0
    amp: str = "none"


@dataclass
class Row:
    """The figures at one open fraction: milliseconds per round and variant, ratios, errors."""

    keep: float
    times: dict[str, list[float]]
    ratios: dict[str, Spread] = field(default_factory=dict)
    error_before: dict[str, float] = field(default_factory=dict)
    error_after: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """All figures of a run and where they come from."""

    setting: Setting
    environment: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; medians and quartiles of the times are added."""
        plain = asdict(self)
        for row, out in zip(self.rows, plain["rows"], strict=True):
            out["ms"] = {name: asdict(spread(times)) for name, times in row.times.items()}
        plain["step"] = CONTENT
        return plain


def measure(setting: Setting) -> Report:
    """Run the benchmark; nothing is timed unless all variants compute the same.

    Raises:
        ValueError: unknown model, variant or device, or open fractions outside (0, 1].
        RuntimeError: the wait policy is not passive, or variants disagree before or after timing.
    """
    require_passive_wait()
    check(setting)
    task = Task(
        models.network(setting.model),
        setting.batch,
        torch.device(setting.device),
        setting.seed,
        AMP[setting.amp],
    )
    before = environment(setting.device)
    gated = {n: make_arm(task, n) for n in setting.variants if not n.startswith("oracle")}
    rows = [measure_row(setting, task, gated, keep) for keep in setting.keep]
    after = environment(setting.device)["load_average"]
    return Report(setting, {**before, "load_average_after": after}, rows)


def check(setting: Setting) -> None:
    unknown = [name for name in setting.variants if name not in VARIANTS]
    if unknown or not setting.variants:
        raise ValueError(f"expected variants among {', '.join(VARIANTS)}, got {unknown or 'none'}")
    if not setting.keep or any(not 0 < keep <= 1 for keep in setting.keep):
        raise ValueError(f"expected open fractions in (0, 1], got {list(setting.keep)}")
    if setting.batch < 1 or setting.rounds < 1:
        raise ValueError(
            f"expected batch >= 1 and rounds >= 1, got {setting.batch} and {setting.rounds}"
        )
    if setting.amp not in AMP:
        raise ValueError(f"expected amp among {', '.join(AMP)}, got {setting.amp!r}")
    if torch.device(setting.device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"expected a CUDA device for {setting.device!r}, found none")


def measure_row(setting: Setting, task: Task, gated: dict[str, Arm], keep: float) -> Row:
    for arm in gated.values():
        arm.set_open(keep)
    before = errors(task, gated)
    drawn = int(gated["ours"].net.l0.step) if "ours" in gated else 0  # pyright: ignore
    arms: dict[str, Arm | Oracle] = dict(gated)
    last: dict[str, Callable[[], object]] = {}
    if "oracle" in setting.variants:
        arms["oracle"] = oracle = Oracle(task, keep, drawn)
        last["oracle"] = oracle.rebuild
    if "oracle-rounded" in setting.variants:
        arms["oracle-rounded"] = rounded = make_arm(task, "oracle-rounded", keep)
        last["oracle-rounded"] = rounded.step  # warm, as the other oracle is
    times = interleave(
        {name: arms[name].step for name in setting.variants},
        setting.rounds,
        setting.warmup,
        task.device,
        f"{setting.model} open {keep:g}",
        last,
    )
    ratios = {
        name: paired(times, over, under)
        for name, (over, under) in RATIOS.items()
        if over in times and under in times
    }
    return Row(keep, times, ratios, before, errors(task, gated))


def errors(task: Task, gated: dict[str, Arm]) -> dict[str, float]:
    """Check the variants against each other where ours is among them."""
    return require_agreement(task, gated["ours"].net, gated) if "ours" in gated else {}


def table(report: Report) -> str:
    """Return the figures as a Markdown table with what they mean."""
    names = list(report.setting.variants)
    ratios = list(report.rows[0].ratios)
    head = ["open", *(f"{name} [ms]" for name in names), *ratios]
    lines = [head, ["---:"] * len(head)]
    for row in report.rows:
        ms = [f"{spread(row.times[name]).median:.1f}" for name in names]
        lines.append([f"{row.keep:g}", *ms, *(str(row.ratios[name]) for name in ratios)])
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{title(report)}\n\n{rows}\n\n{CONTENT}\n{correctness(report)}\n"


def title(report: Report) -> str:
    setting, where = report.setting, report.environment
    return (
        f"{setting.model}, batch {setting.batch}, autocast {setting.amp}, {setting.rounds} rounds;"
        f" {where['device']}"
        f" ({where['cpu']}), {where['threads']} threads, torch {where['torch']}, l0kernels"
        f" {where['l0kernels']} ({where['git']}), OMP_WAIT_POLICY={where['OMP_WAIT_POLICY']}, load"
        f" average {where['load_average']} before, {where['load_average_after']} after"
    )


def correctness(report: Report) -> str:
    found = [
        error
        for row in report.rows
        for errors in (row.error_before, row.error_after)
        for error in errors.values()
    ]
    if not found:
        return "Variants were not compared: ours is not among them."
    return (
        "Loss and all gradients of the gated variants agree with the masked network under the same "
        "draw, in fp64, before and after timing: largest relative difference "
        f"{max(found):.1e}."
    )


def write(report: Report, folder: Path) -> list[Path]:
    """Write step.md, step.json, step.csv (one line per time) and step.png into a folder."""
    from .plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "step.md": table(report),
        "step.json": json.dumps(report.to_dict(), indent=1) + "\n",
        "step.csv": as_csv(report),
    }
    for name, text in texts.items():
        write_whole(folder / name, lambda file, text=text: file.write(text.encode()))
    return [*(folder / name for name in texts), plot(report, folder / "step.png")]


def as_csv(report: Report) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    where = ("device", "cpu", "threads", "torch", "l0kernels", "git", "time")
    rows.writerow(["model", "batch", "open", "variant", "round", "ms", *where])
    fixed = [report.environment[key] for key in where]
    for row in report.rows:
        for name, times in row.times.items():
            for index, ms in enumerate(times):
                what = [report.setting.model, report.setting.batch, row.keep, name, index]
                rows.writerow([*what, f"{ms:.3f}", *fixed])
    return out.getvalue()
