# SPDX-License-Identifier: Apache-2.0
"""SGD that updates open rows only is torch.optim.SGD."""

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
from l0kernels.testing import assert_within_budget

SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 0.05},
    "momentum": {"momentum": 0.9, "weight_decay": 0.05},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    "no decay": {"momentum": 0.9},
    "maximize": {"momentum": 0.9, "weight_decay": 0.05, "maximize": True, "lr": 1e-3},
}
COMMON = SETTINGS["nesterov"]


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


def sgd(net, *, lr=0.05, weight_decay=0.0, **options):
    groups = l0.param_groups(net, lr=lr, weight_decay=weight_decay)
    return l0.optim.SGD(groups, lr=lr, model=net, **options)


def plain(net, *, lr=0.05, weight_decay=0.0, **options):
    groups = l0.param_groups(net, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, **options)


def pair(kind="norm", **options):
    """The same network twice, with our optimizer and with PyTorch's."""
    ours = double(kind)
    theirs = copy.deepcopy(ours)
    return ours, sgd(ours, **options), theirs, plain(theirs, **options)


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


def test_rows_that_are_behind_are_not_touched():
    ours, mine, *_ = pair(**COMMON)
    train(ours, mine, range(2))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    train(ours, mine, range(2, 3))
    seen = 0
    for rows in mine._rows.values():
        closed = rows.last < mine._now
        seen += int(closed.sum())
        assert torch.equal(rows.weight[closed], before[rows.name][closed])
        assert not torch.equal(rows.weight[~closed], before[rows.name][~closed])
    assert seen > 0


def test_gated_weights_are_followed_by_their_first_dimension():
    _, mine, *_ = pair("residual", **COMMON)
    assert mine.row_weights == ["blocks.0.conv1.weight", "blocks.1.conv1.weight"]


