# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench arm` times what it says, and nothing that computes something else."""

import json
from pathlib import Path

import pytest
import torch

from l0kernels.bench import arms, readme, two_passes
from l0kernels.bench.figures import Sheet
from l0kernels.cli import main
from l0kernels.gates import ARM
from l0kernels.nn import GatedLinear

QUICK = ["bench", "arm", "--batch", "64", "--rounds", "2", "--runs", "1", "--warmup", "0"]


def test_both_estimators_are_timed_and_compared(tmp_path: Path):
    assert main([*QUICK, "--model", "mlp-784-300-100", "--out", str(tmp_path)]) == 0
    names = ["arm.csv", "arm.json", "arm.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    sheet = Sheet.load(tmp_path / "arm.csv")
    assert sheet.command == (
        "l0kernels bench arm --model mlp-784-300-100 --batch 64 --rounds 2 --runs 1 --warmup 0"
    )
    shapes = [f"mlp-784-300-100 batch 64 {gates}" for gates in ("polarised", "even")]
    assert [(f.shape, f.impl) for f in sheet.figures] == [
        (shape, name) for shape in shapes for name in ("ar", "arm")
    ]
    for figure in sheet.figures:
        assert figure.p50_ms is not None and figure.p50_ms > 0
        assert figure.error is not None and figure.error < 1e-12
        assert figure.over_ours is not None and (figure.impl == "arm" or figure.over_ours.low == 1)
    rows = json.loads((tmp_path / "arm.json").read_text())["rows"]
    assert [row["open"] for row in rows] == [0.5] * 4
    shown = [line for line in readme.tables(tmp_path).splitlines() if line.startswith("| mlp")]
    assert [line.split("|")[1].strip() for line in shown] == shapes
    ratio = sheet.figures[1].over_ours
    assert ratio is not None and f"{ratio.median:.3f} (" in shown[0]


def test_gates_are_open_as_often_as_they_say():
    task = two_passes.check(two_passes.Setting(model="mlp-784-300-100", batch=2))
    arm = two_passes.make_estimator(task, "arm")
    gates = arm.net.l0
    assert isinstance(gates, ARM) and gates.estimator == "arm"
    for name, (first, second) in two_passes.GATES.items():
        two_passes.open_with(arm.gates, (first, second))
        p = gates.open_probability()
        assert p[::2].sub(first).abs().max() < 1e-6, name
        assert p[1::2].sub(second).abs().max() < 1e-6, name
    before = gates.log_alpha.detach().clone()
    for _ in range(3):
        arm.step()
    assert gates.log_alpha.equal(before)
    assert float(gates.log_alpha.grad.abs().max()) > 0


def test_a_wrong_pass_has_no_figures(monkeypatch: pytest.MonkeyPatch):
    task = two_passes.check(two_passes.Setting(model="mlp-784-300-100"))
    arm = two_passes.make_estimator(task, "arm")
    batch = arms.check_batch(task)
    assert arms.require_the_reference(arm.net, *batch) < 1e-12
    right = GatedLinear.compute
    # In the pass without gradients, whose loss weighs the gates' gradient, and nowhere else.
    monkeypatch.setattr(
        GatedLinear,
        "compute",
        lambda *args: right(*args) * (1.0 if torch.is_grad_enabled() else 1.1),
    )
    with pytest.raises(RuntimeError, match="no figures for different computations"):
        arms.require_the_reference(arm.net, *batch)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gates", "odd"], "expected gates among polarised, even, got ['odd']"),
        (["--rounds", "0"], "expected batch >= 1, rounds >= 1 and runs >= 1, got (64, 0, 1)"),
        (["--model", "alexnet"], "expected one of"),
    ],
)
def test_bad_input(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main([*QUICK, *options]) == 2
    assert told in capsys.readouterr().err
