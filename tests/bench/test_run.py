# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench run` relates whole runs to the work that their draws left."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from l0kernels.bench import run
from l0kernels.cli import main
from l0kernels.recipes import mnist, published
from l0kernels.recipes.arm import PACKED, Arm, drawn_weights, gated_network
from l0kernels.recipes.data import Images
from l0kernels.recipes.loop import Plan
from l0kernels.training import gates_of

MNIST = (1, 28, 28)


@pytest.mark.parametrize("name", [recipe.name for recipe in mnist.RECIPES])
def test_work_is_what_pytorch_counts(name: str):
    net = published.find(name).make()
    cost = run.operations_per_weight(net, MNIST)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(3, *MNIST)).sum().backward()
    assert 2 * 3 * drawn_weights(net, cost) == counter.get_total_flops()
    assert all(not layer._forward_hooks for layer in net.modules())


def test_closed_gates_leave_less_work():
    recipe = published.find("mlp-hc")
    net = gated_network(recipe, recipe.settings("digits"), 100, 0).train()
    cost, gates = run.operations_per_weight(recipe.make(), MNIST), gates_of(net)
    full = drawn_weights(recipe.make(), cost)
    assert full == 2 * 784 * 300 + 3 * (300 * 100 + 100 * 10)  # the data get no gradient
    widths = dict(zip(gates.names, gates.sizes, strict=True))
    for share in (1.0, 0.5, 0.0):
        is_open = [torch.arange(size) < share * size for size in widths.values()]
        with gates.using(torch.cat(is_open).float()):
            net(torch.zeros(2, *MNIST))
            left = drawn_weights(net, cost)
        first, second, third = (int(share * widths[name]) for name in ("fc1.in", "fc1", "fc2"))
        assert left == 2 * first * second + 3 * (second * third + third * 10)


def test_a_run_tells_its_efficiency(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["mlp-hc", "--epochs", "2", "--batch", "500", "--seeds", "0,1", "--out", str(tmp_path)]
    assert main(["bench", "run", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in found["rows"]] == [0, 1]
    for row, seed in zip(found["rows"], found["training"]["seeds"], strict=True):
        assert 0 < row["work_left"] < 1
        assert row["masked_seconds"] == seed["arms"]["masked"]["seconds"]
        assert row["speedup"] == row["masked_seconds"] / row["ours_seconds"]
        assert row["eta_run"] == row["speedup"] * row["work_left"]
        assert 0 <= row["losses"] < 0.01
    told = "l0kernels bench run mlp-hc --epochs 2 --batch 500 --seeds 0,1"
    assert found["command"] == told
    assert found["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| eta_run |" in (tmp_path / "run.md").read_text()
    assert json.loads((tmp_path / "run.json").read_text()) == found


def test_the_command_has_the_device():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    given = parser.parse_args(["mlp-hc", "--device", "cuda", "--epochs", "2"])
    assert run.command(given) == "l0kernels bench run mlp-hc --epochs 2 --device cuda"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["mlp-hc", "--resume"], "expected a run from the start"),
        (["vgg"], "expected one of lenet5-hc, mlp-hc"),
        ([], "expected a recipe"),
    ],
)
def test_bad_input(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "run", *options]) == 2
    assert told in capsys.readouterr().err


def test_every_draw_counts_once():
    recipe = published.find("mlp-hc")
    settings = recipe.settings("digits")
    images = Images("none", *(torch.zeros(0) for _ in range(4)), "")
    plan = Plan(recipe, settings, images, 0, True, None, 1, Path("."))
    work = run.WorkLeft(plan)
    arm = Arm(PACKED, gated_network(recipe, settings, 10, 0), settings, None)
    for draws in (1, 2):
        arm.net.train()(torch.zeros(2, *MNIST))
        for _ in range(3):
            work.note(arm)
        assert len(work.fractions) == draws
    assert all(0 < fraction < 1 for fraction in work.fractions)
