# SPDX-License-Identifier: Apache-2.0
"""`gated_linear`: schemas, fakes, gradient, public function."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.gated_linear import reference, spans
from l0kernels.ops.pack_weight import op as pack_weight


def _forward_fake(x, weight, bias, z, index, counts, maps, in_span, out_span, activation):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_fake(
    grad, x, weight, y, z, index, counts, maps, in_span, out_span, activation,
    need_x, need_weight, need_bias, need_z,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
        z.new_empty(z.shape if need_z else 0),
    )


def _forward_python(x, weight, bias, z, index, counts, maps, in_span, out_span, activation):
    n_in, n_out, *axes = packed_axes(weight, index, counts, maps, in_span, out_span)
    packed_bias = None
    if bias is not None:
        packed_bias = _registry.chosen(pack_weight._FORWARD)(
            bias, z, *axes[:2], None, None, x.dtype
        )
    y = x.new_zeros((*x.shape[:-1], weight.shape[0]))
    with torch.autocast(x.device.type, enabled=False):
        packed_weight = _registry.chosen(pack_weight._FORWARD)(weight, z, *axes, x.dtype)
        packed = F.linear(x.narrow(-1, 0, n_in), packed_weight, packed_bias)
    packed = spans.without_dummies(packed, -1, z, *axes[:2])
    y.narrow(-1, 0, n_out).copy_(packed.relu() if activation == "relu" else packed)
    return y


def _backward_python(
    grad, x, weight, y, z, index, counts, maps, in_span, out_span, activation,
    need_x, need_weight, need_bias, need_z,
):  # fmt: skip
    n_in, n_out, *axes = packed_axes(weight, index, counts, maps, in_span, out_span)
    grad = grad.narrow(-1, 0, n_out)
    if activation == "relu":
        grad = grad.masked_fill(y.narrow(-1, 0, n_out) <= 0, 0)
    rows = x.shape[:-1].numel()
    grad = grad.reshape(rows, n_out)
    grad_x, grad_packed = x.new_empty(0), None
    with torch.autocast(x.device.type, enabled=False):
        if need_x:
            packed_weight = _registry.chosen(pack_weight._FORWARD)(weight, z, *axes, x.dtype)
            grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
            packed = grad @ packed_weight
            grad_x.narrow(-1, 0, n_in).copy_(packed.reshape(*x.shape[:-1], n_in))
        if need_weight or need_z:
            grad_packed = grad.t() @ x.narrow(-1, 0, n_in).reshape(rows, n_in)
    needs = (need_weight, need_bias, need_z)
    return grad_x, *unpack_gradients(grad_packed, grad, weight, z, axes, needs)


def packed_axes(weight, index, counts, maps, in_span, out_span):
    """The packed widths, then rows, row_map, cols and col_map as `pack_weight` takes them."""
    n_in = spans.packed_count(counts, in_span, weight.shape[1])
    n_out = spans.packed_count(counts, out_span, weight.shape[0])
    rows, row_map = spans.index_and_map(index, maps, out_span, weight.shape[0], n_out)
    cols, col_map = spans.index_and_map(index, maps, in_span, weight.shape[1], n_in)
    return n_in, n_out, rows, row_map, cols, col_map


def unpack_gradients(
    grad_packed: Tensor | None,
    grad: Tensor,
    weight: Tensor,
    z: Tensor,
    axes: list[Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight, bias and z.

    Args:
        grad_packed: of the packed weight; None if neither weight nor z needs a gradient.
        grad: of the packed output before its activation, [rows, packed outputs].
        weight, z: as in `gated_linear`.
        axes: rows, row_map, cols, col_map.
        needs: whether weight, bias and z need gradients.
    """
    need_weight, need_bias, need_z = needs
    grad_weight, grad_bias, grad_z = weight.new_empty(0), weight.new_empty(0), z.new_empty(0)
    if grad_packed is not None:
        found = _registry.chosen(pack_weight._BACKWARD)(
            grad_packed, weight, z, *axes, need_weight, need_z
        )
        grad_weight = found[0] if need_weight else grad_weight
        grad_z = found[1] if need_z else grad_z
    if need_bias:
        shape_of_bias = weight.new_empty(weight.shape[0])
        total = grad.sum(0)
        gates = (z, *axes[:2], None, None)
        grad_bias = _registry.chosen(pack_weight._BACKWARD)(
            total, shape_of_bias, *gates, True, False
        )[0]
    return grad_weight, grad_bias, grad_z


