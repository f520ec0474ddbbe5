# SPDX-License-Identifier: Apache-2.0
"""The backward passes of `pack_weight` in plain PyTorch: what runs where no library does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from l0kernels.ops.pack_weight.reference import Axes, Span, axes_of, feature_scale


def list_backward(grads, weights, z, index, maps, spans, need_weights, need_z):
    """The gradients of weights (empty where not needed), then that of the gates."""
    total, results = None, []
    arguments = zip(grads, weights, grouped(spans), need_weights, strict=True)
    for grad, weight, span, needed in arguments:
        axes = axes_of(weight, index, maps, span)
        grad_weight, grad_z = unpack(grad, weight, z, axes, needed, need_z)
        results.append(grad_weight)
        if grad_z is not None:
            total = grad_z if total is None else total + grad_z
    return [*results, rounded(total, z) if need_z else z.new_empty(0)]


def grouped(spans: Sequence[int]) -> list[Span]:
    """The spans of a flat list, four numbers each."""
    return [Span(*spans[i : i + 4]) for i in range(0, len(spans), 4)]


def rounded(grad_z: Tensor | None, z: Tensor) -> Tensor:
    """The gradient of the gates in their dtype; zeros for None."""
    return torch.zeros_like(z) if grad_z is None else grad_z.to(z.dtype)


def unpack(
    grad: Tensor, weight: Tensor, z: Tensor | None, axes: Axes, need_weight: bool, need_z: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a weight (empty if not needed) and, in float64, of the gates (or None)."""
    closed, scale = _closed_and_scale(weight, z, *axes)
    grad = grad.masked_fill(closed, 0)
    grad_weight, grad_z = weight.new_empty(0), None
    if need_weight:
        # Masked again: 0 * Inf is NaN.
        scaled = grad if scale is None else (grad.to(scale.dtype) * scale).masked_fill(closed, 0)
        grad_weight = _grad_weight(scaled, weight, axes.rows, axes.cols)
    if need_z and z is not None and axes.col_map is not None:
        picked = _unscaled(weight, axes.rows, axes.cols).masked_fill(closed, 0)
        cols = axes.cols
        gates = axes.col_map if cols is None else axes.col_map.index_select(1, cols)
        grad_z = _grad_z(grad, picked, z, gates)
    return grad_weight, grad_z


def _closed_and_scale(weight, z, rows, row_map, cols, col_map) -> tuple[Tensor, Tensor | None]:
    """Which packed elements are exactly 0, and the scale of the columns; both broadcast."""
    tail = [1] * (weight.dim() - 1)
    closed = torch.zeros([1, *tail], dtype=torch.bool, device=weight.device)
    scale = None
    if row_map is not None:
        closed = (feature_scale(z, row_map, rows) == 0).reshape([-1, *tail])
    if col_map is not None:
        scale = feature_scale(z, col_map, cols).reshape([1, -1, *tail[1:]])
        closed = closed | (scale == 0)
    return closed, scale


def _unscaled(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    picked = weight if rows is None else weight.index_select(0, rows)
    return picked if cols is None else picked.index_select(1, cols)


def _grad_weight(grad: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """Writes packed gradients to their places in zeros laid out as `weight`."""
    grad = grad.to(weight.dtype)
    if cols is not None:
        wide = grad.new_zeros((grad.shape[0], *weight.shape[1:]))
        grad = wide.index_copy_(1, cols, grad)
    full = torch.zeros_like(weight)
    return full.copy_(grad) if rows is None else full.index_copy_(0, rows, grad)


def _grad_z(grad: Tensor, picked: Tensor, z: Tensor, gates: Tensor) -> Tensor:
    """Sums <grad, weight> over all but the columns and adds it to each column's two gates."""
    per_column = (grad.double() * picked.double()).sum([d for d in range(grad.dim()) if d != 1])
    grad_z = torch.zeros_like(z, dtype=torch.float64)
    for mine, other in ((0, 1), (1, 0)):
        # index_put_ adds in a fixed order on every device; index_add_ need not.
        part = per_column * z[gates[other]].double()
        grad_z.index_put_((gates[mine],), part, accumulate=True)
    grad_z[-1] = 0
    return grad_z
