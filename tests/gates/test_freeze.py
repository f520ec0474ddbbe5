# SPDX-License-Identifier: Apache-2.0
"""Frozen gates: training goes on with the test gates, whatever optimizers and loaders do."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "fused sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adamw, gates decayed": lambda groups: torch.optim.AdamW(
        [{**group, "weight_decay": 0.5} for group in groups], lr=0.1
    ),
}


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    gates = l0.gates.HardConcrete({"a": 12, "b": 9}, lam=0.3, n_train=10, seed=seed)
    net = nn.Sequential(
        l0.nn.GatedLinear(5, 12, out_gate=gates["a"]),
        nn.Tanh(),
        l0.nn.GatedLinear(12, 9, in_gate=gates["a"], out_gate=gates["b"]),
        nn.Tanh(),
        l0.nn.GatedLinear(9, 3, in_gate=gates["b"]),
    )
    gates.attach(net, {"0": 1, "2": 4, "4": 2})
    with torch.no_grad():  # closed, fully open, and between
        gates.log_alpha.copy_(torch.linspace(-4.0, 4.0, 21))
    return net


def objective(net: nn.Module) -> Tensor:
    return l0.expected_loss(net, lambda: net(X).square().mean()) + l0.penalty(net)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """The gates of every step."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        objective(net).backward()
        seen.append(net.l0._draw.z.detach().clone())
        optimizer.step()
    return seen


def start(kind: str = "sgd", seed: int = 0) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    net = make(seed)
    return net, OPTIMIZERS[kind](l0.param_groups(net, lr=0.1, gate_lr=0.5))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gates_stay_whatever_the_optimizer_does(kind: str):
    net, optimizer = start(kind)
    assert len({tuple(z.tolist()) for z in train(net, optimizer, 4)}) == 4
    values, weight = net.l0.log_alpha.detach().clone(), net[2].weight.detach().clone()
    test_gates, step = net.l0.deterministic().detach(), int(net.l0.step)
    now, expected = net.l0.open_now(), net.l0.expected_open()
    net.l0.freeze()
    assert net.l0.frozen
    for z in train(net, optimizer, 6):
        assert z[:-1].equal(test_gates)
    assert not net.l0.log_alpha.equal(values), "the optimizer was expected to move the parameter"
    assert not net[2].weight.equal(weight)
    assert int(net.l0.step) == step
    assert net.l0.open_now() == now and net.l0.expected_open() == expected
    net.eval()
    net(X)
    assert net.l0._draw.z[:-1].equal(test_gates)
    net.train()
    net(X)
    assert net.l0.log_alpha.equal(values)
    optimizer.step()
    net.l0.unfreeze()
    assert not net.l0.frozen and net.l0.log_alpha.equal(values)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("term", ["data", "penalty", "both"])
def test_log_alpha_gets_zeros_and_weights_their_gradients(term: str, impl: str):
    net = make()
    net.l0.freeze()
    twin = copy.deepcopy(net).eval()  # the same gates, as constants
    with l0.use_impl(impl):
        data = l0.expected_loss(net, lambda: net(X).square().mean())
        penalty = l0.penalty(net)
        ({"data": data, "penalty": penalty, "both": data + penalty}[term]).backward()
    grad = net.l0.log_alpha.grad
    assert grad is not None and grad.shape == (21,) and bool((grad == 0).all())
    if term == "penalty":
        return
    twin(X).square().mean().backward()
    for ours, other in zip(net.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_zero_gradients_come_out_of_infinite_ones():
    net = make()
    net.l0.freeze()
    (net(X).sum() * torch.inf + l0.penalty(net) * torch.nan).backward()
    assert bool((net.l0.log_alpha.grad == 0).all())


@pytest.mark.parametrize(
    "options", [{}, {"per": "flop"}, {"lam": 2.0}, {"lam": {"a": 1.0, "b": 3.0}}]
)
def test_penalty_keeps_its_value(options: dict):
    net, optimizer = start()
    net(X)
    before = l0.penalty(net, **options).detach()
    net(X)  # its draw has the penalty of sampled gates at hand
    net.l0.freeze()
    values = [l0.penalty(net, **options)]
    for _ in range(3):
        train(net, optimizer, 1)
        values.append(l0.penalty(net, **options))
    for value in values:
        assert value.equal(values[0]) and value.requires_grad and value.shape == ()
    torch.testing.assert_close(values[0].detach(), before)


def test_held_frozen_gates_serve_several_backward_passes():
    found = []
    for parts in ((X,), (X[:2], X[2:])):
        net = make()
        net.l0.freeze()
        with l0.hold(net):
            for part in parts:
                net(part).sum().backward()
        found.append([p.grad for p in net.parameters()])
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split)


