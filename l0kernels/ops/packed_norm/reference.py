# SPDX-License-Identifier: Apache-2.0
"""The oracle of `packed_norm`: plain PyTorch, differentiable by PyTorch's own autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.ops.pack_weight.reference import feature_scale


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout of the result: channels_last if the channels of x lie side by side."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def is_dummy(x: Tensor, index: Tensor, z: Tensor, feature_map: Tensor) -> Tensor:
    """Tells which packed channels are dummies; broadcasts against x."""
    closed = feature_scale(z.detach(), feature_map, index) == 0
    return closed.reshape([1, -1] + [1] * (x.dim() - 2))


def packed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    index: Tensor,
    z: Tensor,
    feature_map: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Normalises; the arguments are those of `l0kernels.functional.packed_norm`."""
    dummy = is_dummy(x, index, z, feature_map)
    # Masked on both sides: Inf and NaN of dummies must not reach values or gradients.
    everything = (running_mean, running_var, weight, bias)
    mean, var, scale, shift = (
        None if full is None else full.index_select(0, index) for full in everything
    )
    if not training:
        assert mean is not None and var is not None
        mean = mean.masked_fill(dummy.flatten(), 0.0)
        var = var.masked_fill(dummy.flatten(), 1.0)
    finite = x.masked_fill(dummy, 0)
    y = F.batch_norm(finite, mean, var, scale, shift, training, momentum, eps)
    if training:
        for full, new in ((running_mean, mean), (running_var, var)):
            _keep(full, new, index, dummy.flatten())
    y = (F.relu(y) if activation == "relu" else y).masked_fill(dummy, 0)
    return y.contiguous(memory_format=layout_of(x))


@torch.no_grad()
def _keep(full: Tensor | None, new: Tensor | None, index: Tensor, dummy: Tensor) -> None:
    """Writes the running statistics of open features back."""
    if full is not None and new is not None:
        full.index_copy_(0, index, torch.where(dummy, full.index_select(0, index), new))
