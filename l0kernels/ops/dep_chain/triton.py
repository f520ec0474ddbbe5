# SPDX-License-Identifier: Apache-2.0
# What Triton compiles is not Python: arguments are wrapped, launches have a grid.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The Triton kernels of `dep_chain` and its backward pass, a launch for each layer.

A program makes some of a layer's logits, or goes down some of a weight's columns. Sums are in
float64 and in one order; a program adds only what it owns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton
from l0kernels.ops.dep_chain.op import places
from l0kernels.ops.dep_chain.reference import BOUND
from l0kernels.ops.sample_gates.triton import _exp

_BOUND = tl.constexpr(BOUND)
TILES = ((16, 32), (4, 256))  # rows and columns that a program sees at once; the first for few
FEW = 128  # columns, or rows in the backward pass
COLUMNS = ((64, 16), (16, 32))  # the same in the backward pass; the first for few rows


# ---- law, as in csrc/common/chain.h ----


@triton.jit
def _tanh(x):
    """tanh(x) and its slope."""
    size = tl.abs(x)
    e = _exp(-2.0 * size)
    inverse = 1.0 / (1.0 + e)
    far = (1.0 - e) * inverse
    # Next to 0, where 1 - e has few digits left: the Taylor series.
    x2 = size * size
    tail = x2 * (17.0 / 315.0 - x2 * (62.0 / 2835.0))
    near = size - size * x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - tail))
    value = tl.where(size < 0.03125, near, far)
    value = tl.where(x < 0.0, -value, value)
    slope = tl.where(size > 350.0, 0.0, 4.0 * e * inverse * inverse)
    # _exp has no answer to NaN.
    return tl.where(x != x, x, value), tl.where(x != x, x, slope)


# ---- kernels ----


@triton.jit
def _make_rows(
    weight, bias, source, logits, slopes, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_row = row < rows
    lines = weight + row.to(tl.int64)[:, None] * cols
    sums = tl.zeros([ROWS, COLS], tl.float64)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        has_col = col < cols
        read = tl.load(source + col, mask=has_col, other=0.0).to(tl.float64)
        inside = has_row[:, None] & has_col[None, :]
        numbers = tl.load(lines + col[None, :], mask=inside, other=0.0).to(tl.float64)
        sums += numbers * read[None, :]
    shift = tl.load(bias + row, mask=has_row, other=0.0).to(tl.float64)
    value, slope = _tanh(tl.sum(sums, 1) + shift)
    bound = tl.full([], _BOUND, tl.float64)
    tl.store(logits + row, (bound * value).to(logits.dtype.element_ty), mask=has_row)
    tl.store(slopes + row, (bound * slope).to(slopes.dtype.element_ty), mask=has_row)


@triton.jit
def _add_columns(
    weight,
    source,
    slopes,
    grad,
    later,
    earlier,
    grad_weight,
    grad_bias,
    rows,
    cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradients of some columns, what goes back from them, and in one program of the bias.

    Args:
        later: what comes back to these logits; None: nothing reads them.
        earlier: what goes back to the logits that are read.
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    has_col = col < cols
    read = tl.load(source + col, mask=has_col, other=0.0).to(tl.float64)
    sums = tl.zeros([ROWS, COLS], tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        has_row = row < rows
        delta = tl.load(grad + row, mask=has_row, other=0.0).to(tl.float64)
        if later is not None:
            delta += tl.load(later + row, mask=has_row, other=0.0)
        delta *= tl.load(slopes + row, mask=has_row, other=0.0).to(tl.float64)
        mine = has_row & (tl.program_id(0) == 0)
        tl.store(grad_bias + row, delta.to(grad_bias.dtype.element_ty), mask=mine)
        inside = has_row[:, None] & has_col[None, :]
        place = row.to(tl.int64)[:, None] * cols + col[None, :]
        numbers = tl.load(weight + place, mask=inside, other=0.0).to(tl.float64)
        sums += numbers * delta[:, None]
        outer = (delta[:, None] * read[None, :]).to(grad_weight.dtype.element_ty)
        tl.store(grad_weight + place, outer, mask=inside)
    back = tl.sum(sums, 0).to(earlier.dtype.element_ty)
    tl.store(earlier + col, back, mask=has_col)


# ---- operators ----


def dep_chain(
    first: Tensor, weights: list[Tensor], biases: list[Tensor], reverse: bool
) -> tuple[Tensor, Tensor]:
    """The raw operator `dep_chain`."""
    logits = first.new_empty(sum(weight.shape[0] for weight in weights))
    slopes = first.new_empty(logits.shape)
    with _triton.on_device_of(first):
        for layer, at, source in places(weights, reverse):
            rows, cols = weights[layer].shape
            if rows == 0:
                continue
            tile = TILES[0] if cols <= FEW else TILES[1]
            _make_rows[(_triton.cdiv(rows, tile[0]),)](
                weights[layer].contiguous(),
                biases[layer].contiguous(),
                first.contiguous() if source is None else logits[source],
                logits[at],
                slopes[at],
                rows,
                cols,
                *tile,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return logits, slopes


def dep_chain_backward(
    grad: Tensor,
    logits: Tensor,
    slopes: Tensor,
    first: Tensor,
    weights: list[Tensor],
    reverse: bool,
) -> list[Tensor]:
    """The raw operator `dep_chain_backward`."""
    grad, logits, slopes = grad.contiguous(), logits.contiguous(), slopes.contiguous()
    first = first.contiguous()
    grad_first, grad_biases = first.new_empty(first.shape), logits.new_empty(logits.shape)
    grad_weights = [weight.new_empty(weight.shape) for weight in weights]
    back = logits.new_empty(logits.shape, dtype=torch.float64)  # sums that are passed back
    later = None
    with _triton.on_device_of(first):
        for layer, at, source in reversed(list(places(weights, reverse))):
            rows, cols = weights[layer].shape
            earlier = grad_first if source is None else back[source]
            tile = COLUMNS[0] if rows <= FEW else COLUMNS[1]
            # One program at least: biases have gradients where weights have no columns.
            _add_columns[(max(1, _triton.cdiv(cols, tile[1])),)](
                weights[layer].contiguous(),
                first if source is None else logits[source],
                slopes[at],
                grad[at],
                later,
                earlier,
                grad_weights[layer],
                grad_biases[at],
                rows,
                cols,
                *tile,
                num_warps=4,
                enable_fp_fusion=False,
                **_triton.at_most_registers(128),
            )
            later = earlier
    return [grad_first, grad_biases, *grad_weights]
