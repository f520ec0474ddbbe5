# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench networks`: every network of the zoo converted, compared, exported and timed."""

from __future__ import annotations

import copy
import csv
import gc
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import l0kernels as l0
from l0kernels.gates import Gates
from l0kernels.training import gates_of

from . import oracle, zoo
from .convert_cost import (
    CHECK_BATCH,
    bytes_needed,
    growth_elsewhere,
    settled,
    warm_up,
)
from .figures import write_texts
from .timing import Spread, environment, interleave, paired, require_passive_wait
from .zoo_arms import best_masked, best_oracle, convert, formats_of, in_format, our_arm

TOLERANCE = 1e-9  # of fp64 comparisons
ROUNDING = 1e-5  # relative difference of two fp32 logits that rounding can put in another order
AT_ONCE = 256  # output positions of one batch whose largest class is compared
CLOSED_BELOW = -2.3978952727983707  # log alpha at which the deterministic gate becomes 0: -ln 11
CONTENT = """\
Convert: seconds, a tiny network having been converted before to warm up libraries; peak growth of
resident memory in a process of its own whose heap is trimmed, in MB and relative to the model
(parameters and buffers) plus its activations (what autograd saves in one training forward of the
same inputs), once with both in fp32 and once in fp64, which the self-check runs in. Packed error:
largest difference in outputs, gradients and buffers from a plain copy with hooks, in fp64, over all
draws in training mode and a tenth as many in eval mode; relative to the largest element of each
tensor, but of a gradient at least to 1e-3 of the largest gradient of all, and of a running mean to
the largest standard deviation. Tensors: how many were compared over all draws; left out are those
that exceed 1e-9 and that the masked network itself changes by more than 1e-10 when its parameters
move by one rounding error of fp64 (with nearly all units closed, norms divide by deviations that
are rounding). Networks that compute parts in fp32 whatever their dtype (norms of Llama) compute
them in fp64 here. Compact error: outputs of `l0.compact` against that copy in eval
mode with about half of the gates closed, in fp64. Equal predictions: largest class, compact against
masked, in fp32, at every output position (token, pixel or output) of so many random examples. ONNX:
largest difference of onnxruntime from the compact network. Step: gate draw + penalty + forward +
backward + optimizer at half open, gates redrawn every step. S = masked / ours, masked with one flat
draw and one multiplication per reading layer. R = ours / oracle, the oracle being the plain network
at the units that ours draws in a round. Ours runs in NHWC (channels_last), masked and oracle in the
format that was faster in rounds before. Masked and ours take turns in being first; the oracle ends
the round, rebuilt and warmed up outside the clock after ours has run, so that ours pays for what
oneDNN prepares at widths it has not met, as in training. Medians of ratios paired round by round,
quartiles in brackets. Elapsed: everything in the row, untimed parts included."""


@dataclass(frozen=True)
class Setting:
    """One run over the zoo.

    Args:
        only: names of networks, empty for all.
        draws: gate draws compared in training mode.
        inputs: output positions, at least, whose largest class is compared.
        rounds: timed rounds.
        warmup: untimed rounds before them.
        size: "full", or "small" to see quickly that everything runs.
    """

    only: tuple[str, ...] = ()
    draws: int = 50
    inputs: int = 10_000
    rounds: int = 9
    warmup: int = 3
    size: zoo.Size = "full"


QUICK = Setting(draws=3, inputs=64, rounds=2, warmup=0, size="small")


@dataclass
class Row:
    """The figures of one network; None where a stage did not get that far.

    `times` holds milliseconds per arm and round, `stages` seconds of everything that was done,
    `error` what went wrong.
    """

    name: str
    batch: int
    parameters: int | None = None
    groups: int | None = None
    units: int | None = None
    convert_seconds: float | None = None
    convert_mb: float | None = None
    convert_memory: float | None = None
    convert_memory_fp64: float | None = None
    packed_error: float | None = None
    compared: int | None = None
    left_out: int | None = None
    compact_error: float | None = None
    equal_predictions: int | None = None
    positions: int | None = None
    examples: int | None = None
    prediction_gap: float | None = None
    onnx_error: float | None = None
    masked_ms: float | None = None
    step_ms: float | None = None
    speedup: Spread | None = None
    oracle_ratio: Spread | None = None
    masked_format: str | None = None
    oracle_format: str | None = None
    elapsed: float = 0.0
    times: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    error: str | None = None


@dataclass
class Report:
    """All figures of a run and where they come from."""

    setting: Setting
    environment: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "columns": CONTENT}

    @property
    def failed(self) -> list[str]:
        """Networks with an error."""
        return [row.name for row in self.rows if row.error is not None]


