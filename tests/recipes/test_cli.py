# SPDX-License-Identifier: Apache-2.0
"""``l0kernels train``: results, and bad input."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from l0kernels.cli import main
from l0kernels.recipes import mnist
from l0kernels.recipes.cli import deferred_interrupt
from l0kernels.recipes.published import RECIPES

from .conftest import TRAIN, unmoved

PNG = b"\x89PNG\r\n\x1a\n"


def _train(idx_folder: Path, out: Path, *words: str) -> int:
    given = ["--data", str(idx_folder), "--out", str(out), "--batch", "30", "--epochs", "2"]
    return main(["train", "mlp-hc", *given, *words])


def test_ends_with_table_plot_and_checkpoint(
    idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _train(idx_folder, out, "--compare", "--seeds", "0,3") == 0
    table = capsys.readouterr().out
    assert table == (out / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| 0 |")]
    assert [row.split(" | ")[1] for row in rows[:1]] == ["packed"]
    assert len(rows) == 3
    assert rows[1].startswith("| 0 | masked (nchw) |")
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {6, 8}
    assert "| lam per layer | 98.40 | 266-88-33 |  | quoted in the paper on RigL |" in table
    assert "| 98.20 (not confirmed) | 266-88-33 (not confirmed) | 10.01 (not confirmed) |" in table
    assert (out / "curves.png").read_bytes().startswith(PNG)
    assert (out / "curves.png").stat().st_size > 10_000
    for seed in (0, 3):
        assert (out / f"seed-{seed}" / "checkpoint.pt").exists()
        assert (out / f"seed-{seed}" / "filters.png").read_bytes().startswith(PNG)
        assert len((out / f"seed-{seed}" / "epochs.jsonl").read_text().splitlines()) == 2


def test_json_and_more_epochs(
    idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(idx_folder, tmp_path / "out", "--json", "--lam", "5", "--gate-lr", ".1") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["settings"]["lam"] == [5.0, 5.0, 5.0]
    assert first["settings"]["penalty_n"] is None
    assert "compared" not in first["seeds"][0]
    arm = first["seeds"][0]["arms"]["packed"]
    assert 0 < arm["left_realised"] < 1
    words = ["--json", "--lam", "5", "--gate-lr", ".1", "--resume", "--epochs", "3"]
    assert _train(idx_folder, tmp_path / "out", *words) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["settings"]["epochs"] == 3
    assert more["seeds"][0]["arms"]["packed"]["seconds"] > arm["seconds"]


@pytest.mark.parametrize("name", [recipe.name for recipe in mnist.RECIPES])
def test_twenty_steps(
    name: str,
    device: torch.device,
    idx_folder: Path,
    tmp_path: Path,
    starts: list[nn.Module],
    trained_on: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the published settings, but for smaller batches and two epochs of ten steps."""
    words = ["--data", str(idx_folder), "--out", str(tmp_path / "out"), "--json", "--progress"]
    words += ["--epochs", "2", "--batch", "7", "--device", device.type]
    assert main(["train", name, *words]) == 0
    told = capsys.readouterr()
    assert "20/20 [" in told.err
    settings = RECIPES[name].settings("published").to_dict()
    assert json.loads(told.out)["settings"] == {**settings, "epochs": 2, "batch": 7}
    assert trained_on == {device.type}
    (start,) = starts
    assert unmoved(start, tmp_path / "out" / "seed-0" / "checkpoint.pt") == []


