# SPDX-License-Identifier: Apache-2.0
"""One network in training: what is counted, and what leaves no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from l0kernels.recipes import measure, published
from l0kernels.recipes.arm import (
    LAYOUTS,
    MASKED,
    PACKED,
    Arm,
    drawn_weights,
    gated_network,
    open_units,
    weights_left,
)
from l0kernels.recipes.loop import Plan
from l0kernels.recipes.models import LeNet5, build
from l0kernels.training import gates_of, penalty

SHUT, OPEN = -10.0, 10.0


@pytest.fixture
def net(make_plan: Callable[..., Plan]) -> nn.Module:
    """LeNet-5 with gates."""
    plan = make_plan()
    return gated_network(plan.recipe, plan.settings, len(plan.images.train_x), 0)


def _set_gates(net: nn.Module, shut: dict[str, list[int]]) -> None:
    gates = gates_of(net)
    with torch.no_grad():
        gates.log_alpha.fill_(OPEN)
        for name, where in gates.slices():
            gates.log_alpha[where][shut.get(name, [])] = SHUT


def test_build_depends_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = build(LeNet5, 3), build(LeNet5, 3), build(LeNet5, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    assert float(first.conv2.weight.detach().std()) == pytest.approx((2 / 500) ** 0.5, rel=0.05)
    assert not first.conv2.bias.any()


def test_recipe_gates_have_the_published_widths(net: nn.Module) -> None:
    gates = gates_of(net)
    assert dict(zip(gates.names, gates.sizes, strict=True)) == {
        "conv1": 20,
        "conv2": 50,
        "fc1.in": 800,
        "fc1": 500,
    }
    assert open_units(net) == [20, 50, 800, 500]


def test_the_mlp_by_arm_has_the_coupled_l2_of_all_weights() -> None:
    recipe = published.find("mlp-arm")
    settings = recipe.settings("published")
    net = gated_network(recipe, settings, 60_000, 0)
    assert gates_of(net).l2 == pytest.approx(60_000 * 5e-4)
    p = dict(zip(gates_of(net).names, gates_of(net).openness().split([784, 300, 100]), strict=True))
    weights = {"fc1.in": net.fc1.weight, "fc1": net.fc2.weight, "fc2": net.fc3.weight}
    with torch.no_grad():
        found = float(penalty(net) - gates_of(net).penalty())
        expected = sum(float((p[n] * w.square().sum(0)).sum()) for n, w in weights.items())
    assert found == pytest.approx(5e-4 / 2 * expected, rel=1e-4)


def test_inputs_of_closed_channels_are_not_open(net: nn.Module) -> None:
    # Channel 0 of conv2 makes inputs 0-15 of fc1; input 16 is shut by its own gate.
    _set_gates(net, {"conv1": [1], "conv2": [0], "fc1.in": [3, 16], "fc1": [0, 1, 2]})
    assert open_units(net) == [19, 49, 800 - 16 - 1, 497]
    left = 19 * 25 + 49 * 19 * 25 + 497 * 783 + 10 * 497
    assert weights_left(net)["test"] == left
    assert weights_left(net)["total"] == 430_500


def test_drawn_weights_are_those_of_the_draw(net: nn.Module) -> None:
    with torch.no_grad():
        gates_of(net).log_alpha.fill_(OPEN)
    net(torch.rand(2, 1, 28, 28))
    z = {name: net.l0[name].z != 0 for name in ("conv1", "conv2", "fc1.in", "fc1")}
    one, two, four = (int(z[name].sum()) for name in ("conv1", "conv2", "fc1"))
    inputs = int((z["conv2"].repeat_interleave(16) & z["fc1.in"]).sum())
    assert drawn_weights(net) == one * 25 + two * one * 25 + four * inputs + 10 * four
    # Open gates at their upper clamp are drawn shut now and then.
    assert drawn_weights(net) < 430_500


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", [PACKED, MASKED])
def test_measurements_leave_no_trace(
    net: nn.Module, make_plan: Callable[..., Plan], name: str
) -> None:
    plan = make_plan()
    arm = Arm(name, net, plan.settings, "nchw")
    batch = (plan.images.train_x[:30], plan.images.train_y[:30])
    arm.step(*batch)
    before = {key: value.clone() for key, value in tensors(net).items()}
    moments = [dict(state) for state in arm.optimizers[0].state.values()]
    kept = [{k: v.clone() for k, v in state.items()} for state in moments]
    measure.warm_up(arm, [batch])
    assert measure.fastest_layout(arm, [batch]) in LAYOUTS
    assert measure.step_memory(arm, batch) > 0
    assert all(torch.equal(value, before[key]) for key, value in tensors(net).items())
    for state, old in zip(arm.optimizers[0].state.values(), kept, strict=True):
        assert all(torch.equal(value, old[key]) for key, value in state.items())


def test_memory_of_a_step_counts_what_is_computed(
    net: nn.Module, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan()
    batch = (plan.images.train_x, plan.images.train_y)
    _set_gates(net, {"conv1": [*range(18)], "conv2": [*range(48)], "fc1": [*range(490)]})
    packed, masked = (
        measure.step_memory(Arm(name, net, plan.settings, None), batch) for name in (PACKED, MASKED)
    )
    # conv1's output alone is 70 x 20 x 24 x 24 fp32 values in the masked network.
    assert masked > 70 * 20 * 24 * 24 * 4
    assert packed < masked / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_strides_only(
    net: nn.Module, make_plan: Callable[..., Plan], layout
) -> None:
    plan = make_plan()
    conv2: Tensor = net.conv2.weight.detach().clone()
    arm = Arm(MASKED, net, plan.settings, layout)
    assert torch.equal(net.conv2.weight, conv2)
    assert net.conv2.weight.is_contiguous(memory_format=LAYOUTS[layout])
    placed = arm.place(plan.images.test_x)
    assert torch.equal(placed, plan.images.test_x)
    assert placed.stride(1) == (1 if layout == "channels_last" else 28 * 28)
