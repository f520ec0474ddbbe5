# SPDX-License-Identifier: Apache-2.0
"""Convolutions that pack their weight again in backward instead of keeping it.

A packed weight is a copy: kept for backward, the copies of a model with gates on both sides of
each weight take about a fourth of its parameters' memory at half open. Packing costs a few
operations for each weight, a convolution as many for each weight and pixel: where pixels are many
packing twice costs nothing that can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from l0kernels.functional import pack_weights
from l0kernels.gates.base import Gates
from l0kernels.gates.draw import Draw
from l0kernels.nn import packing

if TYPE_CHECKING:
    from l0kernels.nn.base import GatedLayer

LEAST_PIXELS = 1 << 13
"""Of a batch: a weight is used so often, where packing it again takes less than 1 % of that."""
LEAST_NUMBERS = 1 << 16
"""In a packed weight: below, the call takes longer than packing and there is little to free."""


class Options(NamedTuple):
    """How a convolution moves over its input: one number for each dimension."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def pays(x: Tensor, weight: Tensor, draw: Draw) -> bool:
    """Whether a convolution should let go of its packed weight.

    On a CPU only: on a GPU launches would be added, and the widths of a captured step are fixed.

    Args:
        x: [N, I, *pixels].
        weight: [O, I, *kernel], packed.
        draw: that it was packed for.
    """
    return (
        x.numel() // max(1, x.shape[1]) >= LEAST_PIXELS
        and weight.numel() >= LEAST_NUMBERS
        and x.device.type == "cpu"
        and draw.packed is None
        and not draw.is_planned
        and torch.is_grad_enabled()
    )


def keeps_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a convolution computes in the weight's dtype, and does not refuse to.

    Args:
        x: [N, I, *pixels].
        weight: packed.
        bias: packed or None.
    """
    if torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        return weight.dtype == low and x.dtype in (torch.float32, low)
    return x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)


def packer(layer: GatedLayer, gates: Gates, draw: Draw, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A function that packs the weight of a layer as it was packed for a draw.

    It refers to tensors alone: with the layer in it, what a hook keeps of an output would keep
    the model alive through the graph, where Python's garbage collector does not see.

    Raises:
        RuntimeError: from the function, if the weight or the gates were modified in place since.
    """
    part = packing.weight_part(layer, gates, draw)
    assert part is not None
    name, span = type(layer).__name__, part.span
    full, z, index, maps = part.full, draw.z, draw.whole_index, gates.layout.maps
    inputs = full, z, index, maps
    versions = [tensor._version for tensor in inputs]

    def pack() -> Tensor:
        if [tensor._version for tensor in inputs] != versions:
            raise RuntimeError(
                f"{name}: expected weights and gates as they were packed, got some modified in "
                "place since; run backward before the optimizer step"
            )
        return pack_weights([full], z, index, maps, [span], dtype)[0]

    return pack


class Convolution(torch.autograd.Function):
    """A convolution, y = conv(x, W) + b, that saves x alone.

    Its backward pass consists of differentiable operators, so that gradients of the input can be
    differentiated as those of PyTorch's convolution can.

    Args:
        x: [N, I, *pixels].
        weight: [O, I, *kernel], of x's dtype.
        bias: [O], of x's dtype, or None.
        options: of the convolution.
        pack: gives ``weight`` again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, options, pack):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.pack, ctx.options, ctx.outputs = pack, options, weight.shape[0]
        stride, padding, dilation = options
        return torch.convolution(
            x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups=1
        )

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        if grad is None:
            return (None,) * 5
        (x,) = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        grads = torch.ops.aten.convolution_backward(
            grad,
            x,
            ctx.pack(),
            [ctx.outputs],
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            1,
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None
