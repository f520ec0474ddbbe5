# SPDX-License-Identifier: Apache-2.0
"""`sgd_rows` and `sgd_rows_catch_up`: schemas, fakes, public functions."""

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.open_rows.op import check_grad, check_missed, check_state, laid_out_like
from l0kernels.ops.sgd_rows import reference


def _step_fake(*args):
    return None


_catch_up_fake = _step_fake
_step_python = reference.sgd_rows
_catch_up_python = reference.sgd_rows_catch_up

_registry.add_op("sgd_rows")
_STEP = _registry.define(
    "sgd_rows(Tensor(a!) weight, Tensor(b!)? velocity, Tensor grad, Tensor last, int now, "
    "float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) "
    "-> ()",
    fake=_step_fake,
    python=_step_python,
)
_CATCH_UP = _registry.define(
    "sgd_rows_catch_up(Tensor(a!) weight, Tensor(b!)? velocity, Tensor(c!) last, Tensor? rows, "
    "Tensor table, int now, int mark) -> ()",
    fake=_catch_up_fake,
    python=_catch_up_python,
)


@torch.no_grad()
def sgd_rows(
    weight: Tensor,
    velocity: Tensor | None,
    grad: Tensor,
    last: Tensor,
    now: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """One step of SGD, in place, on the rows r with ``last[r] == now + 1``; no other is read.

    With s = -1 to maximize, else 1:

        d = s g + weight_decay w,   v <- momentum v + (1 - dampening) d,
        w <- w - lr (d + momentum v) with nesterov, w - lr v without, w - lr d without velocity.

    Args:
        weight: [O, *], float32 or float64, contiguous or channels_last.
        velocity: momentum buffer with the weight's dtype, shape and strides; None without momentum.
        grad: gradient of the weight, of its dtype and shape.
        last: int64 [O], see `open_rows`.
        now: number of steps so far.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.

    Raises:
        TypeError: another dtype. ValueError: shapes or strides that do not fit.

    A weight is neither copied nor differentiated here: its version counter stays as it is.
    """
    check_state(weight, last, velocity=velocity)
    check_grad(weight, grad)
    options = (lr, momentum, dampening, weight_decay, nesterov, maximize)
    if _config.reference_asked(weight):
        reference.sgd_rows(weight, velocity, grad, last, now, *options)
        return
    grad = laid_out_like(weight, grad)
    _registry.chosen(_STEP)(weight, velocity, grad, last, now, *options)


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
    """Make up for steps that rows have missed, in place.

    A step with gradient zero is linear in each element: (w, v) <- M (w, v). ``table[n]`` is the
    product of the last n of them, so a row r with n = now - last[r] >= 0 becomes
    ``table[n]`` (w, v), and ``last[r]`` becomes ``mark``. Rows with last[r] > now stay as they are.

    Args:
        weight: [O, *], float32 or float64, contiguous or channels_last.
        velocity: momentum buffer with the weight's dtype, shape and strides; None without momentum.
        last: int64 [O], see `open_rows`.
        rows: int64 [n], distinct; None: all.
        table: float64 [steps, 2, 2]; ``table[0]`` is the identity.
        now: number of steps so far.
        mark: ``now``, or ``now + 1`` for rows that take part in the next step.

    Raises:
        TypeError: another dtype. ValueError: shapes or strides that do not fit.
        RuntimeError or IndexError: a row out of bounds, or more missed steps than the table has;
            nothing is changed.
    """
    check_state(weight, last, velocity=velocity)
    check_missed(rows, table, 2, 2)
    arguments = (weight, velocity, last, rows, table, now, mark)
    if _config.reference_asked(weight):
        reference.sgd_rows_catch_up(*arguments)
    else:
        _registry.chosen(_CATCH_UP)(*arguments)
