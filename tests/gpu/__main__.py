# SPDX-License-Identifier: Apache-2.0
"""``python -m gpu``: everything that needs a GPU, in under 8 minutes, without a network.

Builds the package for this Python, runs the tests on the GPU, a part of them under the CUDA
sanitizers, then benchmarks and experiments. Writes <gpu>.md, <gpu>.csv, <gpu>-tests.json and
logs; fails where the build, a test or a benchmark fails. Sanitizers that do not run on a machine
are reported only.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys
import time
from pathlib import Path

import error_table

from gpu.report import Facts, write
from gpu.stages import Deadline, Result, Stage, run_stage, run_together

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 470
PYTHON = sys.executable
GRAPH = ["--mode", "graph", "--variants", "dense,masked-best,oracle,ours"]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
CHECKED = "GPU and (test_shapes or test_more_than_one_block)"
# Races are looked for in our own kernels: where Triton puts barriers is its compiler's matter.
RACES = f"cuda and {CHECKED}"
FEW_KEPT = ["--keep", ".5,.1"]  # for all fractions of all operators the time is too short
# What has no figures yet comes first.
OPS = (
    ("masked_weight", FEW_KEPT),
    ("gate_apply", ["--keep", ".5"]),
    ("dep_chain", ["--keep", ".5"]),
    ("gated_conv2d", [*FEW_KEPT, "--batch", "128", "--dtypes", "bf16"]),
    ("sample_gates", FEW_KEPT),
    ("gated_linear", [*FEW_KEPT, "--batch", "8192", "--dtypes", "bf16"]),
    ("pack_weight", FEW_KEPT),
    ("packed_norm", [*FEW_KEPT, "--batch", "128"]),
)


def build() -> Stage:
    pip = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    return Stage("build", [*pip, "-e", "."], 170, environment={"L0K_BUILD": "cuda"})


def tests(logs: Path) -> list[Stage]:
    pytest = [PYTHON, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "-p", "no:cacheprovider"]
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(max(1, (os.cpu_count() or 2) - 4))]
    large = "tests/gpu/test_large.py"
    return [
        Stage(
            "tests",
            [*pytest, *workers, f"--ignore={large}", f"--junitxml={logs / 'tests.xml'}"],
            300,
            environment={"L0K_TEST_RECORDS": str(logs / "records")},
        ),
        Stage("tests beyond 2^31 elements", [*pytest, large], 90),
    ]


def sanitizers() -> list[Stage]:
    pytest = [PYTHON, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider"]
    return [
        Stage(
            tool,
            ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
            + [*pytest, "tests/ops", "-k", RACES if tool == "racecheck" else CHECKED],
            200,
            # Only memory that is not kept for later use has bounds that a sanitizer knows.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            required=False,
        )
        for tool in SANITIZERS
    ]


def benchmarks(quick: bool) -> list[Stage]:
    rounds = ["--runs", "1", "--rounds", "3" if quick else "15"]
    return [
        _step("wrn-28-10", "bf16", [*rounds, *GRAPH]),
        _step("mlp-block-4096-16384", "bf16", [*rounds, *GRAPH], batch=8192),
        _step("wrn-28-10", "bf16", rounds),
        *[_module(f"op {name}", f"ops.{name}", [*options, *rounds]) for name, options in OPS],
        _step("vgg16", "none", rounds),
        _module("experiments", "experiments", []),
    ]


def _step(model: str, amp: str, options: list[str], batch: int = 128) -> Stage:
    bench = [PYTHON, "-m", "l0kernels.cli", "bench", "step", "--device", "cuda", "--json"]
    what = ["--model", model, "--batch", str(batch), "--amp", amp, "--keep", "1,.5,.25,.1"]
    mode = " graph" if "graph" in options else ""
    return Stage(f"step {model} {amp}{mode}", [*bench, *what, *options], 120, figures=True)


def _module(name: str, module: str, options: list[str]) -> Stage:
    command = [PYTHON, "-m", f"l0kernels.bench.{module}", "--device", "cuda", "--json", *options]
    return Stage(name, command, 60, figures=True)


def collect(only: str, logs: Path, quick: bool, seconds: float) -> list[Result]:
    """Runs the stages whose names match, the tests and sanitizers beside each other."""
    deadline = Deadline(seconds)

    def wanted(stages: list[Stage]) -> list[Stage]:
        return [stage for stage in stages if re.search(only, stage.name)]

    results = [run_stage(stage, ROOT, logs, deadline) for stage in wanted([build()])]
    results += run_together(wanted([*tests(logs), *sanitizers()]), ROOT, logs, deadline)
    for stage in wanted(benchmarks(quick)):
        results.append(run_stage(stage, ROOT, logs, deadline))
    return results


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 if a required stage failed."""
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--logs", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", default="", help="regular expression: names of stages")
    parser.add_argument("--quick", action="store_true", help="few rounds of the benchmarks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    options = parser.parse_args(arguments)
    # What starts in the background ignores interrupts, and so would the stages.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    facts = Facts.of_this_machine(options.commit)
    if facts is None:
        print("make gpu: torch finds no CUDA device here", file=sys.stderr)
        return 1
    options.logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results = collect(options.only, options.logs.resolve(), options.quick, options.seconds)
    records = error_table.load(filter(Path.exists, [options.logs / "records"]))
    print(write(options.out, facts, results, records, time.monotonic() - start))
    defects = [defect for row in records for defect in row.defects()]
    print(*defects, sep="\n")
    return int(bool(defects) or any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
