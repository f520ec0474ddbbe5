# SPDX-License-Identifier: Apache-2.0
"""One draw of all gates of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from l0kernels._config import current_impl, use_impl
from l0kernels.functional import OpenLists
from l0kernels.ops.sample_gates.reference import check_draw

if TYPE_CHECKING:
    from l0kernels.gates.examples import ExampleGates
    from l0kernels.gates.prefix import Prefix

LEAST = 2
"""Closed features fill up to this width. Only where a layer has one feature is it 1."""


def engine() -> AbstractContextManager[Any]:
    """What draws: the masked reference shares the engine's draws, only its layers are PyTorch."""
    return use_impl("auto") if current_impl() == "reference" else nullcontext()


class OpenBlock(NamedTuple):
    """The rows and columns of a weight outside of which all its gates are closed.

    A few closed ones may be among them.

    Args:
        rows: output features, ascending, int64.
        columns: input features, ascending, int64.
        dense: whether the gradient of the whole weight is wanted; else it is 0 outside.
    """

    rows: Tensor
    columns: Tensor
    dense: bool


class Graph:
    """Lives as long as an autograd graph that a draw is part of, through a hook on its z."""

    def hold(self, grad: Tensor) -> None:
        """The hook: it changes nothing."""


class Draw:
    """Gate values of one draw and, for every port, the features that stay packed.

    Args:
        z: values of all gates and a final 1 for "no gate", shape [gates + 1].
        lists: packed features of all ports, see ``functional.OpenLists``.
        starts: where each port starts in them.
        selects: for each port, whether it drops features that arrive.
        training: mode of the gates.
        version: version of log_alpha that was drawn from.
        expected: penalty-weighted expected number of open gates (0-d), or None.
        drawn_from: log_alpha and key of a sampled draw, to say what is wrong with them; or None.
        widths: gives the packed widths for the counts; None: they are the same.
        index: packed features of all ports at these widths; None: those of ``lists``.
        dense: gives, for the counts, all features of the ports that stay at full width, closed
            ones among them; None: there are no such ports.
        planned: packed widths that are known before the draw, see ``gates.capacity``: the host
            does not read the counts. None: it does.

    Raises:
        ValueError: NaN in log_alpha, seed or step out of range. RuntimeError: a layout that does
        not fit the gates. Both where lists come from a GPU, which can only say so by a count
        below zero.
    """

    def __init__(
        self,
        z: Tensor,
        lists: OpenLists,
        starts: Sequence[int],
        selects: list[bool],
        training: bool,
        version: int,
        expected: Tensor | None = None,
        drawn_from: tuple[Tensor, Tensor] | None = None,
        widths: Callable[[list[int]], list[int]] | None = None,
        index: Tensor | None = None,
        dense: Callable[[list[int]], Mapping[int, Tensor]] | None = None,
        planned: Sequence[int] | None = None,
    ) -> None:
        self.differentiable = torch.is_grad_enabled()
        if self.differentiable and not z.requires_grad:
            # Constant gates too are part of the graph, so that it can be told when it is gone.
            z = z.detach().requires_grad_()
        self.z = z
        self.expected = expected
        self.training = training
        self.version = version
        # Seed and step of a sampled draw.
        self.key = None if drawn_from is None else drawn_from[1]
        self.is_planned = planned is not None
        self.counts = on_host(lists.counts) if planned is None else list(planned)
        if min(self.counts, default=0) < 0:
            raise_for(drawn_from)
        self.widths = list(self.counts) if widths is None else widths(self.counts)
        self._starts, self._lists = starts, lists
        self.whole_index = lists.index if index is None else index
        # These need no packing: their gates multiply what layers read.
        self.dense = {} if dense is None else dense(self.counts)
        self.index: list[Tensor] = []
        # Where the packed features stand among those that arrive; None where all are packed.
        self.position: list[Tensor | None] = []
        for port, (start, drops) in enumerate(zip(starts, selects, strict=False)):
            if port in self.dense:
                self.widths[port] = self.dense[port].numel()
                self.index.append(self.dense[port])
                self.position.append(None)
                continue
            width = self.widths[port]
            self.index.append(self.whole_index.narrow(0, start, width))
            self.position.append(lists.position.narrow(0, start, width) if drops else None)
        # What layers packed, to be used again; None where every forward packs anew.
        self.packed: dict[Any, tuple[Tensor, Tensor | None]] | None = None
        # What one call packed for all layers and they have not taken yet, with gradients or not.
        self.shares: dict[bool, dict[Any, Any]] = {}
        # For each group of weight gates what masks its weight, with this draw's values.
        self.masks: dict[str, Any] = {}
        # Of those weights what is to be computed with, where that is less than all.
        self.blocks: dict[str, OpenBlock] = {}
        # Where every example has gates of its own; z is 1 then, and no port is packed.
        self.examples: ExampleGates | None = None
        # What a pass under this draw has in common with one under another draw, while it runs.
        self.prefix: Prefix | None = None
        # Ran without gradients, as reentrant checkpointing does, and not yet again in backward.
        self.awaits_backward = False
        self.graph = Graph()
        if self.differentiable:
            z.register_hook(self.graph.hold)
        if "torch._dynamo" in sys.modules:
            _mark_dynamic(self.index + [p for p in self.position if p is not None])

    def tensors(self) -> list[Tensor]:
        """All that layers and operators get from the draw."""
        return [self.z, self.whole_index, *self._lists]

    def features(self, port: int) -> Tensor:
        """The packed features of a port in ascending order, without what rounds its width up."""
        return self._lists.index.narrow(0, self._starts[port], self.counts[port])


def on_host(counts: Tensor) -> list[int]:
    """The counts as integers: the only thing in a training step that the host waits for."""
    if counts.device.type != "cuda":
        return counts.tolist()
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    # Not for all that the stream has to do, and no other way of waiting goes unnoticed by
    # torch.cuda.set_sync_debug_mode.
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(counts.device))
    copied.synchronize()
    return host.tolist()


def raise_for(drawn_from: tuple[Tensor, Tensor] | None) -> NoReturn:
    """Say what is wrong with a draw whose counts are below zero."""
    if drawn_from is not None:
        log_alpha, key = drawn_from
        check_draw(log_alpha.detach(), key)
    raise RuntimeError(
        "gates: expected a layout with ascending offsets and existing gates, got a count below zero"
    )


def _mark_dynamic(tensors: list[Tensor]) -> None:
    """Widths change with every draw: tell torch.compile, so that one graph serves them all."""
    from torch._dynamo import maybe_mark_dynamic

    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)
