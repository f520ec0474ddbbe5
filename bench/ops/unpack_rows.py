# SPDX-License-Identifier: Apache-2.0
"""Times the gradient of a packed weight in memory that is used again, against new memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l0kernels.functional import GateLayout, open_lists
from l0kernels.ops.pack_weight.op import _LIST_BACKWARD
from l0kernels.ops.unpack_rows import unpack_rows

from .. import row_steps


@dataclass
class Draw:
    """What is open, and the gradient of what it packs."""

    z: Tensor
    index: Tensor
    maps: Tensor
    spans: list[int]
    grad: Tensor


@dataclass
class Problem:
    """A weight, draws of its output and input features, and memory for its gradient."""

    weight: Tensor
    draws: list[Draw]
    into: Tensor
    written: Tensor
    new: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: dict[str, int] = field(default_factory=lambda: {"ours": 0, "plain": 0})

    def _next(self, what: str) -> Draw:
        self.calls[what] += 1
        return self.draws[self.calls[what] % len(self.draws)]

    def ours(self) -> None:
        draw = self._next("ours")
        lists = (draw.z, draw.index, draw.maps, draw.spans)
        unpack_rows([draw.grad], [self.weight], *lists, [self.into], [self.written], True)

    def plain(self) -> None:
        draw = self._next("plain")
        lists = (draw.z, draw.index, draw.maps, draw.spans)
        self.new, _ = _LIST_BACKWARD([draw.grad], [self.weight], *lists, [True], True)


def make_problem(shape: Sequence[int], keep: float, device: torch.device | str = "cpu") -> Problem:
    """Draws a weight, and which output and input features are open in each step.

    Args:
        shape: [O, I, ...].
        keep: share of open features.
        device: where it runs.
    """
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    weight = torch.randn(*shape, device=device).to(memory_format=layout)
    draws = [make_draw(weight, keep) for _ in range(row_steps.DRAWS)]
    written = torch.zeros(shape[0], dtype=torch.bool, device=device)
    return Problem(weight, draws, torch.zeros_like(weight), written)


def make_draw(weight: Tensor, keep: float) -> Draw:
    outputs, inputs = weight.shape[:2]
    counts = [max(1, round(keep * size)) for size in (outputs, inputs)]
    z = torch.zeros(outputs + inputs + 1)
    z[torch.randperm(outputs)[: counts[0]]] = 1.0
    z[outputs + torch.randperm(inputs)[: counts[1]]] = 1.0
    z[-1] = 1.0
    gates = torch.arange(outputs + inputs)
    maps = torch.stack([gates, torch.full_like(gates, outputs + inputs)])
    offsets = torch.tensor([0, outputs, outputs + inputs])
    lists = open_lists(z, GateLayout(offsets, maps, offsets))
    counts = lists.counts.tolist()  # two at least
    spans = [0, counts[0], outputs, counts[1]]
    grad = torch.randn(*counts, *weight.shape[2:])
    if weight.dim() == 4:
        grad = grad.to(memory_format=torch.channels_last)
    z, index, maps, grad = (t.to(weight.device) for t in (z, lists.index, maps, grad))
    return Draw(z, index, maps, spans, grad)


if __name__ == "__main__":
    title = "gradient of one weight; other: how many times slower new memory is than ours"
    row_steps.main("unpack_rows", title, make_problem)
