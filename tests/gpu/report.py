# SPDX-License-Identifier: Apache-2.0
"""The report of `make gpu` and its figures as CSV."""

import csv
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import error_table

from gpu.stages import Result


@dataclass(frozen=True)
class Facts:
    """Where and with what figures were measured."""

    gpu: str
    memory_gb: float
    driver: str
    torch: str
    triton: str
    cuda: str
    nvcc: str
    python: str
    cpus: int
    commit: str
    time: str

    @classmethod
    def of_this_machine(cls, commit: str | None) -> "Facts | None":
        """Asks the first GPU; None where there is none.

        Args:
            commit: what is measured; None: ask git.
        """
        import torch

        if not torch.cuda.is_available():
            return None
        gpu = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return cls(
            gpu=gpu.name,
            memory_gb=round(gpu.total_memory / 1e9, 1),
            driver=said(query),
            torch=str(torch.__version__),
            triton=version_of("triton"),
            cuda=str(torch.version.cuda),
            nvcc=said(["nvcc", "--version"], r"release .*"),
            python=platform.python_version(),
            cpus=os.cpu_count() or 0,
            commit=commit or said(["git", "describe", "--always", "--dirty"]),
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def said(command: list[str], pattern: str = ".+") -> str:
    """The first match in a command's output, "unknown" if it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    found = re.search(pattern, done.stdout)
    return found[0] if found else "unknown"


def write(
    folder: Path,
    facts: Facts,
    results: list[Result],
    records: list[error_table.Row],
    seconds: float,
) -> str:
    """Writes <gpu>.md, <gpu>.csv and <gpu>-tests.json; returns the report.

    Args:
        folder: for all three.
        facts: where it ran.
        results: of all stages.
        records: what the tests of operators noted.
        seconds: the whole run took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "-", facts.gpu.lower()).strip("-")
    text = markdown(facts, results, seconds)
    if records:
        text += f"\n## errors of the operators\n\n{error_table.markdown(records)}"
        error_table.save(folder / f"{slug}-tests.json", records)
    (folder / f"{slug}.md").write_text(text, encoding="utf-8")
    (folder / f"{slug}.csv").write_text(as_csv(facts, results), encoding="utf-8")
    return text


def markdown(facts: Facts, results: list[Result], seconds: float) -> str:
    """What ran, what came of it, and all figures."""
    lines = [f"# {facts.gpu}", ""]
    lines += [f"{name}: {value}  " for name, value in asdict(facts).items()]
    lines += ["", f"`make gpu` took {seconds:.0f} s.", "", "| stage | outcome | seconds | says |"]
    lines += ["| --- | --- | ---: | --- |"]
    for result in results:
        says = (result.last.splitlines() or [""])[-1].strip("= ").replace("|", "/")
        cells = (result.stage.name, result.outcome, f"{result.seconds:.0f}", says[:160])
        lines.append(f"| {' | '.join(cells)} |")
    for result in results:
        if result.outcome != "passed" and result.last:
            lines += ["", f"## {result.stage.name}: {result.outcome}", "", "```", result.last]
            lines += ["```"]
    for result in results:
        if result.figures is not None:
            lines += ["", f"## {result.stage.name}", "", *table(result.figures)]
    return "\n".join(lines) + "\n"


def table(figures: Any) -> list[str]:
    """Every row of figures as a line; what a row does not have is empty."""
    groups = figures if isinstance(figures, dict) and "rows" not in figures else {"": figures}
    lines = []
    for name, rows in groups.items():
        rows = rows["rows"] if isinstance(rows, dict) else rows
        flat = [dict(flatten(row)) for row in rows]
        heads = list(dict.fromkeys(key for row in flat for key in row))
        lines += ([f"### {name}", ""] if name else []) + [f"| {' | '.join(heads)} |"]
        lines += [f"|{' ---: |' * len(heads)}"]
        for row in flat:
            lines.append(f"| {' | '.join(shown(row.get(head, '')) for head in heads)} |")
        lines.append("")
    return lines


def flatten(row: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested rows; single times are left out, and quartiles."""
    for key, value in row.items():
        name = f"{before}{key}"
        if key in ("times", "low", "high", "error_before"):
            continue
        if isinstance(value, dict):
            yield from flatten(value, f"{name} ")
        elif isinstance(value, list):
            yield name, "x".join(map(str, value))
        else:
            yield name.removesuffix(" median"), value


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_csv(facts: Facts, results: list[Result]) -> str:
    """One line per figure: the stage, its part, the row's number, the figure's name and value."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    where = asdict(facts)
    rows.writerow(["stage", "part", "row", "figure", "value", *where])
    for result in results:
        figures = result.figures
        if figures is None:
            continue
        parts = figures if isinstance(figures, dict) and "rows" not in figures else {"": figures}
        for part, found in parts.items():
            for number, row in enumerate(found["rows"] if isinstance(found, dict) else found):
                for name, value in flatten(row):
                    rows.writerow([result.stage.name, part, number, name, value, *where.values()])
    return out.getvalue()
