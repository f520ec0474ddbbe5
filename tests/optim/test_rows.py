# SPDX-License-Identifier: Apache-2.0
"""Optimizers that update open rows only are those of torch.optim."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from interop.nets import NETS, batch, make
from torch import nn
from torch.optim.swa_utils import AveragedModel

import l0kernels as l0
from l0kernels.nn.base import GatedLayer
from l0kernels.optim import rows as rows_module
from l0kernels.optim.rows import FollowsDraws
from l0kernels.testing import assert_within_budget

CLASSES = {"SGD": (l0.optim.SGD, torch.optim.SGD), "AdamW": (l0.optim.AdamW, torch.optim.AdamW)}
ADAMW = {"kind": "AdamW", "lr": 0.01, "eps": 1e-6}
SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 0.05},
    "momentum": {"momentum": 0.9, "weight_decay": 0.05},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    "no decay": {"momentum": 0.9},
    "maximize": {"momentum": 0.9, "weight_decay": 0.05, "maximize": True, "lr": 1e-3},
    "AdamW": {**ADAMW, "weight_decay": 0.05},
    "AdamW, no decay": {**ADAMW, "weight_decay": 0.0},
    "AdamW, betas": {**ADAMW, "betas": (0.5, 0.9), "weight_decay": 0.5},
    "AdamW, no momentum": {**ADAMW, "betas": (0.0, 0.99)},
    "AdamW, maximize": {**ADAMW, "weight_decay": 0.05, "maximize": True, "lr": 1e-3},
    "AdamW, foreach": {**ADAMW, "foreach": True},
    "AdamW, fused": {**ADAMW, "fused": True},
    "AdamW, lr as a tensor": {**ADAMW, "lr": torch.tensor(0.01, dtype=torch.float64)},
}


@pytest.fixture(params=["nesterov", "AdamW"])
def common(request):
    return SETTINGS[request.param]


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    """The networks here are smaller than what pays."""
    monkeypatch.setattr(rows_module, "LEAST", 1)


@pytest.fixture(params=["auto", "reference"])
def impl(request):
    with l0.use_impl(request.param):
        yield request.param


def double(kind="norm"):
    """A network whose gates are mostly closed, so that rows stay behind for long."""
    net = make(kind).double()
    with torch.no_grad():
        net.l0.log_alpha.fill_(-1.5)
    return net


def ours_of(net, *, kind="SGD", lr=0.05, weight_decay=0.0, **options):
    groups = l0.param_groups(net, lr=lr, weight_decay=weight_decay)
    return CLASSES[kind][0](groups, lr=lr, model=net, **options)


def plain(net, *, kind="SGD", lr=0.05, weight_decay=0.0, **options):
    groups = l0.param_groups(net, lr=lr, weight_decay=weight_decay)
    return CLASSES[kind][1](groups, lr=lr, **options)


def of_parameters(parameters, net=None, *, kind="SGD", **options):
    """Ours for a network, else PyTorch's."""
    ours, torchs = CLASSES[kind]
    return torchs(parameters, **options) if net is None else ours(parameters, model=net, **options)


def pair(kind_of_net="norm", **options):
    """The same network twice, with our optimizer and with PyTorch's."""
    ours = double(kind_of_net)
    theirs = copy.deepcopy(ours)
    return ours, ours_of(ours, **options), theirs, plain(theirs, **options)


def loss_of(net, seed):
    x, y = batch(seed=seed)
    x = x.to(net.l0.log_alpha.dtype)
    return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)


