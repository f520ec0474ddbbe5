# SPDX-License-Identifier: Apache-2.0
"""Recipes for CIFAR-10, CIFAR-100 and ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from l0kernels.recipes import phases
from l0kernels.recipes.models import resnet, resnet50, vgg16, wide_resnet
from l0kernels.recipes.recipe import AVERAGE_NOTE, Named, Recipe, Row, Settings

COLOUR, LARGE = (3, 32, 32), (3, 224, 224)
NETWORKS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "resnet20": ("ResNet-20", partial(resnet, 3)),
    "resnet56": ("ResNet-56", partial(resnet, 9)),
    "vgg16": ("VGG-16", vgg16),
    "wrn-28-10": ("WRN-28-10", partial(wide_resnet, 28, 10)),
}
IMAGES = (
    "images normalised by mean and deviation of the training images, moved by up to 4 pixels and "
    "mirrored"
)
IMAGES_NOTE = f"{IMAGES}; the published constants are not confirmed"
LAST_NOTE = "accuracy is that of the last parameters and the deterministic gate"
SHORTCUTS_NOTE = "shortcuts without weights (option A of He et al., 2016)"


def is_3x3(name: str, module: nn.Module) -> bool:
    """Whether a layer is a convolution of 3x3."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


SINGLE: dict[str, Any] = {"granularity": "weight", "select": is_3x3}

# Continuous Sparsification, and Iterative Magnitude Pruning of the same weights.

CS_SOURCE = (
    "Savarese, Silva, Maire, 2020, arXiv:1912.04427; the authors' code, "
    "github.com/lolemacs/continuous-sparsification"
)
CS_ROWS = {
    "resnet20": (
        Row("sparsest ticket as good as dense", None, 12.3, "", "abstract of the paper", True),
        Row("best ticket", 91.54, None, "", "abstract of the paper", True),
    ),
    "vgg16": (
        Row("sparsest ticket as good as dense", None, 1.7, "", "abstract of the paper", True),
        Row("best ticket", 93.45, None, "", "abstract of the paper", True),
    ),
}
_CS = Settings(
    epochs=85,
    batch=128,
    lr=0.1,
    gate_lr=0.1,
    lam=(1e-8,),
    penalty_n=1,
    optimizer="nesterov",
    weight_decay=1e-4,
    milestones=(56, 71),
    decay=0.1,
    gate_decay=0.1,
    initial=0.0,
    rounds=3,
    rewind=2,
)
TRAINED_ON = (
    "trained on all training images; the authors keep 5,000 of CIFAR-10's back (--subset 45000)"
)
TEST_GATES_NOTE = "tested with the ticket, 1[s > 0], within rounds too; the authors use soft gates"


def _sparsification(network: str) -> Recipe:
    title, make = NETWORKS[network]
    special = {
        "resnet20": f"{SHORTCUTS_NOTE}; the authors' have 1x1 convolutions without gates",
        "vgg16": "settings of ResNet-20: those of VGG-16 are not confirmed",
    }
    return Recipe(
        name=f"{network}-cs",
        summary=f"{title}, Continuous Sparsification of all 3x3 convolutions, weight by weight",
        make=make,
        named={"published": Named(_CS, CS_SOURCE)},
        notes=(
            special[network],
            "epochs are those of a round; rounds, then the ticket, take (rounds + 1) as many",
            "weights are kept when rewind epochs of round 1 are over: the authors rewind to epoch "
            "2; that they count from 0, and train the ticket as long as a round, is not confirmed",
            TEST_GATES_NOTE,
            TRAINED_ON,
            IMAGES_NOTE,
            LAST_NOTE,
        ),
        shape=COLOUR,
        method="cs",
        options=SINGLE,
        course=phases.sparsification,
        init=nn.init.xavier_normal_,
        rows=CS_ROWS[network],
    )


