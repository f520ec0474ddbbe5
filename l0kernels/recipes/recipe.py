# SPDX-License-Identifier: Apache-2.0
"""What a recipe is: a network, gates, named settings, and the figures published for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from l0kernels.recipes.errors import InputError
from l0kernels.recipes.phases import Phase, one

OPTIMIZERS = ("adam", "sgd", "nesterov")
MOMENTUM = 0.9
FOLLOW = "same"
AVERAGE_NOTE = (
    "accuracy is that of the averaged parameters, divided by 1 - ema^t, and the deterministic "
    "gate; the authors divide so too but start the average at the initial parameters, not at 0"
)


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run, beside the data and the seed.

    Args:
        epochs: passes over the training set, in each round where there are several.
        batch: images per step; the last batch of an epoch may be smaller.
        lr: learning rate of the weights.
        gate_lr: learning rate of the gates.
        lam: weight of the penalty, one number per group of gates, or one for all.
        droprate: initial dropout rate, likewise; none where the method has no such option.
        penalty_n: the penalty is divided by this; None stands for the size of the training
            set, the whole one where a subset is used.
        optimizer: ``"adam"``, ``"sgd"`` (momentum .9) or ``"nesterov"`` (the same, Nesterov's).
        gate_optimizer: ``"same"`` (one for weights and gates) or ``"adam"``.
        weight_decay: of all parameters but the gates, by the optimizer.
        l2: coupled L2 of gated filters per image (what divides the penalty multiplies it); the
            optimizer does not decay them then.
        milestones: epochs after which learning rates drop, counted from the start of each round.
        decay: what the learning rate of the weights is multiplied by there.
        gate_decay: the same for the gates.
        initial: value that scores or mask variables start with, where the method has such.
        rounds: rounds of a search for tickets.
        rewind: epochs of the first round after which weights are kept, to rewind tickets to.
        prune: part of the open weights that a round of magnitude pruning closes.
        fine_tune: epochs with frozen gates at the end.
        direction: of the chain of dependent gates.
        ema: decay of the moving average of parameters and gates that is evaluated; None: the last
            ones are. For recipes without rounds and fine-tuning.
    """

    epochs: int
    batch: int
    lr: float
    gate_lr: float
    lam: tuple[float, ...]
    droprate: tuple[float, ...] = ()
    penalty_n: int | None = None
    optimizer: str = "adam"
    gate_optimizer: str = FOLLOW
    weight_decay: float = 0.0
    l2: float = 0.0
    milestones: tuple[int, ...] = ()
    decay: float = 1.0
    gate_decay: float = 1.0
    initial: float | None = None
    rounds: int = 0
    rewind: int = 0
    prune: float = 0.0
    fine_tune: int = 0
    direction: str | None = None
    ema: float | None = None

    def check(self) -> None:
        """Check every value.

        Raises:
            InputError: a value is out of range.
        """
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"--{name}: expected a positive integer, got {getattr(self, name)}"
                )
        for name in ("lr", "gate_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(
                    f"--{name.replace('_', '-')}: expected a positive number, got {value}"
                )
        if any(not math.isfinite(value) or value < 0 for value in self.lam):
            raise InputError(f"--lam: expected numbers of at least 0, got {list(self.lam)}")
        if self.initial is not None and not math.isfinite(self.initial):
            raise InputError(f"--initial: expected finite numbers, got {self.initial}")
        if self.rounds and not 0 <= self.rewind < self.epochs:
            raise InputError(
                f"--rewind: expected fewer than the {self.epochs} epochs of a round, "
                f"got {self.rewind}"
            )

    def at_length(self, epochs: int) -> dict[str, Any]:
        """Epochs and milestones for another length, which keeps the proportions of the schedule.

        Args:
            epochs: of a round.
        """
        stretch = epochs / self.epochs
        return {"epochs": epochs, "milestones": tuple(round(m * stretch) for m in self.milestones)}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, as kept in a checkpoint."""
        plain = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


@dataclass(frozen=True)
class Named:
    """Settings with a name.

    Args:
        settings: the values.
        source: where they come from.
    """

    settings: Settings
    source: str


@dataclass(frozen=True)
class Row:
    """A published result.

    Args:
        what: of which setting or data.
        accuracy: on the test set, in percent; None: not known.
        left: weights left, in percent; None: not known.
        units: open units; "" if not known.
        source: where it was read.
        confirmed: whether it was read there; otherwise it is from memory, and shown as such.
    """

    what: str
    accuracy: float | None
    left: float | None
    units: str
    source: str
    confirmed: bool

    def __str__(self) -> str:
        shown = {
            "accuracy %": self.accuracy and f"{self.accuracy:.2f}",
            "weights left %": self.left and f"{self.left:.2f}",
            "open units": self.units,
        }
        figures = ", ".join(f"{name} {value}" for name, value in shown.items() if value)
        return (
            f"{self.what}: {figures}{'' if self.confirmed else ' (not confirmed)'}; {self.source}"
        )


@dataclass(frozen=True)
class Recipe:
    """A network with gates, and how it is trained.

    Args:
        name: as on the command line.
        summary: one line.
        make: makes the network; its argument is the number of classes.
        named: the first is the default for data in files; ``digits`` is used for the
            embedded digits.
        notes: what is unconfirmed or done differently.
        groups: names of the groups of gates that have a ``lam`` of their own, from the input on;
            none: all gates share one.
        widths: number of gates in each of these groups.
        shape: of an image.
        method: of the gates.
        options: further arguments of ``convert``.
        course: the parts of a training run.
        init: sets the weights of convolutions and linear layers.
        probe: shape of the image that ``convert`` runs, if another than ``shape``.
        rows: what was published, shown beside the result.
    """

    name: str
    summary: str
    make: Callable[..., nn.Module]
    named: dict[str, Named]
    notes: tuple[str, ...]
    groups: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    shape: tuple[int, int, int] = (1, 28, 28)
    method: str = "hard_concrete"
    options: dict[str, Any] = field(default_factory=dict)
    course: Callable[[Any], tuple[Phase, ...]] = one
    init: Callable[..., Any] = nn.init.kaiming_normal_
    probe: tuple[int, int, int] | None = None
    rows: tuple[Row, ...] = ()

    @property
    def default(self) -> str:
        """Name of the settings for data in files."""
        return next(iter(self.named))

    def settings(self, name: str) -> Settings:
        """Settings by name.

        Raises:
            InputError: no settings of that name.
        """
        if name not in self.named:
            known = ", ".join(self.named)
            raise InputError(f"--settings: expected one of {known}, got {name!r}")
        return self.named[name].settings