class Subject:
    """One network as the stages need it.

    Args:
        entry: the network.
        setting: of the run.
        row: receives the figures.
    """

    def __init__(self, entry: zoo.Entry, setting: Setting, row: Row):
        self.entry, self.setting, self.row = entry, setting, row
        self.inputs = entry.example(setting.size, CHECK_BATCH)
        self.plain = in_format(settled(entry, setting.size), "NHWC")
        self.twins: oracle.Twins | None = None
        self.small: nn.Module | None = None
        row.parameters = sum(p.numel() for p in self.plain.parameters())

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is done with the network, by name, in order."""
        yield "convert", self.convert
        yield "packed against masked", self.compare_packed
        yield "compact against masked", self.compare_compact
        yield "ONNX", self.export
        yield "steps", self.time_steps

    def converted(self) -> oracle.Twins:
        assert self.twins is not None
        return self.twins

    def convert(self) -> None:
        row = self.row
        self.measure_memory()
        warm_up()
        packed = copy.deepcopy(self.plain)
        start = time.perf_counter()
        convert(packed, self.inputs)
        row.convert_seconds = time.perf_counter() - start
        self.twins = oracle.twins(packed, self.plain, self.inputs)
        gates = gates_of(packed)
        row.groups, row.units = len(gates.names), gates.count
        found, wanted = oracle.groups_of(packed), self.entry.expected(self.plain).gated
        if sorted(found) != sorted(wanted):
            other = sorted(set(found) ^ set(wanted))
            raise RuntimeError(f"expected other groups than convert found; in one only: {other}")

    def measure_memory(self) -> None:
        grown = growth_elsewhere(self.entry.name, self.setting.size)
        if grown is not None:
            single, double = (
                bytes_needed(self.plain, self.inputs, dtype)
                for dtype in (torch.float32, torch.float64)
            )
            self.row.convert_mb = grown / 1e6
            self.row.convert_memory = grown / single
            self.row.convert_memory_fp64 = grown / double

    def compare_packed(self) -> None:
        exact = self.converted().to(torch.float64)
        sizes = gates_of(exact.packed).sizes
        worst, compared, left_out = 0.0, 0, 0
        for training in (True, False):
            exact.train(training)
            for seed in range(self.setting.draws if training else -(-self.setting.draws // 10)):
                z = oracle.gate_values(sizes, seed)
                packed = exact.run_packed(z)
                errors = oracle.relative_errors(exact.run_masked(z), packed)
                large = [name for name, error in errors.items() if not error <= TOLERANCE]
                if large:  # rarely, for it takes two more masked runs
                    for name in exact.undetermined(z, large, TOLERANCE / 10):
                        del errors[name]
                        left_out += 1
                worst = largest((worst, *errors.values()))
                compared += len(errors)
                left = exact.open_where_closed(z, packed)
                if left:
                    raise RuntimeError(f"expected gradients of closed units to be 0, got {left}")
        self.row.packed_error = worst
        self.row.compared, self.row.left_out = compared, left_out
        require("packed and masked", worst, TOLERANCE)

    def compare_compact(self) -> None:
        twins = self.converted()
        open_about_half(gates_of(twins.packed))
        exact = twins.to(torch.float64)
        exact.train(False)
        full = oracle.at_full_precision(torch.float64)
        with torch.no_grad(), full, exact.masking(gates_of(exact.packed).deterministic()):
            masked = zoo.floating(exact.plain(*exact.inputs))
            small = zoo.floating(l0.compact(exact.packed, exact.inputs)(*exact.inputs))
        self.row.compact_error = largest(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(small, masked, strict=True)
        )
        require("compact and masked", self.row.compact_error, TOLERANCE)
        twins.train(False)
        self.small = l0.compact(twins.packed, self.inputs)
        self.count_equal_predictions(twins, self.small)
        twins.train()

    @torch.no_grad()
    def count_equal_predictions(self, twins: oracle.Twins, small: nn.Module) -> None:
        """Compare the largest class; where it differs, keep how close the two classes are."""
        entry, row, size = self.entry, self.row, self.setting.size
        each = len(entry.predictions(small(*in_format(entry.example(size, 1), "NHWC"))))
        row.examples, batch = -(-self.setting.inputs // each), max(1, AT_ONCE // each)
        row.equal_predictions = row.positions = 0
        row.prediction_gap = 0.0
        with twins.masking(gates_of(twins.packed).deterministic()):
            for first in range(0, row.examples, batch):
                count = min(batch, row.examples - first)
                inputs = in_format(entry.example(size, count, seed=first + 1), "NHWC")
                masked, ours = twins.plain(*inputs), small(*inputs)
                same = entry.predictions(masked) == entry.predictions(ours)
                row.equal_predictions += int(same.sum())
                row.positions += len(same)
                if not same.all():
                    row.prediction_gap = max(
                        row.prediction_gap, prediction_gap(entry, masked, ours)
                    )
        require("logits whose order differs", row.prediction_gap, ROUNDING)

    def export(self) -> None:
        assert self.small is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.onnx"
            self.row.onnx_error = l0.export_onnx(self.small.eval(), self.inputs, path)
        self.small = None

    def time_steps(self) -> None:
        twins, row, entry = self.converted(), self.row, self.entry
        inputs = entry.example(self.setting.size, row.batch)
        ours = our_arm(entry, twins.packed, in_format(inputs, "NHWC"))
        ours.step()  # the draw at which the oracle's formats are compared
        masked_format, masked = best_masked(entry, twins, inputs)
        oracle_format, rebuilt = best_oracle(entry, ours, inputs)
        if len(formats_of(self.plain)) > 1:
            row.masked_format, row.oracle_format = masked_format, oracle_format
        row.times = interleave(
            {"masked": masked.step, "ours": ours.step, "oracle": rebuilt.step},
            self.setting.rounds,
            self.setting.warmup,
            label=entry.name,
            last={"oracle": rebuilt.rebuild},
        )
        row.masked_ms, row.step_ms = median(row.times["masked"]), median(row.times["ours"])
        row.speedup = paired(row.times, "masked", "ours")
        row.oracle_ratio = paired(row.times, "ours", "oracle")


def require(what: str, error: float, most: float) -> None:
    """Let a network fail whose figures would be those of another computation.

    Raises:
        RuntimeError: the error is above `most`, or not a number.
    """
    if not error <= most:
        raise RuntimeError(f"{what}: expected to differ by at most {most:.0e}, got {error:.1e}")


def largest(values: Iterable[float]) -> float:
    """Return the largest value; NaN, which an error must not hide behind, beats all."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


