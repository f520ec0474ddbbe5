# SPDX-License-Identifier: Apache-2.0
"""Recipes of colour images: what they gate, and 20 steps of each on files of its format.

All but ResNet-20 are trained narrower, and residual ones with fewer blocks, to take seconds.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

# The folder bench/ ships as l0kernels.bench, which pyright does not know.
from l0kernels.bench import models  # pyright: ignore[reportMissingImports]
from l0kernels.cli import main
from l0kernels.recipes import checkpoint, published, vision
from l0kernels.recipes.arm import gated_network
from l0kernels.recipes.recipe import Recipe
from l0kernels.training import gates_of

from .conftest import unmoved
from .pictures import write_cifar10, write_cifar100, write_folder, write_npz


def _whole(width: int) -> int:
    return width


def _eighth(width: int) -> int:
    return width // 8


def _half(width: int) -> int:
    return width // 2


NARROW: dict[str, Callable[..., nn.Module]] = {
    "resnet20": vision.NETWORKS["resnet20"][1],
    "resnet56": partial(models.CifarResNet, _half, blocks=2),
    "vgg16": partial(models.VGG16, _eighth),
    "resnet50": partial(models.BottleneckResNet, _half, blocks=(1, 1, 2, 1), width=8),
    "wrn-28-10": partial(models.WideResNet, _eighth, depth=10, factor=2),
}
FORMATS = {
    "vgg16-dep": write_cifar100,
    "resnet20-cs": write_npz,
    "vgg16-cs": write_npz,
    "resnet50-dep": write_folder,
}
WORDS = {
    "resnet20-cs": ["--rounds", "1", "--rewind", "1"],
    "vgg16-cs": ["--rounds", "1", "--rewind", "1"],
    "resnet20-imp": ["--rounds", "3", "--rewind", "1"],
    "vgg16-imp": ["--rounds", "3", "--rewind", "0"],
}
NAMES = [recipe.name for recipe in vision.RECIPES]


def _narrow(recipe: Recipe) -> Recipe:
    network = recipe.name.rpartition("-")[0]
    small = {"shape": (3, 48, 48), "probe": (3, 32, 32)} if network == "resnet50" else {}
    return replace(recipe, make=NARROW[network], **small)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps(
    name: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[nn.Module],
    trained_on: set[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(published.RECIPES, name, _narrow(published.find(name)))
    FORMATS.get(name, write_cifar10)(tmp_path / "data")
    words = ["train", name, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    words += ["--epochs", "2", "--batch", "4", *WORDS.get(name, []), "--device", device.type]
    assert main([*words, "--json", "--progress"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    recipe = published.find(name)
    (run,) = found["seeds"]
    arm = run["arms"]["packed"]
    assert math.isfinite(arm["loss"])
    assert 0 <= arm["accuracy"] <= 100
    assert 0 < arm["left_test"] <= 1
    single = recipe.options.get("granularity") == "weight"
    assert arm["open_units"].endswith("weights") == single
    assert [phase["phase"] for phase in run["phases"]] == PHASES.get(name, ["training"])
    assert len(found["published"]) == len(recipe.rows)
    table = (tmp_path / "out" / "table.md").read_text()
    assert ("No published result" in table) == (not recipe.rows)
    lines = (tmp_path / "out" / "seed-0" / "epochs.jsonl").read_text().splitlines()
    assert len(lines) == sum(phase["epochs"] for phase in run["phases"]) >= 2
    # Ten steps an epoch.
    assert f"{10 * len(lines)}/{10 * len(lines)} [" in told.err
    last = json.loads(lines[-1])["arms"]["packed"]
    assert len(last["open_units"]) == GROUPS[recipe.name.rpartition("-")[0]]
    assert trained_on == {device.type}
    (start,) = starts
    assert unmoved(start, tmp_path / "out" / "seed-0" / "checkpoint.pt") == []


def test_every_initial_value_has_a_run_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[nn.Module],
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = replace(published.find("resnet20-cs"), make=partial(vision.resnet, 1))
    monkeypatch.setitem(published.RECIPES, "resnet20-cs", small)
    write_cifar10(tmp_path / "data")
    words = ["train", "resnet20-cs", "--data", str(tmp_path / "data"), "--batch", "20"]
    words += ["--epochs", "2", "--rounds", "1", "--rewind", "1", "--initial=-.05,.05"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["seeds"]
    assert [run["initial"] for run in runs] == [-0.05, 0.05]
    for value, start in zip((-0.05, 0.05), starts, strict=True):
        assert bool((gates_of(start).alpha == value).all())
        kept = checkpoint.load(tmp_path / "out" / f"seed-0-initial-{value:g}" / "checkpoint.pt")
        assert kept["settings"]["initial"] == value
    # Published as what decides how sparse a ticket is.
    sparse, dense = (run["arms"]["packed"]["left_test"] for run in runs)
    assert sparse < dense
    table = (tmp_path / "out" / "table.md").read_text()
    labels = re.findall(r"^\| (.*?) \| packed \|", table, re.MULTILINE)
    assert labels == ["0, initial -0.05", "0, initial 0.05"]


PHASES = {
    "resnet20-cs": ["round 1", "ticket"],
    "vgg16-cs": ["round 1", "ticket"],
    "resnet20-imp": ["round 1", "round 2", "round 3"],
    "vgg16-imp": ["round 1", "round 2", "round 3"],
    "resnet50-dep": ["training", "fine-tuning"],
}
GROUPS = {"resnet20": 19, "vgg16": 13, "resnet56": 6, "resnet50": 10, "wrn-28-10": 3}
# Groups, and gates in all of them; Dep-L0's authors have one group more, the stem, in ResNets.
GATES = {
    "resnet20-cs": (19, 267_696),
    "vgg16-cs": (13, 14_710_464),
    "resnet20-imp": (19, 267_696),
    "vgg16-imp": (13, 14_710_464),
    "resnet20-scl": (19, 267_696),
    "vgg16-scl": (13, 14_710_464),
    "vgg16-dep": (13, 4_224),
    "resnet56-dep": (27, 1_008),
    "resnet50-dep": (32, 7_552),
    "wrn-28-10-hc": (12, 4_480),
    "wrn-28-10-arm": (12, 4_480),
}
# As deep, with a part of all widths: to convert the whole ones takes a minute and a half.
SLIM: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    "resnet50": (8, partial(models.BottleneckResNet, _whole, blocks=(3, 4, 6, 3), width=8)),
    "wrn-28-10": (10, partial(models.WideResNet, _whole, depth=28, factor=1)),
}


@pytest.mark.parametrize("name", NAMES)
def test_gates_are_as_many_as_published(name: str) -> None:
    recipe = published.find(name)
    part, make = SLIM.get(name.rpartition("-")[0], (1, recipe.make))
    settings = recipe.settings(recipe.default)
    gates = gates_of(gated_network(replace(recipe, make=make), settings, 50_000, 0))
    with torch.device("meta"):
        whole = recipe.make()
    weights = [whole.get_parameter(f"{group}.weight") for group in gates.names]
    single = recipe.options.get("granularity") == "weight"
    widths = [weight.numel() if single else len(weight) for weight in weights]
    assert [part * size for size in gates.sizes] == widths
    assert (len(widths), sum(widths)) == GATES[name]
    images = torch.zeros(2, *(recipe.probe or recipe.shape), device="meta")
    assert whole(images).shape == (2, 1000 if "resnet50" in name else 10)
