# SPDX-License-Identifier: Apache-2.0
"""`gated_conv2d`: schemas, fakes, gradient, public function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.gated_conv2d import reference
from l0kernels.ops.gated_linear import spans
from l0kernels.ops.gated_linear.op import packed_axes, unpack_gradients
from l0kernels.ops.pack_weight import op as pack_weight


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of the output of a convolution; not positive if the kernel does not fit."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return height, width


def _channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _forward_fake(
    x, weight, bias, z, index, counts, maps, in_span, out_span, stride, padding, dilation,
    activation,
):  # fmt: skip
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return _channels_last(x, (x.shape[0], weight.shape[0], *size))


def _backward_fake(
    grad, x, weight, y, z, index, counts, maps, in_span, out_span, stride, padding, dilation,
    activation, need_x, need_weight, need_bias, need_z,
):  # fmt: skip
    return (
        _channels_last(x, x.shape) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
        z.new_empty(z.shape if need_z else 0),
    )


def _forward_python(
    x, weight, bias, z, index, counts, maps, in_span, out_span, stride, padding, dilation,
    activation,
):  # fmt: skip
    n_in, n_out, *axes = packed_axes(weight, index, counts, maps, in_span, out_span)
    packed_weight = _registry.chosen(pack_weight._FORWARD)(weight, z, *axes, x.dtype)
    packed_bias = None
    if bias is not None:
        packed_bias = _registry.chosen(pack_weight._FORWARD)(
            bias, z, *axes[:2], None, None, x.dtype
        )
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    y = _channels_last(x, (x.shape[0], weight.shape[0], *size)).zero_()
    packed = y.narrow(1, 0, n_out)
    x = x.narrow(1, 0, n_in)
    if x.numel() and packed.numel():
        with torch.autocast(x.device.type, enabled=False):
            found = F.conv2d(x, packed_weight, packed_bias, stride, padding, dilation)
        packed.copy_(spans.without_dummies(found, 1, z, *axes[:2]))
    elif packed_bias is not None:  # PyTorch refuses convolutions without channels
        packed.copy_(spans.along(packed_bias, 1, 4).expand_as(packed))
    if activation == "relu":
        packed.relu_()
    return y


def _backward_python(
    grad, x, weight, y, z, index, counts, maps, in_span, out_span, stride, padding, dilation,
    activation, need_x, need_weight, need_bias, need_z,
):  # fmt: skip
    n_in, n_out, *axes = packed_axes(weight, index, counts, maps, in_span, out_span)
    packed_weight = _registry.chosen(pack_weight._FORWARD)(weight, z, *axes, x.dtype)
    grad = grad.narrow(1, 0, n_out)
    if activation == "relu":
        grad = grad.masked_fill(y.narrow(1, 0, n_out) <= 0, 0)
    grad_x = _channels_last(x, x.shape).zero_() if need_x else x.new_empty(0)
    x = x.narrow(1, 0, n_in)
    grad_packed = torch.zeros_like(packed_weight) if need_weight or need_z else None
    if x.numel() and grad.numel():
        wanted = [need_x, grad_packed is not None, False]
        options = (stride, padding, dilation, False, [0, 0], 1, wanted)
        with torch.autocast(x.device.type, enabled=False):
            found = torch.ops.aten.convolution_backward(grad, x, packed_weight, None, *options)
        if need_x:
            grad_x.narrow(1, 0, n_in).copy_(found[0])
        if grad_packed is not None:
            grad_packed = found[1]
    flat = grad.permute(0, 2, 3, 1).reshape(grad.shape[0] * grad.shape[2:].numel(), n_out)
    needs = (need_weight, need_bias, need_z)
    return grad_x, *unpack_gradients(grad_packed, flat, weight, z, axes, needs)


_registry.add_op("gated_conv2d")
_FORWARD = _registry.define(
    "gated_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor z, Tensor index, Tensor counts, "
    "Tensor maps, int[] in_span, int[] out_span, int[] stride, int[] padding, int[] dilation, "
    "str activation) -> Tensor",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "gated_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? y, Tensor z, "
    "Tensor index, Tensor counts, Tensor maps, int[] in_span, int[] out_span, int[] stride, "
    "int[] padding, int[] dilation, str activation, "
    "bool need_x, bool need_weight, bool need_bias, bool need_z) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_z)",
    fake=_backward_fake,
    python=_backward_python,
)


class _GatedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, z, index, counts, maps, *options):
        y = _registry.chosen(_FORWARD)(x, weight, bias, z, index, counts, maps, *options)
        saved_y = y if options[-1] == "relu" else None
        ctx.save_for_backward(x, weight, saved_y, z, index, counts, maps)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        if grad is None:
            return (None,) * 13
        needs = ctx.needs_input_grad[:4]
        grads = _registry.chosen(_BACKWARD)(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 9


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int] | None = None,
    out_span: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """A convolution over open channels whose lists and counts stay on the device.

    y[b, n] = act(sum_k conv(x[b, k], s_k weight[index_out[n], index_in[k]]) + bias[index_out[n]]),
    where s_k = z[maps[0, i]] z[maps[1, i]] is the scale of input channel index_in[k]; outputs
    are not scaled. Only packed channels are computed, whatever the widths of x and y, so that
    a captured graph serves every draw. No result depends on what closed places of weight, bias
    and the channels of x and of the upstream gradient behind the packed ones hold.

    Gradients are those of `gated_linear` with rows of unfolded patches in place of the rows of x:
    exactly 0 at closed places of weight and bias, for channels of x behind the packed ones, and
    for the last gate.

    Cost on a GPU, with M = N * output height * output width, P = N H W, T kernel positions, the
    rest as in `gated_linear`:

        y                2 M T n k FLOP, b (P k + M O) + w T n I bytes (zeros included)
        dx               2 M T n k FLOP, b (M n + P I) + w T n I bytes
        relu's gradient  3 b M n bytes
        sums over rows   2 M T n k FLOP, b (M n + P k) + 4 s T n k bytes
        dweight, dbias   4 s T n k + w T (O I + n k) bytes: adds the slices
        lists, dz        about 40 bytes per channel each: a launch each is what they cost

    A 3x3 layer of a 28-10 wide residual network, 128 images of 640 channels at 8 x 8, in bfloat16
    with float32 weights, half of all open (s = 3), on an H200 (4.3 TB/s, 790 TFLOP/s): y, dx and
    the sums need 15.1 GFLOP, at least 19 us, and 23, 23 and 22 MB, 5 us each: tensor cores limit
    them. relu's gradient moves 16 MB, 4 us, dweight 29 MB, 7 us: memory limits those. Counted, not
    measured.

    Args:
        x: [N, capacity, H, W], float64, float32, bfloat16 or float16, fastest in channels_last;
            only the first counts[in port] channels count, and the ones of dummies (scale 0) must
            be finite.
        weight: [O, I, height, width], x's dtype; or float32 where x is bfloat16 or float16: then
            weight times scale is rounded to x's dtype. Sums are float32, float64 for float64.
        bias: [O], weight's dtype, or None.
        z: [G + 1] gates, the last one always open; float64 for float64 x, else float32.
        index: int64 [F], packed features of all ports, see `OpenLists`.
        counts: int64 [ports], packed features of each port, at most the capacity.
        maps: int64 [2, F], the two gates of each feature, see `GateLayout`.
        in_span: (start, port) of the input channels in the lists; None: all I, not scaled.
        out_span: (start, port) of the output channels; None: all O.
        stride, padding, dilation: of the convolution, one number or (height, width); padding
            is with zeros.
        activation: "none" or "relu".

    Returns:
        y [N, O, height, width], channels_last, packed as x is: channels from counts[out port] on
        and dummies are exactly 0. Differentiable in x, weight, bias and z; the gradient of x is
        channels_last.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices, spans, options or activation.
        RuntimeError: on a CPU, an index or a count out of bounds.

    Source: the path-wise gate gradient of Louizos, Welling, Kingma, "Learning sparse neural
    networks through L0 regularization" (ICLR 2018), for gates folded into weights.
    """
    in_span, out_span = list(in_span or ()), list(out_span or ())
    if weight.dim() != 4:
        raise ValueError(f"weight: expected shape [O, I, kh, kw]; got {list(weight.shape)}")
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [N, channels, H, W]; got {list(x.shape)}")
    lists = (z, index, counts, maps, in_span, out_span)
    spans.check(x, x.shape[1], weight, bias, *lists, activation)
    window = (
        _pair("stride", stride, 1),
        _pair("padding", padding, 0),
        _pair("dilation", dilation, 1),
    )
    if min(output_size(x.shape[2:], weight.shape[2:], *window)) < 1 or 0 in x.shape[2:]:
        raise ValueError(
            f"x: expected a height and width that the kernel fits into; got {list(x.shape[2:])} "
            f"with kernel {list(weight.shape[2:])}, padding {window[1]}, dilation {window[2]}"
        )
    arguments = (weight, bias, *lists, *window, activation)
    if _config.reference_asked(x):
        return reference.gated_conv2d(x, *arguments)
    return _GatedConv2d.apply(x, *arguments)


def _pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected one or two numbers of at least {least}; got {value}")
    return pair
