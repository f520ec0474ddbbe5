# SPDX-License-Identifier: Apache-2.0
"""The operators' benchmarks: each problem computed in several ways, checked and timed in turn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import l0kernels as l0
from l0kernels import _registry
from l0kernels.recipes.measure import allocated
from l0kernels.testing import error_ratio, max_error

from .figures import Figure, Sheet, markdown, shown, timed, write_texts
from .timing import environment, interleave, often, repeated, require_passive_wait

NAMES = (
    "sample_gates",
    "dep_chain",
    "pack_weight",
    "masked_weight",
    "gate_apply",
    "packed_norm",
    "gated_linear",
    "gated_conv2d",
)
DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
PARTS = ("forward", "backward")
GRADIENT = "grad "
CLOSE = 1e-10  # of float64 results, relative to the largest entry
MOST = 2.0  # times PyTorch's own error, in lower precision
KINK = 16  # roundings of the mean square within which a ReLU may flip
LONG_ENOUGH = 1e-3  # seconds of one timing: shorter work is repeated
CONTENT = (
    "Milliseconds of one call: percentiles over the rounds of the run whose median is the middle "
    "one, all arms and passes taking turns; short calls are repeated within a timing. reference: "
    "the operator's PyTorch reference. plain: masks in PyTorch as users write them. oracle: the "
    "layer built at the open widths, nothing to gather. cpp, triton, cuda: ours. over ours: time "
    "over that of ours in the same round, the middle run's median. Rates count what the open units "
    "need. Peak: what PyTorch's allocator holds during a call beyond what it held before, without "
    "what libraries allocate on their own. Errors: after timing, against the reference in "
    "float64, relative to the largest entry."
)


class Wrong(RuntimeError):
    """An arm does not compute what the reference does."""


@dataclass(frozen=True)
class Way:
    """One way to compute a problem.

    Args:
        run: the forward pass.
        leaves: of which gradients are taken; none: there is no backward pass.
        upstream: gradient of each result of `run`.
        found: maps results and gradients to what is compared among ways, by name; gradients have
            names that begin with `GRADIENT`. A way may leave out what it does not have.
    """

    run: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    upstream: Sequence[Tensor]
    found: Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, Tensor]]


class Problem(Protocol):
    """Tensors of one call of an operator; a dataclass."""

    def ways(self) -> dict[str, Way]:
        """Ours under "ours", the others by their names."""
        ...

    def work(self) -> dict[str, float]:
        """Bytes or operations that each pass needs at least for the open units."""
        ...


@dataclass(frozen=True)
class Operator:
    """How an operator is benchmarked.

    Args:
        name: of the operator.
        make: draws a problem from a shape, an open fraction, a dtype and a device.
        meaning: of the parts of a shape.
        shapes: that are timed by default.
        small: shapes for tests.
        dtypes: of `DTYPES`.
        unit: "GB/s" or "GFLOP/s".
        batched: returns a shape with another batch; None where shapes have none.
    """

    name: str
    make: Callable[[str, float, torch.dtype, torch.device], Problem]
    meaning: str
    shapes: tuple[str, ...]
    small: tuple[str, ...]
    dtypes: tuple[str, ...]
    unit: str
    batched: Callable[[str, int], str] | None = None


def operator(name: str) -> Operator:
    """Return the benchmark of an operator.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"expected operators among {', '.join(NAMES)}, got {name!r}")
    return import_module(f"{__package__}.ops.{name}").OPERATOR


@dataclass(frozen=True)
class Setting:
    """One run over operators.

    Args:
        only: operators; empty for all.
        shapes: empty for those of each operator.
        dtypes: of `DTYPES`; an operator leaves out those it is not benchmarked in.
        keep: open fractions.
        impls: of ours; empty for all that can run on the device.
        batch: examples, where shapes have them; None: as in the shapes.
        rounds: timed rounds.
        runs: of all rounds.
        warmup: untimed rounds before each run.
        device: "cpu" or "cuda".
        seed: of the problems.
        threads: of the CPU; None: torch's choice.
    """

    only: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("f32",)
    keep: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    impls: tuple[str, ...] = ()
    batch: int | None = None
    rounds: int = 15
    runs: int = 3
    warmup: int = 3
    device: str = "cpu"
    seed: int = 0
    threads: int | None = None


