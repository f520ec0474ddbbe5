# SPDX-License-Identifier: Apache-2.0
"""`sgd_rows` in plain PyTorch: the oracle of the kernels, and what runs without them."""

import torch
from torch import Tensor

from l0kernels.ops.open_rows.reference import advance


@torch.no_grad()
def sgd_rows(
    weight: Tensor,
    velocity: Tensor | None,
    grad: Tensor,
    last: Tensor,
    now: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """See ``l0kernels.ops.sgd_rows.op.sgd_rows``."""
    rows = (last == now + 1).nonzero().flatten()
    w = weight.index_select(0, rows)
    change = grad.index_select(0, rows)
    if maximize:
        change = -change
    change = change.add(w, alpha=weight_decay)
    if velocity is not None:
        v = velocity.index_select(0, rows).mul_(momentum).add_(change, alpha=1 - dampening)
        velocity.index_copy_(0, rows, v)
        change = change.add(v, alpha=momentum) if nesterov else v
    weight.index_copy_(0, rows, w.add_(change, alpha=-lr))


@torch.no_grad()
def sgd_rows_catch_up(
    weight: Tensor,
    velocity: Tensor | None,
    last: Tensor,
    rows: Tensor | None,
    table: Tensor,
    now: int,
    mark: int,
) -> None:
    """See ``l0kernels.ops.sgd_rows.op.sgd_rows_catch_up``."""
    rows, steps = advance(last, rows, now, mark, table.shape[0] - 1)
    change = table - torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    change = change.to(weight.device).index_select(0, steps).to(weight.dtype)
    tail = [1] * (weight.dim() - 1)
    a, b, c, d = (change[:, i, j].reshape(-1, *tail) for i in (0, 1) for j in (0, 1))
    w = weight.index_select(0, rows)
    if velocity is None:
        weight.index_copy_(0, rows, w + a * w)
        return
    v = velocity.index_select(0, rows)
    weight.index_copy_(0, rows, w + (a * w + b * v))
    velocity.index_copy_(0, rows, c * w + d * v)
