# SPDX-License-Identifier: Apache-2.0
"""`open_rows`: schema, fake, public function."""

from typing import Any

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.open_rows import reference

DTYPES = (torch.float32, torch.float64)


def _rows_fake(grad, last, now, written):
    return torch.library.get_ctx().new_dynamic_size()


_rows_python = reference.open_rows

_registry.add_op("open_rows")
_ROWS = _registry.define(
    "open_rows(Tensor grad, Tensor(a!) last, int now, Tensor? written) -> SymInt",
    fake=_rows_fake,
    python=_rows_python,
)


@torch.no_grad()
def open_rows(grad: Tensor, last: Tensor, now: int, written: Tensor | None = None) -> int:
    """Mark the rows that the gradient of a weight moves, and count those that it must not move.

    Row r of a weight has seen ``last[r]`` of ``now`` optimizer steps; ``last[r] == now + 1`` marks
    a row that has seen them all and takes part in the next one. A row that is not marked and whose
    gradient is not exactly zero (Inf and NaN are not) is marked if it has seen all steps; if not,
    the gradient was computed from a value that is out of date.

    Args:
        grad: [O, *], float32 or float64, rows contiguous in memory.
        last: int64 [O], changed in place.
        now: number of steps so far.
        written: bool [O]: other rows are known to be zero, and not read; None: all are read.

    Returns:
        The number of rows out of date that have a gradient; they are not marked. On a GPU the host
        waits for it.

    Raises:
        TypeError: another dtype. ValueError: shapes that do not fit.
    """
    check_rows(grad, last)
    if written is not None and (written.dtype != torch.bool or written.shape != last.shape):
        raise ValueError(
            f"written: expected bool of shape {list(last.shape)}, got {written.dtype} of shape "
            f"{list(written.shape)}"
        )
    if _config.reference_asked(grad):
        return reference.open_rows(grad, last, now, written)
    if not rows_contiguous(grad):
        grad = grad.contiguous()
    return _registry.chosen(_ROWS)(grad, last, now, written)


def rows_contiguous(tensor: Tensor) -> bool:
    """Whether each row (index of dimension 0) lies in one piece, the next one right behind it.

    So do those of contiguous and of channels_last tensors.
    """
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def check_rows(weight: Tensor, last: Tensor) -> None:
    """Raise unless ``last`` has one counter per row of the weight."""
    if weight.dtype not in DTYPES:
        raise TypeError(f"expected float32 or float64, got {weight.dtype}")
    if weight.dim() == 0 or last.dtype != torch.int64 or last.shape != weight.shape[:1]:
        raise ValueError(
            f"last: expected int64 of one entry per row of {list(weight.shape)}, "
            f"got {last.dtype} of shape {list(last.shape)}"
        )


def check_state(weight: Tensor, last: Tensor, **buffers: Tensor | None) -> None:
    """Raise unless rows of the weight and of an optimizer's buffers lie alike in memory."""
    check_rows(weight, last)
    if not rows_contiguous(weight):
        raise ValueError(
            f"weight: expected it contiguous or channels_last, got strides {weight.stride()}"
        )
    for name, buffer in buffers.items():
        if buffer is not None and _layout(buffer) != _layout(weight):
            raise ValueError(
                f"{name}: expected {weight.dtype} of shape {list(weight.shape)} and strides "
                f"{weight.stride()}, got {buffer.dtype} of shape {list(buffer.shape)} and strides "
                f"{buffer.stride()}"
            )


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def check_missed(rows: Tensor | None, table: Tensor, *of_a_step: int) -> None:
    """Raise unless a list has indices of rows, and a table numbers of the shape for each step."""
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(
            f"rows: expected int64 of one dimension, got {rows.dtype} of shape {list(rows.shape)}"
        )
    if table.dtype != torch.float64 or table.dim() == 0 or table.shape[1:] != of_a_step:
        raise ValueError(
            f"table: expected torch.float64 of shape [steps, {', '.join(map(str, of_a_step))}], "
            f"got {table.dtype} of shape {list(table.shape)}"
        )


def check_grad(weight: Tensor, grad: Tensor) -> None:
    """Raise unless a gradient has the dtype and shape of the weight."""
    if grad.shape != weight.shape or grad.dtype != weight.dtype:
        raise ValueError(
            f"grad: expected {weight.dtype} of shape {list(weight.shape)}, "
            f"got {grad.dtype} of shape {list(grad.shape)}"
        )


def laid_out_like(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides of the weight."""
    return grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