def measure(setting: Setting) -> Sheet:
    """Time every problem; one whose arms do not compute the same has no figures but a note.

    Raises:
        ValueError: unknown operators, shapes, dtypes or implementations, or numbers out of range.
        RuntimeError: the wait policy is not passive.
    """
    require_passive_wait()
    chosen = check(setting)
    sheet = Sheet(command(setting), environment(setting.device), [])
    for op in chosen:
        impls, notes = implementations(op, setting)
        sheet.notes += notes
        dtypes = [name for name in setting.dtypes if name in op.dtypes]
        sheet.notes += [
            f"{op.name} is not timed in {name}: its dtypes are {', '.join(op.dtypes)}"
            for name in setting.dtypes
            if name not in op.dtypes
        ]
        for shape in setting.shapes or op.shapes:
            if setting.batch is not None and op.batched is not None:
                shape = op.batched(shape, setting.batch)
            for dtype in dtypes:
                for keep in setting.keep:
                    try:
                        sheet.figures += measure_one(op, shape, dtype, keep, impls, setting)
                    except Wrong as error:  # the other problems have their figures
                        sheet.failed.append(f"{op.name} {shape} {dtype} open {keep:g}: {error}")
    sheet.environment["load_average_after"] = environment(setting.device)["load_average"]
    return sheet


def check(setting: Setting) -> list[Operator]:
    """Return the operators of a setting.

    Raises:
        ValueError: see `measure`.
    """
    chosen = [operator(name) for name in setting.only or NAMES]
    if setting.shapes and len(chosen) > 1:
        raise ValueError(f"expected one operator beside shapes, got {len(chosen)}")
    unknown = [name for name in setting.dtypes if name not in DTYPES]
    if unknown or not setting.dtypes:
        raise ValueError(f"expected dtypes among {', '.join(DTYPES)}, got {unknown or 'none'}")
    if not setting.keep or any(not 0 < keep <= 1 for keep in setting.keep):
        raise ValueError(f"expected open fractions in (0, 1], got {list(setting.keep)}")
    if setting.runs < 1 or (setting.batch is not None and setting.batch < 1):
        raise ValueError(f"expected runs and batch >= 1, got {setting.runs} and {setting.batch}")
    return chosen


def implementations(op: Operator, setting: Setting) -> tuple[list[str], list[str]]:
    """Return which of ours run on the device, and why the others do not.

    Raises:
        ValueError: one that was asked for does not run.
    """
    serving = ("cpp",) if torch.device(setting.device).type == "cpu" else ("cuda", "triton")
    states = _registry.what_runs(op.name)
    unknown = [name for name in setting.impls if name not in serving]
    if unknown:
        raise ValueError(
            f"expected implementations for {setting.device} among {', '.join(serving)}, "
            f"got {', '.join(unknown)}"
        )
    notes = [
        f"{op.name}: {name} cannot run: {states[name][1]}"
        for name in setting.impls or serving
        if not states[name][0]
    ]
    if setting.impls and notes:
        raise ValueError("; ".join(notes))
    return [name for name in setting.impls or serving if states[name][0]], notes


