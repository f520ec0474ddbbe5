# SPDX-License-Identifier: Apache-2.0
"""The oracle of `gate_apply`: plain PyTorch, differentiable by PyTorch's own autograd."""

import torch
from torch import Tensor

from l0kernels.ops.pack_weight.reference import feature_scale


def scale_along(x: Tensor, z: Tensor, gate_map: Tensor, dim: int) -> Tensor:
    """The scale of every feature, of every example where gates are, shaped to broadcast with x."""
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    if z.dim() == 2:
        shape[0] = x.shape[0]
    return feature_scale(z, gate_map, None).reshape(shape)


def gate_apply(x: Tensor, z: Tensor, gate_map: Tensor, dim: int = 1) -> Tensor:
    """Applies gates; the arguments are those of `l0kernels.functional.gate_apply`."""
    scale = scale_along(x, z, gate_map, dim)
    closed = scale == 0
    # Masked on both sides of the product: Inf * 0 is NaN, forward and in both gradients.
    y = (x.masked_fill(closed, 0).to(scale.dtype) * scale).masked_fill(closed, 0)
    return torch.empty_like(x).copy_(y)
