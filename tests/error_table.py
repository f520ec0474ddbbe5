# SPDX-License-Identifier: Apache-2.0
"""The errors that tests of operators measure, as a table.

Tests compare by `within_budget` and `same`, which note what they find. Where L0K_TEST_RECORDS names
a folder, every test process writes a file there when it ends, for ``python -m error_table``.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l0kernels import _triton, testing

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(path.parent.name for path in ROOT.glob("l0kernels/ops/*/op.py"))
KERNELS = ("PyTorch reference", "C++ CPU", "Triton", "CUDA C++")
PASSES = ("forward", "dgrad", "wgrad", "gates")
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MOST = 2.0
"""How many times PyTorch's own error is allowed."""

CLOSE = 1e-10
"""How far two float64 results may be apart."""

RUNS = {
    "reference": ("PyTorch reference", "run on the CPU"),
    "reference on a GPU": ("PyTorch reference", "run on {gpu}"),
    "cpp": ("C++ CPU", "run on the CPU"),
    "triton": ("Triton", "interpreted"),
    "harness": ("CUDA C++", "run on the CPU harness"),
    "triton on a GPU": ("Triton", "run on {gpu}"),
    "cuda on a GPU": ("CUDA C++", "run on {gpu}"),
}
"""What the values of the fixtures `impl` and `op_impl` stand for: kernels, status."""

BEGIN, END = "<!-- make table: begin -->\n", "<!-- make table: end -->\n"
HEAD = ("operator", "kernels", *PASSES, "differences", "dtypes", "tests", "status")


@dataclass
class Row:
    """What tests found out about an operator run in one way.

    Args:
        op: its name.
        kernels: one of `KERNELS`.
        status: how they ran, "" if they did not.
        worst: {pass: largest error against float64 over PyTorch's own in the same dtype}.
        differences: numbers that should be the same and are not, of `compared`.
        dtypes: of the results.
        passed: tests.
        failed: tests.
        compiled: architectures that the kernels were compiled for.
    """

    op: str
    kernels: str
    status: str = ""
    worst: dict[str, float] = field(default_factory=dict)
    differences: int = 0
    compared: int = 0
    dtypes: list[str] = field(default_factory=list)
    passed: int = 0
    failed: int = 0
    compiled: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.kernels, self.status

    def add(self, other: "Row") -> None:
        for name, ratio in other.worst.items():
            self.worst[name] = max(ratio, self.worst.get(name, 0.0))
        self.differences += other.differences
        self.compared += other.compared
        self.dtypes = sorted({*self.dtypes, *other.dtypes})
        self.passed += other.passed
        self.failed += other.failed
        self.compiled = sorted({*self.compiled, *other.compiled})

    def defects(self) -> list[str]:
        """Everything that must not be, one sentence each."""
        name = f"{self.op}, {self.kernels}, {self.status}"
        found = [
            f"{name}: {what}: {ratio:.3g} times PyTorch's error; expected at most {MOST:g}"
            for what, ratio in self.worst.items()
            if not ratio <= MOST
        ]
        if self.differences:
            found.append(f"{name}: {self.differences} of {self.compared} numbers differ")
        if self.failed:
            found.append(f"{name}: {self.failed} tests failed")
        return found


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for each operator, kernels and status."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found.setdefault(row.key, Row(*row.key)).add(row)
    return sorted(found.values(), key=lambda row: (row.op, KERNELS.index(row.kernels), row.status))


# ---- what tests call ----

_noted: list[Row] = []  # by the test that runs
_rows: list[Row] = []  # by the tests that are over


def within_budget(op: str, what: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """`testing.assert_within_budget`, noted as the error of one of the `PASSES` of an operator."""
    assert what in PASSES and op in OPS
    ratio = testing.error_ratio(actual, exact, plain)
    dtype = str(actual.dtype).removeprefix("torch.")
    _noted.append(Row(op, "", worst={what: ratio}, dtypes=[dtype]))
    testing.assert_within_budget(actual, exact, plain, MOST)


def close(op: str, what: str, actual: Tensor, exact: Tensor) -> None:
    """Asserts that a float64 result is what another way to compute it in float64 gives.

    Neither is exact, so neither has an error that the other's could be measured by.
    """
    assert what in PASSES and op in OPS
    _noted.append(Row(op, "", dtypes=[str(actual.dtype).removeprefix("torch.")]))
    torch.testing.assert_close(actual, exact, rtol=CLOSE, atol=CLOSE)


def same(op: str, actual: Tensor, expected: Tensor) -> None:
    """Asserts that two tensors are equal, and notes how many numbers differ."""
    assert op in OPS and actual.shape == expected.shape
    differences = int((actual != expected).sum())
    _noted.append(Row(op, "", differences=differences, compared=actual.numel()))
    assert differences == 0


# ---- what conftest.py calls ----


def note_outcome(item: pytest.Item, report: pytest.TestReport) -> None:
    """Takes what a test has noted, and that it passed or failed."""
    noted = list(_noted)
    _noted.clear()
    if report.skipped or (report.passed and report.when != "call"):
        return
    impl = _impl_of(item)
    if impl == "triton" and not _triton.interpreted():
        impl = "triton on a GPU"
    if impl not in RUNS:
        return
    kernels, status = RUNS[impl]
    if "{gpu}" in status:
        status = status.format(gpu=torch.cuda.get_device_name())
    ops = {row.op for row in noted} | {item.path.stem.removeprefix("test_")} & set(OPS)
    noted += [Row(op, "", passed=int(report.passed), failed=int(report.failed)) for op in ops]
    for row in noted:
        row.kernels, row.status = kernels, status
    _rows.extend(noted)


def _impl_of(item: pytest.Item) -> str:
    values = {**getattr(item, "funcargs", {})}
    if hasattr(item, "callspec"):
        values |= item.callspec.params  # there also where a fixture failed
    found = values.get("impl", values.get("op_impl", ""))
    if found == "reference" and str(values.get("device")).startswith("cuda"):
        found = "reference on a GPU"
    return found if isinstance(found, str) else ""


def write() -> None:
    """Writes what the tests of this process noted to the folder that L0K_TEST_RECORDS names."""
    folder = os.environ.get("L0K_TEST_RECORDS")
    if folder and _rows:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file, path = tempfile.mkstemp(".json", "tests-", folder)
        os.close(file)
        save(Path(path), merged(_rows))


# ---- the table ----


def save(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def load(paths: Iterable[Path]) -> list[Row]:
    """The sum of files, and of all files of folders."""
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])
    ]
    return merged(
        Row(**fields) for file in files for fields in json.loads(file.read_text(encoding="utf-8"))
    )


