# SPDX-License-Identifier: Apache-2.0
"""Recipes have the settings that were published.

Values are written out here as the papers and their authors' code have them, not taken from the
recipes. What neither was read to say is left out.

- L0-HC: Louizos, Welling, Kingma, 2018, arXiv:1712.01312; github.com/AMLab-Amsterdam/
  L0_regularization (train_lenet5.py, train_wide_resnet.py, models.py). Its ``lamba``
  is lam before the division by N. The vector of LeNet-5 is the one in the code of L0-ARM.
- L0-ARM and AR: Li, Ji, 2019, arXiv:1904.04432; github.com/leo-yangli/l0-arm (config.py, main.py).
- Dep-L0: Li, Ji, 2021, arXiv:2107.00070; github.com/leo-yangli/dep-l0 (README, train_vgg.py,
  train_resnet56.py, train_resnet50.py).
- Continuous Sparsification: Savarese, Silva, Maire, 2020, arXiv:1912.04427;
  github.com/lolemacs/continuous-sparsification (main.py, layers.py).
"""

from typing import Any

import pytest
import torch
from torch import nn

from l0kernels.gates import ARM, ContinuousSparsification, Gates
from l0kernels.recipes import published
from l0kernels.recipes.arm import gated_network, make_optimizer
from l0kernels.training import gates_of

MNIST_TRAIN = 60_000

MNIST = {
    "epochs": 200,
    "optimizer": "adam",
    "gate_optimizer": "same",
    "lr": 1e-3,
    "gate_lr": 1e-3,
    "milestones": (),
    "penalty_n": None,
}
# The authors' code divides LeNet-5's decay of 5e-4 by N, which leaves 8e-9.
LENET = {**MNIST, "lam": (10.0, 0.5, 0.1, 10.0), "droprate": (0.5, 0.5, 0.5, 0.5), "l2": 0.0}
MLP = {**MNIST, "lam": (0.1, 0.1, 0.1), "droprate": (0.2, 0.5, 0.5)}
LENET_HC, LENET_ARM = {**LENET, "batch": 100}, {**LENET, "batch": 128}
MLP_HC, MLP_ARM = {**MLP, "batch": 100}, {**MLP, "batch": 128, "l2": 5e-4}

WIDE = {
    "epochs": 200,
    "batch": 128,
    "optimizer": "nesterov",
    "gate_optimizer": "same",
    "lr": 0.1,
    "gate_lr": 0.1,
    "decay": 0.2,
    "gate_decay": 0.2,
    "weight_decay": 5e-4,
    "l2": 5e-4 / 0.7,
    "penalty_n": None,
}
WIDE_HC = {**WIDE, "milestones": (60, 120, 160), "droprate": (0.3,), "ema": 0.99}
WIDE_ARM = {**WIDE, "milestones": (60, 120), "droprate": (0.01,), "ema": None}

VGG_DEP = {
    "penalty_n": 1,
    "fine_tune": 0,
    "milestones": (60, 120, 180, 240),
    "epochs": 300,
    "batch": 128,
    "optimizer": "sgd",
    "gate_optimizer": "adam",
    "lr": 0.05,
    "gate_lr": 1e-3,
    "decay": 0.2,
    "gate_decay": 1.0,
    "weight_decay": 5e-4,
    "lam": (1e-6,),
}
RESNET56_DEP = {**VGG_DEP, "lr": 0.1, "decay": 0.1, "gate_decay": 0.1}
RESNET50_DEP = {
    "epochs": 90,
    "fine_tune": 10,
    "batch": 256,
    "gate_optimizer": "adam",
    "lr": 0.1,
    "gate_lr": 1e-3,
    "milestones": (31, 61, 91),
    "optimizer": "sgd",
    "penalty_n": 1,
    "decay": 0.1,
    "gate_decay": 0.2,
    "weight_decay": 1e-4,
    "lam": (5e-9,),
}

