# SPDX-License-Identifier: Apache-2.0
"""A target for the density: its value and gradient, the ascent, training, state, bad input."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.gates.hard_concrete import BETA, GAMMA, ZETA

K = BETA * math.log(-GAMMA / ZETA)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

METHODS = {
    "hard_concrete": l0.gates.HardConcrete,
    "arm": l0.gates.ARM,
    "dep": l0.gates.DependentHardConcrete,
    "cs": l0.gates.ContinuousSparsification,
}
methods = pytest.mark.parametrize("method", METHODS)
per_what = pytest.mark.parametrize("per", ["weight", "flop"])


def make(method: str = "hard_concrete", **options) -> nn.Sequential:
    """A convolution and two linear layers in fp64, gates of all sizes."""
    torch.manual_seed(0)
    gates = METHODS[method]({"a": 3, "b": 17}, lam=0.7, n_train=10, **options)
    net = nn.Sequential(
        l0.nn.GatedConv2d(2, 3, 5, out_gate=gates["a"]),
        nn.Tanh(),
        nn.Flatten(),
        l0.nn.GatedLinear(12, 17, in_gate=gates["a"].expand(4), out_gate=gates["b"]),
        nn.Tanh(),
        l0.nn.GatedLinear(17, 2, in_gate=gates["b"]),
    )
    gates.attach(net, {"0": 4, "3": 1, "5": 1})
    with torch.no_grad():
        gates.log_alpha.add_(0.3 * torch.randn_like(gates.log_alpha))
    if method == "cs":
        gates.set_progress(0.3)
    return net.double()


def density_of(net: nn.Sequential, per: str) -> Tensor:
    """The density by hand, differentiable in ``log_alpha``."""
    gates = net.l0
    positions = 4 if per == "flop" else 1
    if isinstance(gates, l0.gates.ARM):
        p = torch.sigmoid(7 * gates.log_alpha)
    elif isinstance(gates, l0.gates.ContinuousSparsification):
        p = torch.sigmoid(gates.beta * gates.log_alpha)
    else:
        p = torch.sigmoid(gates.alpha - K)
    a, b = (part.sum() for part in p.split([3, 17]))
    if isinstance(gates, l0.gates.DependentHardConcrete):
        # Weights between open units: of the convolution, between both groups, of the last layer.
        return (50 * positions * a + 4 * a * b + 2 * b) / (150 * positions + 4 * 51 + 34)
    # What each gate multiplies: a filter of 2 x 25, or the column that reads a neuron.
    return (50 * positions * a + 2 * b) / (150 * positions + 34)


def gradient(value: Tensor, net: nn.Module) -> Tensor:
    return torch.autograd.grad(value, net.l0.log_alpha)[0]


# ---- value and gradient ----


@methods
@per_what
def test_density_is_the_open_part_and_so_is_its_gradient(method: str, per: str):
    net = make(method)
    expected = density_of(net, per)
    assert 0.1 < float(expected.detach()) < 0.99
    states: list[Callable[[], object]] = [lambda: None, lambda: net(X), net.eval]
    for prepare in states:
        prepare()
        density = net.l0.density(per)
        assert density.shape == () and density.dtype == torch.float64
        torch.testing.assert_close(density, expected, **CLOSE)
        right = gradient(density_of(net, per), net)
        torch.testing.assert_close(gradient(density, net), right, **CLOSE)
        assert right.abs().max() > 1e-4


@methods
@per_what
def test_density_of_open_and_closed_gates(method: str, per: str):
    net = make(method)
    biases = slice(-20, None) if method == "dep" else slice(None)
    for value, expected in ((50.0, 1.0), (-50.0, 0.0)):
        with torch.no_grad():
            net.l0.log_alpha[biases] = value
        net.eval()  # training clamps hard concrete gates
        found = float(net.l0.density(per).detach())
        # The chain's logits are at most ln 100 in size.
        assert found == pytest.approx(expected, abs=0.05 if method == "dep" else 1e-10)


def test_density_of_a_ticket_is_what_it_keeps():
    net = make("cs", initial=0.2)
    net.l0.set_progress(1.0)
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.where(torch.arange(20) % 3 == 0, 1.0, -5.0))
    kept = (50 * 1 + 2 * 6) / (150 + 34)  # gates 0, 3, 6, ...: one channel, six neurons
    assert float(net.l0.density().detach()) == pytest.approx(kept, abs=1e-10)


@methods
@per_what
def test_the_term_is_the_multiplier_times_the_excess(method: str, per: str):
    net = make(method)
    budget = l0.Budget(net, 0.3, per, lr=0.5)
    budget.multiplier.fill_(3.7)
    term = budget()
    expected = 3.7 * (density_of(net, per) - 0.3)
    assert term.shape == () and term.dtype == torch.float64
    torch.testing.assert_close(term, expected, **CLOSE)
    torch.testing.assert_close(gradient(term, net), gradient(expected, net), **CLOSE)


@methods
def test_it_adds_to_a_loss_and_a_penalty(method: str):
    net = make(method)
    budget = l0.Budget(net, 0.3, lr=0.5)
    grads = []
    for parts in ("both", "loss", "term"):
        net.l0.step.zero_()
        budget.multiplier.fill_(2.0)
        net.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        if parts != "term":
            total = l0.expected_loss(net, lambda: net(X).square().mean()) + l0.penalty(net)
        if parts != "loss":
            total = total + budget()
        total.backward()
        grads.append(net.l0.log_alpha.grad.clone())
    torch.testing.assert_close(grads[0], grads[1] + grads[2], **CLOSE)
    assert grads[1].any() and grads[2].any()


def test_other_readers_of_the_draw_are_left_alone():
    """Terms may come in any order, be backed separately, or be computed without gradients."""
    for method in METHODS:
        net = make(method)
        net(X)
        expected = gradient(l0.penalty(net), net)
        net(X)
        budget = l0.Budget(net, 0.3)
        with torch.no_grad():
            budget()
        budget.multiplier.fill_(1.0)
        budget().backward()
        torch.testing.assert_close(gradient(l0.penalty(net), net), expected, **CLOSE)


# ---- ascent ----


@methods
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("warmup", [0, 3])
def test_each_call_ascends_by_the_formula(method: str, restart: bool, warmup: int):
    net = make(method)
    budget = l0.Budget(net, 0.55, "weight", lr=0.8, warmup=warmup, restart=restart)
    step = {"dep": 3.0, "hard_concrete": 1.0}.get(method, 0.3)  # how fast gates close
    multiplier, seen = 0.0, []
    # Shifts that take the density over the level, far below it and over it again.
    for k, shift in enumerate((1.0, 0.5, -2.5, -0.5, 2.5, 1.0, 0.2), start=1):
        with torch.no_grad():
            net.l0.log_alpha[-20:] += step * shift
        density = float(density_of(net, "weight").detach())
        level = 0.55 + 0.45 * max(0.0, 1 - k / warmup) if warmup else 0.55
        term = budget()
        assert float(term.detach()) == pytest.approx(multiplier * (density - level), abs=1e-12)
        multiplier = max(0.0, multiplier + 0.8 * (density - level))
        if restart and density < level:
            multiplier = 0.0
        assert float(budget.multiplier) == pytest.approx(multiplier, abs=1e-12)
        assert float(budget.level()) == pytest.approx(level, abs=1e-12)
        seen.append(density > level)
    assert int(budget.step) == 7 and {True, False} == set(seen)


@pytest.mark.parametrize("restart", [True, False])
def test_the_multiplier_is_never_below_zero(restart: bool):
    net = make()
    budget = l0.Budget(net, 1.0, lr=10.0, restart=restart)
    for _ in range(3):
        budget()
        assert float(budget.multiplier) == 0.0


def test_nothing_ascends_without_training():
    net = make()
    budget = l0.Budget(net, 0.1, lr=1.0)
    budget()
    before = budget.state_dict()
    before = {name: value.clone() for name, value in before.items()}

    def unchanged() -> bool:
        budget()
        return all(value.equal(before[name]) for name, value in budget.state_dict().items())

    with torch.no_grad():
        assert unchanged()
    net.eval()
    assert unchanged()
    net.train()
    budget.eval()
    assert unchanged()
    budget.train()
    net.l0.freeze()
    assert unchanged()
    assert bool((gradient(budget(), net) == 0).all())
    net.l0.unfreeze()
    assert not unchanged()


@methods
def test_a_call_is_one_ascent_whatever_holds_the_draw(method: str):
    found = []
    for held in (False, True):
        net = make(method)
        budget = l0.Budget(net, 0.1, lr=1.0)
        if held:
            with l0.hold(net):
                loss = sum(l0.expected_loss(net, lambda n=net: n(X).sum()) for _ in range(2))
                (loss + l0.penalty(net) + budget()).backward()
        else:
            net(X)
            budget().backward()
        found.append(budget.state_dict())
    assert int(found[1]["step"]) == 1
    assert found[0]["multiplier"].equal(found[1]["multiplier"]) and found[0]["multiplier"] > 0


def test_the_graph_keeps_the_multiplier_of_its_call():
    net = make()
    budget = l0.Budget(net, 0.1, lr=5.0)
    budget.multiplier.fill_(2.0)
    first = budget()
    budget()
    expected = 2.0 * gradient(density_of(net, "flop"), net)
    torch.testing.assert_close(gradient(first, net), expected, **CLOSE)


@methods
def test_replicas_agree_whatever_they_see(method: str):
    found = []
    for rank in range(2):
        net = make(method)
        budget = l0.Budget(net, 0.2, lr=0.5, warmup=4)
        net.l0.step.fill_(100 * rank)
        for step in range(6):
            net((1 + rank) * X)
            budget()
            with torch.no_grad():
                net.l0.log_alpha.sub_(0.05 * step)
        found.append(budget.state_dict())
    for name, value in found[0].items():
        assert value.equal(found[1][name])


# ---- training ----


# Learning rate of the gates, and options, with which 300 steps are enough.
SPEEDS = {
    "hard_concrete": (0.05, {}),
    "arm": (0.02, {}),
    "dep": (0.03, {"bias": 1.0}),
    "cs": (0.01, {}),
}


@methods
@per_what
def test_training_arrives_at_the_target(method: str, per: str):
    densities = train(method, 0.3, per, 300)
    assert densities[0] > 0.45
    assert 0.23 < sum(densities[-50:]) / 50 < 0.33


def train(method: str, target: float, per: str, steps: int) -> list[float]:
    """The densities of a regression that uses half of the features it has."""
    torch.manual_seed(0)
    x = torch.randn(32, 2, 5, 5)
    y = torch.tanh(x[:, 0, :3].flatten(1) @ torch.randn(15, 3))
    layers = [nn.Conv2d(2, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 16), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(16, 3))
    gate_lr, options = SPEEDS[method]
    l0.convert(net, method, example_inputs=(x[:3],), **options)
    budget = l0.Budget(net, target, per, lr=0.3, warmup=100)
    optimizer = torch.optim.Adam(l0.param_groups(net, lr=3e-3, gate_lr=gate_lr))
    densities = []
    for step in range(steps):
        if method == "cs":
            net.l0.set_progress(step / (steps - 1))
        densities.append(float(net.l0.density(per).detach()))
        optimizer.zero_grad()
        loss = l0.expected_loss(net, lambda: F.mse_loss(net(x), y)) + budget()
        loss.backward()
        optimizer.step()
    return densities


# ---- state ----


@pytest.mark.parametrize("method", ["hard_concrete", "cs"])
def test_state_is_saved_and_loaded(method: str):
    def steps(net: nn.Module, budget: l0.Budget, count: int) -> None:
        for _ in range(count):
            net.zero_grad()
            (net(X).square().mean() + budget()).backward()
            with torch.no_grad():
                net.l0.log_alpha.sub_(0.1 * net.l0.log_alpha.grad)

    straight = make(method)
    steps(straight, whole := l0.Budget(straight, 0.2, lr=0.3, warmup=5), 8)
    net = make(method)
    steps(net, budget := l0.Budget(net, 0.2, lr=0.3, warmup=5), 3)
    file = io.BytesIO()
    torch.save((net.state_dict(), budget.state_dict()), file)
    file.seek(0)
    other = make(method)
    resumed = l0.Budget(other, 0.2, lr=0.3, warmup=5)
    for module, state in zip((other, resumed), torch.load(file, weights_only=True), strict=True):
        module.load_state_dict(state)
    steps(other, resumed, 5)
    assert set(whole.state_dict()) == {"multiplier", "step"}
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name])
    assert straight.l0.log_alpha.equal(other.l0.log_alpha)


def test_the_model_is_not_the_budgets():
    net = make()
    budget = l0.Budget(net, 0.2)
    assert list(budget.parameters()) == [] and list(budget.modules()) == [budget]
    keys, count = set(net.state_dict()), len(list(net.parameters()))
    net.budget = budget
    assert set(net.state_dict()) == keys | {"budget.multiplier", "budget.step"}
    assert len(list(net.parameters())) == count


def test_a_copied_model_has_a_budget_of_its_own():
    net = make()
    net.budget = l0.Budget(net, 0.2, lr=1.0)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.l0.log_alpha.sub_(2.0)
    twin.budget()
    net.budget()
    for each in (net, twin):
        expected = max(0.0, float(density_of(each, "flop").detach()) - 0.2)
        assert float(each.budget.multiplier) == pytest.approx(expected, abs=1e-12)


def test_it_finds_the_gates_of_a_wrapped_model():
    net = make()
    wrapped = l0.Budget(torch.optim.swa_utils.AveragedModel(net), 0.2, lr=1.0)
    plain = l0.Budget(net, 0.2, lr=1.0)
    for each in (wrapped, plain):
        each()
    assert wrapped.multiplier.equal(plain.multiplier)


def test_the_multiplier_keeps_its_digits():
    net = make().float()
    budget = l0.Budget(net, 0.2, lr=1e-9)
    budget.multiplier.fill_(math.pi)
    budget.bfloat16()
    term = budget()
    assert term.dtype == torch.float32
    assert budget.multiplier.dtype == torch.float64
    assert 0 < float(budget.multiplier) - math.pi < 1e-8


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target: expected a density above 0 and up to 1, got 0.0"),
        ({"target": 1.5}, "target: expected a density above 0 and up to 1, got 1.5"),
        ({"target": math.nan}, "target: expected a density above 0 and up to 1, got nan"),
        ({"per": "byte"}, "per: expected 'weight' or 'flop', got 'byte'"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"lr": math.inf}, "lr: expected a positive number, got inf"),
        ({"warmup": -1}, "warmup: expected a number of calls, 0 or more, got -1"),
        ({"warmup": 1.5}, "warmup: expected a number of calls, 0 or more, got 1.5"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        l0.Budget(make(), **{"target": 0.3, **options})


def test_models_that_have_no_density():
    with pytest.raises(ValueError, match="expected a model with gates"):
        l0.Budget(nn.Linear(2, 2), 0.3)
    gates = l0.gates.HardConcrete({"a": 4})
    net = gates.attach(nn.Sequential(l0.nn.GatedLinear(2, 4, out_gate=gates["a"])))
    with pytest.raises(ValueError, match="per='flop': expected output positions"):
        l0.Budget(net, 0.3)
    budget = l0.Budget(net, 0.3, "weight")
    with pytest.raises(ValueError, match="density: expected gates that multiply weights, got none"):
        budget()
