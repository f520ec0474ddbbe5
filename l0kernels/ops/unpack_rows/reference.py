# SPDX-License-Identifier: Apache-2.0
"""`unpack_rows` in plain PyTorch: the oracle of the kernel, and what runs without it."""

import torch
from torch import Tensor

from l0kernels.ops.pack_weight.backward import list_backward
from l0kernels.ops.pack_weight.reference import is_transposed


@torch.no_grad()
def unpack_rows(grads, weights, z, index, maps, spans, into, written, need_z) -> Tensor:
    """See ``l0kernels.ops.unpack_rows.op.unpack_rows``; ``spans`` is flat."""
    needed = [True] * len(weights)
    *found, grad_z = list_backward(grads, weights, z, index, maps, spans, needed, need_z)
    for gradient, memory, rows in zip(found, into, written, strict=True):
        memory.copy_(gradient)
        rows.copy_((stored_rows(gradient) != 0).reshape(rows.shape[0], -1).any(1))
    return grad_z


def stored_rows(weight: Tensor) -> Tensor:
    """A weight as it lies in memory: rows are its input features if it is stored [I, O]."""
    return weight.t() if is_transposed(weight) else weight
