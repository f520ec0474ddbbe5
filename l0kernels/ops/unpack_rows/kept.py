# SPDX-License-Identifier: Apache-2.0
"""The gradient of a weight whose memory is used again when nobody has it any more."""

import threading
import weakref

import torch
from torch import Tensor

from l0kernels.ops.unpack_rows.op import same_layout
from l0kernels.ops.unpack_rows.reference import stored_rows


class KeptGradient:
    """Memory for the gradient of one weight on a CPU, and which of its rows are not zero.

    What is lent is a tensor like any other: it can be changed, kept and accumulated into. It is
    lent again only when nothing refers to its memory any more, neither itself nor a view, and its
    rows count as known only if its version counter says that nobody has changed it since it was
    written. Collectives change tensors without telling the counter: where ``torch.distributed`` is
    initialised nothing is lent.

    Args:
        weight: float32 or float64, dense.
    """

    def __init__(self, weight: Tensor) -> None:
        self._memory = torch.zeros_like(weight, requires_grad=False)
        rows = stored_rows(weight).shape[0]
        self.written = torch.zeros(rows, dtype=torch.bool, device=weight.device)
        self._borrower: weakref.ref | None = None
        self._counter: Tensor | None = None  # shares the version counter of what was lent
        self._version: int | None = None  # as it was written; None: it was not
        self._lock = threading.Lock()

    def lend(self, weight: Tensor) -> Tensor | None:
        """The memory as a tensor; None if somebody has it, or it does not fit the weight now."""
        if not same_layout(self._memory, weight) or is_distributed():
            return None
        with self._lock:
            if self._borrower is not None and self._borrower() is not None:
                return None
            if self._counter is not None and not self._is_untouched():
                self.written.fill_(True)
            # A tensor made from an array holds it as long as anything refers to its memory.
            array = self._memory.numpy()[...]
            self._borrower = weakref.ref(array)
            lent = torch.from_numpy(array)
            self._counter, self._version = lent.detach(), None
            self._counter.data = torch.empty(0)  # the counter without the memory
            return lent

    def has_written(self, lent: Tensor) -> None:
        """The lent tensor is what `written` says now."""
        self._version = lent._version

    def is_as_written(self, grad: Tensor) -> bool:
        """Whether a gradient is the lent one, and nobody has changed it; then `written` holds."""
        return grad.data_ptr() == self._memory.data_ptr() and self._is_untouched()

    def _is_untouched(self) -> bool:
        return self._counter is not None and self._counter._version == self._version


def is_distributed() -> bool:
    """Whether other processes may take part in gradients."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
