# SPDX-License-Identifier: Apache-2.0
"""Whole training runs: packed and masked arrive at the same place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models


def task(examples: int) -> tuple[Tensor, Tensor]:
    """Ten noisy prototypes: easy enough that a few steps learn something."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 1, 28, 28, generator=generator)
    y = torch.randint(10, (examples,), generator=generator)
    return prototypes[y] + 0.5 * torch.randn(examples, 1, 28, 28, generator=generator), y


def train(net: nn.Module, impl: str, steps: int, dtype: torch.dtype) -> list[float]:
    x, y = task(32 * 8)
    x = x.to(dtype)
    optimizer = torch.optim.Adam(l0.param_groups(net, lr=1e-3, gate_lr=0.05))
    losses = []
    for step in range(steps):
        batch = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.zero_grad()
        with l0.use_impl(impl):
            loss = l0.expected_loss(
                net, lambda b=batch: F.cross_entropy(net(x[b]), y[b])
            ) + l0.penalty(net)
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def start(granularity: str, dtype: torch.dtype, lam: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    network = models.network("lenet5")
    return l0.convert(
        network.build().to(dtype),
        "hard_concrete",
        example_inputs=(network.example(2)[0].to(dtype),),
        granularity=granularity,
        lam=lam,
        n_train=1000,
    )


def tensors_of(net: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers: the extra state has the rows that packed layers alone count."""
    return [*net.named_parameters(), *net.named_buffers()]


@pytest.mark.parametrize("granularity", ["unit", "input"])
def test_fp64_training_is_the_same_to_rounding(granularity: str):
    packed = start(granularity, torch.float64)
    masked = copy.deepcopy(packed)
    losses = [
        train(packed, "auto", 40, torch.float64),
        train(masked, "reference", 40, torch.float64),
    ]
    assert losses[0][-1] < 0.8 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-9, atol=0)
    for (name, a), (_, b) in zip(tensors_of(packed), tensors_of(masked), strict=True):
        # Adam divides by gradients that are zero but for rounding: parameters are compared to
        # a step's size rather than to rounding.
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=name)


def test_fp32_losses_stay_within_one_percent():
    packed = start("input", torch.float32)
    masked = copy.deepcopy(packed)
    ours = torch.tensor(train(packed, "auto", 60, torch.float32))
    theirs = torch.tensor(train(masked, "reference", 60, torch.float32))
    ours, theirs = (losses.view(-1, 10).mean(1) for losses in (ours, theirs))
    assert bool(((ours - theirs).abs() <= 0.01 * theirs).all())


def test_gates_close_under_a_strong_penalty_and_training_goes_on():
    net = start("unit", torch.float32, lam=500.0)
    losses = train(net, "auto", 60, torch.float32)
    opened = net.l0.open_now()
    assert sum(opened.values()) < 0.5 * sum(net.l0.sizes)
    assert all(torch.isfinite(torch.tensor(losses)))
