# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: stages that fail, hang or are missing are reported; figures become tables and CSV."""

import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import gpu.__main__ as runner
from gpu.report import Facts, as_csv, markdown
from gpu.stages import Deadline, Result, Stage, run_stage, run_together

FACTS = Facts("NVIDIA Test", 1.0, "1", "2", "3", "4", "5", "6", 7, "abc", "now")


def run(tmp_path, code, limit=30.0, left=60.0, **options):
    stage = Stage("some stage", [sys.executable, "-c", code], limit, **options)
    return run_stage(stage, tmp_path, tmp_path, Deadline(left))


def test_outcomes(tmp_path):
    assert run(tmp_path, "print('fine')").outcome == "passed"
    failed = run(tmp_path, "import sys; print('why'); sys.exit(3)")
    assert failed.outcome == "failed (exit 3)" and failed.last == "why" and failed.failed
    assert not run(tmp_path, "raise SystemExit(3)", required=False).failed
    late = run(tmp_path, "pass", left=1.0)
    assert late.outcome == "left out: no time left" and late.failed
    missing = run_stage(Stage("x", ["no-such-program"], 30), tmp_path, tmp_path, Deadline(60))
    assert missing.outcome == "left out: no-such-program is not installed"


def test_a_stage_that_hangs_is_interrupted_and_heard(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.stages.GRACE", 12.0)
    # What starts in the background ignores interrupts, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A shell and long limits: a busy machine may not come to run it for seconds.
    hangs = "trap 'echo so far; kill $!; exit 1' INT; sleep 60 & wait"
    stage = Stage("some stage", ["sh", "-c", hangs], 12.0)
    try:
        found = run_stage(stage, tmp_path, tmp_path, Deadline(60))
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.outcome == "interrupted after 12 s" and found.last == "so far" and found.failed


def test_the_environment_of_a_stage(tmp_path):
    code = "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ['X'])"
    assert run(tmp_path, code, environment={"X": "y"}).last == "passive y"


def test_figures_become_a_table_and_csv(tmp_path):
    code = 'print(\'{"rows": [{"open": 0.5, "ms": {"ours": {"median": 1.25, "low": 1}}}]}\')'
    result = run(tmp_path, code, figures=True)
    text = markdown(FACTS, [result], 1.0)
    assert "| open | ms ours |" in text and "| 0.5 | 1.25 |" in text
    assert "| some stage | passed |" in text and "commit: abc" in text
    lines = list(csv.DictReader(io.StringIO(as_csv(FACTS, [result]))))
    assert [(line["figure"], line["value"]) for line in lines] == [
        ("open", "0.5"),
        ("ms ours", "1.25"),
    ]
    assert {line["gpu"] for line in lines} == {"NVIDIA Test"}


def test_figures_in_parts(tmp_path):
    stage = Stage("experiments", [], 1, figures=True)
    result = Result(stage, "passed", figures={"a": [{"x": 1}], "b": [{"y": "z"}]})
    assert "### a" in markdown(FACTS, [result], 1.0)
    lines = list(csv.DictReader(io.StringIO(as_csv(FACTS, [result]))))
    assert [line["part"] for line in lines] == ["a", "b"]


def test_what_failed_is_quoted(tmp_path):
    result = run(tmp_path, "import sys; print('E   wrong'); sys.exit(1)")
    assert "E   wrong" in markdown(FACTS, [result], 1.0)


def test_stages_run_beside_each_other(tmp_path):
    stages = [Stage(name, [sys.executable, "-c", "pass"], 30) for name in ("a", "b")]
    results = run_together(stages, tmp_path, tmp_path, Deadline(60))
    assert [result.stage.name for result in results] == ["a", "b"]
    assert run_together([], tmp_path, tmp_path, Deadline(60)) == []


def test_stages_that_there_are(tmp_path):
    names = [stage.name for stage in (*runner.tests(tmp_path), *runner.benchmarks(False))]
    assert "tests" in names and "experiments" in names and len(set(names)) == len(names)
    assert all(not stage.required for stage in runner.sanitizers())


def test_without_a_gpu_nothing_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert runner.main(["--out", str(tmp_path), "--logs", str(tmp_path / "logs")]) == 1
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_nothing_of_the_benchmarks_is_needed_before_the_package_is_built():
    code = "import sys, gpu.__main__; sys.exit('l0kernels.bench' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