def test_small_weights_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(rows_module, "LEAST", 1 << 14)
    net = make()
    optimizer = sgd(net, **COMMON)
    assert optimizer.row_weights == []
    train(net, optimizer, range(2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("setting", ["decay", "nesterov", "dampening"])
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
    mine = l0.optim.SGD([layer.weight], model=net, **options)
    others = [torch.optim.SGD([p], **options) for p in (single, exact)]
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
    if "momentum" in options:
        found = [
            o.state[p]["momentum_buffer"]
            for o, p in zip((mine, *others), (layer.weight, single, exact), strict=True)
        ]
        assert_within_budget(found[0], found[2], found[1])


def test_learning_rates_may_change_at_every_step():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        for seed in range(50):
            if seed == 20:
                optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.2)
            if seed == 30:
                optimizer.param_groups[0].update(momentum=0.0, nesterov=False)
            if seed == 40:
                optimizer.param_groups[0].update(momentum=0.8)
            train(net, optimizer, [seed])
            schedule.step()
    assert int(behind(mine).max()) > 2
    assert_same(ours, mine, theirs, reference)


def test_rows_are_flushed_before_too_many_steps_are_remembered(monkeypatch):
    monkeypatch.setattr(rows_module, "REMEMBERED", 7)
    ours, mine, theirs, reference = pair(**COMMON)
    for step in range(20):
        train(ours, mine, [step])
        assert mine._now == (step + 1) % 7 and len(mine._tables[0]) == mine._now + 1
    train(theirs, reference, range(20))
    assert_same(ours, mine, theirs, reference)


def test_evaluation_flushes():
    ours, mine, theirs, reference = pair(**COMMON)
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
def test_copies_and_states_of_the_model_are_up_to_date(make_copy):
    ours, mine, theirs, reference = pair("lenet", **COMMON)
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


def test_loading_a_model_replaces_all_rows():
    ours, mine, theirs, reference = pair(**COMMON)
    saved = copy.deepcopy(ours.state_dict())
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(12))
        net.load_state_dict(saved)
        train(net, optimizer, range(12, 24))
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("way", ["to torch", "from torch", "to ours"])
def test_optimizers_take_over_each_others_state(way):
    ours, mine, theirs, reference = pair(**COMMON)
    first, second = {"to torch": (sgd, plain), "from torch": (plain, sgd), "to ours": (sgd, sgd)}[
        way
    ]
    mine = first(ours, **COMMON)
    train(ours, mine, range(10))
    stream = io.BytesIO()
    torch.save({"model": ours.state_dict(), "optimizer": mine.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    ours = double()
    ours.load_state_dict(saved["model"])
    mine = second(ours, **COMMON)
    mine.load_state_dict(saved["optimizer"])
    train(ours, mine, range(10, 20))
    train(theirs, reference, range(20))
    if isinstance(mine, l0.optim.SGD):
        assert int(behind(mine).max()) > 2
        mine.flush()
        for p in ours.parameters():
            assert mine.state[p]["momentum_buffer"].stride() == p.stride()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


def test_loading_an_earlier_state_into_an_optimizer_that_is_behind():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        train(net, optimizer, range(5))
        saved = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, range(5, 12))
        optimizer.load_state_dict(saved)
        train(net, optimizer, range(12, 24))
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("draws", ["held", "separate"])
def test_accumulation(draws):
    ours, mine, theirs, reference = pair(**COMMON)
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


def test_two_forwards_before_one_backward():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(20):
            optimizer.zero_grad()
            (loss_of(net, 2 * step) + loss_of(net, 2 * step + 1)).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_several_steps_under_one_draw():
    ours, theirs = double(), double()
    mine = l0.optim.SGD(l0.param_groups(ours, lr=0.05)[:1], model=ours, **COMMON)
    reference = torch.optim.SGD(l0.param_groups(theirs, lr=0.05)[:1], **COMMON)
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
def test_a_second_step_without_forward(clear):
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            train(net, optimizer, [step])
            if clear:
                optimizer.zero_grad(set_to_none=False)
            optimizer.step()
    assert int(behind(mine).max()) > 2
    assert_same(ours, mine, theirs, reference)


def test_gradients_set_to_zero_instead_of_none():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            optimizer.zero_grad(set_to_none=False)
            if step % 3 != 2:
                loss_of(net, step).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_weights_without_gradients_stay():
    ours, mine, theirs, reference = pair(**COMMON)
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


def test_clipped_gradients():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_steps(fused):
    results = []
    for make_optimizer in (sgd, plain):
        net = make()
        optimizer = make_optimizer(net, fused=fused, **COMMON)
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
        if isinstance(optimizer, l0.optim.SGD):
            assert optimizer._now == 13
            optimizer.flush()
        results.append({name: p.detach() for name, p in net.named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_several_groups_with_settings_of_their_own():
    nets = []
    for cls in (l0.optim.SGD, torch.optim.SGD):
        net = double()
        options = {"model": net} if cls is l0.optim.SGD else {}
        groups = [
            {"params": [net.stem.weight], "lr": 0.1, "weight_decay": 0.1},
            {"params": [net.inner.weight, net.fc1.weight], "lr": 0.02, "momentum": 0.5},
        ]
        optimizer = cls(groups, lr=0.05, momentum=0.9, **options)
        train(net, optimizer, range(8))
        optimizer.add_param_group({"params": [net.fc1.bias, net.fc2.weight], "weight_decay": 0.3})
        train(net, optimizer, range(8, 20))
        nets += [net, optimizer]
    assert nets[1].row_weights == ["stem.weight", "inner.weight", "fc1.weight"]
    assert_same(*nets)


def test_weights_added_later_have_missed_nothing():
    nets = []
    for cls in (l0.optim.SGD, torch.optim.SGD):
        net = double()
        options = {"model": net} if cls is l0.optim.SGD else {}
        optimizer = cls([net.stem.weight], lr=0.05, momentum=0.9, weight_decay=0.1, **options)
        train(net, optimizer, range(8))
        optimizer.add_param_group({"params": [net.inner.weight]})
        train(net, optimizer, range(8, 20))
        nets += [net, optimizer]
    assert int(behind(nets[1]).max()) > 2
    assert_same(*nets)


def test_closures():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):

            def closure(net=net, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0
    assert_same(ours, mine, theirs, reference)


def test_frozen_gates():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        with torch.no_grad():
            net.l0.log_alpha.fill_(-4.0)
            net.l0.log_alpha[::3] = 2.0
        train(net, optimizer, range(4))
        net.l0.freeze()
        train(net, optimizer, range(4, 12))
    assert int(behind(mine).max()) >= 8
    assert_same(ours, mine, theirs, reference)


def test_reverting_ends_it():
    ours, mine, theirs, reference = pair(**COMMON)
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


def test_compacting_sees_all_rows():
    ours, mine, theirs, reference = pair(**COMMON)
    x = (batch()[0].double(),)
    small = []
    for net, optimizer in ((ours, mine), (theirs, reference)):
        with torch.no_grad():
            net.l0.log_alpha[::2] = 1.0
        train(net, optimizer, range(12))
        small.append(l0.compact(net, x))
    for p, q in zip(small[0].parameters(), small[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_a_penalty_on_weights_raises():
    ours, mine, *_ = pair(**COMMON)
    train(ours, mine, range(5))
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    mine.zero_grad()
    loss = loss_of(ours, 5) + 0.01 * ours.inner.weight.square().sum()
    now = mine._now
    loss.backward()
    with pytest.raises(RuntimeError, match=r"inner.weight: expected gradients of zero in closed"):
        mine.step()
    assert mine._now == now
    assert torch.equal(before["fc2.weight"], ours.fc2.weight)


def test_a_penalty_on_weights_works_after_a_flush():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            if net is ours:
                mine.flush()
            optimizer.zero_grad()
            (loss_of(net, step) + 0.01 * net.inner.weight.square().sum()).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_writes_while_rows_are_behind_raise():
    ours, mine, *_ = pair(**COMMON)
    train(ours, mine, range(5))
    with torch.no_grad():
        ours.inner.weight.clamp_(-0.1, 0.1)
    with pytest.raises(RuntimeError, match=r"got inner.weight written by somebody else"):
        train(ours, mine, [5])
    with pytest.raises(RuntimeError, match=r"got inner.weight written by somebody else"):
        mine.flush()


def test_writes_after_a_flush():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        for step in range(12):
            train(net, optimizer, [step])
            if net is ours:
                mine.flush()
            with torch.no_grad():
                net.inner.weight.clamp_(-0.1, 0.1)
    assert_same(ours, mine, theirs, reference)


def test_weights_that_are_read_twice_are_left_to_torch():
    net = make()
    net.add_module("tied", nn.Linear(1, 1))
    net.tied.weight = net.inner.weight
    assert sgd(net, **COMMON).row_weights == ["stem.weight", "fc1.weight"]


def test_a_new_optimizer_takes_over():
    ours, mine, theirs, reference = pair(**COMMON)
    train(ours, mine, range(8))
    second = sgd(ours, **COMMON)
    assert mine.row_weights == [] and ours.l0.followers == [second]
    train(theirs, reference, range(8))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
def test_copies_of_the_optimizer_are_up_to_date_and_do_what_torchs_does(copied):
    ours, mine, theirs, reference = pair(**COMMON)
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
            buffers = [o.state[t]["momentum_buffer"] for o, t in ((found, p), (expected, q))]
            torch.testing.assert_close(*buffers, rtol=1e-10, atol=1e-10)


def test_the_state_of_a_new_optimizer_is_empty():
    ours, mine, theirs, reference = pair(**COMMON)
    for net, optimizer in ((ours, mine), (theirs, reference)):
        fresh = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, range(5))
        optimizer.load_state_dict(fresh)
        assert not optimizer.state_dict()["state"]
        train(net, optimizer, range(5, 15))
    assert_same(ours, mine, theirs, reference)


def test_transposed_convolutions_are_followed_by_their_inputs():
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
    mine, reference = sgd(ours, **COMMON), plain(theirs, **COMMON)
    assert isinstance(ours.up, GatedLayer) and "up.weight" in mine.row_weights
    train(ours, mine, range(20))
    assert int(behind(mine).max()) > 2
    train(theirs, reference, range(20))
    assert_same(ours, mine, theirs, reference)


def test_compiled_models():
    ours, mine, theirs, reference = pair("mlp", **COMMON)
    compiled = torch.compile(ours, backend="aot_eager")
    for net, optimizer in ((compiled, mine), (theirs, reference)):
        for step in range(6):
            optimizer.zero_grad()
            x, y = batch(seed=step)
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
    assert_same(ours, mine, theirs, reference)


def test_arguments():
    net = make()
    with pytest.raises(ValueError, match="expected a model with gates"):
        l0.optim.SGD(net.parameters(), model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="differentiable: expected False"):
        l0.optim.SGD(net.parameters(), model=net, differentiable=True)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        l0.optim.SGD(net.parameters(), lr=-1.0, model=net)
    assert net.l0.followers == []
