# SPDX-License-Identifier: Apache-2.0
"""Layers with a gate for every number of their weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.gates.base import Gates
from l0kernels.gates.draw import Draw, OpenBlock
from l0kernels.gates.ref import WeightRef
from l0kernels.nn import block
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.matmul import linear


class MaskedLayer(GatedLayer):
    """Mix-in: a layer whose weight is multiplied by a gate for each of its numbers."""

    packs_alone: ClassVar[bool] = True
    gate: WeightRef | None = None

    @property
    def gates(self) -> Gates | None:
        return None if self.gate is None else self.gate.gates

    def connect_weight(self, gate: WeightRef | None) -> None:
        """Set the reference; ``gates.attach(model)`` makes it work.

        Raises:
            TypeError: a reference to gates of units.
            ValueError: the reference has another shape than the weight.
        """
        if gate is not None and not isinstance(gate, WeightRef):
            raise TypeError(
                f"{type(self).__name__}: expected gates of a weight, got {gate}; "
                f"name the shape of the weight where the gates are made"
            )
        if gate is not None and gate.shape != self.weight.shape:
            raise ValueError(
                f"{type(self).__name__}: expected gates of shape {list(self.weight.shape)}, "
                f"got {list(gate.shape)}"
            )
        self.gate = gate

    def _in_width(self) -> int:
        return self.weight.shape[1]

    def _out_width(self) -> int:
        return self.weight.shape[0]

    def resize(self, inputs: int, outputs: int) -> None:
        """Nothing: no feature is left out."""

    def current_draw(self) -> Draw:
        gates = self.gates
        assert gates is not None
        return gates.current_draw()

    def _pack(self, draw: Draw) -> tuple[Tensor, Tensor | None]:
        gate = self.gate
        assert gate is not None
        return draw.masks[gate.name](self.weight, self.compute_dtype()), self.bias

    def open_block(self, draw: Draw) -> OpenBlock | None:
        """What of the weight is computed with; None for all of it."""
        # A graph that depends on how many are open would serve one draw only.
        if torch.compiler.is_compiling() or current_impl() == "reference":
            return None
        assert self.gate is not None
        return draw.blocks.get(self.gate.name)


class MaskedLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` with a gate for every weight: y = x (W * z)^T + b.

    Outputs and inputs whose gates are all closed are left out, where that pays.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        gate: gates of the weight's shape, ``g["name"]`` of a method that has such.

    Shape: as of ``nn.Linear``.

    Raises:
        TypeError: ``gate`` is one of units. ValueError: it has another shape than the weight.
    """

    plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gate: WeightRef | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.connect_weight(gate)

    def forward(self, input: Tensor) -> Tensor:
        if self.gate is None:
            return super().forward(input)
        draw = self.current_draw()
        weight, bias = self.packed_parameters(draw)
        some = self.open_block(draw)
        if some is None:
            return linear(input, weight, bias)
        return block.linear(input, weight, bias, some)


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """``nn.Conv2d`` with a gate for every weight: y = conv(x, W * z) + b.

    Outputs and inputs whose gates are all closed are left out, where that pays, unless the
    convolution is grouped.

    Args:
        in_channels, out_channels, kernel_size, ...: as in ``nn.Conv2d``, groups included.
        gate: gates of the weight's shape, ``g["name"]`` of a method that has such.

    Shape: as of ``nn.Conv2d``.

    Raises:
        TypeError: ``gate`` is one of units. ValueError: it has another shape than the weight.
    """

    plain_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *args: Any,
        gate: WeightRef | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.connect_weight(gate)

    def forward(self, input: Tensor) -> Tensor:
        if self.gate is None:
            return super().forward(input)
        draw = self.current_draw()
        weight, bias = self.packed_parameters(draw)
        some = self.open_block(draw)
        if some is None:
            return self._conv_forward(input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return block.conv2d(input, weight, bias, some, self.stride, padding, self.dilation)


def masked_class(cls: type[nn.Module]) -> type[MaskedLayer] | None:
    """The masked class of a plain layer class, or None where there is none.

    Args:
        cls: looked up exactly: a subclass may compute something else.
    """
    return {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}.get(cls)  # pyright: ignore


__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear", "masked_class"]
