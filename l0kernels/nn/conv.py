# SPDX-License-Identifier: Apache-2.0
"""Gated convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.gates.draw import Draw
from l0kernels.gates.ref import GateRef
from l0kernels.nn import repack
from l0kernels.nn.base import GatedLayer


class _GatedConv(GatedLayer, nn.modules.conv._ConvNd):
    """A convolution that computes open channels only: y = conv(x * z_in, W) + b.

    A depthwise convolution (groups == in_channels == out_channels) passes its channels through:
    it takes ``out_gate`` only, and nothing is multiplied.

    Args:
        in_channels, out_channels, kernel_size, ...: as in the plain class; parameters keep their
            full shape.
        in_gate: gates that multiply the input channels.
        out_gate: gates of the output channels; they are multiplied where the output is read, or
            here if they stand before a norm.

    Shape: x [N, packed in_channels, ...]; y [N, packed out_channels, ...]; N may be left out.
    Behind gates before a norm x has further examples, see ``l0kernels.nn.constants``.

    Raises:
        ValueError: a gate has another number of features than the layer, or the layer is grouped
            but not depthwise, or depthwise with ``in_gate`` or gates before a norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *args: Any,
        in_gate: GateRef | None = None,
        out_gate: GateRef | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        self.connect(in_gate, out_gate)

    def connect(self, in_gate: GateRef | None, out_gate: GateRef | None) -> None:
        before_norm = out_gate is not None and out_gate.is_before_norm
        if self.groups > 1 and (in_gate is not None or before_norm or not self.depthwise):
            raise ValueError(
                f"{type(self).__name__}: expected groups=1, or a depthwise convolution with "
                f"out_gate only, not before a norm, got groups={self.groups}, "
                f"in_channels={self.in_channels}, out_channels={self.out_channels}, "
                f"in_gate={in_gate}, out_gate={out_gate}"
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

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.gates is None:
            return super().forward(input, *args, **kwargs)
        draw, dim = self.current_draw(), self.feature_dim
        if current_impl() == "reference":
            y = super().forward(self.mask_inputs(input, dim, draw), *args, **kwargs)
            return self.mask_outputs(y, dim, draw)
        return self.compute_packed(input, dim, draw, *args, **kwargs)

    @property
    def feature_dim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return -len(self.kernel_size) - 1

    def packed_groups(self, weight: Tensor) -> int:
        """A depthwise convolution has a group for every packed channel."""
        return weight.shape[0] if self.depthwise else 1


class _GatedForwardConv(_GatedConv):
    __doc__ = _GatedConv.__doc__
    knows_constants = True
    _function: ClassVar[Callable[..., Tensor]]

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        groups = self.packed_groups(weight)
        return self._function(x, weight, bias, self.stride, padding, self.dilation, groups)

    def compute_drawn(
        self, draw: Draw, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        # Asked first: compiled code would be made anew for every answer to the other questions.
        if torch.compiler.is_compiling() or not self._packs_again(draw, x, weight, bias):
            return self.compute(x, weight, bias)
        assert self.gates is not None
        x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        pack = repack.packer(self, self.gates, draw, weight.dtype)
        padding = cast("tuple[int, ...]", self.padding)
        options = repack.Options(self.stride, padding, self.dilation)
        return repack.Convolution.apply(x, weight, bias, options, pack)

    def _packs_again(self, draw: Draw, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether that pays, its weight is a copy, and its convolution a plain one of a batch."""
        return (
            repack.pays(x, weight, draw)
            and self.packs_together
            and weight is not self._parameters.get("weight", weight)
            and self.groups == 1
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and x.dim() == weight.dim()
            and type(self).compute is _GatedForwardConv.compute
            and repack.keeps_dtype(x, weight, bias)
        )


class GatedConv1d(_GatedForwardConv, nn.Conv1d):
    __doc__ = _GatedConv.__doc__
    plain_class = nn.Conv1d
    _function = staticmethod(F.conv1d)


class GatedConv2d(_GatedForwardConv, nn.Conv2d):
    __doc__ = _GatedConv.__doc__
    plain_class = nn.Conv2d
    _function = staticmethod(F.conv2d)


class GatedConvTranspose2d(_GatedConv, nn.ConvTranspose2d):
    __doc__ = _GatedConv.__doc__
    plain_class = nn.ConvTranspose2d

    @property
    def stored_in_out(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight is [in, out, kh, kw]; a depthwise one is [channels, 1, kh, kw]."""
        return self.groups == 1

    def uses(self, positions: int) -> float:
        # A weight is used at every input position; these are stride times fewer.
        return positions / math.prod(self.stride)

    def compute(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        padding = self._output_padding(
            x,
            output_size,
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            2,
            self.dilation,  # pyright: ignore[reportArgumentType]
        )
        groups = self.packed_groups(weight)
        options = (self.stride, self.padding, padding, groups, self.dilation)
        return F.conv_transpose2d(x, weight, bias, *options)  # pyright: ignore[reportArgumentType]
