# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench step --trained DIR`: steps at the gates of a run of `l0kernels train`."""

import copy
import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels.compact.shrink import shrink
from l0kernels.nn import GatedLayer, MaskedLayer
from l0kernels.recipes import checkpoint, measure, published
from l0kernels.recipes.arm import MASKED, PACKED, Arm, gated_network, make_optimizer
from l0kernels.recipes.images import Batch
from l0kernels.recipes.loop import CHECKPOINT, PACKED_LAYOUT
from l0kernels.recipes.recipe import Settings
from l0kernels.training import gates_of

from . import step
from .arms import CHECK_BATCH, TOLERANCE, require, require_the_reference
from .timing import environment, interleave, often, repeated, require_passive_wait

VARIANTS = ("masked-best", "oracle", "ours")
OF_THE_RUN = ("model", "batch", "keep", "device", "amp", "optimizer", "mode", "place")
CONTENT = (
    "Steps of a run of `l0kernels train` at its end: the network, gates, batch size and optimizers "
    "of its checkpoint, random images, gates drawn as training would; learning rates are 0, so "
    "that it stays there. A step is gate draw + penalty + forward + backward + optimizer (+ "
    "averaging). open: weights that the draws of the last epoch left. masked-best is the same "
    "network with draws of the same law and the same optimizers, all computed, in its faster "
    "memory format. The oracle is the "
    "plain network at the widths that ours draws last in a round, rebuilt and warmed up outside "
    "the clock after ours; it has no gates to draw. S = other / ours, R = ours / oracle: medians "
    "of ratios paired round by round, quartiles in brackets. A turn is as many steps as fill 50 "
    "ms. Of several runs the one with the middle median counts; the JSON has all."
)


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds.

    Args:
        ours: the packed network with its optimizers, at the end of the run.
        batch: random images and labels.
        open: weights that the draws of the last epoch left, of all.
        notes: about the run.
    """

    ours: Arm
    batch: Batch
    open: float
    notes: list[str]


def measure_run(setting: step.Setting) -> step.Report:
    """Time steps at the gates of a trained run.

    Raises:
        ValueError: options that the run decides, unknown variants, no checkpoint or several.
        RuntimeError: the wait policy is not passive, or variants disagree before or after timing.
    """
    require_passive_wait()
    setting = check(setting)
    run = load(setting)
    before = environment()
    errors = {"ours": require_the_reference(run.ours.net, *check_batch(run))}
    arms, notes = variants_of(setting, run)
    steps = often(partial(arms["ours"].step, *run.batch), torch.device("cpu"), step.TURN_SECONDS)
    turns, last = {}, {}
    for name, arm in arms.items():
        # The oracle's images lie as ours.
        batch = (arm if isinstance(arm, Arm) else run.ours).place(run.batch[0]), run.batch[1]
        turns[name] = partial(repeated, partial(arm.step, *batch), steps)
        if isinstance(arm, Oracle):
            last[name] = partial(arm.rebuild, *batch)
    how = setting.rounds, setting.warmup, "cpu", setting.problem, last
    runs = [interleave(turns, *how) for _ in range(setting.runs)]
    runs = [{name: [ms / steps for ms in found[name]] for name in found} for found in runs]
    after = {"ours": require_the_reference(run.ours.net, *check_batch(run))}
    constants = any(isinstance(m, GatedLayer) and m.makes_constants for m in run.ours.net.modules())
    if constants and "oracle" in arms:
        notes.append("the oracle leaves out what closed units before a norm add")
    elif "oracle" in arms:
        after["oracle"] = require_the_same_loss(run.ours.net, *check_batch(run))
    row = step.Row(run.open, runs, steps, error_before=errors, error_after=after)
    row.compare(tuple(arms))
    where = {**before, "load_average_after": environment()["load_average"]}
    return step.Report(setting, where, [row], tuple(arms), [*run.notes, *notes], CONTENT)


def check(setting: step.Setting) -> step.Setting:
    """Return the setting with the variants that a run has.

    Raises:
        ValueError: options that the run decides, or unknown variants.
    """
    default = step.Setting()
    given = [name for name in OF_THE_RUN if getattr(setting, name) != getattr(default, name)]
    if given:
        raise ValueError(f"--trained: expected none of the options that it decides, got {given}")
    if setting.variants == default.variants:
        setting = replace(setting, variants=VARIANTS)
    if "ours" not in setting.variants or not set(setting.variants) <= set(VARIANTS):
        known = ", ".join(VARIANTS)
        raise ValueError(f"--trained: expected ours and others of {known}, got {setting.variants}")
    return setting


def load(setting: step.Setting) -> Trained:
    """Read the one checkpoint under a folder.

    Raises:
        ValueError: there is none, or several, or it is damaged.
    """
    found = sorted(Path(setting.trained or "").rglob(CHECKPOINT))
    if len(found) != 1:
        raise ValueError(f"--trained: expected a folder with one {CHECKPOINT}, got {len(found)}")
    content = checkpoint.load(found[0])
    recipe = published.find(content["recipe"])
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in content["settings"].items()}
    settings = Settings(**{"epochs": content["epoch"], **known})
    state = content["arms"][PACKED]
    classes = [t for t in state["model"].values() if isinstance(t, Tensor) and t.dim() == 2][-1]
    net = gated_network(recipe, settings, 1, content["seed"], len(classes))
    ours = Arm(PACKED, net, settings, PACKED_LAYOUT)
    ours.restore(state)
    at_rest(ours)
    generator = torch.Generator().manual_seed(setting.seed)
    images = torch.randn(settings.batch, *recipe.shape, generator=generator)
    labels = torch.randint(len(classes), (settings.batch,), generator=generator)
    history = [record["arms"] for record in content["history"]]
    end = history[-1][PACKED]
    drawn, test = (end[f"weights_{kind}"] / end["weights_total"] for kind in ("realised", "test"))
    seconds = {name: sum(arms[name]["seconds"] for arms in history) for name in history[-1]}
    notes = [
        f"{recipe.name}, seed {content['seed']}, after {content['epoch']} epochs, batch "
        f"{settings.batch}: weights left {drawn:.2%} drawn, {test:.2%} at test; accuracy "
        f"{end['accuracy']:.2f} %"
    ]
    if MASKED in seconds:
        notes.append(f"the whole run: masked / ours {seconds[MASKED] / seconds[PACKED]:.2f}")
    return Trained(ours, (ours.place(images), labels), drawn, notes)


def check_batch(run: Trained) -> tuple[Tensor, Tensor]:
    return run.batch[0][:CHECK_BATCH], run.batch[1][:CHECK_BATCH]


def at_rest(arm: Arm) -> Arm:
    """Set all learning rates of an arm to 0."""
    for optimizer in arm.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    return arm


def variants_of(setting: step.Setting, run: Trained) -> tuple[dict[str, Any], list[str]]:
    """Return the variants by name, those that can run, and why others cannot."""
    arms: dict[str, Any] = {}
    notes = []
    ours = run.ours
    for name in setting.variants:
        if name == "ours":
            arms[name] = ours
        elif name == "masked-best":
            net = copy.deepcopy(ours.net)
            masked = Arm(MASKED, net, ours.settings, PACKED_LAYOUT)
            layout = measure.fastest_layout(masked, [run.batch])
            arms[name] = at_rest(Arm(MASKED, net, ours.settings, layout))
        elif any(isinstance(m, MaskedLayer) for m in ours.net.modules()):
            notes.append("oracle is left out: gates of single weights leave all widths as they are")
        else:
            arms[name] = Oracle(ours)
    return arms, notes


class Oracle:
    """The plain network at the units that the last draw of ours left open, see `arms.Oracle`.

    Args:
        ours: the arm whose draw counts.
    """

    WARMUP = 2

    def __init__(self, ours: Arm):
        self.ours = ours
        self.net: nn.Module | None = None

    def rebuild(self, images: Tensor, labels: Tensor) -> None:
        """Build the network of the last draw and warm it up."""
        self.net = None
        gc.collect()
        gates = gates_of(self.ours.net)
        z = gates.current_draw().z.detach()[: gates.count]
        self.net = copy.deepcopy(self.ours.net)
        shrink(self.net, z)
        rest: list[dict[str, Any]] = [{"params": [*self.net.parameters()], "lr": 0.0}]
        self.optimizer = make_optimizer(self.ours.settings.optimizer, rest)
        for _ in range(self.WARMUP):
            self.step(images, labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One whole step.

        Raises:
            RuntimeError: nothing was built yet.
        """
        if self.net is None:
            raise RuntimeError("expected rebuild() before step()")
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(images), labels).backward()
        self.optimizer.step()


def require_the_same_loss(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return how far the loss of the oracle is from that of ours, under its last draw, in fp64.

    Raises:
        RuntimeError: it is another one.
    """
    gates = gates_of(net)
    z = gates.current_draw().z.detach()[: gates.count].double()
    exact = copy.deepcopy(net).double().train()
    small = copy.deepcopy(exact)
    shrink(small, z)
    with torch.no_grad(), gates_of(exact).using(z):
        ours = F.cross_entropy(exact(x.double()), y)
    with torch.no_grad():
        loss = F.cross_entropy(small(x.double()), y)
    errors = {"oracle": float((loss - ours).abs() / ours.abs())}
    return require("ours", TOLERANCE, errors)["oracle"]
