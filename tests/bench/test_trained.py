# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench step --trained`: steps of what `l0kernels train` has left."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.conftest import write_images
from recipes.pictures import write_cifar10
from recipes.test_vision import _narrow
from torch import nn

from l0kernels.bench import readme, step, trained
from l0kernels.cli import main
from l0kernels.nn import GatedLinear
from l0kernels.recipes import published
from l0kernels.recipes.arm import drawn_weights, weights_left
from l0kernels.training import gates_of

QUICK = ["--rounds", "2", "--runs", "1", "--warmup", "1"]
RECIPES = ("mlp-hc", "mlp-arm", "lenet5-hc")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "data")
    for name in RECIPES:
        words = ["train", name, "--data", str(folder / "data"), "--out", str(folder / name)]
        more = ["--compare"] if name == "mlp-hc" else []
        assert main([*words, "--epochs", "2", "--batch", "35", "--gate-lr", "0.2", *more]) == 0
    return {name: folder / name for name in RECIPES}


def _bench(*words: str) -> int:
    return main(["bench", "step", *QUICK, *words])


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_timed_at_its_end(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    assert _bench("--trained", str(runs[name]), "--out", str(tmp_path)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step.csv", "step.json", "step.md"]
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["variants"] == list(trained.VARIANTS)
    last = json.loads((runs[name] / "seed-0" / "epochs.jsonl").read_text().splitlines()[-1])
    end = last["arms"]["packed"]
    (row,) = report["rows"]
    assert row["keep"] == end["weights_realised"] / end["weights_total"] < 1
    assert set(row["ratios"]) == {"S best", "R"}
    assert row["error_before"]["ours"] < 1e-10 and set(row["error_after"]) == {"ours", "oracle"}
    assert row["error_after"]["oracle"] < 1e-10
    text = (tmp_path / "step.md").read_text()
    told = (
        f"last draw after timing, in fp64: relative difference {row['error_after']['oracle']:.1e}."
    )
    assert f"The loss of the oracle is that of ours under its {told}" in text
    assert "oracle-onednn" not in text  # what is told of other runs, all of whose gradients agree
    lines = list(csv.DictReader((tmp_path / "step.csv").open()))
    assert [(line["impl"], line["shape"]) for line in lines] == [
        (variant, name) for variant in trained.VARIANTS
    ]
    words = (
        f"--rounds 2 --runs 1 --warmup 1 --variants masked-best,oracle,ours --trained {runs[name]}"
    )
    assert lines[0]["command"] == f"l0kernels bench step {words}"
    assert f"after 2 epochs, batch 35: weights left {row['keep']:.2%} drawn" in report["notes"][0]
    compared = any("masked / ours" in note for note in report["notes"])
    assert compared == (name == "mlp-hc")
    assert f"| {name} | f32 |" in readme.tables(tmp_path)


def _loaded(run: Path) -> trained.Trained:
    return trained.load(replace(step.Setting(), trained=str(run)))


def test_the_gates_are_those_of_the_run_and_stay(runs: dict[str, Path]) -> None:
    run = _loaded(runs["lenet5-hc"])
    content: dict[str, Any] = torch.load(
        runs["lenet5-hc"] / "seed-0" / "checkpoint.pt", weights_only=True
    )
    saved = content["arms"]["packed"]["model"]
    net = run.ours.net
    first = int(gates_of(net).step)
    assert first == int(saved["l0.step"]) == 4
    for name, value in net.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert value.equal(saved[name]), name
    for _ in range(3):
        run.ours.step(*run.batch)
    assert int(gates_of(net).step) == first + 3
    for name, value in net.named_parameters():
        assert value.equal(saved[name]), name
    assert drawn_weights(net) < weights_left(net)["total"]


def test_the_oracle_has_the_widths_of_the_last_draw(runs: dict[str, Path]) -> None:
    run = _loaded(runs["mlp-arm"])
    oracle = trained.Oracle(run.ours)
    with pytest.raises(RuntimeError, match="rebuild"):
        oracle.step(*run.batch)
    for _ in range(2):
        run.ours.step(*run.batch)
        oracle.rebuild(*run.batch)
        assert oracle.net is not None
        gates = gates_of(run.ours.net)
        for name in ("fc1", "fc2"):
            layer, count = oracle.net.get_submodule(name), int((gates[name].z != 0).sum())
            assert isinstance(layer, nn.Linear) and 2 < layer.out_features == count


def test_a_wrong_step_has_no_figures(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, right = _loaded(runs["mlp-arm"]), GatedLinear.compute
    x, y = trained.check_batch(run)
    run.ours.step(*run.batch)
    assert trained.require_the_same_loss(run.ours.net, x, y) < 1e-10
    monkeypatch.setattr(GatedLinear, "compute", lambda *args: right(*args) * 1.1)
    with pytest.raises(RuntimeError, match="no figures for different computations"):
        trained.require_the_same_loss(run.ours.net, x, y)
    with pytest.raises(RuntimeError, match="no figures for different computations"):
        trained.require_the_reference(run.ours.net, x, y)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch", "64"], "expected none of the options that it decides, got ['batch']"),
        (["--variants", "dense,ours"], "expected ours and others of masked-best, oracle, ours"),
        (["--variants", "oracle"], "expected ours and others of"),
        (["--plot", "a.png"], "--plot: expected several open fractions"),
    ],
)
def test_bad_options(
    runs: dict[str, Path], words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench("--trained", str(runs["mlp-hc"]), *words) == 2
    assert told in capsys.readouterr().err


def test_a_folder_without_one_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, count in ((tmp_path, 0), (runs["mlp-hc"].parent, len(RECIPES))):
        assert _bench("--trained", str(folder)) == 2
        told = f"expected a folder with one checkpoint.pt, got {count}"
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "note", "variants"),
    [
        ("resnet20-scl", "oracle is left out: gates of single weights", ["masked-best", "ours"]),
        ("wrn-28-10-hc", "the oracle leaves out what closed units", list(trained.VARIANTS)),
    ],
)
def test_gates_of_weights_and_before_norms(
    name: str, note: str, variants: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(published.RECIPES, name, _narrow(published.find(name)))
    write_cifar10(tmp_path / "data")
    words = ["train", name, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*words, "--epochs", "1", "--batch", "4"]) == 0
    assert _bench("--trained", str(tmp_path / "run"), "--out", str(tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "step.json").read_text())
    assert report["variants"] == variants
    assert any(told.startswith(note) for told in report["notes"])
    assert list(report["rows"][0]["error_after"]) == ["ours"]
