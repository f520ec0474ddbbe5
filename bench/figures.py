# SPDX-License-Identifier: Apache-2.0
"""Figures of the benchmarks: one line each, with where and how they were measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from l0kernels._files import write_whole

from .timing import Runs, Spread, middle, middle_run, spread

KEY = ("op", "pass", "impl", "dtype", "shape", "open")
ENVIRONMENT = (
    "device",
    "cpu",
    "cpus",
    "threads",
    "OMP_WAIT_POLICY",
    "allocator",
    "load_average",
    "load_average_after",
    "python",
    "torch",
    "cuda",
    "l0kernels",
    "git",
    "time",
)
OURS = ("ours", "ar", "arm", "cpp", "triton", "cuda")
"""What runs our kernels: a network, an estimator, or an operator by implementation."""


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Args:
        op: an operator, or "step", "arm" or "memory".
        part: of it: "forward", "backward" or "step"; the column is called "pass".
        impl: which arm.
        dtype: of the computation.
        shape: of the problem, as on the command line.
        open: fraction of the units that are open.
        p20_ms, p50_ms, p80_ms: milliseconds, of the run whose median is the middle one.
        medians_ms: of every run.
        over_ours: how many times as long as ours, or of "arm" as AR, it takes, paired by round:
            the middle run's median, with quartiles.
        peak_mb: most memory in use, 10^6 bytes.
        rate: what the open units need over the median time, in `unit`.
        unit: "GB/s" or "GFLOP/s".
        error: after timing, against float64.
    """

    op: str
    part: str
    impl: str
    dtype: str
    shape: str
    open: float
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    medians_ms: tuple[float, ...] = ()
    over_ours: Spread | None = None
    peak_mb: float | None = None
    rate: float | None = None
    unit: str = ""
    error: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What must be the same for two figures to be compared."""
        return self.op, self.part, self.impl, self.dtype, self.shape, f"{self.open:g}"

    @property
    def problem(self) -> tuple[str, ...]:
        """What was computed, by whatever arm."""
        return self.op, self.part, self.dtype, self.shape, f"{self.open:g}"


COLUMNS = tuple("pass" if f.name == "part" else f.name for f in fields(Figure))


def timed(runs: Runs, name: str, ours: str | None) -> dict[str, Any]:
    """Return the fields of a `Figure` that hold times.

    Args:
        runs: milliseconds of all variants.
        name: the variant.
        ours: the variant that it is compared with, if any.
    """
    medians = [spread(times[name]).median for times in runs]
    kept = runs[middle(medians)][name]
    low, median, high = np.percentile(np.asarray(kept, dtype=float), [20, 50, 80])
    return {
        "p20_ms": float(low),
        "p50_ms": float(median),
        "p80_ms": float(high),
        "medians_ms": tuple(medians),
        "over_ours": None if ours is None else middle_run(runs, name, ours),
    }


@dataclass
class Sheet:
    """Figures of one command.

    Args:
        command: repeats them.
        environment: see `timing.environment`.
        figures: in the order in which they were measured.
        notes: what was left out, and why.
        failed: what has no figures because a check after timing failed.
    """

    command: str
    environment: dict[str, Any]
    figures: list[Figure]
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rows = [{_column(name): value for name, value in asdict(f).items()} for f in self.figures]
        return {
            "command": self.command,
            "environment": self.environment,
            "notes": self.notes,
            "failed": self.failed,
            "rows": rows,
        }

    def to_csv(self) -> str:
        """Return a line per figure, each with the command and the environment."""
        out = io.StringIO()
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow([*COLUMNS, "command", *ENVIRONMENT])
        where = [_written(self.environment.get(name)) for name in ENVIRONMENT]
        for figure in self.figures:
            cells = [_written(getattr(figure, f.name)) for f in fields(Figure)]
            lines.writerow([*cells, self.command, *where])
        return out.getvalue()

    @classmethod
    def load(cls, path: Path) -> Sheet:
        """Read what `to_csv` wrote.

        Raises:
            ValueError: it is another table, or has no line.
            OSError: it cannot be read.
        """
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        missing = [name for name in (*COLUMNS, "command") if not rows or name not in rows[0]]
        if missing:
            raise ValueError(f"{path}: expected a line with the columns {', '.join(missing)}")
        environment = {name: rows[0].get(name) for name in ENVIRONMENT}
        return cls(rows[0]["command"], environment, [_read(row) for row in rows])

    def find(self, impl: str) -> dict[tuple[str, ...], Figure]:
        """Return the figures of one arm by problem."""
        return {figure.problem: figure for figure in self.figures if figure.impl == impl}


def _column(name: str) -> str:
    return "pass" if name == "part" else name


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Spread):
        return " ".join(f"{number:.4g}" for number in (value.median, value.low, value.high))
    if isinstance(value, tuple | list):
        return " ".join(_written(one) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _read(row: dict[str, str]) -> Figure:
    texts: dict[str, Any] = {
        name: row[_column(name)] for name in ("op", "part", "impl", "dtype", "shape", "unit")
    }
    numbers: dict[str, Any] = {
        name: float(row[name]) if row[name] else None
        for name in ("p20_ms", "p50_ms", "p80_ms", "peak_mb", "rate", "error")
    }
    ratio = [float(number) for number in row["over_ours"].split()]
    return Figure(
        **texts,
        **numbers,
        open=float(row["open"]),
        medians_ms=tuple(float(number) for number in row["medians_ms"].split()),
        over_ours=Spread(*ratio) if ratio else None,
    )


@dataclass(frozen=True)
class Change:
    """A figure measured twice; `ratio` is the new time over the old one."""

    new: Figure
    old_ms: float
    ratio: float

    @property
    def ours(self) -> bool:
        return self.new.impl in OURS


def compare(old: Sheet, new: Sheet) -> list[Change]:
    """Return the times that both sheets have.

    Raises:
        ValueError: they have none in common.
    """
    before = {figure.key: figure.p50_ms for figure in old.figures}
    changes = [
        Change(figure, then, figure.p50_ms / then)
        for figure in new.figures
        if figure.p50_ms is not None and (then := before.get(figure.key))
    ]
    if not changes:
        raise ValueError("expected times of the same problems in both files, got none in common")
    return changes


def slower(changes: Iterable[Change], most: float) -> list[Change]:
    """Return our times that have grown by more than the fraction `most`."""
    return [change for change in changes if change.ours and change.ratio > 1 + most]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Return a table whose first columns, `left` of them, are aligned to the left."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def change_table(changes: Sequence[Change]) -> str:
    """Return old and new times as a Markdown table."""
    rows = [
        (*change.new.key, f"{change.old_ms:.4g}", f"{change.new.p50_ms:.4g}", f"{change.ratio:.3f}")
        for change in changes
    ]
    return markdown((*KEY, "old [ms]", "new [ms]", "new / old"), rows, len(KEY))


def shown(value: float | None, form: str = ".4g") -> str:
    """Return a figure as text, nothing for None."""
    return "" if value is None else format(value, form)


def write_texts(folder: Path, texts: dict[str, str]) -> list[Path]:
    """Write files into a folder, which is made; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, lambda file, text=text: file.write(text.encode()))
    return [folder / name for name in texts]


def put_between(text: str, table: str, begin: str, end: str) -> str:
    """Return a text with a table between its markers.

    Raises:
        ValueError: the text does not have both markers once.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin.strip()} and {end.strip()} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
