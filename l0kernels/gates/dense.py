# SPDX-License-Identifier: Apache-2.0
"""Groups of which so few units are closed that it takes less time to compute them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from l0kernels.gates.rounding import Rounding

# So many rows of a product take as long as to pack its weight and to unpack the gradient, and
# reading the weight as long as some more (fitted to where dense and packed steps took the same
# time on one CPU: four networks, 4 to 1,024 rows).
ROWS_PER_PACKING = 32
ROWS_PER_READING = 16
# With more rows than these a group is packed unless all is open: layers read too much to multiply.
MOST_ROWS = 4096
# Numbers in the weights of a group for which it matters.
LEAST_WEIGHTS = 1 << 14


class DenseGroups:
    """Which groups of a model run dense in a draw, from the rows that layers got last in training.

    To pack weights and to unpack their gradients takes as long as some rows (examples, pixels,
    tokens) of the products that they are for. Where less is saved, all units are computed, and
    the gates multiply what comes into the layers that read them. With a part p of the units open
    packing pays while (1 - p) (rows + ROWS_PER_READING) > p ROWS_PER_PACKING. Only groups whose
    features meet no others can: the order of others is known to kernels alone.

    Args:
        sizes: of the groups.
        firsts: first gate of each group.
        maps: of each port, on the CPU, see ``GateLayout``.
        rounding: knows which ports carry the units of one group alone and in order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        firsts: Iterable[int],
        maps: Sequence[Tensor],
        rounding: Rounding,
    ) -> None:
        groups = {first: group for group, first in enumerate(firsts)}
        self.sizes = sizes
        # Of each port that can run dense, its group and all its features.
        self.ports = {
            port: (groups[int(m[0, 0])], torch.arange(m.shape[1]))
            for port, (m, units) in enumerate(zip(maps, rounding.ports, strict=True))
            if units is not None
        }
        # Whether layers noted their rows since the last draw, and before it: compiled ones do not.
        self._noted = self._known = False
        self._rows: list[float] | None = None
        self._least: list[float] | None = None

    def note(self, layer: Any, rows: int) -> None:
        """A layer gets so many rows."""
        self._noted = True
        if rows != layer.rows:
            layer.rows = rows
            self.forget()

    def state(self, layers: Iterable[Any]) -> list[float] | None:
        """What the next draw goes by: rows of every group, None if they are not known."""
        if self._noted and self._rows is None:
            self._rows = self.count_rows(layers)
        return self._rows if self._noted else None

    def load(self, rows: Sequence[float] | None) -> None:
        """Go on as gates with this `state` would."""
        self._rows, self._least = None if rows is None else list(rows), None
        self._noted = rows is not None

    def forget(self) -> None:
        """Have the rows of the groups counted again."""
        self._rows = self._least = None

    def next_draw(self) -> None:
        """Gates are about to be drawn for a forward."""
        self._known, self._noted = self._noted, False

    def of_draw(self, counts: Sequence[int], layers: Iterable[Any]) -> dict[int, Tensor]:
        """All features of the ports that run dense.

        Args:
            counts: open units of every group, and what may follow them.
            layers: the model's.
        """
        if not self._known:
            return {}
        least = self._least_open(layers)
        return {
            port: features
            for port, (group, features) in self.ports.items()
            if counts[group] > least[group]
        }

    def runs_dense(self, group: int, is_open: float, layers: Iterable[Any]) -> bool:
        """Whether skipping so few units costs more than it saves.

        Args:
            group: its number.
            is_open: part of its units that is open.
            layers: the model's.
        """
        return is_open * self.sizes[group] > self._least_open(layers)[group]

    def _least_open(self, layers: Iterable[Any]) -> list[float]:
        """Of every group, so many units may be open without its running dense."""
        if self._rows is None:
            self._rows = self.count_rows(layers)
        if self._least is None:
            self._least = [
                size * _least_part(rows) if 0 < rows <= MOST_ROWS else math.inf
                for size, rows in zip(self.sizes, self._rows, strict=True)
            ]
        return self._least

    def count_rows(self, layers: Iterable[Any]) -> list[float]:
        """Rows of every group, averaged over its weights; 0 for those that cannot run dense, are
        small, or that no layer has worked with.
        """
        weights, products = [0] * len(self.sizes), [0] * len(self.sizes)
        for layer in layers:
            ports = [p for p in (layer.in_port, layer.out_port) if p in self.ports]
            for group in {self.ports[port][0] for port in ports}:
                weights[group] += layer.weight.numel()
                products[group] += layer.weight.numel() * layer.rows
        return [
            product / weight if weight >= LEAST_WEIGHTS else 0.0
            for weight, product in zip(weights, products, strict=True)
        ]


def _least_part(rows: float) -> float:
    """The part of its units up to which a group of so many rows is packed."""
    saved = rows + ROWS_PER_READING
    return saved / (saved + ROWS_PER_PACKING)
