# SPDX-License-Identifier: Apache-2.0
"""The recipes: networks, gates and named settings, with where each setting comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from l0kernels.recipes.errors import InputError
from l0kernels.recipes.models import MLP, LeNet5

MNIST_TRAIN = 60_000


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run, beside the data and the seed.

    Args:
        epochs: passes over the training set.
        batch: images per step; the last batch of an epoch may be smaller.
        lr: learning rate of the weights (Adam).
        gate_lr: learning rate of the gates (Adam).
        lam: weight of the penalty, one number per group of gates.
        droprate: initial dropout rate, one number per group of gates.
        penalty_n: the penalty is divided by this; None stands for the size of the training set.
    """

    epochs: int
    batch: int
    lr: float
    gate_lr: float
    lam: tuple[float, ...]
    droprate: tuple[float, ...]
    penalty_n: int | None = None

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
class Recipe:
    """A network with gates, and how it is trained.

    Args:
        name: as on the command line.
        summary: one line.
        make: class of the network.
        groups: names of the groups of gates, from the input on.
        widths: number of gates in each group.
        published: settings for MNIST as published.
        own: further named settings; ``digits`` is used for the embedded digits.
        notes: what is unconfirmed or done differently.
        method: of the gates.
        options: further arguments of their class.
    """

    name: str
    summary: str
    make: Callable[[], nn.Module]
    groups: tuple[str, ...]
    widths: tuple[int, ...]
    published: Named
    own: dict[str, Named]
    notes: tuple[str, ...]
    method: str = "hard_concrete"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Named]:
        """All named settings."""
        return {"published": self.published, **self.own}

    def settings(self, name: str) -> Settings:
        """Settings by name.

        Raises:
            InputError: no settings of that name.
        """
        if name not in self.named:
            raise InputError(f"--settings: expected one of {', '.join(self.named)}, got {name!r}")
        return self.named[name].settings


PAPER = "Louizos, Welling, Kingma, 2018, arXiv:1712.01312"
CODE = "the authors' code, github.com/AMLab-Amsterdam/L0_regularization"
OURS_DIGITS = (
    "ours, not published: the published lam / N with N = 60,000 kept although digits has 1,347 "
    "training images, and gates that learn 40 times faster than the weights, to fit the 1,400 steps"
)
OURS_SHORT = "ours, not published: the published values, with gates that learn 4 times faster"
COMMON_NOTES = (
    "Adam's betas and eps are PyTorch's defaults: not confirmed for the published runs",
    "He initialisation by fan-in with zero biases; the published biases' start is not confirmed",
    "accuracy is that of the last parameters and the deterministic gate",
)

_LENET = Settings(200, 100, 1e-3, 1e-3, (10.0, 0.5, 0.1, 10.0), (0.5, 0.5, 0.5, 0.5))
_MLP = Settings(200, 100, 1e-3, 1e-3, (0.1, 0.1, 0.1), (0.2, 0.5, 0.5))

ARM_PAPER = "Li, Ji, 2019, arXiv:1904.04432"
ARM_CODE = "the authors' code, github.com/leo-yangli/l0-arm"
ARM_DIGITS = (
    "ours, not published: the published lam / N with N = 60,000 kept although digits has 1,347 "
    "training images, and gates that learn 5 times faster than the weights, to fit the 1,100 steps"
)
ARM_NOTES = (
    "k 7, sigmoid gates; test gate pi where pi >= 1/2, as in the authors' code",
    *COMMON_NOTES,
)
_LENET_ARM, _MLP_ARM = replace(_LENET, batch=128), replace(_MLP, batch=128)


