# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench predict`: a row per network, and what it refuses."""

import json
from pathlib import Path

import pytest

from l0kernels.bench import models, predict
from l0kernels.cli import main
from l0kernels.speed import Speed

QUICK = ["bench", "predict", "--models", "mlp-784-300-100"]


def test_every_network_has_a_batch():
    assert set(predict.BATCHES) == set(models.NAMES)


def test_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    found = Speed(masked=30.0, packed=20.0, predicted=12.0, groups={})
    seen = []

    def measure(root, inputs):
        seen.append((root.l0.open_probability().mean().item(), inputs[0].shape[0]))
        return found

    monkeypatch.setitem(predict.l0.report.__globals__, "measure", measure)
    found.groups.update(dict.fromkeys(("fc1", "fc2")))
    assert main([*QUICK, "--keep", ".25", "--out", str(tmp_path)]) == 0
    assert seen == [(pytest.approx(0.25), 128)]
    text = capsys.readouterr().out
    assert "| mlp-784-300-100 | 128 | 30.0 | 20.0 | 1.50 | 2.50 | +67% |" in text
    assert (tmp_path / "predict.md").read_text() == text
    written = json.loads((tmp_path / "predict.json").read_text())
    assert written["rows"][0]["predicted"] == 2.5
    assert written["command"] == "l0kernels bench predict --models mlp-784-300-100 --keep 0.25"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--keep", "0"], "open fraction in"), (["--models", "nothing"], "nothing")],
)
def test_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*QUICK, *options]) != 0
    assert message in capsys.readouterr().err
