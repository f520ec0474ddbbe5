# SPDX-License-Identifier: Apache-2.0
"""`adam_rows` in plain PyTorch: the oracle of the kernels, and what runs without them."""

import torch
from torch import Tensor

from l0kernels.ops.open_rows.reference import advance


@torch.no_grad()
def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    last: Tensor,
    now: int,
    number: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """See ``l0kernels.ops.adam_rows.op.adam_rows``."""
    rows = (last == now + 1).nonzero().flatten()
    w, m, v, g = (t.index_select(0, rows) for t in (weight, exp_avg, exp_avg_sq, grad))
    if maximize:
        g = -g
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    _move(w, m, v, number, (lr, beta1, beta2, eps, weight_decay))
    for whole, part in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
        whole.index_copy_(0, rows, part)


@torch.no_grad()
def adam_rows_catch_up(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last: Tensor,
    rows: Tensor | None,
    table: Tensor,
    now: int,
    number: int,
    mark: int,
) -> None:
    """See ``l0kernels.ops.adam_rows.op.adam_rows_catch_up``.

    One step after the other, of all rows that have missed it: in the order of what they have
    missed these come first.
    """
    found, steps = advance(last, rows, now, mark, min(table.shape[0], number))
    steps, order = steps.sort(descending=True)
    found, missed = found[order], steps.tolist()
    w, m, v = (t.index_select(0, found) for t in (weight, exp_avg, exp_avg_sq))
    zero, count = w.new_zeros(()), 0
    for age in range(missed[0] if missed else 0, 0, -1):  # 1: the step before this one
        while count < len(missed) and missed[count] >= age:
            count += 1
        lr, beta1, beta2, eps, decay = table[table.shape[0] - age].tolist()
        m[:count].lerp_(zero, 1 - beta1)
        v[:count].mul_(beta2)
        settings = (lr, beta1, beta2, eps, decay)
        _move(w[:count], m[:count], v[:count], number + 1 - age, settings)
    for whole, part in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
        whole.index_copy_(0, found, part)


def _move(w: Tensor, m: Tensor, v: Tensor, number: int, settings: tuple[float, ...]) -> None:
    """What a step does to the weight, after the moments."""
    lr, beta1, beta2, eps, decay = settings
    divisor = v.sqrt().div_((1 - beta2**number) ** 0.5).add_(eps)
    w.mul_(1 - lr * decay).addcdiv_(m, divisor, value=-lr / (1 - beta1**number))
