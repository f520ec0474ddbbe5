# SPDX-License-Identifier: Apache-2.0
"""Linear layers and convolutions whose weight is zero outside a block of rows and columns.

With the rows r and the columns c of the block, and where the weight W is zero elsewhere,

    y[r] = layer(x[c], W[r, c], b[r]), and y = b for the other outputs,
    dx[c] = the gradient of that layer's input, from dy[r], and 0 for the other inputs.

dW is that of the whole layer where it is wanted (straight-through gates learn from it what to
open), else that of the small one, and 0 outside the block. Exact, but for the order of sums; what
the other inputs hold does not matter to y and dx, Inf and NaN included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from l0kernels import _registry
from l0kernels.gates.draw import OpenBlock
from l0kernels.nn import matmul
from l0kernels.ops.pack_weight.reference import is_channels_last


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: OpenBlock) -> Tensor:
    """``torch.nn.functional.linear`` with a weight that is zero outside the block.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.
        block: rows and columns of the weight.
    """
    return _apply(x, weight, bias, block, _LINEAR)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: OpenBlock,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a weight that is zero outside the block.

    Args:
        x: [N, I, H, W] or [I, H, W].
        weight: [O, I, kh, kw].
        bias: [O] or None.
        block: rows and columns of the weight.
        stride, padding, dilation: two numbers each.
    """
    places: Any = (stride, padding, dilation)
    if x.dim() == 3:
        return conv2d(x.unsqueeze(0), weight, bias, block, *places).squeeze(0)
    layer = _Layer(
        -3,
        lambda x, w, b: F.conv2d(x, w, b, *places),
        lambda shape, w, dy: conv2d_input(shape, w, dy, *places),
        lambda x, shape, dy: conv2d_weight(x, shape, dy, *places),
    )
    return _apply(x, weight, bias, block, layer)


class _Layer(NamedTuple):
    """A layer's three products, and which dimension of its input has the features."""

    dim: int
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    dgrad: Callable[[torch.Size, Tensor, Tensor], Tensor]
    wgrad: Callable[[Tensor, torch.Size, Tensor], Tensor]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


_LINEAR = _Layer(
    -1,
    matmul.linear,
    lambda shape, w, dy: matmul.linear(dy, w.t(), None),
    lambda x, shape, dy: matmul.linear(_rows(dy).t(), _rows(x).t(), None),
)


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: OpenBlock, layer: _Layer
) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):  # the weight has its dtype
        x = x.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
    with torch.autocast(device, enabled=False):
        return _OnBlock.apply(x, weight, bias, block, layer)


class _OnBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, block: OpenBlock, layer: _Layer):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.block, ctx.layer = block, layer
        small = None if bias is None else _take(bias, 0, block.rows)
        y = layer.forward(_take(x, layer.dim, block.columns), _cut(weight, block), small)
        return _put(y, layer.dim, block.rows, weight.shape[0], bias)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        (rows, columns, dense), layer = ctx.block, ctx.layer
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        small, grad_x, grad_weight, grad_bias = _cut(weight, ctx.block), None, None, None
        some = _take(grad, layer.dim, rows)
        if need_x:
            shape = list(x.shape)
            shape[layer.dim] = columns.numel()
            grad_x = layer.dgrad(torch.Size(shape), small, some)
            grad_x = _put(grad_x, layer.dim, columns, x.shape[layer.dim])
        if need_weight and dense:
            grad_weight = layer.wgrad(x, weight.shape, grad)
        elif need_weight:
            grad_weight = layer.wgrad(_take(x, layer.dim, columns), small.shape, some)
            grad_weight = _put(grad_weight, 1 - grad_weight.dim(), columns, weight.shape[1])
            grad_weight = _put(grad_weight, -grad_weight.dim(), rows, weight.shape[0])
        if need_bias:
            others = [d for d in range(grad.dim()) if d != grad.dim() + layer.dim]
            grad_bias = grad.sum(others) if others else grad
        return grad_x, grad_weight, grad_bias, None, None


def _cut(weight: Tensor, block: OpenBlock) -> Tensor:
    return _take(_take(weight, 0, block.rows), 1, block.columns)


def _take(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Features of a tensor; itself where they are all, which the host knows."""
    if index.numel() == x.shape[dim]:
        return x
    if is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
        return x.index_select(_NHWC[dim], index).permute(0, 3, 1, 2)
    return x.index_select(dim, index)


def _put(x: Tensor, dim: int, index: Tensor, size: int, fill: Tensor | None = None) -> Tensor:
    """The opposite of `_take`: features among others that are 0, or else as `fill` says."""
    if index.numel() == size:
        return x
    last = is_channels_last(x)
    if last:
        x, dim = x.permute(0, 2, 3, 1), _NHWC[dim]
    shape = list(x.shape)
    shape[dim] = size
    full = x.new_empty(shape)
    if fill is None:
        full.zero_()
    else:
        full.copy_(fill.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]))
    full.index_copy_(dim, index, x)
    return full.permute(0, 3, 1, 2) if last else full


_NHWC = {0: 0, -4: 0, 1: 3, -3: 3}
"""Where the dimensions of rows and columns, or features, are in channels_last order."""
