# SPDX-License-Identifier: Apache-2.0
"""Averaged parameters: without bias, gates included, evaluated, and resumed to the same bits."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from l0kernels.recipes import published
from l0kernels.recipes.arm import MASKED, PACKED, Arm, gated_network
from l0kernels.recipes.average import averaged, update
from l0kernels.recipes.loop import Plan, Run
from l0kernels.recipes.recipe import AVERAGE_NOTE
from l0kernels.training import gates_of

DECAY = 0.9


def _parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    """The gates learn so fast that some leave the range of their method."""
    return make_plan("mlp-hc", epochs=3, settings={"ema": DECAY, "lr": 3e-3, "gate_lr": 4.0})


def _arm(plan: Plan, name: str = PACKED) -> Arm:
    net = gated_network(plan.recipe, plan.settings, plan.images.whole, plan.seed)
    return Arm(name, net, plan.settings, None)


@pytest.mark.parametrize("name", [PACKED, MASKED])
def test_the_average_weighs_the_values_after_each_step(plan: Plan, name: str) -> None:
    arm = _arm(plan, name)
    assert arm.average is not None
    values = []
    for _ in range(5):
        arm.step(plan.images.train_x[:30], plan.images.train_y[:30])
        values.append(_parameters(arm.net))
        # What the last bits of the sum are does not matter: it is in float64.
        weights = [(1 - DECAY) * DECAY**i / (1 - DECAY ** len(values)) for i in range(len(values))]
        for key, got in arm.average.module.named_parameters():
            pairs = zip(weights, reversed(values), strict=True)
            expected = sum(weight * value[key].double() for weight, value in pairs)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6, msg=key)
    low, high = math.log(0.01), math.log(100)
    gates = values[-1]["l0.log_alpha"]
    assert bool((gates == torch.tensor(low)).any() | (gates == torch.tensor(high)).any())
    assert float(gates.min()) >= low - 1e-6 and float(gates.max()) <= high + 1e-6


def test_the_average_in_fp64() -> None:
    net = gated_network(*_small()).double()
    ema, sums, updates = averaged(net, DECAY), {}, 7
    for t in range(updates):
        for name, parameter in net.named_parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
            weight = (1 - DECAY) * DECAY ** (updates - 1 - t) / (1 - DECAY**updates)
            sums[name] = sums.get(name, 0) + weight * parameter.detach()
        update(ema, net)
    for name, got in ema.module.named_parameters():
        torch.testing.assert_close(got, sums[name], rtol=1e-14, atol=1e-15, msg=name)


def test_the_average_of_equal_values_is_that_value() -> None:
    net = gated_network(*_small())
    ema = averaged(net, 0.999)
    with torch.no_grad():
        for parameter in ema.module.parameters():
            parameter.fill_(100.0)  # what it starts with does not count
    for _ in range(3):
        update(ema, net)
    for (name, got), value in zip(ema.module.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7, msg=name)


def _small():
    recipe = published.find("mlp-hc")
    return recipe, recipe.settings("published"), 100, 0


def test_the_average_is_what_is_evaluated(plan: Plan) -> None:
    arm = _arm(plan)
    assert arm.average is not None and arm.tested is arm.average.module
    batch = (plan.images.train_x[:30], plan.images.train_y[:30])
    arm.step(*batch)
    with torch.no_grad():
        arm.average.module.fc3.weight.zero_()
        arm.average.module.fc3.bias.copy_(torch.arange(10) == 7)
    labels = torch.full((30,), 7)
    assert arm.accuracy([(batch[0], labels)]) == 100
    assert arm.accuracy([(batch[0], labels - 1)]) == 0
    assert arm.net.training and arm.tested.training


def test_history_has_the_units_of_the_average(plan: Plan) -> None:
    run = Run(replace(plan, compare=False))
    run.start()
    run.train()
    arm = run.arms[0]
    assert arm.average is not None and int(arm.average.n_averaged) == 3 * plan.steps
    units = gates_of(arm.tested).open_now()
    last = run.history[-1]["arms"][PACKED]
    assert last["open_units"][1:] == [units["fc1"], units["fc2"]]
    assert units != gates_of(arm.net).open_now()


@pytest.mark.parametrize(
    ("name", "settings", "decay"),
    [
        ("wrn-28-10-hc", "published", 0.99),
        ("wrn-28-10-hc", "strong", 0.99),
        ("wrn-28-10-arm", "published", None),
        ("mlp-hc", "published", 0.999),
        ("lenet5-hc", "published", None),
        ("lenet5-hc", "averaged", 0.999),
        ("lenet5-arm", "averaged", 0.999),
        ("mlp-ar", "published", None),
        ("mlp-ar", "averaged", 0.999),
    ],
)
def test_who_averages(name: str, settings: str, decay: float | None) -> None:
    recipe = published.find(name)
    assert recipe.settings(settings).ema == decay
    text = published._describe(recipe)
    of_settings = text.split(f"  settings {settings}: ")[1].split("  settings ")[0]
    assert ("    ema  " in of_settings) == (decay is not None)
    assert decay is None or f"ema            {decay}" in of_settings
    whoever = any(named.settings.ema is not None for named in recipe.named.values())
    assert (AVERAGE_NOTE in text) == whoever
