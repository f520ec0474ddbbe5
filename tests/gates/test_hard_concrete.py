# SPDX-License-Identifier: Apache-2.0
"""Hard concrete gates of a model: law, penalty, parameters, bad input."""

import math

import pytest
import torch
from torch import nn

import l0kernels as l0
from l0kernels.gates.hard_concrete import BETA, CLAMP, GAMMA, ZETA

# P(z = 0), P(z = 1) and the test gate for initial drop rates: closed forms of the law.
TABLE = {0.01: (0.0020, 0.9524, 1.0), 0.3: (0.0797, 0.3205, 0.740), 0.5: (0.1682, 0.1682, 0.5)}


def small(lam=0.1, n_train=10, **options) -> tuple[nn.Module, l0.gates.HardConcrete]:
    gates = l0.gates.HardConcrete({"a": 3, "b": 17}, lam=lam, n_train=n_train, **options)
    net = nn.Sequential(
        l0.nn.GatedConv2d(2, 3, 5, out_gate=gates["a"]),
        nn.ReLU(),
        nn.Flatten(),
        l0.nn.GatedLinear(12, 17, in_gate=gates["a"].expand(4), out_gate=gates["b"]),
        l0.nn.GatedLinear(17, 2, in_gate=gates["b"]),
    )
    gates.attach(net)
    return net, gates


@pytest.mark.parametrize("rate", TABLE)
def test_law_at_the_initial_drop_rates(rate: float):
    gates = l0.gates.HardConcrete({"a": 40_000}, droprate=rate)
    nn.init.constant_(gates.log_alpha, math.log((1 - rate) / rate))
    layer = nn.Sequential(l0.nn.GatedLinear(2, 40_000, out_gate=gates["a"]))
    gates.attach(layer)
    gates.draw()
    z = gates["a"].z
    closed, full, test_gate = TABLE[rate]
    for share, expected in (((z == 0).double().mean(), closed), ((z == 1).double().mean(), full)):
        deviation = math.sqrt(expected * (1 - expected) / z.numel())
        assert abs(float(share) - expected) < 4.5 * deviation + 1e-4
    assert abs(float(gates.deterministic().detach()[0]) - test_gate) < 1e-3
    assert abs(float(gates.open_probability()[0]) - (1 - closed)) < 1e-4


def test_initial_log_alpha_follows_the_drop_rates():
    gates = l0.gates.HardConcrete({"a": 2000, "b": 1000}, droprate={"a": 0.2, "b": 0.5})
    a, b = gates.log_alpha.detach().split([2000, 1000])
    assert abs(float(a.mean()) - math.log(4)) < 2e-3 and abs(float(b.mean())) < 2e-3
    assert 0.009 < float(a.std()) < 0.011


def test_penalty_is_the_papers_sum_and_its_gradient():
    lam = {"a": 2.0, "b": 0.5}
    net, gates = small(lam=lam, n_train=10)
    net.double()
    # A convolution's gate has its filter, a neuron's gate the column that reads it.
    sizes = torch.tensor([2 * 25.0] * 3 + [2.0] * 17, dtype=torch.float64)
    torch.testing.assert_close(gates.unit_weights, sizes)
    lams = torch.tensor([2.0] * 3 + [0.5] * 17, dtype=torch.float64)
    alpha = gates.log_alpha.detach().clone().requires_grad_()
    p = torch.sigmoid(alpha - BETA * math.log(-GAMMA / ZETA))
    expected = (p * lams * sizes).sum() / 10
    expected.backward()
    exact = {"rtol": 1e-10, "atol": 0}
    for prepare in (lambda: None, lambda: net(torch.randn(1, 2, 6, 6).double())):
        prepare()
        net.zero_grad()
        value = l0.penalty(net)
        value.backward()
        torch.testing.assert_close(value, expected, **exact)
        torch.testing.assert_close(gates.log_alpha.grad, alpha.grad, **exact)
    torch.testing.assert_close(l0.penalty(net, lam=1.0), (p * sizes).sum() / 10, **exact)


def test_penalty_follows_a_parameter_update():
    net, gates = small()
    net(torch.randn(1, 2, 6, 6))
    before = float(l0.penalty(net).detach())
    with torch.no_grad():
        gates.log_alpha.add_(1.0)
    assert float(l0.penalty(net).detach()) > before


