# SPDX-License-Identifier: Apache-2.0
"""Packed widths rounded up, for libraries that are slow at widths they have not met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l0kernels.functional import OpenLists


class Units(NamedTuple):
    """What a port whose widths can be rounded carries: the units of one group.

    Args:
        size: of the group.
        repeat: features per unit, next to each other.
    """

    size: int
    repeat: int


class Rounding:
    """Rounds the number of packed units of a group up to a multiple; dummies make up for it.

    Libraries prepare each convolution anew for every width, and odd widths are slow. The first
    closed units follow the open ones: they pass as zeros, as the dummies of narrow layers do,
    so no result changes. A group is rounded if all its ports carry its units alone and in order;
    where features of several groups meet, only the kernels know their order.

    A group of which all units are packed whatever is drawn keeps their order: at that width
    packed features may meet those of other layers, one by one.

    Args:
        maps: of each port, on the CPU, see `GateLayout`.
        ports: what each port carries, None for one that is not rounded.
    """

    def __init__(self, maps: Sequence[Tensor], ports: Sequence[Units | None]) -> None:
        self.ports = list(ports)
        sizes = torch.tensor([m.shape[1] for m in maps])
        starts = torch.tensor([0, *sizes.tolist()]).cumsum(0)[:-1]
        number = torch.arange(len(maps)).repeat_interleave(sizes)
        self.gates = torch.cat([m[0] for m in maps])
        self.first, self.number = starts[number], number
        # Open features of a port come before its closed ones, ports one after the other.
        self.order = (2 * number).int()
        self._rules: _Rules | None = None

    @classmethod
    def of(cls, maps: Sequence[Tensor], selects: Sequence[bool], sizes: dict[int, int]) -> Rounding:
        """The rounding of a model's ports.

        Args:
            maps: of each port, on the CPU.
            selects: whether a port has gates beside those that features are born with.
            sizes: of the groups, by their first gate.
        """
        found = [None if s else _units(m[0], sizes) for m, s in zip(maps, selects, strict=True)]
        others = [m.flatten() for m, units in zip(maps, found, strict=True) if units is None]
        exact = set(torch.cat(others).tolist()) if others else set()

        def rounded(gates: Tensor, units: Units | None) -> Units | None:
            return None if units is None or exact.intersection(gates.tolist()) else units

        return cls(maps, [rounded(m[0], units) for m, units in zip(maps, found, strict=True)])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the tensors, as `nn.Module._apply` moves a module's."""
        for name in ("gates", "first", "order"):
            setattr(self, name, fn(getattr(self, name)))
        self._rules = None

    def multiples(self, multiple_of: Callable[[int], int]) -> list[int]:
        """What the width of every port is rounded up to multiples of; 1: it is not.

        Args:
            multiple_of: maps the size of a group to that of its ports.
        """
        return [1 if units is None else multiple_of(units.size) for units in self.ports]

    def index(self, z: Tensor, lists: OpenLists, multiples: Sequence[int]) -> Tensor:
        """The features of all ports as ``lists`` has them; of rounded ports the open ones first,
        then the closed ones, or all in order where all are packed.
        """
        rules = self._rules
        if rules is None or rules.multiples != multiples:
            rules = self._rules = self._rules_for(multiples)
        closed = z.detach().index_select(0, self.gates) == 0
        key = self.order + (closed & rules.open_first)
        order = torch.sort(key, stable=True).indices - self.first
        return torch.where(rules.is_rounded, order, lists.index)

    def _rules_for(self, multiples: Sequence[int]) -> _Rules:
        pairs = list(zip(multiples, self.ports, strict=True))
        rounded = torch.tensor([m > 1 for m, _ in pairs])
        varies = torch.tensor([units is not None and 1 < m < units.size for m, units in pairs])
        flags = [flag[self.number] for flag in (rounded, varies)]
        if self.gates.is_cuda:  # the host does not wait
            flags = [flag.pin_memory().to(self.gates.device, non_blocking=True) for flag in flags]
        return _Rules(list(multiples), *flags)

    def widths(self, counts: Sequence[int], multiples: Sequence[int]) -> list[int]:
        """The packed widths for the numbers of features that kernels counted.

        Args:
            counts: of every port.
            multiples: see `multiples`.
        """
        return [
            count if units is None else _rounded(count, units, multiple)
            for count, units, multiple in zip(counts, self.ports, multiples, strict=True)
        ]


class _Rules(NamedTuple):
    """For these multiples: whose features are listed here, and of whom the open ones first."""

    multiples: list[int]
    is_rounded: Tensor
    open_first: Tensor


def _rounded(count: int, units: Units, multiple: int) -> int:
    packed = count // units.repeat
    return min(units.size, -(-packed // multiple) * multiple) * units.repeat


def _units(gates: Tensor, sizes: dict[int, int]) -> Units | None:
    """The group whose units these features are, in order; None for other features."""
    size = sizes.get(int(gates[0])) if gates.numel() else None
    if size is None or gates.numel() % size:
        return None
    repeat = gates.numel() // size
    inorder = gates[0] + torch.arange(size).repeat_interleave(repeat)
    return Units(size, repeat) if torch.equal(gates, inorder) else None
