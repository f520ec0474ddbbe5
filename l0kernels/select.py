# SPDX-License-Identifier: Apache-2.0
"""Kinds of units that ``convert(select=...)`` can gate; combine them with ``|``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kinds:
    """Kinds of units.

    Args:
        names: among ``"inner"`` and ``"heads"``.
    """

    names: frozenset[str]

    def __or__(self, other: Kinds) -> Kinds:
        if not isinstance(other, Kinds):
            return NotImplemented
        return Kinds(self.names | other.names)


inner = Kinds(frozenset({"inner"}))
"""Units made by one layer, or by a product of layers (gated linear units, squeeze-and-excite), and
read only by convolutions and linear layers: channels and neurons inside blocks."""

heads = Kinds(frozenset({"heads"}))
"""Attention heads; with grouped-query attention the query heads that share a key-value head."""

__all__ = ["Kinds", "heads", "inner"]
