# SPDX-License-Identifier: Apache-2.0
"""The operators' benchmarks compare like with like, and write what they measured."""

import csv
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l0kernels import _registry
from l0kernels.bench import cli as bench_cli
from l0kernels.bench import operators, plot
from l0kernels.bench.figures import COLUMNS, ENVIRONMENT, KEY, Sheet
from l0kernels.bench.ops import pack_weight, sample_gates
from l0kernels.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    pytest.param(name, shape, id=f"{name} {shape}")
    for name in operators.NAMES
    for shape in operators.operator(name).small
]
QUICK = ["bench", "ops", "--rounds", "2", "--runs", "2", "--warmup", "0"]
LINEAR = [*QUICK, "--only", "gated_linear", "--shapes", "20x12x5", "--keep", "1,.5"]


def implementations(name: str) -> list[str]:
    return operators.implementations(operators.operator(name), operators.Setting())[0]


def test_every_operator_has_a_benchmark():
    # Those of optimizers change their arguments: files of their own time whole steps.
    of_optimizers = {"adam_rows", "open_rows", "sgd_rows", "unpack_rows"}
    assert {*operators.NAMES} | of_optimizers == set(_registry.OPS)


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize(("name", "shape"), SMALL)
def test_all_arms_compute_the_same(name: str, shape: str, keep: float):
    op, impls = operators.operator(name), implementations(name)
    for dtype in op.dtypes:
        torch.manual_seed(0)
        problem = op.make(shape, keep, operators.DTYPES[dtype], torch.device("cpu"))
        arms = operators.arms_of(problem, impls)
        errors = operators.checked(problem, arms, impls, operators.DTYPES[dtype])
        assert list(errors) == list(arms) and {"reference", "plain", *impls} <= set(arms)
        one_pass = shape.endswith((":eval", ":arm", ":noise"))
        parts = {"forward"} if one_pass else set(operators.PARTS)
        for arm in ("reference", *impls):
            assert set(errors[arm]) == parts
        assert parts <= set(problem.work()) <= set(operators.PARTS)
        assert all(amount > 0 for amount in problem.work().values())


