# SPDX-License-Identifier: Apache-2.0
"""The oracle of `pack_weight`: plain PyTorch, differentiable by PyTorch's own autograd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Where the axes of one weight lie in the flat lists and maps of a model's ports.

    Args:
        row_start: first feature of the port of the output features; -1: all rows are packed, in
            order, and none is a dummy.
        row_count: how many output features are packed.
        col_start: first feature of the port of the input features; -1: all columns are packed, in
            order, and not scaled.
        col_count: how many input features are packed.
    """

    row_start: int = -1
    row_count: int = 0
    col_start: int = -1
    col_count: int = 0


class Axes(NamedTuple):
    """The arguments of `pack_weight` that say what of one weight is packed."""

    rows: Tensor | None
    row_map: Tensor | None
    cols: Tensor | None
    col_map: Tensor | None


def axes_of(weight: Tensor, index: Tensor, maps: Tensor, span: Span) -> Axes:
    """Cuts the lists and maps of one weight out of those of all ports."""
    rows = row_map = cols = col_map = None
    if span.row_start >= 0:
        rows = index.narrow(0, span.row_start, span.row_count)
        row_map = maps.narrow(1, span.row_start, weight.shape[0])
    if span.col_start >= 0:
        cols = index.narrow(0, span.col_start, span.col_count)
        col_map = maps.narrow(1, span.col_start, weight.shape[1])
    return Axes(rows, row_map, cols, col_map)


def feature_scale(z: Tensor, feature_map: Tensor, features: Tensor | None) -> Tensor:
    """The scale of features: the product of their two gates, from `z` [..., G + 1].

    The last gate, always open, is a constant: no gradient reaches it.
    """
    gates = torch.cat([z[..., :-1], z[..., -1:].detach()], -1)
    chosen = feature_map if features is None else feature_map.index_select(1, features)
    return gates[..., chosen[0]] * gates[..., chosen[1]]


def is_channels_last(weight: Tensor) -> bool:
    """Tells whether a weight is packed to channels_last.

    Where one channel or one pixel leaves it open in memory, the strides say so, by which
    convolutions choose their layout.
    """
    if weight.dim() != 4 or not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    _, channels, *kernel = weight.shape
    strided_so = weight.stride(1) == 1 and weight.stride(3) == channels
    return not weight.is_contiguous() or (strided_so and channels * kernel[0] * kernel[1] > 1)


def is_transposed(weight: Tensor) -> bool:
    """Tells whether a weight is packed to a matrix stored [I, O]: on a CPU, if it is one."""
    stored_so = weight.dim() == 2 and not weight.is_contiguous() and weight.t().is_contiguous()
    return stored_so and weight.device.type == "cpu"


def _along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Shapes a vector so that it broadcasts along one dimension."""
    return values.reshape([-1 if i == dim else 1 for i in range(ndim)])


def pack_weight(
    weight: Tensor,
    z: Tensor | None = None,
    rows: Tensor | None = None,
    row_map: Tensor | None = None,
    cols: Tensor | None = None,
    col_map: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Packs a weight; the arguments are those of `l0kernels.functional.pack_weight`."""
    ndim = weight.dim()
    packed = weight if rows is None else weight.index_select(0, rows)
    packed = packed if cols is None else packed.index_select(1, cols)
    closed = torch.zeros([1] * ndim, dtype=torch.bool, device=weight.device)
    scale = None
    if z is not None and row_map is not None:
        closed = _along(feature_scale(z.detach(), row_map, rows) == 0, 0, ndim)
    if z is not None and col_map is not None:
        scale = _along(feature_scale(z, col_map, cols), 1, ndim)
        closed = closed | (scale == 0)
    packed = packed.masked_fill(closed, 0)
    if scale is not None:
        # Masked on both sides of the product: Inf * 0 is NaN, forward and in both gradients.
        packed = (packed.to(scale.dtype) * scale).masked_fill(closed, 0)
    if is_transposed(weight):
        return packed.to(dtype or weight.dtype).t().contiguous().t()
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return packed.to(dtype or weight.dtype).clone(memory_format=layout)


def pack_weights(
    weights: Sequence[Tensor],
    z: Tensor,
    index: Tensor,
    maps: Tensor,
    spans: Sequence[Span],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Packs weights; the arguments are those of `l0kernels.functional.pack_weights`."""
    return [
        pack_weight(weight, z, *axes_of(weight, index, maps, span), dtype)
        for weight, span in zip(weights, spans, strict=True)
    ]
