# SPDX-License-Identifier: Apache-2.0
"""The oracle of `pack_weight`: plain PyTorch, differentiable by PyTorch's own autograd."""

import torch
from torch import Tensor


def feature_scale(z: Tensor, feature_map: Tensor, features: Tensor | None) -> Tensor:
    """The scale of features: the product of their two gates, from `z` [G + 1].

    The last gate, always open, is a constant: no gradient reaches it.
    """
    gates = torch.cat([z[:-1], z[-1:].detach()])
    chosen = feature_map if features is None else feature_map.index_select(1, features)
    return gates[chosen[0]] * gates[chosen[1]]


def is_channels_last(weight: Tensor) -> bool:
    """Tells whether a weight is packed to channels_last."""
    return (
        weight.dim() == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
    )


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
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return packed.to(dtype or weight.dtype).contiguous(memory_format=layout)
