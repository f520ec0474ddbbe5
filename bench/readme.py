# SPDX-License-Identifier: Apache-2.0
"""README's tables of figures, from the files that the benchmarks wrote."""

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from .figures import OURS, Figure, Sheet, markdown, put_between, shown
from .memory import BASE, ratios

BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
NOTHING = "No file of the suite has been recorded yet.\n"
COMPARED = {
    "step": ("masked-nchw", "masked-best", "dense", "oracle", "oracle-onednn", "index-select"),
    "operator": ("plain", "reference", "oracle"),
}


def sheets(folder: Path) -> list[Sheet]:
    """Return what all CSV files of the suite under a folder hold; other tables are left out."""
    found = []
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            head = next(csv.reader(file), [])
        if "command" in head:
            found.append(Sheet.load(path))
    return found


def tables(found: Sequence[Sheet]) -> str:
    """Return a table per kind of figure and a line per problem, each with its command."""
    parts = []
    for kind, title in (("step", "Training steps"), ("operator", "Operators")):
        rows = [row for sheet in found for row in timed_rows(sheet, kind)]
        if rows:
            others = [f"{name} / ours" for name in COMPARED[kind]]
            what = ("network",) if kind == "step" else ("operator", "pass", "shape")
            head = (*what, "dtype", "open", "ours [ms]", *others, "faster than ours", "command")
            parts.append(f"{title}:\n\n{markdown(head, rows, len(what) + 1)}\n")
    rows = [row for sheet in found for row in memory_rows(sheet)]
    if rows:
        head = ("network", "variant", "open", "peak [MB]", f"/ {BASE}", "command")
        parts.append(f"Peak memory of a step:\n\n{markdown(head, rows, 2)}\n")
    if parts:
        parts += [f"- {line}" for line in places(found)]
    return "\n".join(parts) + ("\n" if parts else "") or NOTHING


def timed_rows(sheet: Sheet, kind: str) -> Iterable[tuple[str, ...]]:
    """Return a row per time of ours."""
    for figure in sheet.figures:
        if figure.impl not in OURS or figure.op == "memory" or kind_of(figure) != kind:
            continue
        others = {f.impl: f for f in sheet.figures if f.problem == figure.problem}
        slower = {
            name: other.p50_ms / figure.p50_ms
            if other.over_ours is None
            else other.over_ours.median
            for name, other in others.items()
            if name != figure.impl and other.p50_ms and figure.p50_ms
        }
        what = (figure.shape,) if kind == "step" else (figure.op, figure.part, figure.shape)
        losses = [name for name, ratio in slower.items() if ratio < 1]
        yield (
            *what,
            figure.dtype,
            f"{figure.open:g}",
            shown(figure.p50_ms, ".3g"),
            *(shown(slower.get(name), ".2f") for name in COMPARED[kind]),
            ", ".join(losses),
            f"`{sheet.command}`",
        )


def kind_of(figure: Figure) -> str:
    return "step" if figure.op == "step" else "operator"


def memory_rows(sheet: Sheet) -> Iterable[tuple[str, ...]]:
    """Return a row per arm."""
    for figure, ratio in ratios(sheet):
        cells = (f"{figure.open:g}", shown(figure.peak_mb, ".0f"), shown(ratio, ".2f"))
        yield figure.shape, figure.impl, *cells, f"`{sheet.command}`"


def places(found: Sequence[Sheet]) -> list[str]:
    """Return where the commands ran, a line for each."""
    lines = []
    for sheet in found:
        where = sheet.environment
        lines.append(
            f"`{sheet.command}`: {where['device']} ({where['cpu']}), {where['threads']} threads, "
            f"torch {where['torch']}, commit {where['git']}, "
            f"OMP_WAIT_POLICY={where['OMP_WAIT_POLICY']}, load average {where['load_average']} "
            f"before, {where['load_average_after']} after"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Put the tables into a file, or print them."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.readme", description=__doc__)
    parser.add_argument("results", type=Path, help="folder with CSV files of the benchmarks")
    parser.add_argument("--readme", type=Path, help="file with the markers of the tables")
    options = parser.parse_args(arguments)
    text = tables(sheets(options.results))
    if options.readme is None:
        print(text)
        return
    old = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(put_between(old, text, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main()
