# SPDX-License-Identifier: Apache-2.0
"""Packed widths that are known before gates are drawn, for steps in which the host reads nothing.

A captured step has the same shapes whenever it is replayed. So every group has a capacity, the
number of units that are packed in every draw: the open ones, and the first closed ones as dummies
(z = 0), in ascending order. Dummies pass as zeros, so no result changes. As all layers take the
very same units, features of several groups may meet in a port, by concatenation, say.

With X the number of open units of a group, a sum of independent gates, the capacity is

    ceil16(E X + 4 sqrt(Var X)), at most the size of the group,

16 channels being what a tensor core's instruction takes. A draw with more open units than that does
not fit: its lists are cut off, which keeps all indices and shapes in bounds, and a flag is raised
on the device, for which see ``l0kernels.graph``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import OpenLists, open_lists
from l0kernels.gates.base import GPU_MULTIPLE, Gates, arrivals
from l0kernels.gates.draw import LEAST

SIGMAS = 4
# Of the widths of a plan: by so much less another one is worth to be captured.
WORTH = 1 / 16

Parts = list[tuple[int, int]]
"""(group, features per packed unit) of what makes up a port; group -1: features that always are."""


def capacity(mean: float, variance: float, size: int) -> int:
    """How many units of a group are packed.

    Args:
        mean: expected number of open units.
        variance: of that number.
        size: of the group; also what is returned where the others are not finite.
    """
    wanted = mean + SIGMAS * math.sqrt(variance) if variance >= 0 else math.inf
    if not wanted <= size:
        return size
    return min(size, math.ceil(max(wanted, LEAST) / GPU_MULTIPLE) * GPU_MULTIPLE)


@torch.no_grad()
def capacities(gates: Gates) -> list[int]:
    """Of every group, for the present gate parameters, which the host reads from the device."""
    p = (gates.deterministic() != 0).double() if gates.frozen else gates.open_probability()
    parts = p.split(gates.sizes)
    moments = [torch.stack((part.sum(), (part * (1 - part)).sum())) for part in parts]
    pairs = zip(torch.stack(moments).tolist(), gates.sizes, strict=True)
    whole = groups_of_ports(gates)[1]
    return [
        size if group in whole else capacity(mean, variance, size)
        for group, ((mean, variance), size) in enumerate(pairs)
    ]


class Plan:
    """The packed width of every port, and what is packed in a draw.

    Args:
        gates: that are drawn.
        capacities: units of each group that are packed, see `capacities`.
        flag: 0-d, float32, on the device of the gates; becomes 1 in a draw that does not fit, or
            that kernels find a mistake in, and stays so.
    """

    def __init__(self, gates: Gates, capacities: Sequence[int], flag: Tensor) -> None:
        self.capacities, self.flag = list(capacities), flag
        ports, _ = groups_of_ports(gates)
        self.widths = [
            sum(n if group < 0 else n * self.capacities[group] for group, n in parts)
            for parts in ports
        ]
        device = gates.log_alpha.device
        self._layout = gates.layout
        self._sizes = torch.tensor(gates.sizes, device=device)
        self._fits = torch.tensor(self.capacities, device=device)
        self._group = torch.arange(len(gates.sizes), device=device).repeat_interleave(self._sizes)

    def serves(self, needs: Sequence[int]) -> bool:
        """Whether these capacities are within the plan's, and save too little to make another."""
        fits = all(need <= mine for need, mine in zip(needs, self.capacities, strict=True))
        return fits and sum(needs) > (1 - WORTH) * sum(self.capacities)

    @torch.no_grad()
    def lists(self, z: Tensor, drawn: OpenLists) -> OpenLists:
        """What is packed, at the widths of the plan, and the flag; the host reads nothing.

        Args:
            z: gates and a final 1.
            drawn: the lists of the open ones, whose counts are below 0 where kernels found NaN.
        """
        is_open = z[:-1] != 0
        before = F.pad((~is_open).long().cumsum(0), (1, 0))  # closed ones before each gate
        starts = before.index_select(0, self._layout.group_offsets)
        count = self._sizes - starts.diff()
        place = before[1:] - starts.index_select(0, self._group)  # among the closed ones, from 1
        packed = is_open | (place <= (self._fits - count).index_select(0, self._group))
        wrong = (count > self._fits).any() | (drawn.counts < 0).any()
        self.flag.copy_(torch.maximum(self.flag, wrong.to(self.flag.dtype)))
        return open_lists(torch.cat((packed.to(z.dtype), z.new_ones(1))), self._layout)


def groups_of_ports(gates: Gates) -> tuple[list[Parts], set[int]]:
    """What makes up each port, and the groups that have to be packed whole.

    Those are the groups of ports whose width the numbers of packed units do not tell: their units
    have different numbers of features, or features have a gate beside that of their producer.
    """
    group_of = torch.arange(len(gates.sizes)).repeat_interleave(torch.tensor(gates.sizes))
    ports: list[Parts] = []
    whole: set[int] = set()

    def take_whole(features: Tensor) -> None:
        whole.update(group_of[features[features != gates.count]].tolist())

    for maps, made_by in zip(gates.port_maps, gates.port_arrivals, strict=True):
        made, extra = maps.cpu()
        parts = made_by
        if bool((extra != gates.count).any()):
            alone = arrivals(extra, gates.starts, gates.sizes, gates.count)
            if alone is not None and not bool((made != gates.count).any()):
                parts = alone
            else:
                take_whole(extra)
        if parts is None:
            take_whole(torch.cat((made, extra)))
            parts = [(-1, made.numel())]
        ports.append(parts)
    return ports, whole


__all__ = ["Plan", "capacities", "capacity"]