CS = {
    "epochs": 85,
    "batch": 128,
    "optimizer": "nesterov",
    "gate_optimizer": "same",
    "lr": 0.1,
    "gate_lr": 0.1,
    "milestones": (56, 71),
    "decay": 0.1,
    "gate_decay": 0.1,
    "weight_decay": 1e-4,
    "lam": (1e-8,),
    "penalty_n": 1,
    "initial": 0.0,
    "rounds": 3,
    "rewind": 2,
}

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("lenet5-hc", "published"): {**LENET_HC, "ema": None},
    ("lenet5-hc", "averaged"): {**LENET_HC, "ema": 0.999},
    ("mlp-hc", "published"): {**MLP_HC, "ema": 0.999},
    ("lenet5-arm", "published"): {**LENET_ARM, "ema": None},
    ("lenet5-arm", "averaged"): {**LENET_ARM, "ema": 0.999},
    ("lenet5-ar", "published"): {**LENET_ARM, "ema": None},
    ("lenet5-ar", "averaged"): {**LENET_ARM, "ema": 0.999},
    ("mlp-arm", "published"): {**MLP_ARM, "ema": None},
    ("mlp-arm", "averaged"): {**MLP_ARM, "ema": 0.999},
    ("mlp-ar", "published"): {**MLP_ARM, "ema": None},
    ("mlp-ar", "averaged"): {**MLP_ARM, "ema": 0.999},
    ("wrn-28-10-hc", "published"): {**WIDE_HC, "lam": (1e-3,)},
    ("wrn-28-10-hc", "strong"): {**WIDE_HC, "lam": (2e-3,)},
    ("wrn-28-10-arm", "published"): {**WIDE_ARM, "lam": (1e-3,)},
    ("vgg16-dep", "published"): {**VGG_DEP, "direction": "forward"},
    ("vgg16-dep", "backward"): {**VGG_DEP, "direction": "backward"},
    ("resnet56-dep", "published"): {**RESNET56_DEP, "direction": "forward", "lam": (5e-7,)},
    ("resnet56-dep", "backward"): {**RESNET56_DEP, "direction": "backward", "lam": (1e-6,)},
    ("resnet50-dep", "published"): {**RESNET50_DEP, "direction": "forward"},
    ("resnet50-dep", "backward"): {**RESNET50_DEP, "direction": "backward"},
    ("resnet20-cs", "published"): CS,
    # Those of ResNet-20, and the recipe says so.
    ("vgg16-cs", "published"): CS,
}
OURS = ("ours", "digits", "short")

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet5-hc": ("hard_concrete", {"granularity": "input"}),
    "mlp-hc": ("hard_concrete", {"granularity": "input"}),
    "lenet5-arm": ("arm", {"granularity": "input", "estimator": "arm"}),
    "mlp-arm": ("arm", {"granularity": "input", "estimator": "arm"}),
    "lenet5-ar": ("arm", {"granularity": "input", "estimator": "ar"}),
    "mlp-ar": ("arm", {"granularity": "input", "estimator": "ar"}),
    "wrn-28-10-hc": ("hard_concrete", {"place": "before_norm"}),
    "wrn-28-10-arm": ("arm", {"place": "before_norm"}),
    "vgg16-dep": ("dep", {"widths": "chain"}),
    "resnet56-dep": ("dep", {"widths": "chain"}),
    # The authors' penalty for it counts kernels twice, which is not repeated.
    "resnet50-dep": ("dep", {}),
}

# Units of each group, and weights of a unit.
LENET_UNITS = {"conv1": (20, 25), "conv2": (50, 500), "fc1.in": (800, 500), "fc1": (500, 10)}
MLP_UNITS = {"fc1.in": (784, 300), "fc1": (300, 100), "fc2": (100, 10)}
# P(z != 0) at the start, by dropout rate.
OPEN = {"hard_concrete": {0.2: 0.9519, 0.5: 0.8318}, "arm": {0.2: 0.8, 0.5: 0.5}}


def _gates(name: str) -> Gates:
    """The gates of a recipe's network, with the published settings."""
    recipe = published.find(name)
    return gates_of(gated_network(recipe, recipe.settings("published"), MNIST_TRAIN, 0))