def test_subsets_are_what_is_trained_and_tested(
    idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--subset", "12,7", "--batch", "4", "--json", "--progress"]
    assert _train(idx_folder, tmp_path / "out", *words) == 0
    told = capsys.readouterr()
    # Two epochs of three steps.
    assert "6/6 [" in told.err
    found = json.loads(told.out)
    assert (found["data"], found["n_train"], found["n_test"]) == ("part of squares", 12, 7)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "on part of squares: 12 train, 7 test; 2 epochs of 3 steps" in table
    assert f"/ {TRAIN};" in table
    for line in (tmp_path / "out" / "seed-0" / "epochs.jsonl").read_text().splitlines():
        right = json.loads(line)["arms"]["packed"]["accuracy"] * 7 / 100
        assert right == pytest.approx(round(right), abs=1e-9)


def test_recipes_are_listed_with_what_is_unconfirmed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    parts = {part.split(":")[0]: part for part in capsys.readouterr().out.split("\n\n")}
    assert list(parts) == list(RECIPES)
    for name, recipe in RECIPES.items():
        # The authors' code has all that these two need.
        assert ("not confirmed" in parts[name]) == (name not in ("vgg16-dep", "resnet56-dep")), name
        assert ("published results: none at hand" in parts[name]) == (not recipe.rows)
        for row in recipe.rows:
            line = next(line for line in parts[name].splitlines() if str(row) in line)
            assert ("(not confirmed)" in line) == (not row.confirmed)
    assert "settings ours: ours, not published, and not tuned" in parts["resnet20-scl"]
    assert "    milestones     60, 120, 180, 240\n" in parts["vgg16-dep"]
    assert "    gate_optimizer adam\n" in parts["vgg16-dep"]


def test_list_names_settings_sources_and_doubts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: {recipe.summary}" in text for name, recipe in RECIPES.items())
    assert "arXiv:1712.01312" in text
    assert "ours, not published" in text
    assert "not confirmed" in text
    assert "lam            10, 0.5, 0.1, 10" in text


BAD = {
    "no recipe": (
        [],
        "expected a recipe, one of lenet5-hc, mlp-hc, lenet5-arm, mlp-arm, "
        "lenet5-ar, mlp-ar, resnet20-cs,",
    ),
    "recipe": (["vgg"], "unknown recipe 'vgg': expected one of lenet5-hc, mlp-hc"),
    "folder": (["mlp-hc", "--data", "nowhere"], "nowhere: expected a folder with IDX files"),
    "device": (["mlp-hc", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
    "no such device": (
        ["mlp-hc", "--device", "cuda:99"],
        f"--device: expected one of {torch.cuda.device_count()} cuda devices, got 'cuda:99'",
    ),
    "epochs": (["mlp-hc", "--epochs", "-1"], "--epochs: expected a positive integer, got -1"),
    "batch": (["mlp-hc", "--batch", "0"], "--batch: expected a positive integer, got 0"),
    "lr": (["mlp-hc", "--lr", "nan"], "--lr: expected a positive number, got nan"),
    "gate lr": (["mlp-hc", "--gate-lr", "-1"], "--gate-lr: expected a positive number, got -1.0"),
    "lam count": (["mlp-hc", "--lam", "1,2"], "--lam: expected 1 number or 3 (for fc1.in, fc1"),
    "lam text": (["mlp-hc", "--lam", "much"], "--lam: expected numbers like .1 or 10,.5,.1,10"),
    "lam sign": (["mlp-hc", "--lam", "-.5"], "--lam: expected numbers of at least 0, got [-0.5"),
    "seeds": (["mlp-hc", "--seeds", "a"], "--seeds: expected integers like 0,1,2, got 'a'"),
    "twice": (["mlp-hc", "--seeds", "1,1"], "--seed: expected different integers in [0, 2**63)"),
    "seed": (["mlp-hc", "--seed", "-2"], "--seed: expected different integers in [0, 2**63)"),
    "settings": (
        ["mlp-hc", "--settings", "x"],
        "--settings: expected one of published, digits, short, got 'x'",
    ),
    "data": (
        ["vgg16-dep"],
        "--data: expected a folder with images of 32x32 in colour, got none",
    ),
    "other data": (["vgg16-dep", "--data", "."], "expected one of data_batch_1.bin, train.bin"),
    "subset": (["mlp-hc", "--subset", "a"], "--subset: expected one or two numbers like 1000,500"),
    "subset size": (
        ["mlp-hc", "--subset", "10,451"],
        "--subset: expected 1 to 450 test images, got 451",
    ),
    "initial": (["mlp-hc", "--initial", "1"], "--initial: expected a recipe whose gates start"),
    "initial of pruning": (["vgg16-imp", "--initial", "1"], "--initial: expected a recipe whose"),
    "initial text": (
        ["resnet20-cs", "--initial", "a"],
        "--initial: expected numbers like .1 or 10,.5,.1,10, got 'a'",
    ),
    "initial size": (
        ["resnet20-cs", "--initial", "inf"],
        "--initial: expected finite numbers, got inf",
    ),
    "rounds": (["mlp-hc", "--rounds", "2"], "--rounds: expected a recipe with rounds, got mlp-hc"),
    "no rounds": (["resnet20-cs", "--rounds", "0"], "--rounds: expected a positive integer, got 0"),
    "rewind": (
        ["resnet20-cs", "--epochs", "2"],
        "--rewind: expected fewer than the 2 epochs of a round, got 2",
    ),
    "save": (["mlp-hc", "--save-every", "0"], "--save-every: expected a positive integer, got 0"),
    "resume": (["mlp-hc", "--resume"], "--resume: expected runs/mlp-hc-digits/seed-0/checkpoint"),
    "out": (["mlp-hc", "--out", "file/x"], "--out: expected a folder that can be made, got file/x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    words, message = BAD[case]
    assert main(["train", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert message in told.err


def test_missing_matplotlib_is_told_before_training(
    idx_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert _train(idx_folder, out) == 2
    assert "pip install 'l0kernels[train]'" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_first_interrupt_waits_and_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
