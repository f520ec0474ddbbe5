# SPDX-License-Identifier: Apache-2.0
"""References from the features of a layer to the gates of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from l0kernels.gates.base import Gates


class GateRef:
    """Which gates scale the features of one axis of a layer.

    Made by ``gates["group"]`` and combined with :meth:`expand`, ``*`` and :func:`cat`.

    Args:
        gates: the gates of the model.
        maps: one or two int64 tensors of shape [features]; entry f is the flat index of a gate
            that multiplies feature f, or ``gates.count`` where none does.
        is_before_norm: see :meth:`before_norm`.
    """

    def __init__(
        self, gates: Gates, maps: tuple[Tensor, ...], is_before_norm: bool = False
    ) -> None:
        self.gates = gates
        self.maps = maps
        self.is_before_norm = is_before_norm

    @property
    def features(self) -> int:
        """Number of features, open and closed."""
        return self.maps[0].numel()

    @property
    def z(self) -> Tensor:
        """Scale of every feature in the current draw, shape [features].

        Where every example has its own, those of the latest forward, [examples, features].
        """
        draw = self.gates.current_draw()
        z = draw.z if draw.examples is None else draw.examples.of_last()
        scale = z[..., self.maps[0].to(z.device)]
        for extra in self.maps[1:]:
            scale = scale * z[..., extra.to(z.device)]
        return scale

    @property
    def index(self) -> Tensor:
        """Packed features of the current draw in ascending order, int64 of shape [count]."""
        return self.gates.current_draw().features(self.gates.port_of(self))

    @property
    def count(self) -> int:
        """Number of packed features in the current draw (never below min(2, features)).

        On a GPU, layers may be a little wider, see ``gates.rounding``.
        """
        return self.gates.current_draw().counts[self.gates.port_of(self)]

    def expand(self, repeat: int) -> GateRef:
        """Repeat every gate over ``repeat`` neighbouring features, as flattening [C, H, W] does.

        Args:
            repeat: features per unit (H * W).

        Raises:
            ValueError: ``repeat`` is not a positive integer.
        """
        if not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"expand: expected a positive integer, got {repeat!r}")
        maps = tuple(m.repeat_interleave(repeat) for m in self.maps)
        return GateRef(self.gates, maps, self.is_before_norm)

    def before_norm(self) -> GateRef:
        """The same gates as factors of what the producer makes, before a BatchNorm that follows.

        The producer, the norm and all readers need references made by it: see
        ``l0kernels.nn.constants`` for what it means and when it is exact.

        Raises:
            ValueError: two gates meet on each feature.
        """
        if len(self.maps) > 1:
            raise ValueError("before_norm: expected one gate per feature, got a product")
        return GateRef(self.gates, self.maps, True)

    def __mul__(self, other: GateRef) -> GateRef:
        """Two gates on each feature: it is open where both are.

        Raises:
            ValueError: the references differ in features or gates, more than two gates would meet
                on one feature, or one was made by ``before_norm``.
        """
        if not isinstance(other, GateRef):
            return NotImplemented
        if other.gates is not self.gates:
            raise ValueError("product of gates: expected two references into the same gates")
        if other.features != self.features:
            raise ValueError(
                f"product of gates: expected {self.features} features, got {other.features}"
            )
        _check_after_act("product of gates", self, other)
        maps = self.maps + other.maps
        if len(maps) > 2:
            raise ValueError(f"product of gates: expected at most 2 per feature, got {len(maps)}")
        return GateRef(self.gates, maps)

    def __repr__(self) -> str:
        place = ", before_norm" if self.is_before_norm else ""
        return f"GateRef(features={self.features}, gates_per_feature={len(self.maps)}{place})"


def _check_after_act(what: str, *refs: GateRef) -> None:
    if any(ref.is_before_norm for ref in refs):
        raise ValueError(f"{what}: expected gates that multiply what is read, got before_norm()")


class WeightRef:
    """The gates of one weight, one for each of its numbers.

    Made by ``gates["group"]`` where the group has the shape of a weight.

    Args:
        gates: the gates of the model.
        name: of the group.
        shape: of the weight.
    """

    def __init__(self, gates: Gates, name: str, shape: tuple[int, ...]) -> None:
        self.gates = gates
        self.name = name
        self.shape = shape

    @property
    def z(self) -> Tensor:
        """Gate values of the current draw, of the weight's shape."""
        dtype = self.gates.log_alpha.dtype
        return self.mask(self.gates.log_alpha.new_ones(self.shape), dtype)

    def mask(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight times its gates in the current draw.

        Args:
            weight: of ``shape``.
            dtype: of the result.
        """
        return self.gates.current_draw().masks[self.name](weight, dtype)

    def __repr__(self) -> str:
        return f"WeightRef(name={self.name!r}, shape={list(self.shape)})"


def cat(*parts: GateRef | int) -> GateRef:
    """Gates of concatenated features.

    Args:
        parts: references in order of concatenation; an integer stands for that many features
            without a gate.

    Raises:
        ValueError: no reference among the parts, references into different gates, or one made by
            ``before_norm``.
    """
    refs = [p for p in parts if isinstance(p, GateRef)]
    if not refs:
        raise ValueError("cat: expected at least one GateRef, got none")
    gates = refs[0].gates
    if any(r.gates is not gates for r in refs):
        raise ValueError("cat: expected references into the same gates")
    _check_after_act("cat", *refs)
    ungated = gates.count
    depth = max(len(r.maps) for r in refs)
    rows: list[Tensor] = []
    for level in range(depth):
        pieces = []
        for part in parts:
            size = part.features if isinstance(part, GateRef) else part
            if isinstance(part, GateRef) and level < len(part.maps):
                pieces.append(part.maps[level])
            else:
                pieces.append(torch.full((size,), ungated, dtype=torch.int64))
        rows.append(torch.cat(pieces))
    return GateRef(gates, tuple(rows))