@pytest.mark.parametrize("key", SETTINGS, ids=" ".join)
def test_settings_are_the_published(key: tuple[str, str]) -> None:
    name, settings = key
    found = published.find(name).settings(settings)
    assert {field: getattr(found, field) for field in SETTINGS[key]} == SETTINGS[key]


def test_no_settings_pass_for_published_unseen() -> None:
    named = {(r.name, name) for r in published.RECIPES.values() for name in r.named}
    assert {key for key in named if key[1] not in OURS} == set(SETTINGS)
    for name in {name for name, _ in SETTINGS}:
        assert published.find(name).default == "published"
    for recipe, name in named - set(SETTINGS):
        assert published.find(recipe).named[name].source.startswith("ours, not published")
    notes = published.find("vgg16-cs").notes
    assert "settings of ResNet-20: those of VGG-16 are not confirmed" in notes


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_the_published(name: str) -> None:
    recipe = published.find(name)
    assert (recipe.method, recipe.options) == METHODS[name]


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(("lenet5", "mlp"))])
def test_gates_start_as_published(name: str) -> None:
    units = LENET_UNITS if "lenet5" in name else MLP_UNITS
    settings, gates = SETTINGS[name, "published"], _gates(name)
    assert dict(zip(gates.names, gates.sizes, strict=True)) == {n: k for n, (k, _) in units.items()}
    recipe = published.find(name)
    assert (recipe.groups, recipe.widths) == (tuple(units), tuple(gates.sizes))
    is_open = [OPEN[METHODS[name][0]][rate] for rate in settings["droprate"]]
    parts = zip(settings["lam"], is_open, units.values(), strict=True)
    expected = sum(lam * p * count * size for lam, p, (count, size) in parts) / MNIST_TRAIN
    assert float(gates.penalty().detach()) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["lenet5-arm", "lenet5-ar", "mlp-arm", "mlp-ar"])
def test_gates_of_arm_are_sigmoids_with_k_7(name: str) -> None:
    gates = _gates(name)
    assert isinstance(gates, ARM)
    assert gates.estimator == name.rpartition("-")[2]
    phi = gates.log_alpha.detach()
    torch.testing.assert_close(gates.open_probability(), torch.sigmoid(7 * phi.double()))
    # phi ~ N(mean, (.01 / k)^2), and the last hundred have one mean.
    assert float(phi[-100:].std()) == pytest.approx(0.01 / 7, rel=0.3)
    assert (gates.samples, gates.scope, gates.test_gate) == (1, "batch", "soft")


def test_rounds_of_sparsification_are_as_published() -> None:
    recipe, gates = published.find("resnet20-cs"), _gates("resnet20-cs")
    rounds = recipe.course(recipe.settings("published"))[:3]
    assert [phase.epochs for phase in rounds] == [85, 85, 85]
    assert [phase.hardens for phase in rounds] == [True, True, True]
    assert [phase.keep_after for phase in rounds] == [2, None, None]
    assert isinstance(gates, ContinuousSparsification)
    # Both masks are divided by sigmoid(0).
    assert (gates.final_beta, gates.scale) == (200, 2)
    assert float(gates.penalty().detach()) == pytest.approx(1e-8 * 267_696)


def test_fine_tuning_follows_where_published() -> None:
    for name, lengths in {"vgg16-dep": [300], "resnet50-dep": [90, 10]}.items():
        recipe = published.find(name)
        course = recipe.course(recipe.settings("published"))
        assert [phase.epochs for phase in course] == lengths


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_momentum_is_as_published(name: str) -> None:
    optimizer = make_optimizer(name, [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}])
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, name == "nesterov")


def test_weights_start_as_published() -> None:
    for recipe in published.RECIPES.values():
        if recipe.method == "hard_concrete":
            assert recipe.init is nn.init.kaiming_normal_
        if recipe.name.endswith("-cs"):
            assert recipe.init is nn.init.xavier_normal_
