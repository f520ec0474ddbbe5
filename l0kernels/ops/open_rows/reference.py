# SPDX-License-Identifier: Apache-2.0
"""`open_rows` in plain PyTorch: the oracle of the kernel, and what runs without it."""

import torch
from torch import Tensor


@torch.no_grad()
def open_rows(grad: Tensor, last: Tensor, now: int) -> int:
    """See ``l0kernels.ops.open_rows.op.open_rows``."""
    nonzero = grad != 0
    found = nonzero.flatten(1).any(1) if grad.dim() > 1 else nonzero
    stale = found & (last < now)
    last.masked_fill_(found & (last == now), now + 1)
    return int(stale.sum())
