# SPDX-License-Identifier: Apache-2.0
"""The oracle of `masked_weight`: plain PyTorch, differentiable by PyTorch's own autograd."""

import math

import torch
from torch import Tensor

from l0kernels.ops.pack_weight.reference import is_channels_last

UNDERFLOW = {torch.float32: -87.0, torch.float64: -700.0}
"""The least beta s of a gate that is not 0: sigmoid underflows soon after."""


def closed_below(skip_below: float, dtype: torch.dtype) -> float:
    """The beta s below which a gate is 0: where sigmoid is `skip_below`, or underflows.

    Args:
        skip_below: from 0 up to, and without, 1.
        dtype: of the scores.
    """
    if skip_below == 0:
        return UNDERFLOW[dtype]
    return max(math.log(skip_below / (1 - skip_below)), UNDERFLOW[dtype])


def masked_weight(
    weight: Tensor,
    scores: Tensor,
    beta: Tensor,
    scale: float = 1.0,
    skip_below: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Masks a weight; the arguments are those of `l0kernels.functional.masked_weight`."""
    soft = beta.isfinite()
    x = scores * torch.where(soft, beta, 1)  # 0 times Inf would be NaN
    closed = torch.where(soft, x < closed_below(skip_below, scores.dtype), ~(scores > 0))
    gate = torch.where(soft, torch.sigmoid(x), 1) * scale
    # Masked on both sides of the product: Inf * 0 is NaN, forward and in both gradients.
    masked = (weight.masked_fill(closed, 0).to(gate.dtype) * gate).masked_fill(closed, 0)
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return masked.to(dtype or weight.dtype).clone(memory_format=layout)
