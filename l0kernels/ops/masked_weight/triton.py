# SPDX-License-Identifier: Apache-2.0
# What Triton compiles is not Python: arguments are wrapped, launches have a grid.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportPrivateImportUsage=false
"""The Triton kernels of `masked_weight` and its backward pass.

All tensors are brought into the memory order of the weight first, as a rule they have it; the
kernels then see plain runs of numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton
from l0kernels.ops.pack_weight.reference import is_channels_last

NUMBERS = 1024  # of a program


@triton.jit
def _exp_of_negative(x):
    """e^x for -87 <= x <= 0 in float32, as csrc/common/soft_gate.h has it; float64: any x.

    Triton's own in float32 is that of 2^(x log2 e), which loses |x| 2^-24 of it.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        shifted = tl.fma(x, 1.44269504, 12582912.0)  # its lowest bits hold the integer n
        n = shifted - 12582912.0
        r = tl.fma(-n, -2.12194440e-4, tl.fma(-n, 0.693359375, x))
        q = tl.fma(r, 0.00019891981, 0.0013934541)
        q = tl.fma(q, r, 0.0083333105)
        q = tl.fma(q, r, 0.041666456)
        q = tl.fma(q, r, 0.16666667)
        q = tl.fma(q, r, 0.5)
        e_r = 1.0 + tl.fma(r * r, q, r)
        power = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
        return e_r * power.to(tl.float32, bitcast=True)  # e_r 2^n, NaN for NaN


@triton.jit
def _gates(scores, beta, SCALE: tl.constexpr, CLOSED_BELOW: tl.constexpr):
    """Values of gates, 0 where they are closed, and their slopes in the scores."""
    is_step = beta == float("inf")
    x = scores * tl.where(is_step, 1.0, beta)
    limit = 87.0 if scores.dtype == tl.float32 else 700.0
    # The least of a NaN and a number would be the number.
    size = tl.abs(x)
    e = _exp_of_negative(-tl.where(size > limit, limit, size))
    inverse = 1.0 / (1.0 + e)
    value = tl.where(is_step, 1.0, tl.where(x < 0, e * inverse, inverse)) * SCALE
    slope = tl.where(is_step, 0.0, e * inverse * inverse * (beta * SCALE))
    # Above, where a closed one is below, gates are open for good.
    slope = tl.where(x > limit, 0.0, slope)
    closed = tl.where(is_step, (scores > 0) == 0, x < CLOSED_BELOW)
    return tl.where(closed, 0.0, value), slope


@triton.jit(do_not_specialize=["count"])
def _mask(
    weights,
    scores,
    beta,
    masked,
    count,
    SCALE: tl.constexpr,
    CLOSED_BELOW: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < count
    score = tl.load(scores + place, mask=inside, other=0.0)
    gate, _ = _gates(score, tl.load(beta), SCALE, CLOSED_BELOW)
    value = tl.load(weights + place, mask=inside, other=0.0).to(gate.dtype)
    value = tl.where(gate != 0, value * gate, 0.0)
    tl.store(masked + place, value.to(masked.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _unmask(
    grads,
    weights,
    scores,
    beta,
    grad_weights,
    grad_scores,
    count,
    SCALE: tl.constexpr,
    CLOSED_BELOW: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = place < count
    score = tl.load(scores + place, mask=inside, other=0.0)
    gate, slope = _gates(score, tl.load(beta), SCALE, CLOSED_BELOW)
    grad = tl.load(grads + place, mask=inside, other=0.0).to(gate.dtype)
    if NEED_WEIGHT:
        result = tl.where(gate != 0, grad * gate, 0.0)
        tl.store(grad_weights + place, result.to(grad_weights.dtype.element_ty), mask=inside)
    if NEED_SCORES:
        value = tl.load(weights + place, mask=inside, other=0.0).to(gate.dtype)
        result = tl.where(gate != 0, grad * value * slope, 0.0)
        tl.store(grad_scores + place, result, mask=inside)


def _layout(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(weight) else torch.contiguous_format


def _empty(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = _layout(weight)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=layout)


def _launch(kernel, count: int, device_of: Tensor, *arguments, **options) -> None:
    if count > 0:
        with _triton.on_device_of(device_of):
            kernel[(_triton.cdiv(count, NUMBERS),)](
                *arguments, count, **options, NUMBERS=NUMBERS, num_warps=4
            )


def masked_weight(
    weight: Tensor,
    scores: Tensor,
    beta: Tensor,
    scale: float,
    closed_below: float,
    dtype: torch.dtype,
) -> Tensor:
    """The raw operator `masked_weight`."""
    masked = _empty(weight, dtype)
    stored = (tensor.contiguous(memory_format=_layout(weight)) for tensor in (weight, scores))
    options = {"SCALE": scale, "CLOSED_BELOW": closed_below}
    _launch(_mask, weight.numel(), weight, *stored, beta, masked, **options)
    return masked


def masked_weight_backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    beta: Tensor,
    scale: float,
    closed_below: float,
    need_weight: bool,
    need_scores: bool,
) -> tuple[Tensor, Tensor]:
    """The raw operator `masked_weight_backward`."""
    grad_weight = _empty(weight, weight.dtype) if need_weight else weight.new_empty(0)
    grad_scores = _empty(weight, scores.dtype) if need_scores else scores.new_empty(0)
    if need_weight or need_scores:
        tensors = (grad, weight, scores)
        stored = (tensor.contiguous(memory_format=_layout(weight)) for tensor in tensors)
        options = {"SCALE": scale, "CLOSED_BELOW": closed_below}
        options |= {"NEED_WEIGHT": need_weight, "NEED_SCORES": need_scores}
        arguments = (*stored, beta, grad_weight, grad_scores)
        _launch(_unmask, weight.numel(), weight, *arguments, **options)
    return grad_weight, grad_scores
