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
    with pytest.raises(RuntimeError, match=REPLACED):
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


REPLACED = "expected the draw of the forward being recomputed"
OUTCOMES = {
    "constant gates": REPLACED,
    "eval first": "expected a draw of eval mode, got one of training mode",
    "held twice": REPLACED,
    "held once": "equal",
    "one after the other": "equal",
}


def losses(case: str, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Forwards and backward passes, with another forward between those that must be refused."""
    if case == "constant gates":
        net.l0.log_alpha.requires_grad_(False)
    if case in ("held once", "held twice"):
        with l0.hold(net):
            first, second = (F.cross_entropy(net(x), y) for _ in range(2))
        first.backward()
        if case == "held twice":
            net(x)
        second.backward()
        return
    if case == "one after the other":
        for _ in range(2):
            F.cross_entropy(net(x), y).backward()
        return
    net.train(case != "eval first")
    first = F.cross_entropy(net(x), y)
    net.train()
    net(x)
    net.train(case != "eval first")
    first.backward()


def outcome(case: str, seed: int, reentrant: bool) -> str:
    """Whether checkpointing gives equal gradients, different ones or an error: its message."""
    exact, net = make(seed=seed), make(seed=seed)
    net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    x, y = batch()
    losses(case, exact, x, y)
    try:
        losses(case, net, x.requires_grad_(), y)
    except RuntimeError as error:
        return str(error)
    same = zip(gradients(exact).values(), gradients(net).values(), strict=True)
    return "equal" if all(torch.allclose(a, b, atol=1e-6) for a, b in same) else "different"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", OUTCOMES)
def test_nothing_is_silently_wrong(case: str, reentrant: bool):
    for seed in range(5):
        assert OUTCOMES[case] in outcome(case, seed, reentrant)


def test_constant_gates_can_be_checkpointed():
    net = make()
    net.l0.log_alpha.requires_grad_(False)
    x, y = batch()
    F.cross_entropy(checkpoint(net, x, use_reentrant=False), y).backward()
    assert net.fc2.weight.grad is not None
