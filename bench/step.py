# SPDX-License-Identifier: Apache-2.0
"""Time whole training steps: masked PyTorch, packing in plain PyTorch, the oracle, l0kernels."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from l0kernels.convert.place import PLACES

from . import models
from .arms import (
    IN_SINGLE,
    REBUILT,
    UNGATED,
    VARIANTS,
    Arm,
    Oracle,
    Task,
    make_arm,
    require_agreement,
    require_closeness,
    require_variants,
    why_not,
)
from .figures import Figure, Sheet, markdown, timed, write_texts
from .operators import options_of
from .timing import (
    Runs,
    Spread,
    environment,
    interleave,
    middle_run,
    often,
    paired,
    repeated,
    require_passive_wait,
)

OPTIMIZERS = ("torch", "open-rows")
MODES = ("eager", "graph")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Name in tables: (over, under).
RATIOS = {
    "S as written": ("masked-nchw", "ours"),
    "S best": ("masked-best", "ours"),
    "S dense": ("dense", "ours"),
    "S compiled": ("masked-compiled", "ours"),
    "R": ("ours", "oracle"),
    "R oneDNN": ("ours", "oracle-onednn"),
    "R rounded": ("ours", "oracle-rounded"),
    "ours / index-select": ("ours", "index-select"),
    "index-select / oracle": ("index-select", "oracle"),
    "ours / torch-prune": ("ours", "torch-prune"),
    "ours / torch-pruning": ("ours", "torch-pruning"),
}
# Of a variant's turn: steps that are shorter are repeated, as in training.
TURN_SECONDS = 0.05
CONTENT = (
    "A step is gate draw + penalty + forward + backward + optimizer (SGD, Nesterov momentum .9, "
    "weight decay 5e-4, torch's fused implementation for every variant; --optimizer open-rows: "
    "l0.optim.SGD for ours); gates are redrawn every step. A variant's turn is one step, or as "
    "many as fill 50 ms: training repeats them, and a step finds the caches as its like left them. "
    "dense is the full network without "
    "gates. The oracle is the network at the widths that ours draws last in a round: it ends the "
    "round, rebuilt and warmed up outside the clock after ours has run, so that ours pays for "
    "what oneDNN prepares at widths it has not met, as in training (oneDNN has room for all of "
    "them, so that oracles push nothing of the others out); oracle-onednn is the same "
    "with linear layers in oneDNN. oracle-rounded, after it, is built once at round(open "
    "fraction * width), where widths are often multiples of 16, which CPU convolutions are "
    "fastest at; torch-pruning has these widths too, torch-prune masks the same units. None of "
    "these has gates to draw. The others take turns in being first. oracle-rounded, "
    "torch-pruning and index-select, which draws widths of its own, prepare some widths for ours "
    "too (--variants leaves variants out). --mode graph replays steps from CUDA graphs, ours at "
    "planned widths (l0.graph), the oracle's at exact ones, captured outside the clock. S = other "
    "/ ours, R = ours / oracle: medians of ratios paired round by round, quartiles in brackets. Of "
    "several runs the one with the middle "
    "median counts; the JSON has all."
)


@dataclass(frozen=True)
class Setting:
    """One benchmark run.

    Args:
        model: name as in `models.network`.
        batch: examples per step.
        keep: open fractions.
        rounds: timed rounds per open fraction and run.
        runs: of all rounds.
        warmup: untimed rounds before each run.
        variants: which of `arms.ALL_VARIANTS` to time.
        device: "cpu", "cuda" or "cuda:N".
        seed: of weights, data and gates.
        amp: autocast around forward and loss: "none", "bf16" or "fp16" (without loss scaling).
        optimizer: of ours: "torch", as the others have it, or "open-rows": `l0.optim.SGD`.
        mode: "eager", or "graph": steps are replayed from CUDA graphs; on a CPU, which has none, a
            dry run that launches each operator.
        place: of the gates: "after_act", or "before_norm", where the oracle leaves out what closed
            units add.
        threads: of the CPU; None: torch's choice.
        trained: folder of a run of `l0kernels train`, whose network and gates at its end are timed
            in place of model, batch and keep: see `trained`.
    """

    model: str = "wrn-28-10"
    batch: int = 32
    keep: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    rounds: int = 15
    runs: int = 3
    warmup: int = 3
    variants: tuple[str, ...] = VARIANTS
    device: str = "cpu"
    seed: int = 0
    amp: str = "none"
    optimizer: str = "torch"
    mode: str = "eager"
    place: str = "after_act"
    threads: int | None = None
    trained: str | None = None

    @property
    def problem(self) -> str:
        """What is timed, in a few words."""
        if self.trained is not None:
            return Path(self.trained).name
        place = "" if self.place == PLACES[0] else f" {self.place}"
        return f"{self.model} batch {self.batch}{place}"


@dataclass
class Row:
    """The figures at one open fraction: milliseconds of all runs, steps of a turn, ratios, errors.

    `medians` has the median ratio of every run, `ratios` the run whose median is the middle one.
    """

    keep: float
    times: Runs
    steps: int = 1
    ratios: dict[str, Spread] = field(default_factory=dict)
    medians: dict[str, list[float]] = field(default_factory=dict)
    error_before: dict[str, float] = field(default_factory=dict)
    error_after: dict[str, float] = field(default_factory=dict)

    def compare(self, variants: tuple[str, ...]) -> None:
        """Form the ratios of `RATIOS` between variants that were timed."""
        for name, (over, under) in RATIOS.items():
            if over in variants and under in variants:
                self.ratios[name] = middle_run(self.times, over, under)
                self.medians[name] = [paired(times, over, under).median for times in self.times]

    def figure(self, variant: str, setting: Setting) -> Figure:
        """Return what is known of a variant."""
        what = ("f32" if setting.amp == "none" else setting.amp, setting.problem, self.keep)
        ours = "ours" if "ours" in self.times[0] else None
        found = timed(self.times, variant, ours)
        error = self.error_after.get(variant)
        return Figure("step", "step", variant, *what, **found, error=error)


@dataclass
class Report:
    """All figures of a run and where they come from; `variants` are those that could run."""

    setting: Setting
    environment: dict[str, Any]
    rows: list[Row]
    variants: tuple[str, ...]
    notes: list[str]
    content: str = CONTENT

    def sheet(self) -> Sheet:
        """Return the figures as the other benchmarks have them."""
        figures = [row.figure(name, self.setting) for row in self.rows for name in self.variants]
        return Sheet(command(self.setting), self.environment, figures, self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; the percentiles of the times are added."""
        plain = asdict(self)
        content = plain.pop("content")
        for row, out in zip(self.rows, plain["rows"], strict=True):
            figures = {name: row.figure(name, self.setting) for name in self.variants}
            out["ms"] = {name: {"median": f.p50_ms, **_ends(f)} for name, f in figures.items()}
        return {**plain, "step": content, "command": command(self.setting)}


