# SPDX-License-Identifier: Apache-2.0
"""`open_rows` in plain PyTorch: the oracle of the kernel, and what runs without it."""

import torch
from torch import Tensor


@torch.no_grad()
def open_rows(grad: Tensor, last: Tensor, now: int, written: Tensor | None = None) -> int:
    """See ``l0kernels.ops.open_rows.op.open_rows``."""
    nonzero = grad != 0
    found = nonzero.flatten(1).any(1) if grad.dim() > 1 else nonzero
    if written is not None:
        found &= written
    stale = found & (last < now)
    last.masked_fill_(found & (last == now), now + 1)
    return int(stale.sum())


def advance(
    last: Tensor, rows: Tensor | None, now: int, mark: int, known: int
) -> tuple[Tensor, Tensor]:
    """Set the counters of rows, all for None, that are not marked yet.

    Returns:
        The rows of them that have missed steps, and how many each.

    Raises:
        IndexError: a row out of bounds, or more missed steps than are known; nothing is changed.
    """
    count = last.shape[0]
    if rows is None:
        rows = torch.arange(count, device=last.device)
    outside = rows[(rows < 0) | (rows >= count)]
    if outside.numel():
        raise IndexError(f"rows: expected indices of {count} rows; got {int(outside[0])}")
    steps = now - last.index_select(0, rows)
    if steps.numel() and (most := int(steps.max())) > known:
        raise IndexError(f"last: expected at most {known} missed steps; got {most}")
    rows, steps = rows[steps >= 0], steps[steps >= 0]
    last.index_fill_(0, rows, mark)
    return rows[steps > 0], steps[steps > 0]
