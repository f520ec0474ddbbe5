# SPDX-License-Identifier: Apache-2.0
"""`unpack_rows`: schema, fake, public function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.unpack_rows import reference
from l0kernels.ops.unpack_rows.reference import stored_rows


def _unpack_fake(grads, weights, z, index, maps, spans, into, written, need_z):
    return torch.empty_like(z) if need_z else z.new_empty(0)


_unpack_python = reference.unpack_rows

_registry.add_op("unpack_rows")
_UNPACK = _registry.define(
    "unpack_rows(Tensor[] grads, Tensor[] weights, Tensor z, Tensor index, Tensor maps, "
    "SymInt[] spans, Tensor(a!)[] into, Tensor(b!)[] written, bool need_z) -> Tensor",
    fake=_unpack_fake,
    python=_unpack_python,
)


@torch.no_grad()
def unpack_rows(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    z: Tensor,
    index: Tensor,
    maps: Tensor,
    spans: Sequence[int],
    into: Sequence[Tensor],
    written: Sequence[Tensor],
    need_z: bool,
) -> Tensor | None:
    """The backward pass of `pack_weights` into memory where closed rows are zero already.

    Rows are those that lie in memory: output features, or input features of a matrix stored [I, O].
    A row of ``into`` that is not ``written`` is zero. Open rows are written whole; closed ones are
    set to zero if they were written before, and not touched else. So a step costs memory traffic of
    the rows that are open now or were so last time.

    Args:
        grads: dL/dpacked, as `pack_weights` packed them.
        weights, z, index, maps: as in `pack_weights`, on a CPU.
        spans: those of `pack_weights`, one after another.
        into: for each weight what becomes its gradient, with its dtype, shape and strides; dense.
        written: bool [rows] for each weight; afterwards true for all rows that are not zero.
        need_z: whether the gradient of the gates is wanted.

    Returns:
        dL/dz, shape [G + 1], or None.

    Raises:
        ValueError: memory that does not fit its weight, or other numbers of arguments.
        RuntimeError: an index out of bounds; ``into`` and ``written`` may have changed then.
    """
    _check(grads, weights, spans, into, written)
    arguments = (grads, weights, z, index, maps, spans, into, written, need_z)
    if _config.reference_asked(z):
        grad_z = reference.unpack_rows(*arguments)
    else:
        grad_z = _registry.chosen(_UNPACK)(*arguments)
    return grad_z if need_z else None


def _check(grads, weights, spans, into, written) -> None:
    counts = (len(grads), len(spans) / 4, len(into), len(written))
    if any(count != len(weights) for count in counts):
        raise ValueError(
            f"grads, spans / 4, into, written: expected {len(weights)} each as there are weights; "
            f"got {counts}"
        )
    for i, (weight, memory, rows) in enumerate(zip(weights, into, written, strict=True)):
        if not same_layout(memory, weight):
            raise ValueError(
                f"into[{i}]: expected {weight.dtype} of shape {list(weight.shape)} and strides "
                f"{weight.stride()}; got {memory.dtype} of shape {list(memory.shape)} and strides "
                f"{memory.stride()}"
            )
        count = stored_rows(weight).shape[0]
        if rows.dtype != torch.bool or rows.shape != (count,):
            raise ValueError(
                f"written[{i}]: expected bool of shape [{count}]; got {rows.dtype} of shape "
                f"{list(rows.shape)}"
            )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, device, shape and strides."""
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