@torch.no_grad()
def open_about_half(gates: Gates) -> None:
    """Set the gates so that the deterministic ones are 0 for about half, and fractions else."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(gates.log_alpha.shape, generator=generator)
    gates.log_alpha.copy_(CLOSED_BELOW + 2 * noise)


def prediction_gap(entry: zoo.Entry, masked: Any, ours: Any) -> float:
    """Return how far apart, at most, differing predictions are in the masked network's logits.

    It is relative to the largest logit: rounding if it is near 1e-7.
    """
    gap = 0.0
    for exact, other in zip(zoo.floating(masked), zoo.floating(ours), strict=True):
        rows = exact.movedim(entry.class_dim, -1).flatten(0, -2)
        chosen = other.movedim(entry.class_dim, -1).flatten(0, -2).argmax(1, keepdim=True)
        missing = rows.max(1).values - rows.gather(1, chosen)[:, 0]
        gap = max(gap, float(missing.max() / rows.abs().max()))
    return gap


def measure(setting: Setting, keep: Callable[[Report], object] = lambda report: None) -> Report:
    """Run over the zoo; a network that fails says so in its row and does not stop the others.

    Args:
        setting: what is measured.
        keep: called after every network with all figures so far.

    Raises:
        ValueError: an unknown network, or numbers that are not positive.
        RuntimeError: the wait policy is not passive.
    """
    require_passive_wait()
    chosen = [zoo.entry(name) for name in setting.only] or list(zoo.entries())
    for name, least in (("draws", 1), ("inputs", 1), ("rounds", 1), ("warmup", 0)):
        if getattr(setting, name) < least:
            raise ValueError(f"expected {name} >= {least}, got {getattr(setting, name)}")
    before = environment()
    with tqdm(total=len(chosen), desc="networks", disable=None) as bar:
        rows = []
        for entry in chosen:
            rows.append(row := measure_row(entry, setting, bar))
            bar.update()
            after = environment()["load_average"]
            report = Report(setting, {**before, "load_average_after": after}, list(rows))
            keep(report)
            parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in row.stages.items())
            bar.write(f"{row.name}: {row.elapsed:.0f} s ({parts})", file=sys.stderr)
    return report


def measure_row(entry: zoo.Entry, setting: Setting, bar: Any) -> Row:
    """Go through the stages until one fails."""
    row = Row(entry.name, entry.batch)
    if not entry.available():
        row.skipped = f"{entry.needs} is not installed"
        return row
    start, stage = time.perf_counter(), "build"
    try:
        subject = Subject(entry, setting, row)
        for stage, work in subject.stages():
            bar.set_description(f"{entry.name}: {stage}")
            begun = time.perf_counter()
            work()
            gc.collect()
            row.stages[stage] = time.perf_counter() - begun
    except Exception as error:  # whatever a network does wrong belongs in its row
        row.error = f"{stage}: {type(error).__name__}: {' '.join(str(error).split())}"
    row.elapsed = time.perf_counter() - start
    return row


COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda r: r.name,
    "parameters": lambda r: shown(r.parameters, ",d"),
    "groups": lambda r: shown(r.groups, "d"),
    "units": lambda r: shown(r.units, ",d"),
    "convert [s]": lambda r: shown(r.convert_seconds, ".1f"),
    "convert [MB]": lambda r: shown(r.convert_mb, ",.0f"),
    "/ (model + activations)": lambda r: shown(r.convert_memory, ".2f"),
    "/ the same in fp64": lambda r: shown(r.convert_memory_fp64, ".2f"),
    "packed error": lambda r: shown(r.packed_error, ".1e"),
    "tensors (left out)": lambda r: (
        "" if r.compared is None else f"{r.compared:,d} ({r.left_out:,d})"
    ),
    "compact error": lambda r: shown(r.compact_error, ".1e"),
    "equal predictions / positions (examples)": lambda r: (
        "" if r.examples is None else f"{r.equal_predictions} / {r.positions} ({r.examples})"
    ),
    "ONNX": lambda r: shown(r.onnx_error, ".1e"),
    "batch": lambda r: str(r.batch),
    "masked step [ms]": lambda r: shown(r.masked_ms, ".1f"),
    "step [ms]": lambda r: shown(r.step_ms, ".1f"),
    "S": lambda r: shown(r.speedup, ""),
    "R": lambda r: shown(r.oracle_ratio, ""),
    "masked format": lambda r: shown(r.masked_format, ""),
    "oracle format": lambda r: shown(r.oracle_format, ""),
    "elapsed [s]": lambda r: shown(r.elapsed, ".0f"),
}


def shown(value: Any, form: str) -> str:
    """Return a figure as text, nothing for None."""
    return "" if value is None else format(str(value) if isinstance(value, Spread) else value, form)


def table(report: Report) -> str:
    """Return the figures as a Markdown table with what they mean."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)]]
    lines += [[cell(row) for cell in COLUMNS.values()] for row in report.rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = [f"- {row.name} failed: {row.error}" for row in report.rows if row.error is not None]
    notes += [f"- {row.name} skipped: {row.skipped}" for row in report.rows if row.skipped]
    return "\n\n".join(part for part in (title(report), body, "\n".join(notes), CONTENT) if part)


def title(report: Report) -> str:
    setting, where = report.setting, report.environment
    return (
        f"{setting.size} networks, {setting.draws} draws, {setting.rounds} rounds;"
        f" {where['device']} ({where['cpu']}), {where['threads']} threads, torch {where['torch']},"
        f" l0kernels {where['l0kernels']} ({where['git']}),"
        f" OMP_WAIT_POLICY={where['OMP_WAIT_POLICY']}, load average {where['load_average']} before,"
        f" {where['load_average_after']} after"
    )


def write(report: Report, folder: Path) -> list[Path]:
    """Write networks.md, networks.json and networks.csv (one line per network) into a folder."""
    texts = {
        "networks.md": table(report) + "\n",
        "networks.json": json.dumps(report.to_dict(), indent=1) + "\n",
        "networks.csv": as_csv(report),
    }
    return write_texts(folder, texts)


def as_csv(report: Report) -> str:
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    where = ("device", "cpu", "threads", "torch", "l0kernels", "git", "time")
    names = [f.name for f in fields(Row) if f.name not in ("times", "stages")]
    spreads = ("speedup", "oracle_ratio")
    head = [n for name in names for n in (columns_of(name) if name in spreads else [name])]
    lines.writerow(["size", *head, *where])
    fixed = [report.environment[key] for key in where]
    for row in report.rows:
        cells: list[Any] = []
        for name in names:
            value = getattr(row, name)
            if name in spreads:
                cells += ["", "", ""] if value is None else [value.median, value.low, value.high]
            else:
                cells.append("" if value is None else value)
        lines.writerow([report.setting.size, *cells, *fixed])
    return out.getvalue()


def columns_of(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]
