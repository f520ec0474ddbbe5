# SPDX-License-Identifier: Apache-2.0
"""The training loop: one seed of one recipe, with the masked reference beside it if asked."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0kernels._files import write_whole
from l0kernels.recipes import checkpoint, measure
from l0kernels.recipes.arm import (
    EVAL_PIXELS,
    MASKED,
    PACKED,
    Arm,
    drawn_weights,
    gated_network,
    open_units,
    weights_left,
)
from l0kernels.recipes.errors import InputError
from l0kernels.recipes.images import Batch, Images
from l0kernels.recipes.phases import Phase
from l0kernels.recipes.recipe import Recipe, Settings
from l0kernels.training import gates_of

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
LOG = "epochs.jsonl"
# Fixed, not measured: the packed arm's bits must not depend on a clock. In LeNet-5 on a CPU it is
# the faster one at every open fraction.
PACKED_LAYOUT = "channels_last"
ENTRY = (
    "loss",
    "data_loss",
    "seconds",
    "step_ms",
    "accuracy",
    "open_units",
    "weights_total",
    "weights_expected",
    "weights_realised",
    "weights_test",
    "step_memory",
)


@dataclass(frozen=True)
class Plan:
    """What to train.

    Args:
        recipe: network and gates.
        settings: what decides the result.
        images: the data.
        seed: of parameters, gates and the order of the data.
        compare: train the masked reference beside the packed network.
        reference_layout: memory format of the reference; None measures which is faster.
        save_every: epochs between two checkpoints; the last epoch is always saved.
        folder: where the checkpoint and the log go.
        variant: what tells it from other runs of the same seed.
        device: where it is trained.
    """

    recipe: Recipe
    settings: Settings
    images: Images
    seed: int
    compare: bool
    reference_layout: str | None
    save_every: int
    folder: Path
    variant: str = ""
    device: torch.device = torch.device("cpu")

    @property
    def label(self) -> str:
        """As it is called in tables."""
        return f"{self.seed}, {self.variant}" if self.variant else str(self.seed)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the run."""
        return self.recipe.course(self.settings)

    @property
    def epochs(self) -> int:
        """Of all phases."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file."""
        return self.folder / CHECKPOINT

    @property
    def steps(self) -> int:
        """Steps per epoch and arm."""
        return -(-len(self.images.train_y) // self.settings.batch)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which an epoch visits the training set.

    Args:
        seed: of the run.
        epoch: from 1 on.
        count: size of the training set.

    Returns:
        Permutation, int64 of shape [count], that depends on nothing but the arguments.
    """
    key = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(key >> np.uint64(1))))


class Run:
    """One seed in training; ``history`` has one entry per finished epoch.

    Args:
        plan: what to train.
        on_step: called after every step.
        on_epoch: called after every epoch, before it is saved.
    """

    def __init__(
        self,
        plan: Plan,
        on_step: Callable[[], object] = lambda: None,
        on_epoch: Callable[[], object] = lambda: None,
    ) -> None:
        self.plan = plan
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.history: list[dict[str, Any]] = []
        self.arms: list[Arm] = []

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def layout(self) -> str | None:
        """Memory format of the masked reference; None without one."""
        return self.arms[1].layout if len(self.arms) > 1 else None

    def start(self) -> None:
        """Begin anew; a checkpoint that is there already is kept under another name."""
        plan = self.plan
        plan.folder.mkdir(parents=True, exist_ok=True)
        if plan.checkpoint.exists():
            os.replace(plan.checkpoint, plan.folder / PREVIOUS)
        self._make_arms(plan.reference_layout)
        self._write_log()

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises:
            InputError: it is missing, damaged, or of another run.
        """
        plan, path = self.plan, self.plan.checkpoint
        content = checkpoint.load(path)
        checkpoint.same(path, "recipe", plan.recipe.name, content["recipe"])
        checkpoint.same(path, "seed", plan.seed, content["seed"])
        checkpoint.same(path, "setting", self._settings(), content["settings"])
        checkpoint.same(path, "data", plan.images.fingerprint, content["data"])
        names = [PACKED, MASKED] if plan.compare else [PACKED]
        checkpoint.same(path, "networks", names, list(content["arms"]))
        # Times and memory of two machines would stand in one table.
        checkpoint.same(path, "device", plan.device.type, content.get("device", "cpu"))
        if content["epoch"] > plan.epochs:
            raise InputError(
                f"--epochs: expected at least {content['epoch']}, the epochs that {path} has, "
                f"got {plan.epochs}"
            )
        layout = content.get("reference_layout")
        if plan.compare and layout not in measure.LAYOUTS:
            raise InputError(
                f"{path}: expected reference_layout in {list(measure.LAYOUTS)}, got {layout!r}"
            )
        self._make_arms(layout)
        try:
            for arm in self.arms:
                arm.restore(content["arms"][arm.name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: expected the state of {plan.recipe.name}, "
                f"got one that does not fit: {' '.join(str(error).split())[:200]}"
            ) from error
        self._check_history(content["history"])
        self.history = content["history"]
        self._write_log()

    def train(self) -> None:
        """Run the epochs that are left, saving as planned."""
        plan = self.plan
        if self.epoch < plan.epochs:
            batches = self._sample()
            for arm in self.arms:
                measure.warm_up(arm, batches)
        while self.epoch < plan.epochs:
            self._train_epoch()
            self.on_epoch()
            if self.epoch % plan.save_every == 0 or self.epoch == plan.epochs:
                self.save()

    def save(self) -> None:
        """Write the checkpoint of the finished epochs."""
        plan = self.plan
        content = {
            "recipe": plan.recipe.name,
            "seed": plan.seed,
            "settings": self._settings(),
            "data": plan.images.fingerprint,
            "epoch": self.epoch,
            "reference_layout": self.layout,
            "device": plan.device.type,
            "arms": {arm.name: arm.state() for arm in self.arms},
            "history": self.history,
        }
        checkpoint.save(plan.checkpoint, content)

    def _check_history(self, history: list[Any]) -> None:
        for number, record in enumerate(history, 1):
            phase = self._place(number - 1)[0].name
            whole = isinstance(record, dict) and record.get("epoch") == number
            whole = whole and record.get("phase") == phase
            arms = record.get("arms") if whole else None
            if not isinstance(arms, dict) or any(
                set(arms.get(arm.name, ())) != set(ENTRY) for arm in self.arms
            ):
                raise InputError(
                    f"{self.plan.checkpoint}: expected a whole record of epoch {number}, "
                    f"got one that is not"
                )

    def _settings(self) -> dict[str, Any]:
        settings = self.plan.settings.to_dict()
        if len(self.plan.phases) == 1:
            # Milestones are compared by themselves; else a finished run may go on.
            del settings["epochs"]
        return settings

    def _make_arms(self, layout: str | None) -> None:
        plan = self.plan
        count, classes = plan.images.whole, plan.images.classes
        net = gated_network(plan.recipe, plan.settings, count, plan.seed, classes).to(plan.device)
        self.arms = [Arm(PACKED, net, plan.settings, PACKED_LAYOUT)]
        if plan.compare:
            twin = Arm(MASKED, copy.deepcopy(net), plan.settings, PACKED_LAYOUT)
            chosen = layout or measure.fastest_layout(twin, self._sample())
            self.arms.append(Arm(MASKED, twin.net, plan.settings, chosen))

    def _batches(self, epoch: int) -> Iterator[Batch]:
        plan = self.plan
        order = epoch_order(plan.seed, epoch, len(plan.images.train_y))
        for number, part in enumerate(order.split(plan.settings.batch)):
            yield plan.images.train_batch(part, (plan.seed, epoch, number))

    def _sample(self) -> list[Batch]:
        """A few batches for measurements."""
        return [*itertools.islice(self._batches(0), measure.BATCHES)]

    def _place(self, epoch: int) -> tuple[Phase, int]:
        """The phase of an epoch, from 0 on, and its number there, from 0 on."""
        for phase in self.plan.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        raise ValueError(f"expected one of {self.plan.epochs} epochs")

    def _train_epoch(self) -> None:
        phase, number = self._place(self.epoch)
        for arm in self.arms:
            _begin_epoch(arm, phase, number)
        epoch = self.epoch + 1
        # Turns alternate, so that neither arm always runs on the warmer or cooler machine.
        turns = self.arms if epoch % 2 else self.arms[::-1]
        entries = {arm.name: self._train_arm(arm, epoch) for arm in turns}
        record = {
            "epoch": epoch,
            "phase": phase.name,
            "first": turns[0].name,
            "arms": {arm.name: entries[arm.name] for arm in self.arms},
        }
        with (self.plan.folder / LOG).open("a") as log:
            log.write(json.dumps(record) + "\n")
        self.history.append(record)

    def _train_arm(self, arm: Arm, epoch: int) -> dict[str, Any]:
        images = self.plan.images
        times: list[float] = []
        loss = data_loss = drawn = 0.0
        for x, y in self._batches(epoch):
            step = arm.step(arm.place(x), y)
            share = len(y) / len(images.train_y)
            times.append(step.seconds)
            data_loss += float(step.data_loss) * share
            loss += float(step.data_loss + step.penalty) * share
            drawn += drawn_weights(arm.net) * share
            self.on_step()
        left, tested = weights_left(arm.net), weights_left(arm.tested)
        measured = epoch in (1, self.plan.epochs)
        tests = images.test_batches(max(1, EVAL_PIXELS // math.prod(images.shape[1:])))
        return {
            "loss": loss,
            "data_loss": data_loss,
            "seconds": sum(times),
            "step_ms": 1e3 * statistics.median(times),
            "accuracy": arm.accuracy(tests),
            "open_units": open_units(arm.tested),
            "weights_total": int(left["total"]),
            "weights_expected": left["expected"],
            "weights_realised": drawn,
            "weights_test": int(tested["test"]),
            "step_memory": measure.step_memory(arm, self._sample()[0]) if measured else None,
        }

    def _write_log(self) -> None:
        text = "".join(json.dumps(record) + "\n" for record in self.history)
        write_whole(self.plan.folder / LOG, lambda file: file.write(text.encode()))


def _begin_epoch(arm: Arm, phase: Phase, number: int) -> None:
    """Bring an arm to where an epoch of a phase begins.

    Args:
        arm: as the epoch before left it.
        phase: the phase.
        number: of the epoch in it, from 0 on.
    """
    if number == 0:
        phase.begin(arm)
    if number == phase.keep_after:
        arm.keep()
    arm.set_learning_rates(phase.passed + number)
    if phase.hardens:
        gates_of(arm.net).set_progress(phase.progress(number))
