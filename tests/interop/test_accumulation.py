# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation under one draw equals the big batch."""

import pytest
import torch
import torch.nn.functional as F

import l0kernels as l0
from interop.nets import assert_equal, batch, gradients, make, norms_in_eval, objective


@pytest.mark.parametrize("kind", ["mlp", "lenet", "norm", "residual"])
@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("gates", ["sampled", "frozen"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_parts_equal_the_whole(kind: str, parts: int, gates: str, impl: str):
    x, y = batch()
    whole, split = (norms_in_eval(make(kind)).double() for _ in range(2))
    x = x.double()
    for net in (whole, split):
        if gates == "frozen":
            net.l0.freeze()
    with l0.use_impl(impl):
        objective(whole, x, y).backward()
        with l0.hold(split):
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = l0.expected_loss(split, lambda a=a, b=b: F.cross_entropy(split(a), b))
                (loss / parts).backward()
            l0.penalty(split).backward()
    assert split.l0.step.equal(whole.l0.step)
    assert_equal(gradients(whole), gradients(split), tolerance=1e-12)
    assert gradients(whole)["l0.log_alpha"].any() == (gates == "sampled")


def test_several_optimizer_steps():
    x, y = batch()
    nets = [norms_in_eval(make()).double() for _ in range(2)]
    for net, parts in zip(nets, (1, 4), strict=True):
        optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.1, gate_lr=5.0), momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            with l0.hold(net):
                for a, b in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                    (F.cross_entropy(net(a), b) / parts).backward()
                l0.penalty(net).backward()
            optimizer.step()
    assert_equal(*(dict(net.named_parameters()) for net in nets), tolerance=1e-10)
    assert int(nets[0].l0.step) == int(nets[1].l0.step) == 5
