# SPDX-License-Identifier: Apache-2.0
"""Continuous Sparsification: gates, gradients, penalty, schedule, tickets."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import l0kernels as l0
from l0kernels.ops.masked_weight.reference import UNDERFLOW

CS = l0.gates.ContinuousSparsification
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def units(**options) -> tuple[nn.Sequential, CS]:
    """A network with a score for each channel and neuron, in float64."""
    gates = CS({"a": 3, "b": 17}, **options)
    net = nn.Sequential(
        l0.nn.GatedConv2d(2, 3, 5, out_gate=gates["a"]),
        nn.Tanh(),
        nn.Flatten(),
        l0.nn.GatedLinear(12, 17, in_gate=gates["a"].expand(4), out_gate=gates["b"]),
        l0.nn.GatedLinear(17, 2, in_gate=gates["b"]),
    )
    return scattered(gates.attach(net).double(), gates)


def weights(**options) -> tuple[nn.Sequential, CS]:
    """A network with a score for each weight of a convolution and a linear layer, in float64."""
    gates = CS({"conv": (3, 2, 5, 5), "fc": (17, 12)}, **options)
    net = nn.Sequential(
        l0.nn.MaskedConv2d(2, 3, 5, gate=gates["conv"]),
        nn.Tanh(),
        nn.Flatten(),
        l0.nn.MaskedLinear(12, 17, gate=gates["fc"]),
        nn.Linear(17, 2),
    )
    return scattered(gates.attach(net).double(), gates)


def scattered(net, gates):
    """With scores on both sides of 0."""
    nn.init.uniform_(gates.log_alpha, -0.5, 0.5)
    return net, gates


KINDS = {"units": units, "weights": weights}
both = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def batch():
    return torch.randn(4, 2, 6, 6, dtype=torch.float64)


def by_hand(net, x, gate):
    """What the network computes if its gates have these values, shape [gates]."""
    conv, _, _, fc, last, _ = net
    if isinstance(conv, l0.nn.MaskedLayer):
        in_conv, in_fc = gate.split([conv.weight.numel(), fc.weight.numel()])
        y = F.conv2d(x, conv.weight * in_conv.view_as(conv.weight), conv.bias)
        y = F.linear(y.tanh().flatten(1), fc.weight * in_fc.view_as(fc.weight), fc.bias)
        return F.linear(y, last.weight, last.bias)
    a, b = gate.split([3, 17])
    y = F.conv2d(x, conv.weight, conv.bias).tanh().flatten(1) * a.repeat_interleave(4)
    return F.linear(F.linear(y, fc.weight, fc.bias) * b, last.weight, last.bias)


# ---- gates and gradients ----


@both
@pytest.mark.parametrize("initial, rescale", [(0.0, True), (0.1, True), (-0.2, False)])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_training_gates_and_all_gradients(make, initial, rescale, t):
    net, gates = make(initial=initial, rescale=rescale)
    gates.set_progress(t)
    beta = torch.tensor(200.0**t, dtype=torch.float64)
    scale = 1 + math.exp(-initial) if rescale else 1.0
    x = batch().requires_grad_()
    actual = net(x)
    expected = by_hand(net, x, torch.sigmoid(beta * gates.log_alpha) * scale)
    torch.testing.assert_close(actual, expected, **CLOSE)
    upstream = torch.randn_like(expected)
    leaves = [x, *net.parameters()]
    found, right = (torch.autograd.grad(y, leaves, upstream) for y in (actual, expected))
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@both
def test_training_starts_at_the_network_itself(make):
    net, gates = make(initial=0.3)
    nn.init.constant_(gates.log_alpha, 0.3)
    x = batch()
    torch.testing.assert_close(net(x), by_hand(net, x, torch.ones_like(gates.log_alpha)), **CLOSE)
    assert CS({"a": 3}, initial=0.3).log_alpha.tolist() == pytest.approx([0.3] * 3)


@both
def test_the_test_gate_is_the_ticket(make):
    net, gates = make(initial=0.1)
    with torch.no_grad():
        gates.log_alpha[1] = 0.0
    net.eval()
    x, ticket = batch(), (gates.log_alpha > 0).double() * (1 + math.exp(-0.1))
    actual, expected = net(x), by_hand(net, x, ticket)
    torch.testing.assert_close(actual, expected, **CLOSE)
    with l0.frozen(net):
        torch.testing.assert_close(net(x), expected, **CLOSE)
    upstream = torch.randn_like(actual)
    for parameter in net.parameters():
        mine, other = (
            torch.autograd.grad(y, parameter, upstream, retain_graph=True, allow_unused=True)[0]
            for y in (actual, expected)
        )
        if parameter is gates.log_alpha:
            assert mine is None and other is None
        else:
            torch.testing.assert_close(mine, other, **CLOSE)
    assert gates.open_now() == {
        name: int((gates.log_alpha[where] > 0).sum()) for name, where in gates.slices()
    }


@both
def test_penalty_is_the_sum_of_all_gates_and_its_gradient(make):
    lam = {"a": 2.0, "b": 0.5} if make is units else {"conv": 2.0, "fc": 0.5}
    net, gates = make(lam=lam, n_train=7, initial=0.1)
    gates.set_progress(0.5)
    scale, beta = 1 + math.exp(-0.1), 200.0**0.5
    sizes = [50.0] * 3 + [2.0] * 17 if make is units else [1.0] * (150 + 204)
    lams = torch.cat(
        [torch.full((size,), value) for size, value in zip(gates.sizes, lam.values(), strict=True)]
    )
    cost = lams * torch.tensor(sizes).double() / 7
    m = torch.sigmoid(gates.beta * gates.log_alpha.detach())
    value = l0.penalty(net)
    torch.testing.assert_close(value, (cost * scale * m).sum(), **CLOSE)
    (grad,) = torch.autograd.grad(value, gates.log_alpha)
    torch.testing.assert_close(grad, scale * cost * beta * m * (1 - m), **CLOSE)
    assert torch.equal(l0.penalty(net, lam=0.0), torch.zeros(()).double())


@both
def test_skip_below_closes_gates_in_training(make):
    net, gates = make(skip_below=0.3)
    gates.set_progress(0.5)
    m = torch.sigmoid(gates.beta * gates.log_alpha)
    kept = (m >= 0.3).detach()
    assert 0 < int(kept.sum()) < gates.count
    x = batch()
    actual, expected = net(x), by_hand(net, x, 2 * m * kept)
    torch.testing.assert_close(actual, expected, **CLOSE)
    upstream = torch.randn_like(actual)
    (mine,), (other,) = (
        torch.autograd.grad(y, gates.log_alpha, upstream) for y in (actual, expected)
    )
    torch.testing.assert_close(mine, other, **CLOSE)
    assert bool((mine[~kept] == 0).all())
    (grad,) = torch.autograd.grad(l0.penalty(net), gates.log_alpha)
    assert bool((grad[~kept] == 0).all() and (grad[kept] > 0).all())
    assert sum(gates.expected_open().values()) == int(kept.sum())


@both
def test_gates_close_where_sigmoid_underflows(make):
    net, gates = make()
    gates.set_progress(1.0)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.where(gates.log_alpha < 0, -4.0, 0.2))
    assert UNDERFLOW[torch.float64] > -800
    x = batch()
    grads = torch.autograd.grad(net(x).square().sum(), gates.log_alpha)[0]
    assert bool((grads[gates.log_alpha < 0] == 0).all())
    assert gates.expected_open() == {k: float(v) for k, v in gates.open_now().items()}


def test_closed_weights_get_gradients_of_zero():
    net, gates = weights()
    gates.freeze()
    everything = net(batch()).square().sum()
    for layer, part in zip((net[0], net[3]), gates.log_alpha.split(gates.sizes), strict=True):
        (grad,) = torch.autograd.grad(everything, layer.weight, retain_graph=True)
        closed = part.view_as(grad) <= 0
        assert bool((grad[closed] == 0).all() and (grad[~closed] != 0).all())


@both
def test_a_held_draw_serves_several_backward_passes(make):
    x, found, (start, _) = batch(), [], make()
    for parts in (1, 2, 4):
        net = copy.deepcopy(start)
        with l0.hold(net):
            for part in x.chunk(parts):
                net(part).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for whole, two, four in zip(*found, strict=True):
        torch.testing.assert_close(two, whole, **CLOSE)
        torch.testing.assert_close(four, whole, **CLOSE)


# ---- schedule, rounds, tickets ----


def test_beta_grows_exponentially():
    _, gates = units(final_beta=300.0)
    assert float(gates.beta) == 1.0
    for epoch in range(5):
        gates.set_progress(epoch / 4)
        assert float(gates.beta) == pytest.approx(300 ** (epoch / 4), rel=1e-12)


@both
def test_beta_may_change_before_backward(make):
    net, gates = make()
    x, results, right = batch(), [], []
    for t in (0.2, 0.7):
        gates.set_progress(t)
        results.append(net(x).square().sum() + l0.penalty(net))
        right.append(torch.autograd.grad(results[-1], gates.log_alpha, retain_graph=True)[0])
    gates.beta.copy_(gates.beta)  # as DDP does with all buffers
    sum(results).backward()
    torch.testing.assert_close(gates.log_alpha.grad, sum(right), **CLOSE)


@both
def test_rounds(make):
    net, gates = make(initial=0.05)
    gates.set_progress(1.0)
    with torch.no_grad():
        gates.log_alpha[0], gates.log_alpha[1] = 0.0001, -0.0001
    before, s = gates._soft().detach(), gates.log_alpha.detach().clone()
    gates.next_round()
    after = gates._soft().detach()
    assert torch.equal(gates.log_alpha, (200 * s).clamp(max=0.05)) and float(gates.beta) == 1.0
    lost = 200 * s < 0.05
    assert bool(lost[:2].all() and (~lost).any())
    torch.testing.assert_close(after[lost], before[lost], **CLOSE)
    torch.testing.assert_close(after[~lost], torch.ones_like(after[~lost]), **CLOSE)
    x = batch()
    torch.testing.assert_close(net(x), by_hand(net, x, after), **CLOSE)


@both
def test_training_of_a_ticket(make):
    net, gates = make()
    x, scores = batch(), gates.log_alpha.detach().clone()
    early = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("l0.")}
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.05, weight_decay=0.1), momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = net(x).square().mean() + l0.penalty(net)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(3):
        step()
    assert not torch.equal(gates.log_alpha, scores)
    scores = gates.log_alpha.detach().clone()
    net.load_state_dict(early)
    gates.freeze()
    assert torch.equal(net[0].weight, early["0.weight"])
    ticket = 2 * (scores > 0)
    torch.testing.assert_close(net(x), by_hand(net, x, ticket), **CLOSE)
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert torch.equal(gates.log_alpha.grad, torch.zeros_like(scores))
    torch.testing.assert_close(net(x), by_hand(net, x, ticket), **CLOSE)
    gates.unfreeze()
    assert torch.equal(gates.log_alpha, scores)


@both
def test_frozen_scores_get_gradients_of_zero_from_each_loss(make):
    net, gates = make(lam=0.5, n_train=4)
    gates.freeze()
    cost = gates.unit_weights * 0.5 / 4
    value = l0.penalty(net)
    torch.testing.assert_close(value, (cost * 2 * (gates.log_alpha > 0)).sum(), **CLOSE)
    for loss in (value, net(batch()).square().sum()):
        gates.log_alpha.grad = None
        loss.backward()
        assert torch.equal(gates.log_alpha.grad, torch.zeros_like(gates.log_alpha))


def test_a_ticket_finds_what_matters():
    truth = torch.zeros(1, 20)
    truth[0, [2, 5, 11]] = torch.tensor([1.0, -2.0, 1.5])
    x = torch.randn(256, 20)
    gates = CS({"fc": (1, 20)}, lam=1e-3)
    net = gates.attach(nn.Sequential(l0.nn.MaskedLinear(20, 1, gate=gates["fc"])))
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.02, weight_decay=0.1), momentum=0.9)
    for step in range(300):
        gates.set_progress(step / 299)
        loss = F.mse_loss(net(x), x @ truth.t()) + l0.penalty(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(gates.log_alpha > 0, truth[0] != 0)


# ---- state ----


@both
def test_state_is_saved_and_loaded(make):
    net, gates = make()
    gates.set_progress(0.3)
    other, _ = make()
    other.load_state_dict(net.state_dict())
    x = batch()
    assert torch.equal(other(x), net(x)) and torch.equal(other.l0.beta, gates.beta)
    gates.freeze()
    other.load_state_dict(net.state_dict())
    assert other.l0.frozen and torch.equal(other(x), net(x))


@both
def test_copies_are_apart(make):
    net, gates = make()
    net(batch())
    copied = copy.deepcopy(net)
    copied.l0.set_progress(1.0)
    assert float(gates.beta) == 1.0
    x = batch()
    torch.testing.assert_close(net(x), by_hand(net, x, gates._soft()), **CLOSE)
    torch.testing.assert_close(copied(x), by_hand(copied, x, copied.l0._soft()), **CLOSE)


def test_gates_of_half_models_keep_their_digits():
    net, gates = weights()
    net.float()
    gates.set_progress(0.777)
    beta = gates.beta.clone()
    net.bfloat16()
    assert gates.log_alpha.dtype == gates.beta.dtype == torch.float32
    assert torch.equal(gates.beta, beta)
    y = net(batch().bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and gates.log_alpha.grad.dtype == torch.float32


# ---- bad input ----


@pytest.mark.parametrize(
    "groups, options, message",
    [
        ({"a": 3, "b": (2, 2)}, {}, "groups: expected numbers of units or shapes of weights"),
        ({"a": 3}, {"initial": math.inf}, "initial: expected a finite number, got inf"),
        ({"a": 3}, {"final_beta": 1.0}, "final_beta: expected a number above 1, got 1.0"),
        ({"a": 3}, {"skip_below": 1.0}, "skip_below: expected a number from 0 up to 1, got 1.0"),
        ({"a": (0, 3)}, {}, "group 'a': expected a positive number"),
        ({}, {}, "groups: expected at least one"),
    ],
)
def test_bad_options_are_refused(groups, options, message):
    with pytest.raises(ValueError, match=message):
        CS(groups, **options)


@both
def test_schedule_refuses_what_cannot_be(make):
    net, gates = make()
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="set_progress: expected a number from 0 to 1"):
            gates.set_progress(t)
    with l0.hold(net):
        for change in (lambda: gates.set_progress(0.5), gates.next_round):
            with pytest.raises(RuntimeError, match="expected to be outside hold"):
                change()
    gates.freeze()
    with pytest.raises(RuntimeError, match="next_round: expected gates that change"):
        gates.next_round()


@both
def test_nan_in_scores_is_noticed(make):
    net, gates = make()
    with torch.no_grad():
        gates.log_alpha[3] = math.nan
    assert net(batch()).isnan().any()
    net.eval()
    with pytest.raises(ValueError, match="log_alpha: expected no NaN; got 1 of"):
        net(batch())
