# SPDX-License-Identifier: Apache-2.0
"""Gated convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.gates.ref import GateRef
from l0kernels.nn.base import GatedLayer


class GatedConv2d(GatedLayer, nn.Conv2d):
    """``nn.Conv2d`` that computes open channels only: y = conv(x * z_in, W) + b.

    A depthwise convolution (groups == in_channels == out_channels) passes its channels through:
    it takes ``out_gate`` only, and nothing is multiplied.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in ``nn.Conv2d``; parameters keep their full shape.
        in_gate: gates that multiply the input channels.
        out_gate: gates of the output channels; they are multiplied where the output is read.

    Shape: x [N, packed in_channels, H, W]; y [N, packed out_channels, H', W'].

    Raises:
        ValueError: a gate has another number of features than the layer, or the layer is grouped
            but not depthwise, or depthwise with ``in_gate``.
    """

    plain_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        in_gate: GateRef | None = None,
        out_gate: GateRef | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.connect(in_gate, out_gate)

    def connect(self, in_gate: GateRef | None, out_gate: GateRef | None) -> None:
        if self.groups > 1 and (in_gate is not None or not self.depthwise):
            raise ValueError(
                f"GatedConv2d: expected groups=1, or a depthwise convolution with out_gate only, "
                f"got groups={self.groups}, in_channels={self.in_channels}, "
                f"out_channels={self.out_channels}, in_gate={in_gate}"
            )
        super().connect(in_gate, out_gate)

    @property
    def depthwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every channel has its own filter, and channels pass through."""
        return 1 < self.groups == self.in_channels == self.out_channels

    def _in_width(self) -> int:
        return self.in_channels

    def _out_width(self) -> int:
        return self.out_channels

    def resize(self, inputs: int, outputs: int) -> None:
        self.in_channels, self.out_channels = inputs, outputs
        if self.groups > 1:  # depthwise
            self.groups = outputs

    def forward(self, input: Tensor) -> Tensor:
        if self.gates is None:
            return super().forward(input)
        draw = self.current_draw()
        if current_impl() == "reference":
            if self.in_port >= 0:
                input = input * self.scale(draw).to(input.dtype).view(-1, 1, 1)
            return super().forward(input)
        weight, bias = self.packed_parameters(draw)
        return self._convolve(self.select_inputs(input, -3, draw, weight), weight, bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = weight.shape[0] if self.depthwise else 1
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)
