# SPDX-License-Identifier: Apache-2.0
"""The oracle of `dep_chain`: plain PyTorch, differentiable by PyTorch's own autograd."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BOUND = math.log(100.0)
"""No logit is larger, nor smaller than its negative."""


def order_of(layers: int, reverse: bool) -> range:
    """The numbers of the layers in the order in which they are computed."""
    return range(layers - 1, -1, -1) if reverse else range(layers)


def dep_chain(
    first: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], reverse: bool = False
) -> Tensor:
    """The arguments are those of `l0kernels.functional.dep_chain`."""
    made: list[Tensor] = [first] * len(weights)
    previous = first
    # Logits keep their precision wherever they are computed.
    with torch.autocast(first.device.type, enabled=False):
        for i in order_of(len(weights), reverse):
            previous = BOUND * torch.tanh(F.linear(previous, weights[i], biases[i]))
            made[i] = previous
        return torch.cat(made)