def test_penalty_per_flop_weighs_by_output_positions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 16, 2),
    )  # fmt: skip
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(2, 1, 8, 8),), n_train=7)
    net.double()
    p = net.l0.open_probability()
    # 3x3 filters over 6x6 and 4x4 output positions.
    expected = (p[:4].sum() * 9 * 36 + p[4:].sum() * 36 * 16) / 7
    torch.testing.assert_close(l0.penalty(net, per="flop"), expected, rtol=1e-14, atol=0)


def test_clamped_before_each_draw():
    net, gates = small()
    nn.init.constant_(gates.log_alpha, 50.0)
    net(torch.randn(1, 2, 6, 6))
    assert float(gates.log_alpha.detach().max()) == pytest.approx(math.log(100))
    nn.init.constant_(gates.log_alpha, -50.0)
    net(torch.randn(1, 2, 6, 6))
    assert float(gates.log_alpha.detach().min()) == pytest.approx(math.log(0.01))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("how", ["fused", "foreach", "one by one"])
def test_clamped_whatever_optimizer_wrote(kind: type, how: str):
    """Fused optimizers write without a new version."""
    net, gates = small(lam=50.0)
    options = {"fused": how == "fused", "foreach": how == "foreach"}
    least = float(torch.tensor(math.log(0.01)))
    optimizer = kind(gates.parameters(), lr=3.0, **options)
    for _ in range(4):
        optimizer.zero_grad()
        (net(torch.randn(1, 2, 6, 6)).sum() + l0.penalty(net)).backward()
        assert float(gates.log_alpha.detach().min()) >= least
        optimizer.step()
    assert float(gates.log_alpha.detach().min()) < least  # until the next draw


def test_the_penalty_of_other_weights_leaves_the_graph_of_a_draw_alone():
    net, gates = small()
    (net(torch.randn(1, 2, 6, 6)).sum() + l0.penalty(net, lam=2.0)).backward()
    assert float(gates.log_alpha.grad.abs().max()) > 0


def test_counts_by_group():
    net, gates = small()
    with torch.no_grad():
        gates.log_alpha[:3] = torch.tensor([5.0, -5.0, 5.0])
        gates.log_alpha[3:] = -5.0
    assert gates.open_now() == {"a": 2, "b": 0}
    p = gates.open_probability()
    assert gates.expected_open() == pytest.approx(
        {"a": float(p[:3].sum()), "b": float(p[3:].sum())}
    )


# Where each test gate becomes 0; it becomes 1 at the opposite log_alpha.
THRESHOLDS = {"mean": -2.3979, "median": -1.5986}


@pytest.mark.parametrize("test_gate", THRESHOLDS)
def test_test_gates_by_their_formula_and_thresholds(test_gate: str):
    gates = l0.gates.HardConcrete({"a": 801}, test_gate=test_gate).double()
    with torch.no_grad():
        gates.log_alpha.copy_(torch.linspace(-4, 4, 801))
    divisor = {"mean": 1.0, "median": BETA}[test_gate]
    alpha, z = gates.log_alpha.detach(), gates.deterministic().detach()
    s = 1 / (1 + torch.exp(-alpha / divisor))
    torch.testing.assert_close(z, (1.2 * s - 0.1).clamp(0, 1), rtol=0, atol=1e-12)
    threshold = THRESHOLDS[test_gate]
    for side, value in ((1, 0.0), (-1, 1.0)):
        with torch.no_grad():
            gates.log_alpha[:2] = side * (threshold + torch.tensor([-1e-4, 1e-4]))
        beyond, within = gates.deterministic().detach()[:2].tolist()
        assert beyond == value and 0 < within < 1


def test_the_median_is_that_of_the_training_gate():
    values = torch.tensor([-1.8, -1.2, 0.0, 0.9, 1.4, 1.8])
    gates = l0.gates.HardConcrete({"a": 6 * 20_001}, test_gate="median")
    with torch.no_grad():
        gates.log_alpha.copy_(values.repeat_interleave(20_001))
    gates.attach(nn.Sequential(l0.nn.GatedLinear(2, gates.count, out_gate=gates["a"])))
    gates.draw()
    drawn = gates["a"].z.detach().view(6, -1).median(1).values
    expected = gates.deterministic().detach().view(6, -1)[:, 0]
    assert expected.tolist() == expected.sort().values.tolist()
    assert expected[0] == drawn[0] == 0 and expected[-1] == drawn[-1] == 1
    # A median of 20,001 has a standard deviation of 1/2 / sqrt(20,001) / density.
    assert bool(((drawn - expected).abs() < 0.02).all())


