# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: the draw of the forward, or an error."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from interop.nets import assert_equal, batch, gradients, make


@pytest.mark.parametrize(
    ("reentrant", "where", "scoped"),
    [
        (False, "block", False),
        (False, "block", True),
        (False, "root", False),
        (False, "root", True),
        (True, "block", False),
        (True, "block", True),
        (True, "root", True),
    ],
)
@pytest.mark.parametrize("gates", ["sampled", "frozen"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradients_are_the_same(reentrant: bool, where: str, scoped: bool, gates: str, impl: str):
    def recompute(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    x, y = batch()
    x.requires_grad_()  # reentrant checkpointing needs a differentiable input
    found = []
    for use in (False, True):
        net = make()
        if gates == "frozen":
            net.l0.freeze()
        net.norm.momentum = 0.0  # a recomputation counts a batch twice, in plain torch too
        run: Callable[[Tensor], Tensor] = net
        if use and where == "block":
            net.wrap = recompute
        elif use:

            def run(x: Tensor, net: nn.Module = net) -> Tensor:
                return recompute(net, x)

        def loss(run=run):
            return F.cross_entropy(run(x), y)

        for _ in range(2):
            net.zero_grad()
            with l0.use_impl(impl):
                value = l0.expected_loss(net, loss) if scoped else loss()
                (value + l0.penalty(net)).backward()
        assert int(net.l0.step) == (0 if gates == "frozen" else 2)
        found.append(gradients(net))
    assert_equal(*found, tolerance=1e-6)


def test_a_block_under_autocast_is_recomputed_in_the_same_dtype():
    x, y = batch()
    found = []
    for use in (False, True):
        net = make()
        net.norm.momentum = 0.0
        if use:
            net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = l0.expected_loss(net, lambda net=net: F.cross_entropy(net(x), y))
        loss.backward()
        found.append(gradients(net))
    assert_equal(*found)


def test_reentrant_around_the_root_asks_for_a_scope():
    net = make()
    x, y = batch()
    loss = F.cross_entropy(checkpoint(net, x.requires_grad_(), use_reentrant=True), y)
    with pytest.raises(RuntimeError, match="inside l0kernels.expected_loss"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_replaced_draw_is_an_error(reentrant: bool):
    net = make()
    net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    x, y = batch()
    x.requires_grad_()
    first = F.cross_entropy(net(x), y)
    second = F.cross_entropy(net(x), y)
    with pytest.raises(RuntimeError, match="expected the draw of the forward being recomputed"):
        (first + second).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_freezing_before_the_recomputation_is_an_error(reentrant: bool):
    net = make()
    net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    x, y = batch()
    loss = F.cross_entropy(net(x.requires_grad_()), y)
    net.l0.freeze()
    with pytest.raises(RuntimeError, match="no gates are drawn"):
        loss.backward()


def silently_wrong(run: Callable[[nn.Module, bool], dict[str, Tensor]]) -> int:
    """How often ``run`` with checkpointing differs from the same without, and nothing is said."""
    wrong = 0
    for seed in range(20):
        exact = run(make(seed=seed), False)
        try:
            got = run(make(seed=seed), True)
        except RuntimeError:
            continue
        wrong += any(not torch.allclose(exact[n], got[n], atol=1e-6) for n in exact)
    return wrong


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["constant gates", "eval first", "held twice"])
def test_nothing_is_silently_wrong(case: str, reentrant: bool):
    def run(net: nn.Module, checkpointed: bool) -> dict[str, Tensor]:
        if checkpointed:
            net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
        x, y = batch()
        x.requires_grad_()
        if case == "constant gates":
            net.l0.log_alpha.requires_grad_(False)
        if case == "held twice":
            with l0.hold(net):
                first, second = (F.cross_entropy(net(x), y) for _ in range(2))
            first.backward()
            net(x)
            second.backward()
            return gradients(net)
        net.train(case != "eval first")
        first = F.cross_entropy(net(x), y)
        net.train()
        net(x)
        net.train(case != "eval first")
        first.backward()
        return gradients(net)

    assert silently_wrong(run) == 0


def test_constant_gates_can_be_checkpointed():
    net = make()
    net.l0.log_alpha.requires_grad_(False)
    x, y = batch()
    F.cross_entropy(checkpoint(net, x, use_reentrant=False), y).backward()
    assert net.fc2.weight.grad is not None