@dataclass
class Arm:
    """A way to compute a problem, by one implementation where it is ours."""

    way: Way
    impl: str | None = None

    def scope(self) -> Any:
        return nullcontext() if self.impl is None else l0.use_impl(self.impl)

    def steps(self) -> dict[str, Callable[[], object]]:
        """Its passes, ready to be timed."""
        way, scope = self.way, self.scope()

        def forward() -> None:
            with scope:
                way.run()

        if not way.leaves:
            return {"forward": forward}
        with scope:
            results = way.run()

        def backward() -> None:
            with scope:
                torch.autograd.grad(results, way.leaves, way.upstream, retain_graph=True)

        return {"forward": forward, "backward": backward}

    def outcome(self) -> dict[str, Tensor]:
        """What it computes."""
        way = self.way
        with self.scope():
            results = way.run()
            gradients = torch.autograd.grad(results, way.leaves, way.upstream) if way.leaves else ()
        return {name: t.detach() for name, t in way.found(results, gradients).items()}


def arms_of(problem: Problem, impls: Sequence[str]) -> dict[str, Arm]:
    """Return the arms of a problem by name: the reference, plain ways, ours by implementation."""
    ways = problem.ways()
    ours = ways.pop("ours")
    arms = {"reference": Arm(ours, "reference")} | {name: Arm(way) for name, way in ways.items()}
    return arms | {name: Arm(ours, name) for name in impls}


def measure_one(
    op: Operator, shape: str, dtype: str, keep: float, impls: Sequence[str], setting: Setting
) -> list[Figure]:
    """Time one problem; returns a figure per arm and pass."""
    device = torch.device(setting.device)
    torch.manual_seed(setting.seed)
    problem = op.make(shape, keep, DTYPES[dtype], device)
    arms = arms_of(problem, impls)
    steps = {(name, part): step for name, arm in arms.items() for part, step in arm.steps().items()}
    peaks = {key: allocated(step, device) / 1e6 for key, step in steps.items()}
    runs = time_steps(steps, setting, f"{op.name} {shape} {dtype} open {keep:g}")
    errors = checked(problem, arms, impls, DTYPES[dtype])
    figures, work = [], problem.work()
    for name, part in steps:
        found = timed(runs, f"{name} {part}", f"{impls[0]} {part}" if impls else None)
        figure = Figure(
            op.name,
            part,
            name,
            dtype,
            shape,
            keep,
            **found,
            peak_mb=peaks[name, part],
            rate=work[part] / found["p50_ms"] / 1e6,
            unit=op.unit,
            error=errors[name].get(part),
        )
        figures.append(figure)
    return figures


def time_steps(
    steps: dict[tuple[str, str], Callable[[], object]], setting: Setting, label: str
) -> list[dict[str, list[float]]]:
    """Return milliseconds per call of "ARM PASS", a list of rounds for each, of every run."""
    device = torch.device(setting.device)
    repeats = {" ".join(key): often(step, device, LONG_ENOUGH) for key, step in steps.items()}
    long = {
        " ".join(key): partial(repeated, step, repeats[" ".join(key)])
        for key, step in steps.items()
    }
    runs = []
    for _ in range(setting.runs):
        times = interleave(long, setting.rounds, setting.warmup, device, label)
        runs.append({name: [ms / repeats[name] for ms in times[name]] for name in times})
    return runs


def in_double(value: Any) -> Any:
    """Return a problem, or a part of one, in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    if is_dataclass(value):
        parts = {f.name: in_double(getattr(value, f.name)) for f in fields(value)}
        return type(value)(**parts)  # pyright: ignore[reportCallIssue]
    return [in_double(one) for one in value] if type(value) is list else value


def checked(
    problem: Problem, arms: dict[str, Arm], impls: Sequence[str], dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Return the largest error of each arm and pass, relative to the largest exact entry.

    PyTorch's arms must be right to half of their dtype's digits, ours to twice PyTorch's own error,
    in float64 all to `CLOSE`.

    Raises:
        Wrong: an arm computes something else.
    """
    exact = arms_of(in_double(problem), [])["reference"].outcome()
    got = {name: arm.outcome() for name, arm in arms.items()}
    errors: dict[str, dict[str, float]] = {}
    for name, outcome in got.items():
        errors[name] = {}
        for what, tensor in outcome.items():
            part = "backward" if what.startswith(GRADIENT) else "forward"
            error = max_error(tensor, exact[what]) / largest(exact[what])
            errors[name][part] = max(error, errors[name].get(part, 0.0))
            if dtype == torch.float64:
                good = error <= CLOSE
            elif name in impls:
                pytorch = [got[arm][what] for arm in got if arm not in impls and what in got[arm]]
                good = min(error_ratio(tensor, exact[what], one) for one in pytorch) <= MOST
            else:
                good = error <= math.sqrt(torch.finfo(dtype).eps)
            if not good:
                raise Wrong(
                    f"{name}: {what} is off by {error:.1e} of the largest entry; "
                    "no figures for different computations"
                )
    return errors