def _magnitude(network: str, rounds: int) -> Recipe:
    title, make = NETWORKS[network]
    settings = replace(
        _CS, lam=(0.0,), gate_decay=1.0, gate_lr=0.1, initial=None, rounds=rounds, prune=0.2
    )
    source = (
        "ours, not published: the schedule of Continuous Sparsification, a fifth of the weights "
        "less in each round as in Frankle, Carbin, 2019, arXiv:1803.03635"
    )
    return Recipe(
        name=f"{network}-imp",
        summary=f"{title}, Iterative Magnitude Pruning of all 3x3 convolutions, the baseline",
        make=make,
        named={"ours": Named(settings, source)},
        notes=(
            f"{rounds} rounds leave {0.8 ** (rounds - 1):.1%}; the paper on Continuous "
            "Sparsification has this baseline, its settings are not confirmed",
            "epochs are those of a round; gates are frozen, gate_lr has no effect",
            TRAINED_ON,
            SHORTCUTS_NOTE if network == "resnet20" else "one linear classifier",
            IMAGES_NOTE,
            LAST_NOTE,
        ),
        shape=COLOUR,
        method="cs",
        options={**SINGLE, "rescale": False, "initial": 1.0},
        course=phases.magnitude,
        init=nn.init.xavier_normal_,
    )


# Sparse Connectivity Learning.

_SCL = Settings(
    epochs=160,
    batch=128,
    lr=0.1,
    gate_lr=0.01,
    lam=(0.01,),
    penalty_n=1,
    optimizer="nesterov",
    weight_decay=1e-4,
    milestones=(80, 120),
    decay=0.1,
    gate_decay=0.1,
    initial=1.0,
)


def _connectivity(network: str) -> Recipe:
    title, make = NETWORKS[network]
    return Recipe(
        name=f"{network}-scl",
        summary=f"{title}, Sparse Connectivity Learning of all 3x3 convolutions, weight by weight",
        make=make,
        named={"ours": Named(_SCL, "ours, not published, and not tuned")},
        notes=(
            "method: Tang et al., 2022, arXiv:2201.05020, of which only the abstract was at hand; "
            "every setting is ours, none is confirmed",
            "identity proxy, gradients of mask variables divided by the L2 norm of each output's",
            "gated are 3x3 convolutions, not the classifier; the published choice is not confirmed",
            SHORTCUTS_NOTE if network == "resnet20" else "one linear classifier",
            IMAGES_NOTE,
            LAST_NOTE,
        ),
        shape=COLOUR,
        method="scl",
        options=SINGLE,
    )


# Dep-L0.

DEP_SOURCE = "Li, Ji, 2021, arXiv:2107.00070; the authors' code, github.com/leo-yangli/dep-l0"
_VGG_DEP = Settings(
    epochs=300,
    batch=128,
    lr=0.05,
    gate_lr=1e-3,
    lam=(1e-6,),
    penalty_n=1,
    optimizer="sgd",
    gate_optimizer="adam",
    weight_decay=5e-4,
    milestones=(60, 120, 180, 240),
    decay=0.2,
    direction="forward",
)
_RESNET_DEP = replace(_VGG_DEP, lr=0.1, decay=0.1, gate_decay=0.1, lam=(5e-7,))
_RESNET50_DEP = replace(
    _VGG_DEP,
    epochs=90,
    batch=256,
    lr=0.1,
    lam=(5e-9,),
    weight_decay=1e-4,
    milestones=(31, 61, 91),
    decay=0.1,
    gate_decay=0.2,
    fine_tune=10,
)
DEP_NOTES = (
    "one draw of the gates serves the batch; the authors' code draws for each example",
    "the authors report the best test accuracy of all epochs; here accuracy is that of the last "
    "parameters and the deterministic gate",
)
DEP_IMAGES_NOTE = f"{IMAGES}; the authors' constants are those of CIFAR-10"
COUNT_NOTE = (
    "the authors' code counts epochs from 1: it trains one less, and the rates of ResNet-56 drop "
    "one epoch earlier"
)
CHAIN_NOTE = (
    "penalty over neighbouring groups of the chain (widths='chain'), as in the authors' code"
)


def _dependent(network: str, start: Settings, backward_lam: float, note: str) -> Recipe:
    title, make = NETWORKS[network]
    backward = replace(start, lam=(backward_lam,), direction="backward")
    return Recipe(
        name=f"{network}-dep",
        summary=f"{title}, Dep-L0: hard concrete gates of channels that depend on each other",
        make=make,
        named={
            "published": Named(start, DEP_SOURCE),
            "backward": Named(backward, DEP_SOURCE),
        },
        notes=(note, CHAIN_NOTE, COUNT_NOTE, *DEP_NOTES, DEP_IMAGES_NOTE),
        shape=COLOUR,
        method="dep",
        options={"widths": "chain"},
        course=phases.with_fine_tuning,
    )