def compiled(table: Path) -> list[Row]:
    """What `make kernels` compiled without a defect."""
    found = []
    for row in json.loads(table.read_text(encoding="utf-8"))["rows"]:
        source = Path(row["source"])
        op = source.parent.name if row["backend"] == "triton" else source.stem[: -len("_cuda")]
        kernels = "Triton" if row["backend"] == "triton" else "CUDA C++"
        if op in OPS and not row["defects"]:
            found.append(Row(op, kernels, "compiled", compiled=[row["arch"]]))
    return merged(found)


def markdown(rows: list[Row]) -> str:
    """The table, with a line of its own for kernels that are written but nothing ran."""
    lines = [HEAD, ("---", "---", *["---:"] * 5, "---", "---:", "---")]
    for op in OPS:
        mine = [row for row in rows if row.op == op]
        known = {what for row in mine for what in row.worst}
        for kernels in KERNELS:
            ways = [row for row in mine if row.kernels == kernels and row.status != "compiled"]
            built = sorted(
                {arch for row in mine if row.kernels == kernels for arch in row.compiled}
            )
            missing = [Row(op, kernels)] if _is_written(op, kernels) else []
            lines += [_cells(row, known, built) for row in ways or missing]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _is_written(op: str, kernels: str) -> bool:
    """Whether an operator has such kernels; those of optimizers have none for a GPU."""
    sources = {"Triton": f"l0kernels/ops/{op}/triton.py", "CUDA C++": f"csrc/cuda/{op}_cuda.cu"}
    return kernels not in sources or (ROOT / sources[kernels]).exists()


def _cells(row: Row, known: set[str], built: list[str]) -> tuple[str, ...]:
    errors = [
        f"{row.worst[p]:.2f}" if p in row.worst else "-" if p in known else "" for p in PASSES
    ]
    differences = f"{row.differences} of {row.compared:,}" if row.compared else ""
    tests = f"{row.passed:,}" + (f", {row.failed} failed" if row.failed else "")
    status = [row.status] if row.status else []
    status += [f"compiled for {', '.join(built)}"] if built else []
    return (
        f"`{row.op}`",
        row.kernels,
        *errors,
        differences,
        ", ".join(short for name, short in DTYPES.items() if name in row.dtypes),
        tests if row.status else "-",
        "; ".join(status) or "not run",
    )


def put_into(text: str, table: str) -> str:
    """The text with the table between its markers.

    Raises:
        ValueError: the text does not have both markers once.
    """
    # Here, not above: `python -m gpu` imports this module before it has built the package.
    from l0kernels.bench.figures import put_between

    return put_between(text, table, BEGIN, END)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if an error is too large, a number differs or a test failed."""
    parser = argparse.ArgumentParser(prog="python -m error_table", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, help="files and folders of test records")
    parser.add_argument("--kernels", type=Path, help="table.json of `make kernels`")
    parser.add_argument("--save", type=Path, help="file for the sum of the records")
    parser.add_argument("--readme", type=Path, help="file with the markers of the table")
    args = parser.parse_args(arguments)
    for path in filter(None, [*args.records, args.kernels]):
        if not path.exists():
            parser.error(
                f"expected {path}, which make test or make kernels writes; it is not there"
            )
    rows = load(args.records)
    if args.kernels:
        rows += compiled(args.kernels)
    if args.save:
        save(args.save, rows)
    if args.readme:
        text = put_into(args.readme.read_text(encoding="utf-8"), markdown(rows))
        args.readme.write_text(text, encoding="utf-8")
    print(markdown(rows))
    defects = [text for row in rows for text in row.defects()]
    print(*defects, sep="\n")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