def _of_arm(estimator: str) -> tuple[Recipe, Recipe]:
    """LeNet-5 and the MLP by ARM, or by AR."""
    passes = {"arm": "two passes", "ar": "one pass"}[estimator]
    lenet = Recipe(
        name=f"lenet5-{estimator}",
        summary=f"LeNet-5-Caffe, L0-{estimator.upper()} gates 20-50-800-500 ({passes} per step)",
        make=LeNet5,
        groups=("conv1", "conv2", "fc1.in", "fc1"),
        widths=(20, 50, 800, 500),
        published=Named(_LENET_ARM, f"{ARM_PAPER}; {ARM_CODE}"),
        own={
            "digits": Named(
                replace(_LENET_ARM, epochs=100, gate_lr=5e-3, penalty_n=MNIST_TRAIN), ARM_DIGITS
            ),
        },
        notes=("no weight decay (the authors' code divides 5e-4 by N: 8e-9)", *ARM_NOTES),
        method="arm",
        options={"estimator": estimator},
    )
    mlp = Recipe(
        name=f"mlp-{estimator}",
        summary=f"MLP 784-300-100-10, L0-{estimator.upper()} gates 784-300-100 ({passes} per step)",
        make=MLP,
        groups=("fc1.in", "fc1", "fc2"),
        widths=(784, 300, 100),
        published=Named(_MLP_ARM, f"{ARM_PAPER}; {ARM_CODE}"),
        own={
            "digits": Named(
                replace(_MLP_ARM, epochs=100, gate_lr=5e-3, penalty_n=MNIST_TRAIN), ARM_DIGITS
            ),
        },
        notes=("no weight decay (the authors' code has 5e-4, times pi)", *ARM_NOTES),
        method="arm",
        options={"estimator": estimator},
    )
    return lenet, mlp


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="lenet5-hc",
            summary="LeNet-5-Caffe, hard concrete gates 20-50-800-500 (lambda per layer)",
            make=LeNet5,
            groups=("conv1", "conv2", "fc1.in", "fc1"),
            widths=(20, 50, 800, 500),
            published=Named(_LENET, f"{PAPER}; {CODE}"),
            own={
                "digits": Named(
                    replace(_LENET, epochs=100, gate_lr=0.04, penalty_n=MNIST_TRAIN),
                    OURS_DIGITS,
                ),
                "short": Named(replace(_LENET, epochs=20, gate_lr=4e-3), OURS_SHORT),
            },
            notes=(
                "lam 10, .5, .1, 10 was read in the public code of L0-ARM "
                "(github.com/leo-yangli/l0-arm), which repeats this setting; that it is the "
                "paper's own vector is not confirmed",
                "no weight decay (the authors' code divides 5e-4 by N: 8e-9)",
                "convolutions keep their biases in training (the authors' code drops them there)",
                *COMMON_NOTES,
            ),
        ),
        Recipe(
            name="mlp-hc",
            summary="MLP 784-300-100-10, hard concrete gates 784-300-100",
            make=MLP,
            groups=("fc1.in", "fc1", "fc2"),
            widths=(784, 300, 100),
            published=Named(_MLP, f"{PAPER}; {CODE}"),
            own={
                "digits": Named(
                    replace(_MLP, epochs=100, gate_lr=0.04, penalty_n=MNIST_TRAIN),
                    OURS_DIGITS,
                ),
                "short": Named(replace(_MLP, epochs=20, gate_lr=4e-3), OURS_SHORT),
            },
            notes=(
                "no weight decay: the published value is not confirmed",
                "no averaging of parameters (the authors' code averages them, decay .999)",
                *COMMON_NOTES,
            ),
        ),
        *_of_arm("arm"),
        *_of_arm("ar"),
    )
}


def find(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        InputError: no recipe of that name.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def describe() -> str:
    """All recipes with their settings, sources and what is unconfirmed, as text."""
    return "\n\n".join(_describe(recipe) for recipe in RECIPES.values())


def _describe(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: {recipe.summary}"]
    for name, named in recipe.named.items():
        lines.append(f"  settings {name}: {named.source}")
        for setting in fields(Settings):
            lines.append(f"    {setting.name:<10} {_value(named.settings, setting.name)}")
    return "\n".join([*lines, "  notes", *(f"    - {note}" for note in recipe.notes)])


def _value(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    if value is None:
        return "size of the training set"
    if isinstance(value, tuple):
        return ", ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
