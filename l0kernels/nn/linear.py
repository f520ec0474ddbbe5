# SPDX-License-Identifier: Apache-2.0
"""Gated linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.gates.ref import GateRef
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.matmul import linear


class GatedLinear(GatedLayer, nn.Linear):
    """``nn.Linear`` that computes open features only: y = (x * z_in) W^T + b.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``; parameters keep
            their full shape.
        in_gate: gates that multiply the input features.
        out_gate: gates of the output features; they are multiplied where the output is read, or
            here if they stand before a norm.

    Shape: x [..., packed in_features], or [..., in_features] where no producer packs it;
    y [..., packed out_features]. Behind gates before a norm x has further examples, see
    ``l0kernels.nn.constants``.

    Raises:
        ValueError: a gate has another number of features than the layer.
    """

    plain_class = nn.Linear
    knows_constants = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        in_gate: GateRef | None = None,
        out_gate: GateRef | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.connect(in_gate, out_gate)

    def _in_width(self) -> int:
        return self.in_features

    def _out_width(self) -> int:
        return self.out_features

    def resize(self, inputs: int, outputs: int) -> None:
        self.in_features, self.out_features = inputs, outputs

    def forward(self, input: Tensor) -> Tensor:
        if self.gates is None:
            return super().forward(input)
        draw = self.current_draw()
        if current_impl() == "reference":
            y = super().forward(self.mask_inputs(input, -1, draw))
            return self.mask_outputs(y, -1, draw)
        return self.compute_packed(input, -1, draw)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)
