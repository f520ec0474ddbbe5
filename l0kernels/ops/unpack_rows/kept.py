# SPDX-License-Identifier: Apache-2.0
"""The gradient of a weight whose memory is used again when nobody has it any more."""

import weakref

import torch
from torch import Tensor

from l0kernels.ops.unpack_rows.op import same_layout
from l0kernels.ops.unpack_rows.reference import stored_rows


class KeptGradient:
    """Memory for the gradient of one weight on a CPU, and which of its rows are not zero.

    What is lent is a tensor like any other: it can be changed, kept and accumulated into. It is
    lent again only when nothing refers to its memory any more, neither itself nor a view, and its
    rows count as known only if `is_as_written` has said so after it was written.

    Args:
        weight: float32 or float64, dense.
    """

    def __init__(self, weight: Tensor) -> None:
        self._memory = torch.zeros_like(weight, requires_grad=False)
        self.written = torch.zeros(stored_rows(weight).shape[0], dtype=torch.bool)
        self._borrower: weakref.ref | None = None
        self._version = 0
        self._is_known = True

    def lend(self, weight: Tensor) -> Tensor | None:
        """The memory as a tensor; None if somebody has it, or it does not fit the weight now."""
        if self._borrower is not None and self._borrower() is not None:
            return None
        if not same_layout(self._memory, weight):
            return None
        if not self._is_known:
            self.written.fill_(True)
        self._is_known = False
        # A tensor made from an array holds it as long as anything refers to the tensor's memory.
        array = self._memory.numpy()[...]
        self._borrower = weakref.ref(array)
        return torch.from_numpy(array)

    def has_written(self, lent: Tensor) -> None:
        """The lent tensor is what `written` says now."""
        self._version = lent._version

    def is_as_written(self, grad: Tensor) -> bool:
        """Whether a gradient is the lent one, and nobody has changed it; then `written` holds."""
        if grad.data_ptr() != self._memory.data_ptr():
            return False
        self._is_known = grad._version == self._version
        return self._is_known