def off_kinks(upstream: Tensor, before: Tensor) -> Tensor:
    """Return the gradient of a ReLU's output without the places that rounding may flip.

    One flip among millions would be all of an error.

    Args:
        upstream: gradient of the output, in the dtype of the problem.
        before: what the ReLU gets, in float64.
    """
    margin = KINK * torch.finfo(upstream.dtype).eps * before.square().mean().sqrt()
    return upstream.masked_fill(before.abs() <= margin, 0)


def largest(exact: Tensor) -> float:
    return (float(exact.detach().abs().max()) or 1.0) if exact.numel() else 1.0


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench ops", *options_of(setting, Setting())])


def options_of(setting: Any, default: Any) -> list[str]:
    """Return the options that differ from the default ones."""
    words = []
    for f in fields(setting):
        value = getattr(setting, f.name)
        if value != getattr(default, f.name):
            words += [f"--{f.name}", _option(value)]
    return words


def _option(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_option, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(sheet: Sheet) -> str:
    """Return the figures as a Markdown table with what they mean."""
    head = (
        "op", "pass", "impl", "dtype", "shape", "open", "p20 [ms]", "p50 [ms]", "p80 [ms]",
        "over ours", "peak MB", "rate", "error",
    )  # fmt: skip
    rows = [
        (
            *figure.key,
            *(shown(ms) for ms in (figure.p20_ms, figure.p50_ms, figure.p80_ms)),
            shown(figure.over_ours.median, ".2f") if figure.over_ours else "",
            shown(figure.peak_mb),
            f"{shown(figure.rate)} {figure.unit}",
            shown(figure.error, ".1e"),
        )
        for figure in sheet.figures
    ]
    notes = [f"- {note}" for note in dict.fromkeys((*sheet.notes, *sheet.failed))]
    parts = (f"`{sheet.command}`", markdown(head, rows, 6), "\n".join(notes), CONTENT)
    return "\n\n".join(part for part in parts if part)


def write(sheet: Sheet, folder: Path) -> list[Path]:
    """Write ops.md, ops.json, ops.csv and ops.png into a folder."""
    from .plot import plot_ops

    texts = {"ops.md": table(sheet) + "\n", "ops.csv": sheet.to_csv()}
    texts["ops.json"] = json.dumps(sheet.to_dict(), indent=1) + "\n"
    return [*write_texts(folder, texts), plot_ops(sheet, folder / "ops.png")]


def numbers(shape: str, count: int, meaning: str) -> list[int]:
    """Read a shape like 640x640x3x3.

    Raises:
        ValueError: other than `count` positive numbers.
    """
    parts = shape.split("x")
    if len(parts) != count or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"expected a shape of {meaning}, got {shape!r}")
    return [int(part) for part in parts]


def layer_sizes(shape: str, models: Mapping[str, tuple[int, ...]], meaning: str) -> tuple[int, ...]:
    """Gates of every layer of a named model, or of ``layers x gates``.

    Raises:
        ValueError: another shape.
    """
    if shape in models:
        return models[shape]
    layers, gates = numbers(shape, 2, meaning)
    return (gates,) * layers
