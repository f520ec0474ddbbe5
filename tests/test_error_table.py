# SPDX-License-Identifier: Apache-2.0
"""The table of errors has what tests measured and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import error_table
import pytest
from error_table import Row

HERE = Path(__file__).parent
MEASURING = """
import pytest
import torch
from error_table import same, within_budget

EXACT = torch.tensor([1.0, 2.0], dtype=torch.float64)
PLAIN = EXACT.float() + torch.tensor([0.0, 0.01])


@pytest.fixture(params=["cpp", "python", "harness"])
def impl(request):
    return request.param


@pytest.fixture
def broken(impl):
    raise RuntimeError


def measure(what, error):
    within_budget("pack_weight", what, EXACT.float() + error, EXACT, PLAIN)


def test_near(impl):
    measure("forward", 0.015)


def test_nearer(impl):
    measure("forward", 0.005)


def test_far(impl):
    measure("wgrad", 0.03)


def test_same(impl):
    same("pack_weight", torch.ones(5), torch.ones(5))


def test_different(impl):
    same("pack_weight", torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4]))


def test_skipped(impl):
    measure("gates", 0.0)
    pytest.skip("no reason")


def test_broken(broken):
    pass


def test_without_implementation():
    measure("dgrad", 0.0)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """The folder that a test process has written its records to."""
    folder = tmp_path_factory.mktemp("measuring")
    (folder / "test_pack_weight.py").write_text(MEASURING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "."],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(HERE), "L0K_TEST_RECORDS": str(folder / "records")},
        capture_output=True,
        text=True,
    )
    assert "6 failed, 10 passed, 3 skipped, 3 errors" in done.stdout
    return folder / "records"


def test_records_are_what_tests_measured(records):
    rows = error_table.load([records])
    assert [row.key for row in rows] == [
        ("pack_weight", "C++ CPU", "run on the CPU"),
        ("pack_weight", "CUDA C++", "run on the CPU harness"),
    ]
    for row in rows:
        assert row.worst == pytest.approx({"forward": 1.5, "wgrad": 3.0}, rel=1e-3)
        assert (row.differences, row.compared) == (2, 8)
        assert row.dtypes == ["float32"]
        assert (row.passed, row.failed) == (3, 3)
        told = " ".join(row.defects())
        assert "wgrad: 3 times PyTorch's error; expected at most 2" in told
        assert "2 of 8 numbers differ" in told and "3 tests failed" in told


@pytest.mark.parametrize(
    ("ran", "where", "found"),
    [
        ("reference", "cuda", "reference on a GPU"),
        ("reference", "cpu", "reference"),
        ("cpp", "cpu", "cpp"),
    ],
)
def test_the_reference_on_a_gpu_is_told_apart(ran, where, found):
    made = SimpleNamespace(params={"impl": ran, "device": where})
    assert error_table._impl_of(SimpleNamespace(funcargs={}, callspec=made)) == found


def test_defects_are_an_exit_code(records, tmp_path, capsys):
    assert error_table.main([str(records), "--save", str(tmp_path / "sum.json")]) == 1
    assert "3 tests failed" in capsys.readouterr().out
    good = [Row("pack_weight", "Triton", "interpreted", {"forward": 2.0}, passed=1)]
    error_table.save(tmp_path / "good.json", good)
    assert error_table.main([str(tmp_path / "good.json")]) == 0
    with pytest.raises(SystemExit):
        error_table.main([str(tmp_path / "absent")])


def test_sums_keep_the_worst():
    first = Row("pack_weight", "Triton", "interpreted", {"forward": 0.5, "wgrad": 1.0}, passed=2)
    second = Row("pack_weight", "Triton", "interpreted", {"forward": 0.7}, failed=1)
    (row,) = error_table.merged([first, second])
    assert row.worst == {"forward": 0.7, "wgrad": 1.0}
    assert (row.passed, row.failed) == (2, 1)


def test_what_did_not_run_has_no_figure():
    rows = [Row("pack_weight", "C++ CPU", "run on the CPU", {"forward": 0.5}, passed=2)]
    text = error_table.markdown(rows)
    assert "| `pack_weight` | C++ CPU | 0.50 |  |  |  |  |  | 2 | run on the CPU |" in text
    assert "| `pack_weight` | CUDA C++ | - |  |  |  |  |  | - | not run |" in text
    assert "| `gated_linear` | CUDA C++ |  |  |  |  |  |  | - | not run |" in text
    # Those of optimizers have no kernels for a GPU.
    assert "| `sgd_rows` | C++ CPU |" in text and "| `sgd_rows` | CUDA C++" not in text
    of_optimizers = ("adam_rows", "open_rows", "sgd_rows", "unpack_rows")
    on_gpus = sum(op not in of_optimizers for op in error_table.OPS)
    assert len(text.splitlines()) == 2 + 2 * len(error_table.OPS) + 2 * on_gpus


def test_compiled_kernels_are_told_apart_from_run_ones(tmp_path):
    def row(source, arch, *defects):
        backend = "triton" if source.endswith(".py") else "cuda"
        return {"backend": backend, "source": source, "arch": arch, "defects": defects}

    rows = [
        row("csrc/cuda/pack_weight_cuda.cu", "sm_80"),
        row("csrc/cuda/pack_weight_cuda.cu", "sm_90a"),
        row("l0kernels/ops/pack_weight/triton.py", "gfx942"),
        row("l0kernels/ops/pack_weight/triton.py", "sm_80", "spills 4 bytes"),
    ]
    (tmp_path / "table.json").write_text(json.dumps({"facts": {}, "rows": rows}))
    found = error_table.compiled(tmp_path / "table.json")
    run = Row("pack_weight", "CUDA C++", "run on the CPU harness", {"forward": 1.0}, passed=1)
    text = error_table.markdown([*found, run])
    assert "| `pack_weight` | Triton | - |  |  |  |  |  | - | compiled for gfx942 |" in text
    assert "| 1 | run on the CPU harness; compiled for sm_80, sm_90a |" in text


def test_the_table_goes_between_its_markers():
    text = f"before\n{error_table.BEGIN}old\n{error_table.END}after\n"
    once = error_table.put_into(text, "| new |\n")
    assert once == f"before\n{error_table.BEGIN}\n| new |\n\n{error_table.END}after\n"
    assert error_table.put_into(once, "| new |\n") == once
    with pytest.raises(ValueError, match="once each"):
        error_table.put_into("no markers", "| new |\n")
