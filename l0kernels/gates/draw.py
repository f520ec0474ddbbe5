# SPDX-License-Identifier: Apache-2.0
"""One draw of all gates of a model."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from l0kernels.functional import GateLayout, OpenLists


class Graph:
    """Marks an autograd graph that holds a draw: alive and not yet run backward.

    The draw's z keeps it alive through a backward hook, so it dies with the graph.
    """

    def __init__(self) -> None:
        self.done = False

    def finish(self, grad: Tensor) -> None:
        self.done = True


class Draw:
    """Gate values of one draw and, for every port, the features that stay packed.

    Args:
        z: values of all gates and a final 1 for "no gate", shape [gates + 1].
        lists: packed features of all ports, see ``functional.OpenLists``.
        layout: the ports.
        selects: for each port, whether it drops features that arrive.
        expected: penalty-weighted expected number of open gates (0-d), or None.
        version: version of log_alpha that was drawn from.
    """

    def __init__(
        self,
        z: Tensor,
        lists: OpenLists,
        layout: GateLayout,
        selects: list[bool],
        expected: Tensor | None = None,
        version: int = -1,
    ) -> None:
        self.z = z
        self.expected = expected
        self.version = version
        starts = layout.port_offsets.tolist()
        counts = lists.counts.tolist()
        spans = list(zip(starts, counts, selects, strict=False))
        self.index = [lists.index.narrow(0, start, count) for start, count, _ in spans]
        # Where the packed features stand among those that arrive; None where all are packed.
        self.position = [
            lists.position.narrow(0, start, count) if drops else None
            for start, count, drops in spans
        ]
        self.packed: dict[Any, tuple[Tensor, Tensor | None]] | None = None
        self.graph = Graph()
        if z.requires_grad:
            z.register_hook(self.graph.finish)
        if "torch._dynamo" in sys.modules:
            _mark_dynamic(self.index + [p for p in self.position if p is not None])


def _mark_dynamic(tensors: list[Tensor]) -> None:
    """Widths change with every draw: tell torch.compile, so that one graph serves them all."""
    from torch._dynamo import maybe_mark_dynamic

    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)