def test_two_forwards_in_one_loss_with_a_moved_parameter():
    net = make()
    net.l0.freeze()
    with torch.no_grad():
        net.l0.log_alpha.add_(0.5)
    (net(X).sum() + net(2 * X).sum() + l0.penalty(net)).backward()
    assert bool((net.l0.log_alpha.grad == 0).all())


def test_sampling_goes_on_where_it_stopped():
    net, twin = make(), make()
    for each in (net, twin):
        each(X)
    net.l0.freeze()
    net(X)
    net.l0.unfreeze()
    for each in (net, twin):
        each(X)
    assert net.l0["a"].z.equal(twin.l0["a"].z)
    assert not net.l0._draw.z[:-1].equal(net.l0.deterministic())


def test_freezing_twice_keeps_the_first_values_and_unfreezing_needs_nothing():
    net, optimizer = start()
    net.l0.unfreeze()
    assert not net.l0.frozen
    train(net, optimizer, 3)
    net.l0.freeze()
    values = net.l0.alpha.clone()
    train(net, optimizer, 1)
    net.l0.freeze()
    assert net.l0.alpha.equal(values)


def test_a_draw_made_before_is_not_used_after():
    net = make()
    for change in (net.l0.freeze, net.l0.unfreeze):
        net(X)
        change()
        with pytest.raises(RuntimeError, match="no gates are drawn"):
            net[0](X)


def test_not_inside_a_scope():
    net = make()
    for name in ("freeze", "unfreeze"):
        with (
            pytest.raises(RuntimeError, match=f"{name}: expected to be outside hold"),
            l0.hold(net),
        ):
            getattr(net.l0, name)()
    assert not net.l0.frozen


def saved(net: nn.Module) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def drifted() -> nn.Sequential:
    """Frozen, and its parameter moved since."""
    net, optimizer = start()
    train(net, optimizer, 3)
    net.l0.freeze()
    train(net, optimizer, 2)
    assert not net.l0.log_alpha.equal(net.l0.alpha)
    return net


def test_state_dict_freezes_and_unfreezes():
    net = drifted()
    fresh = make(seed=4)
    before = saved(fresh)
    fresh.load_state_dict(saved(net))
    assert fresh.l0.frozen and fresh.l0.alpha.equal(net.l0.alpha)
    assert fresh.l0.alpha is not net.l0.alpha
    assert fresh(X).equal(net(X))
    plain = {name: value for name, value in before.items() if not name.startswith("l0.")}
    fresh.load_state_dict(plain)  # from before conversion: the gates stay as they are
    assert fresh.l0.frozen
    fresh.load_state_dict(before)
    assert not fresh.l0.frozen
    fresh(X)
    assert not fresh.l0._draw.z[:-1].equal(fresh.l0.deterministic())


def test_a_state_dict_has_the_frozen_values_and_shares_nothing():
    net = drifted()
    values = net.l0.alpha.clone()
    found = net.state_dict()
    assert found["l0.log_alpha"].equal(values) and found["l0._extra_state"]["frozen"] is True
    for value in found.values():
        if isinstance(value, Tensor):
            value.requires_grad_(False).fill_(-9)
    assert net.l0.alpha.equal(values)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in saved(net).items() if isinstance(value, Tensor)}


def test_tensors_alone_carry_the_values_of_frozen_gates():
    net, fresh = drifted(), make(seed=4)
    fresh.load_state_dict(tensors(net), strict=False)
    assert not fresh.l0.frozen and fresh.l0.log_alpha.equal(net.l0.alpha)


@pytest.mark.parametrize("assign", [False, True])
def test_frozen_gates_take_loaded_tensors(assign: bool):
    net, other = drifted(), make(seed=4)
    with torch.no_grad():
        other.l0.log_alpha.add_(0.25)
    net.load_state_dict(tensors(other), strict=False, assign=assign)
    assert net.l0.frozen and net.l0.alpha.equal(other.l0.log_alpha)
    net(X)
    assert net.l0.log_alpha.equal(other.l0.log_alpha)
    assert net.l0._draw.z[:-1].equal(other.l0.deterministic())