def _resnet50_dep() -> Recipe:
    return Recipe(
        name="resnet50-dep",
        summary="ResNet-50 on ImageNet, Dep-L0: gates of both inner widths of its bottlenecks",
        make=resnet50,
        named={
            "published": Named(_RESNET50_DEP, DEP_SOURCE),
            "backward": Named(replace(_RESNET50_DEP, direction="backward"), DEP_SOURCE),
        },
        notes=(
            "32 groups, 7,552 gates: the authors gate the stem too, whose units meet a residual "
            "stream",
            "lam belongs to the authors' penalty for this network, which counts kernels twice; "
            "here the penalty is over connected widths, so that its weight is not confirmed",
            *DEP_NOTES,
            "images: random parts of 8 to 100 % of the area, mirrored or not, and middle crops, as "
            "in the authors' code",
        ),
        shape=LARGE,
        method="dep",
        course=phases.with_fine_tuning,
        # Convolutions do not know the size of an image; a small one is enough to find groups.
        probe=(3, 64, 64),
    )


# Wide residual networks.

_WIDE = Settings(
    epochs=200,
    batch=128,
    lr=0.1,
    gate_lr=0.1,
    lam=(1e-3,),
    droprate=(0.3,),
    optimizer="nesterov",
    weight_decay=5e-4,
    l2=5e-4 / 0.7,
    milestones=(60, 120, 160),
    decay=0.2,
    gate_decay=0.2,
)
WIDE_NOTES = (
    "gates stand before the norm, as the published ones",
    "coupled L2 of gated filters is 5e-4 / .7, as in the authors' code",
    IMAGES_NOTE,
)
WIDE_HC_SOURCE = (
    "Louizos, Welling, Kingma, 2018, arXiv:1712.01312; the authors' code, "
    "github.com/AMLab-Amsterdam/L0_regularization"
)
WIDE_ARM_SOURCE = "Li, Ji, 2019, arXiv:1904.04432; the authors' code, github.com/leo-yangli/l0-arm"
_WIDE_HC = replace(_WIDE, ema=0.99)
_WIDE_ARM = replace(_WIDE, droprate=(0.01,), milestones=(60, 120))
HC_NOTES = (
    "with this lam and learning rate gates hardly leave where they start, as an issue of the "
    "authors' code reports too; --gate-lr 6 moves them",
    AVERAGE_NOTE,
)
ARM_NOTES = ("the authors' code averages parameters too, but tests the last ones", LAST_NOTE)


def _wide(
    name: str, method: str, named: dict[str, Named], notes: tuple[str, ...], rows: tuple[Row, ...]
) -> Recipe:
    title, make = NETWORKS["wrn-28-10"]
    return Recipe(
        name=f"wrn-28-10-{name}",
        summary=f"{title}, L0-{name.upper()} gates of the inner widths of its blocks",
        make=make,
        named=named,
        notes=(*notes, *WIDE_NOTES),
        shape=COLOUR,
        method=method,
        options={"place": "before_norm"},
        rows=rows,
    )


RECIPES = (
    _sparsification("resnet20"),
    _sparsification("vgg16"),
    _magnitude("resnet20", 11),
    _magnitude("vgg16", 20),
    _connectivity("resnet20"),
    _connectivity("vgg16"),
    _dependent(
        "vgg16",
        _VGG_DEP,
        1e-6,
        "the gates' learning rate never drops: in the authors' code their schedule acts on the "
        "weights' optimizer",
    ),
    _dependent(
        "resnet56",
        _RESNET_DEP,
        1e-6,
        "27 groups, 1,008 gates: the authors gate the stem too, whose units meet a residual "
        "stream; their code lets the gates' optimizer step once more at the start of each epoch",
    ),
    _resnet50_dep(),
    _wide(
        "hc",
        "hard_concrete",
        {
            "published": Named(_WIDE_HC, WIDE_HC_SOURCE),
            "strong": Named(replace(_WIDE_HC, lam=(2e-3,)), WIDE_HC_SOURCE),
        },
        HC_NOTES,
        (
            Row("CIFAR-10, lam .001 / N", 96.17, None, "", "notes in github.com/kchu25/cs", True),
            Row("CIFAR-100, lam .001 / N", 81.25, None, "", "no text at hand", False),
            Row("CIFAR-10, lam .002 / N", 96.07, None, "", "no text at hand", False),
        ),
    ),
    _wide("arm", "arm", {"published": Named(_WIDE_ARM, WIDE_ARM_SOURCE)}, ARM_NOTES, ()),
)
