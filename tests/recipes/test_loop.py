# SPDX-License-Identifier: Apache-2.0
"""The training loop: equal arms, exact resume, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from l0kernels.recipes import checkpoint, mnist
from l0kernels.recipes.loop import CHECKPOINT, LOG, PREVIOUS, Plan, Run, epoch_order

CLOCK = ("seconds", "step_ms", "step_memory")


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every number, string and tensor of a checkpoint by its place, but not the clock's."""
    if isinstance(value, dict):
        items = [(f"{path}.{key}", v) for key, v in value.items() if key not in CLOCK]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, v in items for key, leaf in _leaves(v, name).items()}


def _assert_same_bits(one: Path, other: Path) -> None:
    first, second = _leaves(checkpoint.load(one)), _leaves(checkpoint.load(other))
    assert first.keys() == second.keys()
    tensors = [key for key, value in first.items() if isinstance(value, torch.Tensor)]
    # Parameters and buffers, and three entries per parameter of the optimizer, in each arm.
    assert len(tensors) >= 2 * 4 * 7
    for key, value in first.items():
        same = torch.equal(value, second[key]) if key in tensors else value == second[key]
        assert same, key


def _train(plan: Plan) -> Run:
    run = Run(plan)
    run.start()
    run.train()
    return run


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(0, 1, 100)
    assert sorted(order.tolist()) == list(range(100))
    torch.manual_seed(123)
    assert torch.equal(epoch_order(0, 1, 100), order)
    others = [epoch_order(0, 2, 100), epoch_order(1, 1, 100), epoch_order(2**62, 1, 100)]
    assert not any(torch.equal(other, order) for other in others)


@pytest.mark.parametrize("recipe", [recipe.name for recipe in mnist.RECIPES])
def test_packed_and_masked_train_alike(make_plan: Callable[..., Plan], recipe: str) -> None:
    history = _train(make_plan(recipe, epochs=3)).history
    for record in history:
        packed, masked = record["arms"]["packed"], record["arms"]["masked"]
        assert packed["loss"] == pytest.approx(masked["loss"], rel=1e-4)
        assert packed["data_loss"] == pytest.approx(masked["data_loss"], rel=1e-4)
        assert packed["weights_realised"] == masked["weights_realised"]
        assert packed["open_units"] == masked["open_units"]
        assert 0 < packed["weights_realised"] < packed["weights_total"]
    losses = [record["arms"]["packed"]["loss"] for record in history]
    assert losses[-1] < losses[0]
    assert [record["first"] for record in history] == ["packed", "masked", "packed"]


def test_it_learns(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("mlp-hc", epochs=12, compare=False, settings={"lr": 3e-3})
    assert _train(plan).history[-1]["arms"]["packed"]["accuracy"] > 90


def test_data_penalty_and_epoch_loss_add_up(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("mlp-hc", epochs=1, compare=False, settings={"lam": (0.0, 0.0, 0.0)})
    entry = _train(plan).history[0]["arms"]["packed"]
    assert entry["loss"] == pytest.approx(entry["data_loss"], rel=1e-6)


@pytest.mark.parametrize(("recipe", "ema"), [("lenet5-hc", None), ("mlp-hc", 0.9)])
def test_resume_gives_the_same_bits(
    make_plan: Callable[..., Plan], recipe: str, ema: float | None
) -> None:
    whole = make_plan(recipe, out="whole", epochs=4, settings={"ema": ema})
    _train(whole)
    parts = make_plan(recipe, out="parts", epochs=2, settings={"ema": ema})
    _train(parts)
    again = Run(replace(parts, settings=whole.settings))
    again.resume()
    assert again.epoch == 2
    again.train()
    _assert_same_bits(whole.checkpoint, parts.checkpoint)
    lines = [json.loads(line) for line in (parts.folder / LOG).read_text().splitlines()]
    assert lines == again.history


def test_interruption_leaves_the_last_whole_epoch(make_plan: Callable[..., Plan]) -> None:
    whole = make_plan(out="whole", epochs=3)
    _train(whole)
    plan = make_plan(out="cut", epochs=3)
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 2 * 2 * plan.steps + 2:
            raise KeyboardInterrupt

    run = Run(plan, on_step)
    run.start()
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.epoch == checkpoint.load(plan.checkpoint)["epoch"] == 2
    again = Run(plan)
    again.resume()
    again.train()
    _assert_same_bits(whole.checkpoint, plan.checkpoint)


def test_log_ahead_of_the_checkpoint_is_cut_on_resume(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(epochs=1, compare=False)
    _train(plan)
    log = plan.folder / LOG
    kept = log.read_text()
    log.write_text(kept + '{"epoch": 2, "half a li')
    Run(plan).resume()
    assert log.read_text() == kept


def test_new_start_keeps_the_old_checkpoint(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(epochs=1, compare=False)
    _train(plan)
    old = plan.checkpoint.read_bytes()
    Run(plan).start()
    assert not plan.checkpoint.exists()
    assert (plan.folder / PREVIOUS).read_bytes() == old


def test_ctrl_c_says_how_to_go_on(idx_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "l0kernels.cli", "train", "mlp-hc", "--data", str(idx_folder)]
    command += ["--epochs", "100000", "--batch", "30", "--out", str(out)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    path = out / "seed-0" / CHECKPOINT
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    epoch = checkpoint.load(path)["epoch"]
    last = told.strip().splitlines()[-1]
    assert last.startswith("interrupted in epoch ")
    assert f" of 100000; {path} holds epoch {epoch}; repeat the command with --resume" in last
    assert printed == ""
    assert {p.name for p in path.parent.iterdir()} == {CHECKPOINT, LOG}
