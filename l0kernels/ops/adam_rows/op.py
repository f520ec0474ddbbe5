# SPDX-License-Identifier: Apache-2.0
"""`adam_rows` and `adam_rows_catch_up`: schemas, fakes, public functions."""

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.adam_rows import reference
from l0kernels.ops.open_rows.op import check_grad, check_missed, check_state, laid_out_like


def _step_fake(*args):
    return None


_catch_up_fake = _step_fake
_step_python = reference.adam_rows
_catch_up_python = reference.adam_rows_catch_up

_registry.add_op("adam_rows")
_STEP = _registry.define(
    "adam_rows(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, "
    "Tensor last, int now, int number, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize) -> ()",
    fake=_step_fake,
    python=_step_python,
)
_CATCH_UP = _registry.define(
    "adam_rows_catch_up(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) last, Tensor? rows, Tensor table, int now, int number, int mark) -> ()",
    fake=_catch_up_fake,
    python=_catch_up_python,
)


@torch.no_grad()
def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    last: Tensor,
    now: int,
    *,
    number: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """One step of AdamW, in place, on the rows r with ``last[r] == now + 1``; no other is read.

    With s = -1 to maximize, else 1, and t = ``number``:

        m <- beta1 m + (1 - beta1) s g,   v <- beta2 v + (1 - beta2) g^2,
        w <- (1 - lr weight_decay) w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).

    Args:
        weight: w [O, *], float32 or float64, contiguous or channels_last.
        exp_avg: m, with the weight's dtype, shape and strides.
        exp_avg_sq: v, likewise.
        grad: g, gradient of the weight, of its dtype and shape.
        last: int64 [O], see `open_rows`.
        now: number of steps so far that counters know.
        number: of this step among all of the weight, from 1.
        lr, beta1, beta2, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.

    Raises:
        TypeError: another dtype. ValueError: shapes or strides that do not fit, number < 1.

    A weight is neither copied nor differentiated here: its version counter stays as it is.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2.
    """
    check_state(weight, last, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_grad(weight, grad)
    if number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    options = (lr, beta1, beta2, eps, weight_decay, maximize)
    if _config.reference_asked(weight):
        reference.adam_rows(weight, exp_avg, exp_avg_sq, grad, last, now, number, *options)
        return
    grad = laid_out_like(weight, grad)
    _registry.chosen(_STEP)(weight, exp_avg, exp_avg_sq, grad, last, now, number, *options)


@torch.no_grad()
def adam_rows_catch_up(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last: Tensor,
    rows: Tensor | None,
    table: Tensor,
    now: int,
    *,
    number: int,
    mark: int,
) -> None:
    """Make up for steps with gradient zero that rows have missed, in place.

    A row r has missed the last n = now - last[r] steps, those with the settings ``table[-n:]``;
    ``last[r]`` becomes ``mark``. Rows with last[r] > now stay as they are. In such steps m and v
    shrink by factors that all elements share, so that w, m and v of before the first of them give

        w <- S w - m sum_t A_t / (B_t sqrt(v) + eps_t),   m <- M_n m,   v <- V_n v,

    where M_t and V_t are the products of the betas up to step t, B_t^2 = V_t / (1 - beta2_t^t'),
    t' the number of step t among all of the weight, D_t = 1 - lr_t weight_decay_t, S the product
    of all D_t, A_t = lr_t M_t / (1 - beta1_t^t') times the product of the D of later steps. In C++:
    a square root for each element, and a division for each step; terms that together are below
    rounding are left out. The reference, and thus a GPU, makes one step after the other, some
    launches each.

    Args:
        weight: [O, *], float32 or float64, contiguous or channels_last.
        exp_avg, exp_avg_sq: with the weight's dtype, shape and strides.
        last: int64 [O], see `open_rows`.
        rows: int64 [n], distinct; None: all.
        table: float64 [steps, 5]: lr, beta1, beta2, eps and weight_decay of the latest steps.
        now: number of steps so far that counters know.
        number: of the latest step among all of the weight, from 1.
        mark: ``now``, or ``now + 1`` for rows that take part in the next step.

    Raises:
        TypeError: another dtype. ValueError: shapes or strides that do not fit.
        RuntimeError or IndexError: a row out of bounds, or more missed steps than the table or
            the weight (``number``) has; nothing is changed.
    """
    check_state(weight, last, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_missed(rows, table, 5)
    arguments = (weight, exp_avg, exp_avg_sq, last, rows, table, now, number, mark)
    if _config.reference_asked(weight):
        reference.adam_rows_catch_up(*arguments)
    else:
        _registry.chosen(_CATCH_UP)(*arguments)