_registry.add_op("gated_linear")
_FORWARD = _registry.define(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor z, Tensor index, Tensor counts, "
    "Tensor maps, int[] in_span, int[] out_span, str activation) -> Tensor",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "gated_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? y, Tensor z, "
    "Tensor index, Tensor counts, Tensor maps, int[] in_span, int[] out_span, str activation, "
    "bool need_x, bool need_weight, bool need_bias, bool need_z) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_z)",
    fake=_backward_fake,
    python=_backward_python,
)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, z, index, counts, maps, in_span, out_span, activation):
        y = _registry.chosen(_FORWARD)(
            x, weight, bias, z, index, counts, maps, in_span, out_span, activation
        )
        saved_y = y if activation == "relu" else None
        ctx.save_for_backward(x, weight, saved_y, z, index, counts, maps)
        ctx.options = (in_span, out_span, activation)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        if grad is None:
            return (None,) * 10
        needs = ctx.needs_input_grad[:4]
        grads = _registry.chosen(_BACKWARD)(grad, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 6


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int] | None = None,
    out_span: Sequence[int] | None = None,
    activation: str = "none",
) -> Tensor:
    """A linear layer over open features whose lists and counts stay on the device.

    y[m, n] = act(sum_k x[m, k] s_k weight[index_out[n], index_in[k]] + bias[index_out[n]]),
    where s_k = z[maps[0, i]] z[maps[1, i]] is the scale of input feature index_in[k]; outputs
    are not scaled. Only packed features are computed, whatever the widths of x and y, so that
    a captured graph serves every draw. No result depends on what closed places of weight, bias
    and the columns of x and of the upstream gradient behind the packed ones hold.

    With g = dL/dy, 0 where relu gave 0:
    dx[m, k] = s_k sum_n g[m, n] weight[index_out[n], index_in[k]];
    dweight[index_out[n], index_in[k]] = s_k G[n, k] with G[n, k] = sum_m g[m, n] x[m, k], exactly
    0 at closed places; dbias[index_out[n]] = sum_m g[m, n]; dz[a] = sum over the columns k scaled
    by gate a of sum_n G[n, k] weight[index_out[n], index_in[k]] times the column's other gate,
    exactly 0 for the last gate.

    Cost on a GPU, with M rows, n and k packed features of O and I = capacity, b and w bytes per
    number of x and weight, and the rows in s slices (s = 1 where O and I make many tiles):

        y                2 M n k FLOP, b M (k + O) + w n I bytes (zeros behind the packed columns)
        dx               2 M n k FLOP, b M (n + I) + w n I bytes
        relu's gradient  3 b M n bytes
        sums over rows   2 M n k FLOP, b M (n + k) + 4 s n k bytes
        dweight, dbias   4 s n k + w (O I + n k) bytes: adds the slices
        lists, dz        about 40 bytes per feature each: a launch each is what they cost

    8192 rows of 4096 features in bfloat16, half of all open, on an H200 (4.3 TB/s, 790 TFLOP/s):
    y, dx and the sums need 68.7 GFLOP, at least 87 us, and 118, 118 and 84 MB, 27, 27 and 20 us:
    tensor cores limit them, memory only below n k / (k + O) = 184. relu's gradient moves 101 MB,
    23 us, dweight 59 MB, 14 us: memory limits those. The tensor cores are used by mma.sync, whose
    own peak on Hopper is lower; float32 has fused multiply-adds instead (67 TFLOP/s, 1.0 ms each).
    Counted, not measured.

    Args:
        x: [..., capacity], float64, float32, bfloat16 or float16; only the first
            counts[in port] columns count, and the ones of dummies (scale 0) must be finite.
        weight: [O, I], x's dtype; or float32 where x is bfloat16 or float16: then weight times
            scale is rounded to x's dtype. Sums are float32, float64 for float64.
        bias: [O], weight's dtype, or None.
        z: [G + 1] gates, the last one always open; float64 for float64 x, else float32.
        index: int64 [F], packed features of all ports, see `OpenLists`.
        counts: int64 [ports], packed features of each port, at most the capacity.
        maps: int64 [2, F], the two gates of each feature, see `GateLayout`.
        in_span: (start, port) of the input features in the lists; None: all I, not scaled.
        out_span: (start, port) of the output features; None: all O.
        activation: "none" or "relu".

    Returns:
        y [..., O], packed as x is: columns from counts[out port] on and dummies are exactly 0.
        Differentiable in x, weight, bias and z.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices, spans or activation.
        RuntimeError: on a CPU, an index or a count out of bounds.

    Source: the path-wise gate gradient of Louizos, Welling, Kingma, "Learning sparse neural
    networks through L0 regularization" (ICLR 2018), for gates folded into weights.
    """
    in_span, out_span = list(in_span or ()), list(out_span or ())
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [O, I]; got {list(weight.shape)}")
    if x.dim() < 1:
        raise ValueError("x: expected shape [..., features]; got a number")
    arguments = (weight, bias, z, index, counts, maps, in_span, out_span, activation)
    spans.check(x, x.shape[-1], *arguments)
    if _config.reference_asked(x):
        return reference.gated_linear(x, *arguments)
    return _GatedLinear.apply(x, *arguments)
