# SPDX-License-Identifier: Apache-2.0
"""What methods share that have gates of single weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0kernels.functional import GateLayout, OpenLists, masked_weight, open_lists
from l0kernels.gates.base import Constant, Gates, uses_of
from l0kernels.gates.draw import Draw, OpenBlock
from l0kernels.gates.ref import WeightRef

# Multiplications saved for each input and output of a layer, at one position, from which leaving
# closed ones out pays: activations are copied for it. Chosen on a CPU.
LEAST_SAVED = 200


class Mask(NamedTuple):
    """The gates of one weight in one draw: scale sigmoid(beta scores)."""

    scores: Tensor
    beta: Tensor
    scale: float = 1.0
    skip_below: float = 0.0

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return masked_weight(weight, self.scores, self.beta, self.scale, self.skip_below, dtype)


class Sides(NamedTuple):
    """Which rows (outputs) and columns (inputs) of one weight have an open gate, bool."""

    rows: Tensor
    columns: Tensor


def _not_positive(alpha: Tensor) -> Tensor:
    return ~(alpha > 0)


def _times(gates: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * gates).masked_fill(gates == 0, 0).to(dtype)


class WeightGates(Gates):
    """Gates of units or of single weights, open where ``alpha`` is above 0 at test.

    Where the host knows which gates are closed, outputs and inputs of a layer whose weights are all
    closed are left out of its computation, if that saves enough (`LEAST_SAVED`): half the outputs
    and half the inputs of a 3x3 convolution from 64 to 64 channels, say.

    Args:
        groups: name -> number of units, or for gates of single weights the shape of the weight;
            all of one kind.
        common: see `Gates`.

    Raises:
        ValueError: groups of both kinds.
    """

    scale: float = 1.0
    """Value of an open gate at test."""

    def __init__(self, groups: Mapping[str, int | Sequence[int]], **common: Any) -> None:
        shapes = {name: tuple(size) for name, size in groups.items() if isinstance(size, Sequence)}
        if shapes and len(shapes) < len(groups):
            raise ValueError(
                f"groups: expected numbers of units or shapes of weights, got both: {dict(groups)}"
            )
        sizes: Any = {name: math.prod(shape) for name, shape in shapes.items()} or groups
        super().__init__(sizes, **common)
        self.shapes = shapes
        self.conv_groups = dict.fromkeys(shapes, 1)
        # Rows and columns of the weights, as gates and ports of their own.
        self._side_starts: list[int] = []
        self._side_layout: GateLayout | None = None

    # What all methods have.

    def deterministic(self) -> Tensor:
        return torch.where(self.alpha.isnan(), self.alpha, self.alpha > 0) * self.scale

    def __getitem__(self, name: str) -> Any:
        """A ``GateRef`` into a group of units, a ``WeightRef`` to that of a weight."""
        shape = self.shapes.get(name)
        return super().__getitem__(name) if shape is None else WeightRef(self, name, shape)

    def _take(
        self, layers: list[Any], names: Mapping[nn.Module, str], positions: Mapping[str, int] | None
    ) -> None:
        if not self.shapes:
            super()._take(layers, names, positions)
            return
        users = [layer.gate.name for layer in layers]
        if sorted(users) != sorted(self.shapes):
            raise ValueError(
                f"attach: expected one layer for each of {list(self.shapes)}, got {users}"
            )
        found = dict(zip(users, layers, strict=True))
        if positions is not None:
            uses = [uses_of(found[n], names[found[n]], positions) for n in self.names]
            work = torch.tensor(uses, dtype=torch.float64)
            self.unit_flops = work.repeat_interleave(torch.tensor(self.sizes))
        self.conv_groups = {name: getattr(found[name], "groups", 1) for name in self.names}
        self._plan_sides()

    def _plan_sides(self) -> None:
        sizes = [size for name in self._sided() for size in self.shapes[name][:2]]
        ends = torch.tensor([0, *sizes]).cumsum(0).to(self.log_alpha.device)
        self._side_starts = ends.tolist()
        own = torch.arange(sum(sizes), device=ends.device)
        maps = torch.stack((own, torch.full_like(own, sum(sizes))))
        self._side_layout = GateLayout(ends, maps, ends)

    def _sided(self) -> list[str]:
        """Weights of which rows and columns can be left out: not those of grouped convolutions."""
        return [name for name in self.shapes if self.conv_groups[name] == 1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        super()._apply(fn, recurse)
        if self._side_layout is not None:
            self._side_layout = GateLayout(*(fn(t) for t in self._side_layout))
        return self

    def masks_of(self, values: Tensor) -> dict[str, Any]:
        return {name: partial(_times, part) for name, part in self._parts(values).items()}

    # Draws of weights.

    def _parts(self, values: Tensor) -> dict[str, Tensor]:
        """What every weight has of these values, shape [gates], in the weight's shape."""
        # Split once: the gradients of all parts come together in one tensor.
        parts = values.split(self.sizes) if self.shapes else ()
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _draw_test_gates(self) -> None:
        """Draw the test gates of all weights, which are constants."""
        sides = self._open_sides()
        if self.frozen and self.training:
            self._settle()
            scores = Constant.apply(self.log_alpha, self.alpha)
        else:
            scores = self.alpha.detach()
        step = scores.new_full((), math.inf)
        masks = {n: Mask(part, step, self.scale) for n, part in self._parts(scores).items()}
        # What is closed gets no gradient of the weight, and its gate none either.
        self._draw_masks(masks, sides, dense=False)

    def _draw_masks(
        self, masks: dict[str, Any], sides: dict[str, Sides] | None = None, dense: bool = True
    ) -> None:
        """Make these masks the draw.

        Args:
            masks: by weight.
            sides: what is open, by weight; None: nothing is left out.
            dense: whether gradients of closed rows and columns of the weights are wanted.
        """
        if not sides:
            none = torch.zeros(0, dtype=torch.int64)  # there is nothing to wait for on a GPU
            draw = self._make_draw(self.log_alpha.new_ones(1), OpenLists(none, none, none))
        else:
            draw = self._draw_of(sides, dense)
        draw.masks = masks
        self._set_draw(draw)

    def _draw_of(self, sides: dict[str, Sides], dense: bool) -> Draw:
        assert self._side_layout is not None
        flags = torch.cat([side for pair in sides.values() for side in pair])
        z = torch.cat((flags.to(self.log_alpha), self.log_alpha.new_ones(1)))
        lists = open_lists(z, self._side_layout)
        selects = [False] * (2 * len(sides))
        mode = self.training, self.log_alpha._version
        draw = Draw(z, lists, self._side_starts, selects, *mode)
        for k, name in enumerate(sides):
            rows, columns = draw.index[2 * k : 2 * k + 2]
            outputs, inputs, *kernel = self.shapes[name]
            pairs = outputs * inputs - rows.numel() * columns.numel()
            if pairs * math.prod(kernel) > LEAST_SAVED * (outputs + inputs):
                draw.blocks[name] = OpenBlock(rows, columns, dense)
        return draw

    @torch.no_grad()
    def _open_sides(self, closed: Callable[[Tensor], Tensor] = _not_positive) -> dict[str, Sides]:
        """What gates leave open, for weights that have sides.

        Args:
            closed: which parameters have a closed gate: with one, all that are lower; default
                those of the test gates.

        Raises:
            ValueError: NaN in log_alpha (on a CPU).
        """
        if self._side_layout is None:
            self._checked_deterministic()
            return {}
        parts = {name: part.flatten(1) for name, part in self._parts(self.alpha).items()}
        # Maxima: one pass over the numbers each, and NaN stays NaN.
        rows = {name: part.amax(1) for name, part in parts.items()}
        if self.alpha.device.type == "cpu" and bool(torch.cat([*rows.values()]).isnan().any()):
            self._checked_deterministic()  # which says where
        found = {}
        for name in self._sided():
            columns = parts[name].amax(0).view(self.shapes[name][1], -1).amax(1)
            found[name] = Sides(~closed(rows[name]), ~closed(columns))
        return found


__all__ = ["Mask", "Sides", "WeightGates"]
