# SPDX-License-Identifier: Apache-2.0
"""Tables of `l0kernels tune`: what is tried, written and read; the kernels' part needs Triton."""

import json
from pathlib import Path

import pytest
import torch

from l0kernels.bench import tune
from l0kernels.cli import main
from l0kernels.ops.gated_linear import tiles
from l0kernels.ops.gated_linear.tiles import HEURISTICS, VERSION, Tiles

CPU = torch.device("cpu")
PLACE = ("layer", "wide")
OTHER = Tiles(64, 128, 32, 4, 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch):
    """Where tables are looked for."""
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.table_of.cache_clear()
    yield tmp_path
    tiles.table_of.cache_clear()


def written(folder: Path, best: Tiles = OTHER) -> Path:
    """A table for the device "cpu"."""
    found = [
        tune.Found(PLACE, best, 1.0, 2.0, 3, 0, 0),
        tune.Found(("weight", "wide"), HEURISTICS["weight", "wide"], 2.0, 2.0, 3, 0, 0),
    ]
    path = tiles.file_of("cpu", folder)
    path.write_text(json.dumps(tune.content(found, CPU, "quick")))
    return path


@pytest.mark.parametrize("place", HEURISTICS, ids=" ".join)
def test_candidates(place):
    quick, normal, thorough = (tune.candidates(place, effort) for effort in tune.EFFORTS)
    assert quick[0] == normal[0] == thorough[0] == HEURISTICS[place]
    assert set(quick) < set(normal) < set(thorough)
    for tried in (quick, normal, thorough):
        assert len(set(tried)) == len(tried)
    itemsize = 4 if place[1] == "float32" else 2
    assert all(tune.shared(one, itemsize) <= tune.MOST_SHARED for one in thorough)
    assert {one[:3] for one in quick} == {HEURISTICS[place][:3]}
    assert {one.depth for one in normal} == {HEURISTICS[place].depth}
    assert len(quick) == 6
    assert thorough == tune.candidates(place, "thorough")


def test_shared_memory():
    assert tune.shared(Tiles(128, 64, 32, 4, 3), 2) == 3 * 32 * (128 + 64) * 2


def test_without_a_table_the_heuristics_hold(folder: Path):
    for place, default in HEURISTICS.items():
        assert tiles.tiles_at(place, CPU) == default


def test_what_is_written_is_read(folder: Path):
    content = json.loads(written(folder).read_text())
    assert content["version"] == VERSION
    assert content["gpu"] == "cpu"
    assert [row[:2] for row in content["tiles"]] == [list(PLACE)]  # no line for a default
    assert content["ms"] == [[*PLACE, 1.0, 2.0]]
    assert tiles.tiles_at(PLACE, CPU) == OTHER
    assert tiles.tiles_at(("weight", "wide"), CPU) == HEURISTICS["weight", "wide"]
    assert tiles.table_of("another GPU") == {}


def test_what_is_tried_goes_before_a_table(folder: Path):
    written(folder)
    third = Tiles(32, 32, 32, 4, 2)
    with tiles.trying(PLACE, third):
        assert tiles.tiles_at(PLACE, CPU) == third
    assert tiles.tiles_at(PLACE, CPU) == OTHER


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb.json"),
        ("Some RTX 6000/8000", "some-rtx-6000-8000.json"),
    ],
)
def test_names_of_files(name: str, file: str):
    assert tiles.file_of(name, Path("x")) == Path("x", file)


def test_a_table_of_another_version_is_not_used(folder: Path):
    path = written(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": VERSION + 1}))
    with pytest.warns(UserWarning, match=f"expected version {VERSION}, got {VERSION + 1}"):
        assert tiles.tiles_at(PLACE, CPU) == HEURISTICS[PLACE]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        f'{{"version": {VERSION}}}',
        f'{{"version": {VERSION}, "tiles": [["layer", "wide", 1]]}}',
        f'{{"version": {VERSION}, "tiles": [["layer", "other", 64, 64, 64, 4, 2]]}}',
    ],
)
def test_a_damaged_table_is_an_error(folder: Path, text: str):
    tiles.file_of("cpu", folder).write_text(text)
    with pytest.raises(ValueError, match="cpu.json: expected"):
        tiles.tiles_at(PLACE, CPU)


def test_tables_that_ship_are_whole():
    """Each can be read and has sizes that kernels take."""
    paths = sorted(tiles.FOLDER.glob("*.json"))
    if not paths:
        pytest.skip("no table ships yet")
    for path in paths:
        content = json.loads(path.read_text())
        assert content["version"] == VERSION
        assert tiles.file_of(content["gpu"], tiles.FOLDER) == path
        for kernel, kind, *sizes in content["tiles"]:
            assert Tiles(*sizes) in tune.candidates((kernel, kind), "thorough")


def test_shows_what_was_found():
    text = tune.table([tune.Found(PLACE, OTHER, 1.0, 2.0, 7, 1, 2)])
    assert "| layer | wide | 64x128x32, 4, 3 | 1 | 2 | 7 (1 wrong, 2 refused) |" in text


def test_where_nothing_can_be_written_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune._triton, "why_not", lambda: None)
    monkeypatch.setattr(tune, "name_of", lambda device: pytest.fail("it goes on"))
    (tmp_path / "file").write_text("")
    assert main(["tune", "--out", str(tmp_path / "file" / "tuned")]) == 2
    assert "--out: expected a folder to write into, got" in capsys.readouterr().err


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune"]) != 0
    assert "expected a GPU to tune for, got none" in capsys.readouterr().err