def train(net, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()


def behind(optimizer):
    """How many steps each row of the followed weights has missed."""
    return torch.cat([optimizer._now - rows.last for rows in optimizer._rows.values()])


def assert_same(net, optimizer, other, reference, tolerance=1e-10):
    """All parameters and all state are equal; flushes."""
    mine, theirs = optimizer.state_dict(), reference.state_dict()
    assert optimizer._now == 0
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=name)
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert mine["state"][key].keys() == state.keys()
        for what, value in state.items():
            torch.testing.assert_close(
                mine["state"][key][what], value, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sixty_steps_are_those_of_torch(impl, kind, setting):
    ours, mine, theirs, reference = pair(kind, **SETTINGS[setting])
    assert mine.row_weights
    train(ours, mine, range(60))
    assert int(behind(mine).max()) > 2
    train(theirs, reference, range(60))
    assert_same(ours, mine, theirs, reference)


def test_rows_that_are_behind_are_not_touched(common):
    ours, mine, *_ = pair(**common)
    train(ours, mine, range(2))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    train(ours, mine, range(2, 3))
    seen = 0
    for rows in mine._rows.values():
        closed = rows.last < mine._now
        seen += int(closed.sum())
        now, then = rows.view(rows.weight), rows.view(before[rows.name])
        assert torch.equal(now[closed], then[closed])
        assert not torch.equal(now[~closed], then[~closed])
    assert seen > 0


def test_gated_weights_are_followed_by_their_first_dimension(common):
    _, mine, *_ = pair("residual", **common)
    assert mine.row_weights == ["blocks.0.conv1.weight", "blocks.1.conv1.weight"]


def test_small_weights_are_left_to_torch(monkeypatch, common):
    monkeypatch.setattr(rows_module, "LEAST", 1 << 14)
    net = make()
    optimizer = ours_of(net, **common)
    assert optimizer.row_weights == []
    train(net, optimizer, range(2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("setting", ["decay", "nesterov", "dampening", "AdamW", "AdamW, betas"])
def test_float32_is_as_exact_as_torch(impl, channels_last, setting):
    """The same gradients for ours, for torch's, and for torch's in fp64."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = make().to(memory_format=layout)
    with torch.no_grad():
        net.l0.log_alpha.fill_(-1.5)
    layer = net.inner
    options = {"lr": 0.05, **SETTINGS[setting]}
    single, exact = (
        nn.Parameter(layer.weight.detach().clone().to(t)) for t in (torch.float32, torch.float64)
    )
    mine = of_parameters([layer.weight], net, **options)
    others = [of_parameters([p], **options) for p in (single, exact)]
    for seed in range(80):
        net(batch(seed=seed)[0])
        grad = torch.randn_like(layer.weight)
        grad[layer.out_gate.z == 0] = 0
        for p in (layer.weight, single, exact):
            p.grad = grad.to(p.dtype)
        for optimizer in (mine, *others):
            optimizer.step()
    assert int(behind(mine).max()) > 2
    mine.flush()
    assert layer.weight.is_contiguous(memory_format=layout)
    assert_within_budget(layer.weight.detach(), exact.detach(), single.detach())
    states = [
        o.state[p] for o, p in zip((mine, *others), (layer.weight, single, exact), strict=True)
    ]
    for name, value in states[0].items():
        assert_within_budget(value, states[2][name], states[1][name])


CHANGES = {
    "nesterov": {
        20: {"momentum": 0.5, "weight_decay": 0.2},
        30: {"momentum": 0.0, "nesterov": False},
        40: {"momentum": 0.8},
    },
    "AdamW": {
        20: {"betas": (0.5, 0.9), "weight_decay": 0.2},
        30: {"betas": (0.0, 0.99), "eps": 1e-3},
        40: {"betas": (0.8, 0.999), "eps": 1e-5},
    },
}


@pytest.mark.parametrize("setting", CHANGES)
def test_settings_may_change_at_every_step(impl, setting):
    ours, mine, theirs, reference = pair(**SETTINGS[setting])
    for net, optimizer in ((ours, mine), (theirs, reference)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        for seed in range(50):
            optimizer.param_groups[0].update(CHANGES[setting].get(seed, {}))
            train(net, optimizer, [seed])
            schedule.step()
    assert int(behind(mine).max()) > 2
    assert_same(ours, mine, theirs, reference)


def test_rows_are_flushed_before_too_many_steps_are_remembered(monkeypatch, common):
    monkeypatch.setattr(rows_module, "REMEMBERED", 7)
    ours, mine, theirs, reference = pair(**common)
    for step in range(20):
        train(ours, mine, [step])
        assert mine._now == (step + 1) % 7
        assert len(mine._tables[0]) - len(mine._no_steps()) == mine._now
    train(theirs, reference, range(20))
    assert_same(ours, mine, theirs, reference)


def test_evaluation_flushes(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(12))
    x = batch()[0].double()
    outputs = []
    for net in (ours, theirs):
        with torch.inference_mode():
            outputs.append(net.eval()(x))
    assert mine._now == 0
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net.train(), optimizer, range(12, 20))
    assert_same(ours, mine, theirs, reference)


def copies():
    def through_pickle(net):
        return pickle.loads(pickle.dumps(net))  # noqa: S301 - its own bytes

    def through_state(net):
        other = double("lenet")
        other.load_state_dict(net.state_dict())
        return other

    def through_inner_state(net):
        other = double("lenet")
        nn.Sequential(other).load_state_dict(nn.Sequential(net).state_dict())
        return other

    def averaged(net):
        return AveragedModel(net).module

    return [copy.deepcopy, through_pickle, through_state, through_inner_state, averaged]


@pytest.mark.parametrize("make_copy", copies(), ids=lambda f: f.__name__)
def test_copies_and_states_of_the_model_are_up_to_date(make_copy, common):
    ours, mine, theirs, reference = pair("lenet", **common)
    train(ours, mine, range(12))
    assert int(behind(mine).max()) > 2
    found = make_copy(ours)
    train(theirs, reference, range(12))
    for (name, p), q in zip(found.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)
    # The copy is nobody's: it trains by any optimizer, and the original goes on.
    train(found, plain(found), range(3))
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(12, 20))
    assert_same(ours, mine, theirs, reference)


def test_loading_a_model_replaces_all_rows(common):
    ours, mine, theirs, reference = pair(**common)
    saved = copy.deepcopy(ours.state_dict())
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(12))
        net.load_state_dict(saved)
        train(net, optimizer, range(12, 24))
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("way", ["to torch", "from torch", "to ours"])
def test_optimizers_take_over_each_others_state(way, common):
    ours, mine, theirs, reference = pair(**common)
    first, second = {
        "to torch": (ours_of, plain),
        "from torch": (plain, ours_of),
        "to ours": (ours_of, ours_of),
    }[way]
    mine = first(ours, **common)
    train(ours, mine, range(10))
    stream = io.BytesIO()
    torch.save({"model": ours.state_dict(), "optimizer": mine.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    ours = double()
    ours.load_state_dict(saved["model"])
    mine = second(ours, **common)
    mine.load_state_dict(saved["optimizer"])
    train(ours, mine, range(10, 20))
    train(theirs, reference, range(20))
    if isinstance(mine, FollowsDraws):
        assert int(behind(mine).max()) > 2
        mine.flush()
        for p in ours.parameters():
            for value in mine.state[p].values():
                assert value.dim() == 0 or value.stride() == p.stride()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


def test_loading_an_earlier_state_into_an_optimizer_that_is_behind(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(5))
        saved = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, range(5, 12))
        optimizer.load_state_dict(saved)
        train(net, optimizer, range(12, 24))
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("draws", ["held", "separate"])
def test_accumulation(draws, common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(20):
            optimizer.zero_grad()
            if draws == "held":
                with l0.hold(net):
                    for part in range(3):
                        loss_of(net, 3 * step + part).backward()
            else:
                for part in range(3):
                    loss_of(net, 3 * step + part).backward()
            optimizer.step()
    assert int(behind(mine).max()) > 0
    assert_same(ours, mine, theirs, reference)


def test_two_forwards_before_one_backward(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(20):
            optimizer.zero_grad()
            (loss_of(net, 2 * step) + loss_of(net, 2 * step + 1)).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_several_steps_under_one_draw(common):
    ours, theirs = double(), double()
    mine = of_parameters(l0.param_groups(ours, lr=0.05)[:1], ours, **common)
    reference = of_parameters(l0.param_groups(theirs, lr=0.05)[:1], **common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        net.l0.log_alpha.requires_grad_(False)
        for step in range(8):
            with l0.hold(net):
                for part in range(3):
                    x, y = batch(seed=3 * step + part)
                    optimizer.zero_grad()
                    F.cross_entropy(net(x.double()), y).backward()
                    optimizer.step()
    assert int(behind(mine).max()) > 2
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("clear", [True, False])
def test_a_second_step_without_forward(clear, common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            train(net, optimizer, [step])
            if clear:
                optimizer.zero_grad(set_to_none=False)
            optimizer.step()
    assert int(behind(mine).max()) > 2
    assert_same(ours, mine, theirs, reference)


def test_gradients_set_to_zero_instead_of_none(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            optimizer.zero_grad(set_to_none=False)
            if step % 3 != 2:
                loss_of(net, step).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_weights_without_gradients_stay(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(20):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            if step % 4 == 1:
                net.inner.weight.grad = None
            if step < 3:
                net.stem.weight.grad = None
            optimizer.step()
    assert int(behind(mine).max()) > 2
    assert_same(ours, mine, theirs, reference)


def test_clipped_gradients(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_steps(fused, common):
    # A bias before a norm has gradients of rounding alone, which AdamW divides by their size.
    options = {**common, "eps": 1e-3} if "eps" in common else common
    results = []
    for make_optimizer in (ours_of, plain):
        net = make()
        optimizer = make_optimizer(net, fused=fused, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
        for step in range(16):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(net, step))
            if step % 5 == 3:
                loss = loss * float("inf")
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() != 1024.0
        if isinstance(optimizer, FollowsDraws):
            assert optimizer._now == 13
            optimizer.flush()
        results.append({name: p.detach() for name, p in net.named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5, msg=name)


OF_A_GROUP = {"SGD": {"momentum": 0.5}, "AdamW": {"betas": (0.5, 0.9)}}


@pytest.mark.parametrize("kind", CLASSES)
def test_several_groups_with_settings_of_their_own(kind):
    nets = []
    for following in (True, False):
        net = double()
        groups = [
            {"params": [net.stem.weight], "lr": 0.1, "weight_decay": 0.1},
            {"params": [net.inner.weight, net.fc1.weight], "lr": 0.02, **OF_A_GROUP[kind]},
        ]
        optimizer = of_parameters(groups, net if following else None, kind=kind, lr=0.05)
        train(net, optimizer, range(8))
        optimizer.add_param_group({"params": [net.fc1.bias, net.fc2.weight], "weight_decay": 0.3})
        train(net, optimizer, range(8, 20))
        nets += [net, optimizer]
    names = ["stem.weight", "inner.weight", "fc1.weight", "fc2.weight"]
    assert nets[1].row_weights == names
    assert_same(*nets)


def test_weights_added_later_have_missed_nothing(common):
    nets = []
    for following in (True, False):
        net = double()
        optimizer = of_parameters([net.stem.weight], net if following else None, **common)
        train(net, optimizer, range(8))
        optimizer.add_param_group({"params": [net.inner.weight]})
        train(net, optimizer, range(8, 20))
        nets += [net, optimizer]
    assert int(behind(nets[1]).max()) > 2
    assert_same(*nets)


def test_closures(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):

            def closure(net=net, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0
    assert_same(ours, mine, theirs, reference)


def test_frozen_gates(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        with torch.no_grad():
            net.l0.log_alpha.fill_(-4.0)
            net.l0.log_alpha[::3] = 2.0
        train(net, optimizer, range(4))
        net.l0.freeze()
        train(net, optimizer, range(4, 12))
    assert int(behind(mine).max()) >= 8
    assert_same(ours, mine, theirs, reference)


def test_reverting_ends_it(common):
    ours, mine, theirs, reference = pair(**common)
    x, y = batch()
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(12))
        l0.revert(net)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
    assert mine.row_weights == []
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


def test_compacting_sees_all_rows(common):
    ours, mine, theirs, reference = pair(**common)
    x = (batch()[0].double(),)
    small = []
    for net, optimizer in ((ours, mine), (theirs, reference)):
        with torch.no_grad():
            net.l0.log_alpha[::2] = 1.0
        train(net, optimizer, range(12))
        small.append(l0.compact(net, x))
    for p, q in zip(small[0].parameters(), small[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_a_penalty_on_weights_raises(common):
    ours, mine, *_ = pair(**common)
    train(ours, mine, range(5))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    mine.zero_grad()
    loss = loss_of(ours, 5) + 0.01 * ours.inner.weight.square().sum()
    now = mine._now
    loss.backward()
    with pytest.raises(RuntimeError, match=r"inner.weight: expected gradients of zero in closed"):
        mine.step()
    assert mine._now == now
    assert torch.equal(before["fc2.bias"], ours.fc2.bias)


def test_a_penalty_on_weights_works_after_a_flush(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            if net is ours:
                mine.flush()
            optimizer.zero_grad()
            (loss_of(net, step) + 0.01 * net.inner.weight.square().sum()).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_writes_while_rows_are_behind_raise(common):
    ours, mine, *_ = pair(**common)
    train(ours, mine, range(5))
    with torch.no_grad():
        ours.inner.weight.clamp_(-0.1, 0.1)
    with pytest.raises(RuntimeError, match=r"got inner.weight written by somebody else"):
        train(ours, mine, [5])
    with pytest.raises(RuntimeError, match=r"got inner.weight written by somebody else"):
        mine.flush()


def test_writes_after_a_flush(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            train(net, optimizer, [step])
            if net is ours:
                mine.flush()
            with torch.no_grad():
                net.inner.weight.clamp_(-0.1, 0.1)
    assert_same(ours, mine, theirs, reference)


def test_weights_that_are_read_twice_are_left_to_torch(common):
    net = make()
    net.add_module("tied", nn.Linear(1, 1))
    net.tied.weight = net.inner.weight
    assert ours_of(net, **common).row_weights == ["stem.weight", "fc1.weight", "fc2.weight"]


def test_a_new_optimizer_takes_over(common):
    ours, mine, theirs, reference = pair(**common)
    train(ours, mine, range(8))
    second = ours_of(ours, **common)
    assert mine.row_weights == [] and ours.l0.followers == [second]
    train(theirs, reference, range(8))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
def test_copies_of_the_optimizer_are_up_to_date_and_do_what_torchs_does(copied, common):
    ours, mine, theirs, reference = pair(**common)
    train(ours, mine, range(8))
    train(theirs, reference, range(8))
    found, expected = copied(mine), copied(reference)
    assert found.row_weights == []
    for optimizer in (found, expected):
        for _ in range(3):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()
    for mine_group, group in zip(found.param_groups, expected.param_groups, strict=True):
        for p, q in zip(mine_group["params"], group["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
            states = [dict(o.state[t]) for o, t in ((found, p), (expected, q))]
            torch.testing.assert_close(*states, rtol=1e-10, atol=1e-10)


def test_the_state_of_a_new_optimizer_is_empty(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        fresh = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, range(5))
        optimizer.load_state_dict(fresh)
        assert not optimizer.state_dict()["state"]
        train(net, optimizer, range(5, 15))
    assert_same(ours, mine, theirs, reference)


def test_transposed_convolutions_are_followed_by_their_inputs(common):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 3, padding=1)
            self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
            self.out = nn.Conv2d(6, 5, 1)

        def forward(self, x):
            return self.out(F.relu(self.up(F.relu(self.conv(x))))).mean((2, 3))

    torch.manual_seed(0)
    ours = l0.convert(Up(), "hard_concrete", example_inputs=(batch()[0],)).double()
    with torch.no_grad():
        ours.l0.log_alpha.fill_(-1.5)
    theirs = copy.deepcopy(ours)
    mine, reference = ours_of(ours, **common), plain(theirs, **common)
    assert isinstance(ours.up, GatedLayer) and "up.weight" in mine.row_weights
    train(ours, mine, range(20))
    assert int(behind(mine).max()) > 2
    train(theirs, reference, range(20))
    assert_same(ours, mine, theirs, reference)


def test_compiled_models(common):
    ours, mine, theirs, reference = pair("mlp", **common)
    compiled = torch.compile(ours, backend="aot_eager")
    for net, optimizer in ((compiled, mine), (theirs, reference)):
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(seed=step)
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_what_adamw_does_not_support(name):
    net = make()
    error = f"{name}: expected False, got True"
    with pytest.raises(ValueError, match=error):
        l0.optim.AdamW(net.parameters(), model=net, **{name: True})
    assert net.l0.followers == []
    mine = l0.optim.AdamW([net.stem.weight], model=net)
    with pytest.raises(ValueError, match=error):
        mine.add_param_group({"params": [net.inner.weight], name: True})
    state = mine.state_dict()
    state["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=error):
        mine.load_state_dict(state)
    assert len(mine.param_groups) == 1 and not mine.param_groups[0][name]


@pytest.mark.parametrize("bad", ["a sparse gradient", "amsgrad"])
def test_steps_that_adamw_cannot_make_change_nothing(bad):
    """Whether an earlier group or a later one asks for them."""
    for number in (0, 1):
        net = double()
        last = {"params": [net.fc1.weight, net.fc2.weight]}
        groups = [{"params": [net.inner.weight, net.fc2.bias]}, last]
        mine = l0.optim.AdamW(groups if number else groups[::-1], model=net)
        train(net, mine, range(3))
        mine.zero_grad()
        loss_of(net, 3).backward()
        grad = net.fc2.weight.grad
        if bad == "amsgrad":
            mine.param_groups[number]["amsgrad"] = True
        else:
            net.fc2.weight.grad = grad.to_sparse()
        before = [p.detach().clone() for p in net.parameters()]
        steps = [float(state["step"]) for state in mine.state.values()]
        with pytest.raises((ValueError, RuntimeError), match=r"expected .*, got"):
            mine.step()
        assert all(map(torch.equal, net.parameters(), before)) and mine._now == 3
        assert steps == [float(state["step"]) for state in mine.state.values()]
        # What was wrong can be mended.
        mine.param_groups[number]["amsgrad"] = False
        net.fc2.weight.grad = grad
        mine.step()
        train(net, mine, range(4, 6))


def test_a_step_that_torch_refuses_leaves_followed_weights():
    ours, mine, *_ = pair(**SETTINGS["nesterov"], fused=True)
    train(ours, mine, range(3))
    mine.zero_grad()
    loss_of(ours, 3).backward()
    ours.fc2.bias.grad = ours.fc2.bias.grad.to_sparse()
    before = [rows.weight.detach().clone() for rows in mine._rows.values()]
    with pytest.raises(RuntimeError, match="sparse"):
        mine.step()
    assert all(map(torch.equal, (rows.weight for rows in mine._rows.values()), before))


def test_a_group_that_is_no_dict():
    net = make()
    mine = l0.optim.AdamW([net.stem.weight], model=net)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        mine.add_param_group([net.inner.weight])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        l0.optim.AdamW([{"params": [net.stem.weight]}, net.inner.weight], model=net)


def test_one_kind_takes_over_from_another():
    ours, mine, theirs, reference = pair(**SETTINGS["AdamW"])
    train(ours, mine, range(8))
    second = ours_of(ours, **SETTINGS["nesterov"])
    assert mine.row_weights == [] and ours.l0.followers == [second]
    train(ours, second, range(8, 16))
    train(theirs, reference, range(8))
    reference = plain(theirs, **SETTINGS["nesterov"])
    train(theirs, reference, range(8, 16))
    assert_same(ours, second, theirs, reference)


def test_arguments():
    net = make()
    with pytest.raises(ValueError, match="expected a model with gates"):
        l0.optim.SGD(net.parameters(), model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="differentiable: expected False"):
        l0.optim.SGD(net.parameters(), model=net, differentiable=True)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        l0.optim.SGD(net.parameters(), lr=-1.0, model=net)
    assert net.l0.followers == []


def test_gradients_lie_in_memory_that_is_used_again(common):
    ours, mine, *_ = pair(**common)
    train(ours, mine, range(3))
    kept = [rows.kept for rows in mine._rows.values()]
    places = [rows.weight.grad.data_ptr() for rows in mine._rows.values()]
    train(ours, mine, range(3, 6))
    for rows, memory, place in zip(mine._rows.values(), kept, places, strict=True):
        assert rows.weight.grad.data_ptr() == place and memory.is_as_written(rows.weight.grad)


def test_memory_is_given_up_where_it_ends(common):
    ours, mine, *_ = pair(**common)
    assert len(ours.l0.kept) == len(mine.row_weights)
    assert not copy.deepcopy(ours).l0.kept
    names = mine.row_weights
    second = ours_of(ours, **common)
    assert second.row_weights == names and len(ours.l0.kept) == len(names) > 0
    copied = copy.deepcopy(ours)
    assert ours_of(copied, **common).row_weights == names
    l0.revert(ours)
    assert not second._rows


def test_gradients_may_change_after_the_step(common):
    """As those of a network that another loss reads too, as the critic of a GAN."""
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(40):
            train(net, optimizer, [step])
            loss_of(net, 100 + step).backward()
            if step % 5 == 4 and net is ours:
                mine.flush()
    assert_same(ours, mine, theirs, reference)


def test_gradients_that_are_kept_by_others_stay_as_they_are(common):
    ours, mine, theirs, reference = pair(**common)
    found = []
    for net, optimizer in ((ours, mine), (theirs, reference)):
        grads = []
        for step in range(8):
            train(net, optimizer, [step])
            grads += [p.grad for p in net.parameters()]
        found.append(grads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_writes_to_gradients_that_leave_no_trace_raise_soon(common):
    ours, mine, *_ = pair(**common)

    def steps():
        for step in range(3 * rows_module.LOOKED_AT):
            mine.zero_grad()
            loss_of(ours, step).backward()
            for rows in mine._rows.values():
                rows.weight.grad.data.add_(1e-3)
            mine.step()

    with pytest.raises(RuntimeError, match="expected gradients of zero in closed rows"):
        steps()


def linear_behind_gates():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5)).double()
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(4, 6).double(),))
    with torch.no_grad():
        net.l0.log_alpha.fill_(-1.5)
    return net


def test_readers_of_gates_are_followed_by_their_inputs(common):
    ours = linear_behind_gates()
    theirs = copy.deepcopy(ours)
    mine, reference = ours_of(ours, **common), plain(theirs, **common)
    assert mine.row_weights == ["0.weight", "2.weight"]
    assert ours[2].weight.stride() == (1, 5)
    x, y = torch.randn(16, 6).double(), torch.randint(0, 5, (16,))
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert int((mine._now - mine._rows[ours[2].weight].last).max()) > 2
    assert ours[2].weight.grad.stride() == (1, 5)
    mine.flush()
    assert_same(ours, mine, theirs, reference)
    # Another model and its optimizer take it over as it is; in the end it lies as before.
    theirs.load_state_dict(ours.state_dict())
    reference.load_state_dict(mine.state_dict())
    small = l0.compact(ours, (x,))
    assert all(p.is_contiguous() for p in small.parameters())
    l0.revert(ours)
    assert ours[2].weight.is_contiguous()
    state = [value for value in mine.state[ours[2].weight].values() if value.dim() == 2]
    assert state and all(value.is_contiguous() for value in state)


def test_readers_of_constants_are_left_to_torch(common):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 5))
    x = torch.randn(8, 6)
    l0.convert(net, "hard_concrete", example_inputs=(x,), place="before_norm")
    assert ours_of(net, **common).row_weights == ["0.weight"]


@pytest.mark.parametrize("setting", ["nesterov", "AdamW, fused", "AdamW, foreach"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_gradients_that_lie_otherwise(setting, made):
    """As those of DDP do, whose memory is there before the optimizer."""
    options = {"fused": True, **SETTINGS[setting]} if setting == "nesterov" else SETTINGS[setting]
    ours = double()
    theirs = copy.deepcopy(ours)
    if made == "after":
        for net in (ours, theirs):
            loss_of(net, 99).backward()
    mine, reference = ours_of(ours, **options), plain(theirs, **options)
    if made == "after":
        mine.step()
        reference.step()
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            for p in net.parameters():
                p.grad = p.grad.contiguous()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_gradients_from_before_the_end(common):
    ours, mine, theirs, reference = pair(**{**common, "fused": True})
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(5))
        optimizer.zero_grad()
        loss_of(net, 5).backward()
        if net is ours:
            mine.release()
        optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_weights_that_get_other_memory(common):
    ours, mine, theirs, reference = pair(**common)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            train(net, optimizer, [step])
            if net is ours:
                mine.flush()
            net.fc2.weight.data = net.fc2.weight.data.contiguous()
    assert_same(ours, mine, theirs, reference)


def test_matrices_of_one_row_are_left_to_torch(common):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1))
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(4, 6),))
    optimizer = ours_of(net, **common)
    assert optimizer.row_weights == ["0.weight"]
    net(torch.randn(4, 6)).sum().backward()
    optimizer.step()