def _ends(figure: Figure) -> dict[str, Any]:
    return {"low": figure.p20_ms, "high": figure.p80_ms}


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench step", *options_of(setting, Setting())])


def measure(setting: Setting) -> Report:
    """Run the benchmark; nothing is told unless all variants compute the same.

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
        setting.optimizer == "open-rows",
        setting.mode == "graph",
        setting.place,
    )
    before = environment(setting.device)
    reasons = {name: why_not(task, name) for name in setting.variants}
    variants = tuple(name for name in setting.variants if not reasons[name])
    notes = [f"{name} is left out: {reason}" for name, reason in reasons.items() if reason]
    if task.graph and task.device.type == "cpu":
        notes.append("a dry run: a CPU has no graphs, and every operator was launched")
    if setting.place == "before_norm":
        notes.append("oracles leave out what closed units before a norm add")
    if not variants:
        raise ValueError(f"expected a variant that can run, got {'; '.join(notes)}")
    gated = {n: make_arm(task, n) for n in variants if n not in UNGATED}
    rows = [measure_row(setting, task, variants, gated, keep) for keep in setting.keep]
    after = environment(setting.device)["load_average"]
    return Report(setting, {**before, "load_average_after": after}, rows, variants, notes)


def check(setting: Setting) -> None:
    require_variants(setting.variants)
    models.network(setting.model)
    if not setting.keep or any(not 0 < keep <= 1 for keep in setting.keep):
        raise ValueError(f"expected open fractions in (0, 1], got {list(setting.keep)}")
    numbers = (setting.batch, setting.rounds, setting.runs)
    if min(numbers) < 1:
        raise ValueError(f"expected batch >= 1, rounds >= 1 and runs >= 1, got {numbers}")
    if setting.amp not in AMP:
        raise ValueError(f"expected amp among {', '.join(AMP)}, got {setting.amp!r}")
    if setting.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"expected an optimizer among {known}, got {setting.optimizer!r}")
    if setting.mode not in MODES:
        raise ValueError(f"expected a mode among {', '.join(MODES)}, got {setting.mode!r}")
    if setting.place not in PLACES:
        raise ValueError(f"expected a place among {', '.join(PLACES)}, got {setting.place!r}")
    if setting.mode == "graph" and setting.optimizer != "torch":
        raise ValueError("expected torch's optimizer in graph mode, got 'open-rows'")
    if torch.device(setting.device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"expected a CUDA device for {setting.device!r}, found none")


def measure_row(
    setting: Setting, task: Task, variants: tuple[str, ...], gated: dict[str, Arm], keep: float
) -> Row:
    for arm in gated.values():
        arm.set_open(keep)
    before = errors(task, gated)
    if task.graph:
        for arm in gated.values():
            arm.capture()
    steps = steps_per_turn(task, gated)
    drawn = int(gated["ours"].net.l0.step) if "ours" in gated else 0  # pyright: ignore
    arms: dict[str, Arm | Oracle] = dict(gated)
    last: dict[str, Callable[[], object]] = {}
    for name in (*REBUILT, "oracle-rounded", "torch-pruning"):
        if name not in variants:
            continue
        if name in REBUILT:
            arms[name] = oracle = Oracle(task, keep, drawn, steps, name == "oracle-onednn")
            last[name] = oracle.rebuild
        else:
            arms[name] = rounded = built_arm(task, name, keep)
            last[name] = rounded.step  # warm, as the other oracles are
    for name in ("dense", "torch-prune"):
        if name in variants:
            arms[name] = built_arm(task, name, keep)
    turns = {name: partial(repeated, arms[name].step, steps) for name in variants}
    runs = [
        interleave(
            turns,
            setting.rounds,
            setting.warmup,
            task.device,
            f"{setting.model} open {keep:g}",
            last,
        )
        for _ in range(setting.runs)
    ]
    runs = [{name: [ms / steps for ms in run[name]] for name in run} for run in runs]
    after = errors(task, gated)
    after |= require_closeness(task, {n: arm for n, arm in arms.items() if n not in after})
    row = Row(keep, runs, steps, error_before=before, error_after=after)
    row.compare(variants)
    return row


def built_arm(task: Task, name: str, keep: float) -> Arm:
    """Return a variant without gates, captured where steps are."""
    arm = make_arm(task, name, keep)
    if task.graph:
        arm.capture()
    return arm


def steps_per_turn(task: Task, gated: dict[str, Arm]) -> int:
    """Return how many steps of ours, else of the first gated variant, make a turn."""
    arm = gated.get("ours") or next(iter(gated.values()), None)
    return 1 if arm is None else often(arm.step, task.device, TURN_SECONDS)


def errors(task: Task, gated: dict[str, Arm]) -> dict[str, float]:
    """Check the variants against each other where ours is among them."""
    return require_agreement(task, gated["ours"].net, gated) if "ours" in gated else {}


def table(report: Report) -> str:
    """Return the figures as a Markdown table with what they mean."""
    ratios = list(report.rows[0].ratios)
    head = ["open", "steps", *(f"{name} [ms]" for name in report.variants), *ratios]
    rows = []
    for row in report.rows:
        figures = [row.figure(name, report.setting) for name in report.variants]
        ms = [f"{figure.p50_ms:.1f}" for figure in figures]
        rows.append(
            [f"{row.keep:g}", str(row.steps), *ms, *(str(row.ratios[name]) for name in ratios)]
        )
    notes = "".join(f"{note}.\n" for note in report.notes)
    body = f"{report.content}\n{notes}{correctness(report)}\n"
    return f"{title(report)}\n\n{markdown(head, rows, 0)}\n\n{body}"


def title(report: Report) -> str:
    setting, where = report.setting, report.environment
    how = f", autocast {setting.amp}, optimizer of ours {setting.optimizer}"
    how += ", replayed from graphs" if setting.mode == "graph" else ""
    return (
        f"{setting.problem}{how if setting.trained is None else ''},"
        f" {setting.runs} x {setting.rounds} rounds;"
        f" {where['device']}"
        f" ({where['cpu']}), {where['threads']} threads, torch {where['torch']}, l0kernels"
        f" {where['l0kernels']} ({where['git']}), OMP_WAIT_POLICY={where['OMP_WAIT_POLICY']}, load"
        f" average {where['load_average']} before, {where['load_average_after']} after"
    )


def correctness(report: Report) -> str:
    gated, ungated = [], []
    for row in report.rows:
        for errors in (row.error_before, row.error_after):
            for name, error in errors.items():
                exact = name in row.error_before
                (gated if exact else ungated).append(error)
    told = ["Gated variants were not compared: ours is not among them."]
    if gated:
        told = [
            "Loss and all gradients of the gated variants agree with the masked network under the "
            "same draw, in fp64, before and after timing: largest relative difference "
            f"{max(gated):.1e}."
        ]
    if ungated and report.setting.trained is not None:
        told.append(
            "The loss of the oracle is that of ours under its last draw after timing, in fp64: "
            f"relative difference {max(ungated):.1e}."
        )
    elif ungated:
        told.append(
            "Every other one agrees after timing with another fp64 network that has its weights, "
            f"in fp64 but {' and '.join(IN_SINGLE)}: largest relative difference of losses and of "
            "all gradients "
            f"{max(ungated):.1e}."
        )
    return " ".join(told)


def write(report: Report, folder: Path) -> list[Path]:
    """Write step.md, step.json, step.csv (one line per figure) and step.png into a folder.

    A run has one open fraction, and no picture.
    """
    from .plot import plot_step

    texts = {
        "step.md": table(report),
        "step.json": json.dumps(report.to_dict(), indent=1) + "\n",
        "step.csv": report.sheet().to_csv(),
    }
    written = write_texts(folder, texts)
    if report.setting.trained is not None:
        return written
    return [*written, plot_step(report, folder / "step.png")]
