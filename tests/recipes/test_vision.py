# SPDX-License-Identifier: Apache-2.0
"""Recipes of colour images: what they gate, and 20 steps of each on files of its format.

All but ResNet-20 are trained narrower, and residual ones with fewer blocks, to take seconds.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from l0kernels.bench import models
from l0kernels.cli import main
from l0kernels.recipes import published, vision
from l0kernels.recipes.recipe import Recipe

from .pictures import write_cifar10, write_cifar100, write_folder, write_npz


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
    "resnet20-cs": ["--rounds", "1", "--rewind", "1", "--initial=-.05,.05"],
    "vgg16-cs": ["--rounds", "1", "--rewind", "1"],
    "resnet20-imp": ["--rounds", "3", "--rewind", "1"],
    "vgg16-imp": ["--rounds", "2", "--rewind", "0"],
}
NAMES = [recipe.name for recipe in vision.RECIPES]


def _narrow(recipe: Recipe) -> Recipe:
    network = recipe.name.rpartition("-")[0]
    small = {"shape": (3, 48, 48), "probe": (3, 32, 32)} if network == "resnet50" else {}
    return replace(recipe, make=NARROW[network], **small)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(published.RECIPES, name, _narrow(published.find(name)))
    FORMATS.get(name, write_cifar10)(tmp_path / "data")
    words = ["train", name, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    words += ["--epochs", "2", "--batch", "4", *WORDS.get(name, [])]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    recipe = published.find(name)
    assert len(found["seeds"]) == (2 if name == "resnet20-cs" else 1)
    for run in found["seeds"]:
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
    logs = [*(tmp_path / "out").glob("seed-0*/epochs.jsonl")]
    assert len(logs) == len(found["seeds"])
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()]
    epochs = sum(phase["epochs"] for phase in found["seeds"][0]["phases"])
    # Ten steps an epoch.
    assert len(lines) == epochs >= 2
    last = lines[-1]["arms"]["packed"]
    assert last["loss"] != lines[0]["arms"]["packed"]["loss"]
    assert len(last["open_units"]) == GROUPS[recipe.name.rpartition("-")[0]]


PHASES = {
    "resnet20-cs": ["round 1", "ticket"],
    "vgg16-cs": ["round 1", "ticket"],
    "resnet20-imp": ["round 1", "round 2", "round 3"],
    "vgg16-imp": ["round 1", "round 2"],
    "resnet50-dep": ["training", "fine-tuning"],
}
GROUPS = {"resnet20": 19, "vgg16": 13, "resnet56": 6, "resnet50": 10, "wrn-28-10": 3}
GATES = {
    "resnet20-cs": (19, 267_696),
    "vgg16-cs": (13, 14_710_464),
    "vgg16-dep": (13, 4_224),
    "resnet56-dep": (27, 1_008),
    "resnet50-dep": (32, 7_552),
    "wrn-28-10-hc": (12, 4_480),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_are_as_many_as_published(name: str) -> None:
    """Counted in the layers of the whole network; `test_twenty_steps` converts small ones."""
    recipe = published.find(name)
    net = recipe.make()
    layers = dict(net.named_modules())
    if recipe.options.get("granularity") == "weight":
        chosen = [m for n, m in layers.items() if recipe.options["select"](n, m)]
        found = [m.weight.numel() for m in chosen if isinstance(m, nn.Conv2d)]
    else:
        inner = ("conv1", "conv2") if "resnet50" in name else ("conv1",)
        chosen = [
            m
            for n, m in layers.items()
            if isinstance(m, nn.Conv2d) and ("vgg" in name or n.rpartition(".")[2] in inner)
        ]
        found = [m.out_channels for m in chosen]
    assert (len(found), sum(found)) == GATES[name]
    shape = recipe.probe or recipe.shape
    assert net(torch.zeros(2, *shape)).shape == (2, 1000 if "resnet50" in name else 10)
