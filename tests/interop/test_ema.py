# SPDX-License-Identifier: Apache-2.0
"""Averaged models, and other copies of a model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import l0kernels as l0
from interop.nets import assert_equal, batch, gradients, make, objective, state


def trained(use_buffers: bool = False) -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer]:
    net = make()
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.1, gate_lr=10.0), momentum=0.9)
    train(net, ema, optimizer, 3)
    return net, ema, optimizer


def train(net, ema, optimizer, steps: int) -> None:
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        objective(net, x, y).backward()
        optimizer.step()
        ema.update_parameters(net)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_average_evaluates_with_its_own_gates(use_buffers: bool):
    net, ema, _ = trained(use_buffers)
    x, _ = batch()
    ema.eval()
    averaged = ema.module.l0.log_alpha
    assert not torch.equal(averaged, net.l0.log_alpha)
    assert ema.module.l0 is not net.l0
    with torch.no_grad(), l0.frozen(ema):
        packed = ema(x)
        used = ema.module.l0._draw.z[:-1]
    torch.testing.assert_close(used, (torch.sigmoid(averaged) * 1.2 - 0.1).clamp(0, 1))
    with torch.no_grad(), l0.use_impl("reference"):
        torch.testing.assert_close(ema(x), packed)
    assert l0.report(ema).to_dict() != l0.report(net).to_dict()


def test_the_average_is_that_of_the_masked_run():
    found = []
    for impl in ("auto", "reference"):
        with l0.use_impl(impl):
            found.append(state(trained()[1].module))
    assert_equal(*found, tolerance=1e-5)


def test_statistics_of_the_average_can_be_estimated_anew():
    _, ema, _ = trained()
    update_bn([batch(seed=s)[0] for s in range(3)], ema)
    assert int(ema.module.norm.num_batches_tracked) == 3
    ema.eval()
    x, _ = batch()
    with torch.no_grad():
        expected = ema(x)
        with l0.use_impl("reference"):
            torch.testing.assert_close(ema(x), expected)


def test_averages_of_frozen_gates_reach_them():
    net, ema, optimizer = trained()
    net.l0.freeze()
    train(net, ema, optimizer, 1)
    assert not ema.module.l0.frozen
    ema.module.l0.freeze()
    values = ema.module.l0.alpha.clone()
    train(net, ema, optimizer, 3)
    ema.eval()
    ema(batch()[0])
    assert ema.module.l0.alpha.equal(values)
    assert ema.module.l0._draw.z[:-1].equal(ema.module.l0.deterministic())


def test_copies_leave_the_draw_behind_and_draw_the_same():
    net = make()
    x, y = batch()
    objective(net, x, y).backward()
    restored = pickle.loads(pickle.dumps(net.l0))
    assert restored._draw is None
    twin = copy.deepcopy(net)
    assert twin.l0._draw is None and twin.inner.in_gate.gates is twin.l0
    assert twin.l0 is not net.l0
    for each in (net, twin):
        each.zero_grad()
        objective(each, x, y).backward()
    assert_equal(gradients(net), gradients(twin))


@pytest.mark.parametrize("kind", ["mlp", "lenet", "residual"])
def test_whole_models_can_be_pickled(kind: str):
    net = make(kind)
    x, y = batch()
    objective(net, x, y).backward()
    twin = pickle.loads(pickle.dumps(net))
    for each in (net, twin):
        each.zero_grad()
        objective(each, x, y).backward()
    assert_equal(gradients(net), gradients(twin))