@pytest.mark.parametrize("test_gate", THRESHOLDS)
def test_all_that_reads_test_gates_has_the_chosen_one(test_gate: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(4, 5)
    l0.convert(net, "hard_concrete", example_inputs=(x,), test_gate=test_gate)
    with torch.no_grad():  # the third and fourth are closed by the median only
        net.l0.log_alpha.copy_(torch.tensor([3.0, 0.0, -2.0, -1.7, -1.5, -3.0]))
    expected = {"mean": 5, "median": 3}[test_gate]
    assert net.l0.open_now() == {"0": expected}
    assert l0.report(net).groups[0].test_open == expected
    net.eval()
    y = net(x)
    z = net.l0.deterministic().detach()
    assert int((z != 0).sum()) == expected
    assert net.l0["0"].count == expected
    hidden = torch.tanh(nn.functional.linear(x, net[0].weight, net[0].bias))
    by_hand = nn.functional.linear(hidden * z, net[2].weight, net[2].bias)
    torch.testing.assert_close(y, by_hand)
    small = l0.compact(net, (x,))
    assert small[0].out_features == expected
    torch.testing.assert_close(small(x), y)
    net.l0.freeze()
    net.train()
    torch.testing.assert_close(net(x), y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {}}, "at least one"),
        ({"groups": {"a": 0}}, "positive number of units, got 0"),
        ({"groups": {"a": 3}, "lam": {"b": 1.0}}, r"each of \['a'\], got \['b'\]"),
        ({"groups": {"a": 3}, "n_train": 0}, "positive integer, got 0"),
        ({"groups": {"a": 3}, "n_train": 1.5}, "positive integer, got 1.5"),
        ({"groups": {"a": 3}, "seed": -1}, "got -1"),
        ({"groups": {"a": 3}, "seed": 1.7}, "got 1.7"),
        ({"groups": {"a": 3}, "lam": float("nan")}, "finite numbers, got nan"),
        ({"groups": {"a": 3}, "test_gate": "mode"}, r"one of \('mean', 'median'\), got 'mode'"),
        ({"groups": {"a": 3}, "droprate": 1.0}, r"\(0, 1\), got \{'a': 1.0\}"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        l0.gates.HardConcrete(options.pop("groups"), **options)


def test_nan_log_alpha_is_named():
    net, gates = small()
    with torch.no_grad():
        gates.log_alpha[4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        net(torch.randn(1, 2, 6, 6))


def test_unknown_group_names_the_groups():
    _, gates = small()
    with pytest.raises(KeyError, match=r"\['a', 'b'\]"):
        gates["c"]


def test_penalty_arguments():
    net, _ = small()
    with pytest.raises(ValueError, match="'weight' or 'flop', got 'byte'"):
        l0.penalty(net, per="byte")
    with pytest.raises(ValueError, match="output positions"):
        l0.penalty(net, per="flop")
    with pytest.raises(ValueError, match="with gates"):
        l0.penalty(nn.Linear(2, 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_fused_optimizers_write_past_versions(frozen: bool):
    """Parameters are back in their range, or where they were frozen, at the next draw."""
    gates = l0.gates.HardConcrete({"a": 4})
    gates.attach(torch.nn.Sequential(l0.nn.GatedLinear(3, 4, out_gate=gates["a"])))
    if frozen:
        gates.freeze()
    gates.draw()
    before = gates.log_alpha.detach().clone()
    optimizer = torch.optim.SGD([gates.log_alpha], lr=10.0, fused=True)
    gates.log_alpha.grad = torch.tensor([1.0, -1.0, 0.01, 0.0])
    version = gates.log_alpha._version
    optimizer.step()
    assert gates.log_alpha._version == version
    assert float(gates.log_alpha.detach().abs().max()) > 9
    gates.draw()
    expected = before if frozen else (before - 10 * gates.log_alpha.grad).clamp(*CLAMP)
    assert gates.log_alpha.equal(expected)
