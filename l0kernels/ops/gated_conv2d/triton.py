# SPDX-License-Identifier: Apache-2.0
"""`gated_conv2d` with the Triton kernels of `gated_linear`: one row per pixel."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from l0kernels import _triton
from l0kernels.ops.gated_conv2d import op
from l0kernels.ops.gated_conv2d.op import output_size
from l0kernels.ops.gated_linear.triton import (
    Geometry,
    Layer,
    Window,
    as_rows,
    float64_by,
    pointwise,
)


def _pixels(images: Tensor) -> Tensor:
    """Views [N, C, H, W] as [N H W, C]; copies if it is not channels_last."""
    return as_rows(images.permute(0, 2, 3, 1))


def _layer(x: Tensor, weight: Tensor, lists: Sequence[Any], options: Sequence[Any]) -> Layer:
    stride, padding, dilation = (tuple(option) for option in options)
    window = Window(tuple(weight.shape[2:]), stride, padding, dilation)
    size = (x.shape[2], x.shape[3])
    geometry = Geometry(x.shape[0], size, output_size(size, *window), window)
    if window == Window():
        geometry = pointwise(x.shape[0] * prod(size))
    return Layer(weight, *lists, in_capacity=x.shape[1], geometry=geometry)


@float64_by(op._forward_python)
def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int],
    out_span: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """The raw operator `gated_conv2d`."""
    lists = (z, index, counts, maps, in_span, out_span)
    layer = _layer(x, weight, lists, (stride, padding, dilation))
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = op._channels_last(x, (x.shape[0], weight.shape[0], *size))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        with _triton.on_device_of(x):
            layer.run(_pixels(x), bias, activation == "relu", _pixels(y), False)
    return y


@float64_by(op._backward_python)
def gated_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int],
    out_span: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator `gated_conv2d_backward`."""
    lists = (z, index, counts, maps, in_span, out_span)
    layer = _layer(x, weight, lists, (stride, padding, dilation))
    grad_x = op._channels_last(x, x.shape) if need_x else x.new_empty(0)
    of_relu = _pixels(y).contiguous() if activation == "relu" and y is not None else None
    needs = (need_weight, need_bias, need_z)
    grad_rows = _pixels(grad_x) if need_x else None
    with _triton.on_device_of(x):
        grads = layer.backward(_pixels(grad), _pixels(x), of_relu, grad_rows, needs)
    return grad_x, *grads