@pytest.mark.parametrize("arm", ["ours", "plain", "oracle"])
@pytest.mark.parametrize("what", ["y", "grad x"])
def test_wrong_arms_have_no_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arm: str, what: str
):
    make = operators.arms_of

    def slightly_wrong(problem: operators.Problem, impls: list[str]) -> dict[str, operators.Arm]:
        arms = make(problem, impls)
        for name in arms:
            if name == arm or (arm == "ours" and name in impls):
                found = arms[name].way.found

                def wrong(y: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
                    right = found(y, grads)  # noqa: B023 - one arm only
                    return {**right, what: right[what] * 1.01}

                arms[name].way = replace(arms[name].way, found=wrong)
        return arms

    if arm == "ours" and not implementations("gated_linear"):
        pytest.skip("the C++ operators are not built")
    monkeypatch.setattr(operators, "arms_of", slightly_wrong)
    assert main([*LINEAR, "--keep", ".5", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == []
    assert f"{what} is off by 1.0e-02 of the largest entry; no figures" in found["failed"][0]


def test_plain_draws_follow_the_law_of_ours():
    log_alpha, cost = torch.zeros(1 << 16), torch.ones(1 << 16)
    z, penalty = sample_gates.plain_draw(log_alpha, cost)
    layout = sample_gates.one_port_per_group([1 << 16])
    key = torch.tensor([1, 1])
    ours, expected, _ = sample_gates.sample_gates(log_alpha, key, cost, layout, "hard_concrete")
    torch.testing.assert_close(penalty, expected)
    assert float(z.mean()) == pytest.approx(float(ours[:-1].mean()), abs=0.01)
    assert float((z == 0).float().mean()) == pytest.approx(0.1682, abs=0.01)


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_problems_are_as_open_as_they_say(keep: float):
    problem = sample_gates.make_problem("2x20000", keep)
    z = problem.ours()[0][:-1]
    assert float((z != 0).float().mean()) == pytest.approx(keep, abs=0.02)
    packed = pack_weight.make_problem("40x80x3x3:both", keep).ours()
    assert packed.shape[:2] == (40 * keep, 80 * keep)


def test_gradients_stay_away_from_kinks():
    upstream = torch.ones(4)
    before = torch.tensor([1.0, -5e-7, 1e-5, 0.0], dtype=torch.float64)
    assert operators.off_kinks(upstream, before).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert operators.off_kinks(upstream.double(), before).tolist() == [1.0, 1.0, 1.0, 0.0]
    # Among 2 million places some are within a rounding error of zero.
    problem = operators.operator("packed_norm").make(
        "16x64x48x48:channels_last:train", 1.0, torch.float32, torch.device("cpu")
    )
    zeros = int((problem.upstream == 0).sum())
    assert 0 < zeros < 1000
    impls = implementations("packed_norm")
    arms = operators.arms_of(problem, impls)
    assert set(operators.checked(problem, arms, impls, torch.float32)) == set(arms)


def test_a_chain_packs_the_same_by_every_arm():
    chain = pack_weight.make_chain((6, 5, 7), 0.5)
    arms = operators.arms_of(chain, implementations("pack_weight"))
    errors = operators.checked(chain, arms, implementations("pack_weight"), torch.float32)
    assert {"plain", "one-by-one", "oracle"} <= set(errors)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ops") / "made" / "here"
    assert main([*LINEAR, "--out", str(out)]) == 0
    return out


def test_writes_every_file(finished: Path):
    names = ["ops.csv", "ops.json", "ops.md", "ops.png"]
    assert sorted(path.name for path in finished.iterdir()) == names
    assert (finished / "ops.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_csv_has_a_line_per_figure_and_says_where(finished: Path):
    with (finished / "ops.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [*COLUMNS, "command", *ENVIRONMENT]
    arms = ["reference", "plain", "oracle", *implementations("gated_linear")]
    keys = [(arm, part, keep) for keep in ("1", "0.5") for arm in arms for part in operators.PARTS]
    assert [(line["impl"], line["pass"], line["open"]) for line in lines] == keys
    for line in lines:
        assert float(line["p20_ms"]) <= float(line["p50_ms"]) <= float(line["p80_ms"])
        assert len(line["medians_ms"].split()) == 2
        assert line["p50_ms"] in line["medians_ms"].split()
        assert float(line["rate"]) > 0 and line["unit"] == "GFLOP/s"
        assert 0 <= float(line["error"]) < 1e-5
        assert line["OMP_WAIT_POLICY"] == "passive" and line["torch"] == torch.__version__
        assert len(line["load_average_after"].split()) == 3
    words = "--only gated_linear --shapes 20x12x5 --keep 1,0.5 --rounds 2 --runs 2 --warmup 0"
    assert lines[0]["command"] == f"l0kernels bench ops {words}"


def test_a_sheet_is_read_as_it_was_written(finished: Path):
    sheet = Sheet.load(finished / "ops.csv")
    assert sheet.to_csv() == (finished / "ops.csv").read_text()
    rows = json.loads((finished / "ops.json").read_text())["rows"]
    for figure, row in zip(sheet.figures, rows, strict=True):
        assert figure.key == tuple(row[n] if n != "open" else f"{row[n]:g}" for n in KEY)
        assert figure.p50_ms == pytest.approx(row["p50_ms"], rel=1e-5)


def scaled(source: Path, target: Path, impls: tuple[str, ...], factor: float) -> str:
    """Writes figures whose times by some implementations are `factor` times as long."""
    sheet = Sheet.load(source)
    sheet.figures = [
        replace(figure, p50_ms=figure.p50_ms * factor) if figure.impl in impls else figure
        for figure in sheet.figures
        if figure.p50_ms is not None
    ]
    target.write_text(sheet.to_csv())
    return str(target)


@pytest.mark.parametrize(
    ("impls", "factor", "most", "code"),
    [
        (("cpp",), 1e-3, "10%", 1),
        (("cpp",), 1e3, "10%", 0),
        (("cpp",), 1e-3, "1e6%", 0),
        (("plain", "reference", "oracle"), 1e-3, "1e6%", 0),  # only ours may fail
    ],
)
def test_slower_than_before(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    impls: tuple[str, ...],
    factor: float,
    most: str,
    code: int,
):
    if not implementations("gated_linear"):
        pytest.skip("the C++ operators are not built")
    old = scaled(finished / "ops.csv", tmp_path / "old.csv", impls, factor)
    assert main([*LINEAR, "--compare", old, "--fail-if-slower", most]) == code
    captured = capsys.readouterr()
    assert "| new / old |" in captured.out
    assert ("slower: gated_linear forward cpp f32 20x12x5 0.5" in captured.err) == bool(code)


def test_the_module_of_an_operator_is_the_same_benchmark(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    module = importlib.import_module("l0kernels.bench.ops")
    monkeypatch.setattr(module.cli, "start", lambda words: seen.append(words) or 0)
    monkeypatch.setattr(sys, "argv", ["gated_linear", "--rounds", "3"])
    with pytest.raises(SystemExit) as stopped:
        module.main("gated_linear")
    assert stopped.value.code == 0
    assert seen == [["bench", "ops", "--only", "gated_linear", "--rounds", "3"]]


def test_the_module_of_an_operator_runs():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    words = [sys.executable, "-m", "l0kernels.bench.ops.sample_gates", "--json", "--rounds", "1"]
    options = ["--runs", "1", "--warmup", "0", "--shapes", "3x20", "--keep", ".5"]
    done = subprocess.run([*words, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["op"] for row in found["rows"]} == {"sample_gates"}
    assert found["environment"]["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "gated_conv"], "expected operators among sample_gates"),
        (["--shapes", "1x2"], f"expected one operator beside shapes, got {len(operators.NAMES)}"),
        (["--only", "gated_linear", "--shapes", "1x2"], "expected a shape of inputs x outputs"),
        (["--only", "packed_norm", "--shapes", "1x2"], "expected a shape of N x C"),
        (["--only", "pack_weight", "--shapes", "1x2"], "expected a shape of O x I"),
        (["--dtypes", "int8"], "expected dtypes among f64"),
        (["--keep", "0"], "expected open fractions in (0, 1], got [0.0]"),
        (["--impls", "cuda"], "expected implementations for cpu among cpp, got cuda"),
        (["--runs", "0"], "expected runs and batch >= 1"),
        (["--fail-if-slower", "10%"], "expected --compare or --base beside --fail-if-slower"),
        (["--compare", "no.csv"], "no.csv"),
    ],
)
def test_bad_input(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main([*QUICK, *options]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


def test_another_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "old.csv").write_text("stage,part,row\na,b,1\n")
    assert main([*LINEAR, "--compare", str(tmp_path / "old.csv")]) == 2
    assert "expected a line with the columns op, pass" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("10%", 0.1), (".1", 0.1), ("0", 0.0)])
def test_fractions_and_percentages(text: str, value: float):
    assert bench_cli.fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "ten", "nan", ""])
def test_what_is_no_fraction(text: str):
    with pytest.raises(bench_cli.argparse.ArgumentTypeError, match="expected a fraction like 10%"):
        bench_cli.fraction(text)


def test_dtypes_and_batches_of_a_sweep(capsys: pytest.CaptureFixture[str]):
    words = ["--only", "packed_norm,sample_gates", "--dtypes", "bf16", "--keep", ".5"]
    module = operators.operator("packed_norm")
    assert module.batched is not None
    assert module.batched("32x320x16x16:contiguous:eval", 2) == "2x320x16x16:contiguous:eval"
    assert main([*QUICK, *words, "--batch", "2", "--rounds", "1", "--runs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["dtype"] for row in found["rows"]} == {"bf16"}
    assert all(row["shape"].startswith("2x") for row in found["rows"])
    assert "sample_gates is not timed in bf16: its dtypes are f64, f32" in found["notes"]


def test_crossover():
    assert plot.crossover([(0.1, 4.0), (0.5, 2.0), (1.0, 0.5)]) == pytest.approx(0.75)
    assert plot.crossover([(0.5, 0.9), (1.0, 0.8)]) is None
    assert plot.crossover([(0.5, 2.0), (1.0, 1.5)]) is None


def test_regression_timings_cover_every_operator():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    module = importlib.import_module("l0kernels.bench.test_operators")
    rows = [case.values for case in module.CASES]
    assert len(rows) >= 12
    assert {row[0] for row in rows} == set(operators.NAMES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/"]
    options = ["--benchmark-disable", "-k", "sample_gates or gated_linear"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout or "12 skipped" in done.stdout
