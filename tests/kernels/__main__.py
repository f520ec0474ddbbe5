# SPDX-License-Identifier: Apache-2.0
"""``python -m kernels``: compiles every GPU kernel, no GPU needed, and says what each takes.

Writes table.md and table.json; fails where a kernel spills registers, does not fit or does not
compile.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from kernels.table import Row, Skipped, markdown, write

PARTS = {"CUDA": "kernels.cuda_aot", "Triton": "kernels.triton_aot"}


def collect(triton_for: Sequence[str] = ()) -> tuple[list[Row], dict[str, str], list[str]]:
    """All rows, what there is to say about each part, and what failed.

    With `triton_for`, of the Triton kernels for these architectures alone.
    """
    found: list[Row] = []
    facts = {"torch": metadata.version("torch")}
    failures: list[str] = []
    parts = {"Triton": PARTS["Triton"]} if triton_for else PARTS
    options = {"targets": triton_for} if triton_for else {}
    for title, module in parts.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            rows = importlib.import_module(module).rows(**options)
        except Skipped as reason:
            facts[title] = str(reason)
            continue
        except RuntimeError as error:
            failures.append(f"{title}: {error}")
            continue
        facts[title] = f"{len(rows)} kernels"
        found += rows
    failures += [defect for row in found for defect in row.defects()]
    return found, facts, failures


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"))
    parser.add_argument(
        "--triton-for", nargs="+", default=(), metavar="ARCH", help="Triton alone, for these"
    )
    options = parser.parse_args(arguments)
    out = options.out
    rows, facts, failures = collect(options.triton_for)
    write(out, rows, facts)
    print(markdown(rows))
    for name, value in facts.items():
        print(f"{name}: {value}")
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{len(rows)} kernels, {len(failures)} failures; {out / 'table.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
