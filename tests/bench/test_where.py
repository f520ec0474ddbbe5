# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench where` splits a step into kinds of work and refuses bad input."""

import json
from pathlib import Path

import pytest

from l0kernels.bench import plot, where
from l0kernels.cli import main

QUICK = ["bench", "where", "--model", "mlp-784-300-100", "--batch", "4", "--steps", "3"]


def test_operators_have_kinds():
    assert where.kind_of("l0kernels::pack_weights_backward") == "pack, backward"
    assert where.kind_of("l0kernels::pack_weights") == "pack"
    assert where.kind_of("aten::mm") == "convolutions, products"
    assert where.kind_of("aten::relu") == "other operators"
    assert where.kind_of("Optimizer.step#SGD.step") == where.HOST
    assert len(plot.KIND_COLOURS) == len({*where.KINDS, where.HOST})


def test_writes_a_table_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("l0kernels.gates.dense.MOST_ROWS", 0)  # else all would run dense
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    names = ["where.json", "where.md", "where.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "where.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "where.md").read_text() in capsys.readouterr().out
    found = json.loads((tmp_path / "where.json").read_text())
    parts = {part["variant"]: part["kinds"] for part in found["parts"]}
    assert list(parts) == ["masked-best", "oracle", "ours"]
    for variant, kinds in parts.items():
        assert min(kinds.values()) >= 0 and kinds["convolutions, products"] > 0
        for kind in ("gates", "pack", "pack, backward"):
            assert (kinds[kind] > 0) == (variant == "ours")
        assert kinds["optimizer"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "open fraction in"),
        (["--steps", "0"], "steps >= 1"),
        (["--batch", "0"], "batch >= 1"),
        (["--variants", "nobody"], "expected variants among"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main([*QUICK, *options]) != 0
    assert message in capsys.readouterr().err
