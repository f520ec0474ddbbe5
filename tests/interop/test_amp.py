# SPDX-License-Identifier: Apache-2.0
"""Autocast in both half precisions, half-precision weights, and the gradient scaler."""

from collections import defaultdict
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from interop.nets import (
    assert_closed_get_nothing,
    assert_equal,
    batch,
    gradients,
    make,
    objective,
    state,
)

HALF = [torch.bfloat16, torch.float16]
KINDS = ["mlp", "lenet", "norm", "residual"]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm())


def one_step(kind: str, seed: int, impl: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients under autocast to ``dtype``, or in fp64."""
    x, y = batch(seed=seed)
    net = make(kind, seed)
    if dtype is None:
        net, x = net.double(), x.double()
    with l0.use_impl(impl), torch.autocast("cpu", dtype or HALF[0], enabled=dtype is not None):
        loss = objective(net, x, y)
    loss.backward()
    assert_closed_get_nothing(net)
    return gradients(net)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_errs_as_little_as_the_masked_reference(kind: str, dtype: torch.dtype):
    # Medians: a ReLU whose input rounds to the other side of 0 changes one draw a lot.
    ours, theirs = defaultdict(list), defaultdict(list)
    for seed in range(11):
        exact = one_step(kind, seed, "reference", None)
        packed = one_step(kind, seed, "auto", dtype)
        masked = one_step(kind, seed, "reference", dtype)
        assert set(exact) == set(packed) == set(masked)
        for name, value in exact.items():
            assert packed[name].dtype == torch.float32 and packed[name].isfinite().all(), name
            ours[name].append(error(packed[name], value))
            theirs[name].append(error(masked[name], value))
    for name in ours:
        assert 0 < median(ours[name]) <= 2 * median(theirs[name]), name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen eval"])
def test_outputs_have_the_dtype_and_nearly_the_values_of_the_reference(
    dtype: torch.dtype, mode: str
):
    x, _ = batch()
    packed, masked = (make().train(mode == "train") for _ in range(2))
    with torch.autocast("cpu", dtype):
        with l0.use_impl("reference"):
            expected = masked(x)
        if mode == "frozen eval":
            with torch.no_grad(), l0.frozen(packed):
                got = packed(x)
                assert packed(x).equal(got)
        else:
            got = packed(x)
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, atol=8 * torch.finfo(dtype).eps, rtol=0.05)


@pytest.mark.parametrize("autocast", [None, *HALF])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_weights(dtype: torch.dtype, autocast: torch.dtype | None):
    x, y = batch()
    found = {}
    for impl in ("reference", "auto"):
        net = make("lenet").to(dtype)
        low = torch.autocast("cpu", autocast or dtype, enabled=autocast is not None)
        with l0.use_impl(impl), low:
            out = net(x.to(dtype))
            loss = F.cross_entropy(out.float(), y) + l0.penalty(net)
        loss.backward()
        assert out.dtype == (autocast or dtype)
        assert net.l0.log_alpha.grad.dtype == torch.float32
        found[impl] = gradients(net)
    for name, expected in found["reference"].items():
        got = found["auto"][name]
        assert got.dtype == expected.dtype, name
        assert error(got, expected) <= 0.05 * float(expected.norm()) + 1e-6, name


class Run:
    """Training with a gradient scaler; ``plant`` multiplies the loss of one step."""

    def __init__(self, impl: str, dtype: torch.dtype, init_scale: float = 2.0**10) -> None:
        self.impl, self.dtype = impl, dtype
        self.net = make()
        self.optimizer = torch.optim.SGD(
            l0.param_groups(self.net, lr=0.05, gate_lr=1.0), momentum=0.9
        )
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=init_scale, backoff_factor=2.0**-12, growth_interval=1000
        )

    def step(self, seed: int, plant: float = 1.0) -> bool:
        """Whether the optimizer stepped."""
        x, y = batch(seed=seed)
        before = weights(self.net)
        with l0.use_impl(self.impl), torch.autocast("cpu", self.dtype):
            loss = objective(self.net, x, y) * plant
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        assert all(p.grad is not None for p in self.net.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return any(not t.equal(before[name]) for name, t in weights(self.net).items())


def weights(net: nn.Module) -> dict[str, Tensor]:
    """All parameters, of frozen gates what they are frozen at."""
    found = {name: p.detach().clone() for name, p in net.named_parameters()}
    found["l0.log_alpha"] = net.l0.alpha.detach().clone()
    return found


def opened(net: nn.Module) -> Tensor:
    return net.l0._draw.z != 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plant", [float("inf"), float("nan")])
@pytest.mark.parametrize("gates", ["sampled", "frozen"])
def test_a_step_with_inf_is_skipped_alike(dtype: torch.dtype, plant: float, gates: str):
    runs = [Run("auto", dtype), Run("reference", dtype)]
    for step in range(6):
        for run in runs:
            if step == 2 and gates == "frozen":
                run.net.l0.freeze()
            statistics = run.net.norm.running_mean.clone()
            assert run.step(step, plant if step == 3 else 1.0) == (step != 3)
            assert not run.net.norm.running_mean.equal(statistics)
            assert all(t.isfinite().all() for t in state(run.net).values())
        packed, masked = runs
        assert opened(packed.net).equal(opened(masked.net)), step
        assert packed.net.l0.step.equal(masked.net.l0.step)
        assert packed.scaler.get_scale() == masked.scaler.get_scale()
        assert_equal(state(packed.net), state(masked.net), tolerance=40 * torch.finfo(dtype).eps)
    assert packed.scaler.get_scale() == 2.0**-2


def test_scales_that_overflow_fp16_back_off_alike():
    runs = [Run(impl, torch.float16, init_scale=2.0**40) for impl in ("auto", "reference")]
    history = [[(run.step(step), run.scaler.get_scale()) for step in range(6)] for run in runs]
    assert history[0] == history[1]
    stepped = [step for step, _ in history[0]]
    assert not stepped[0] and stepped[-1]
    for run in runs:
        assert all(t.isfinite().all() for t in state(run.net).values())