def test_what_a_state_dict_lacks_stays_frozen():
    net = drifted()
    values = net.l0.alpha.clone()
    net.load_state_dict({"l0.step": torch.tensor(7)}, strict=False)
    assert net.l0.frozen and net.l0.alpha.equal(values) and int(net.l0.step) == 7


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("extra", [{"a": 12, "b": 9}, {"groups": {"a": 12, "b": 9}}])
def test_older_extra_states_say_nothing_about_freezing(extra: dict, frozen: bool):
    net, old = make(), saved(make(seed=4))
    with torch.no_grad():
        net.l0.log_alpha.zero_()
    if frozen:
        net.l0.freeze()
    net.load_state_dict({**old, "l0._extra_state": extra})
    assert net.l0.frozen == frozen
    assert net.l0.alpha.equal(old["l0.log_alpha"]) and net.l0.seed == 4


BAD = {
    "other size": ({"a": 12, "b": 10}, r"expected gates .*, got \{'a': 12, 'b': 10\}"),
    "other order": ({"groups": {"b": 9, "a": 12}}, r"got \{'b': 9, 'a': 12\}"),
    "no groups": ([12, 9], r"expected gates .*, got \[12, 9\]"),
    "frozen": (
        {"groups": {"a": 12, "b": 9}, "frozen": "yes"},
        "load_state_dict: expected frozen True or False, got 'yes'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_extra_state_of_other_gates_is_refused_before_gates_change(case: str):
    extra, message = BAD[case]
    net = drifted()
    before = saved(net)
    with pytest.raises(ValueError, match=message):
        net.l0.load_state_dict({**make(seed=4).l0.state_dict(), "_extra_state": extra})
    for name, value in saved(net).items():
        assert value.equal(before[name]) if isinstance(value, Tensor) else value == before[name]


@pytest.mark.parametrize("scope", [l0.hold, l0.frozen])
@pytest.mark.parametrize("freeze", [False, True])
def test_nothing_is_loaded_in_a_scope(scope: Callable, freeze: bool):
    net = make().eval()
    state = drifted().state_dict() if freeze else make(seed=4).state_dict()
    with (
        pytest.raises(RuntimeError, match="load_state_dict: expected to be outside hold"),
        scope(net),
    ):
        net.load_state_dict(state)
    assert not net.l0.frozen and net.l0.seed == 0
    net.load_state_dict(state)
    assert net.l0.frozen == freeze


@pytest.mark.parametrize("thaw", [False, True])
def test_a_loss_from_before_freezing_can_still_run_backward(thaw: bool):
    net, twin = make(), make()
    losses = [objective(each) for each in (net, twin)]
    net.l0.freeze()
    net(X)
    if thaw:
        net.l0.unfreeze()
        net(X)
    for loss in losses:
        loss.backward()
    for ours, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad.equal(other.grad)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_frozen_too(how: str):
    net = drifted()
    twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert twin.l0.frozen and twin(X).equal(net(X))
    twin.l0.unfreeze()
    assert net.l0.frozen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_frozen_gates_follow_the_dtype_of_the_model(dtype: torch.dtype):
    net = drifted()
    z = net.l0.deterministic()
    net.to(dtype)
    assert net.l0.alpha.dtype == net.l0.log_alpha.dtype
    net(X.to(dtype))
    torch.testing.assert_close(net.l0._draw.z[:-1].to(z), z, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resuming_frozen_training_is_bit_equal(kind: str):
    def run(net, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            if step == 5:
                net.l0.freeze()
            if step == 15:
                net.l0.unfreeze()
            train(net, optimizer, 1)

    straight, optimizer = start(kind)
    run(straight, optimizer, 0, 20)
    first, first_optimizer = start(kind)
    run(first, first_optimizer, 0, 9)
    resumed, resumed_optimizer = start(kind, seed=3)
    resumed.load_state_dict(saved(first))
    resumed_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    run(resumed, resumed_optimizer, 9, 20)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert a.equal(b)
    assert straight.l0.step.equal(resumed.l0.step)
