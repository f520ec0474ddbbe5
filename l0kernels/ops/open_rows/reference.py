# SPDX-License-Identifier: Apache-2.0
"""`open_rows` in plain PyTorch: the oracle of the kernel, and what runs without it."""

import torch
from torch import Tensor


@torch.no_grad()
def open_rows(grad: Tensor, last: Tensor, now: int) -> int:
    """See ``l0kernels.ops.open_rows.op.open_rows``."""
    # float64 gradients, and NaN, are true too where they are not zero.
    found = (grad.reshape(grad.shape[0], -1) != 0).any(1)
    stale = found & (last < now)
    last.masked_fill_(found & (last == now), now + 1)
    return int(stale.sum())
