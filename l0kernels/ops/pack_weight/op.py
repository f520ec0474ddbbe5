# SPDX-License-Identifier: Apache-2.0
"""`pack_weight` and `pack_weights`: schemas, fakes, gradients, public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.pack_weight import reference
from l0kernels.ops.pack_weight.backward import grouped, list_backward, rounded, unpack
from l0kernels.ops.pack_weight.reference import (
    Axes,
    Span,
    axes_of,
    is_channels_last,
    is_transposed,
)
from l0kernels.ops.unpack_rows import KeptGradient, unpack_rows

_OUTPUT_DTYPES = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


def _forward_fake(weight, z, rows, row_map, cols, col_map, dtype):
    height = None if rows is None else rows.shape[0]
    return _empty_packed(weight, height, None if cols is None else cols.shape[0], dtype)


def _empty_packed(weight, height, width, dtype) -> Tensor:
    shape = list(weight.shape)
    if height is not None:
        shape[0] = height
    if width is not None:
        shape[1] = width
    if is_transposed(weight):
        return torch.empty(shape[::-1], dtype=dtype, device=weight.device).t()
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=weight.device, memory_format=layout)


def _backward_fake(grad, weight, z, rows, row_map, cols, col_map, need_weight, need_z):
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    return grad_weight, torch.empty_like(z) if need_z else weight.new_empty(0)


def _list_forward_fake(weights, z, index, maps, spans, dtype):
    return [
        _empty_packed(
            weight,
            span.row_count if span.row_start >= 0 else None,
            span.col_count if span.col_start >= 0 else None,
            dtype,
        )
        for weight, span in zip(weights, grouped(spans), strict=True)
    ]


def _list_backward_fake(grads, weights, z, index, maps, spans, need_weights, need_z):
    grad_weights = [
        torch.empty_like(weight) if needed else weight.new_empty(0)
        for weight, needed in zip(weights, need_weights, strict=True)
    ]
    return [*grad_weights, torch.empty_like(z) if need_z else z.new_empty(0)]


def _forward_python(weight, z, rows, row_map, cols, col_map, dtype):
    packed = _forward_fake(weight, z, rows, row_map, cols, col_map, dtype)
    return packed.copy_(reference.pack_weight(weight, z, rows, row_map, cols, col_map, dtype))


def _backward_python(grad, weight, z, rows, row_map, cols, col_map, need_weight, need_z):
    axes = Axes(rows, row_map, cols, col_map)
    grad_weight, grad_z = unpack(grad, weight, z, axes, need_weight, need_z)
    return grad_weight, rounded(grad_z, z) if need_z else weight.new_empty(0)


def _list_forward_python(weights, z, index, maps, spans, dtype):
    return [
        _forward_python(weight, z, *axes_of(weight, index, maps, span), dtype)
        for weight, span in zip(weights, grouped(spans), strict=True)
    ]


_list_backward_python = list_backward

_registry.add_op("pack_weight")
_FORWARD = _registry.define(
    "pack_weight(Tensor weight, Tensor? z, Tensor? rows, Tensor? row_map, Tensor? cols, "
    "Tensor? col_map, ScalarType dtype) -> Tensor",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "pack_weight_backward(Tensor grad, Tensor weight, Tensor? z, Tensor? rows, Tensor? row_map, "
    "Tensor? cols, Tensor? col_map, bool need_weight, bool need_z) "
    "-> (Tensor grad_weight, Tensor grad_z)",
    fake=_backward_fake,
    python=_backward_python,
)
_LIST_FORWARD = _registry.define(
    "pack_weights(Tensor[] weights, Tensor z, Tensor index, Tensor maps, SymInt[] spans, "
    "ScalarType dtype) -> Tensor[]",
    fake=_list_forward_fake,
    python=_list_forward_python,
)
_LIST_BACKWARD = _registry.define(
    "pack_weights_backward(Tensor[] grads, Tensor[] weights, Tensor z, Tensor index, Tensor maps, "
    "SymInt[] spans, bool[] need_weights, bool need_z) -> Tensor[]",
    fake=_list_backward_fake,
    python=_list_backward_python,
)


class _PackWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, z, rows, row_map, cols, col_map, dtype):
        ctx.save_for_backward(weight, z, rows, row_map, cols, col_map)
        ctx.set_materialize_grads(False)
        return _registry.chosen(_FORWARD)(weight, z, rows, row_map, cols, col_map, dtype)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        need_weight, need_z = ctx.needs_input_grad[:2]
        if grad is None:
            return (None,) * 7
        grad_weight, grad_z = _registry.chosen(_BACKWARD)(
            grad, *ctx.saved_tensors, need_weight, need_z
        )
        return (
            grad_weight if need_weight else None,
            grad_z if need_z else None,
            *(None,) * 5,
        )


def _versions(tensors) -> list[int]:
    """Version counters; tensors of inference mode have none, and no backward pass either."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class _PackWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, index, maps, spans, dtype, kept, *weights):
        # Plain references instead of saved tensors: parts of one call may be used by several
        # backward passes, and recomputation in backward must find as many saved tensors as there
        # were, whether it makes the call or not.
        ctx.inputs, ctx.spans, ctx.kept = (z, index, maps, *weights), spans, kept
        if not torch.compiler.is_compiling():  # compiled graphs save and check these themselves
            ctx.versions = _versions(ctx.inputs)
        ctx.set_materialize_grads(False)
        return tuple(_registry.chosen(_LIST_FORWARD)(weights, z, index, maps, spans, dtype))

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        if not torch.compiler.is_compiling() and _versions(ctx.inputs) != ctx.versions:
            raise RuntimeError(
                "pack_weights: expected weights and gates as they were packed, got some modified "
                "in place since; run backward before the optimizer step"
            )
        z, _, _, *weights = ctx.inputs
        need_z, _, _, _, _, _, *need_weights = ctx.needs_input_grad
        need_z = need_z and any(grad is not None for grad in grads)
        spans = grouped(ctx.spans)
        results: list[Tensor | None] = [None] * len(weights)
        lent = _lent(ctx.kept, weights, grads, need_weights)
        grad_z = _unpack_into(ctx, lent, grads, need_z, results) if lent else None
        # What neither a weight nor the gates ask for is not computed.
        chosen = [
            i
            for i, grad in enumerate(grads)
            if grad is not None
            and i not in lent
            and (need_weights[i] or (need_z and spans[i].col_start >= 0))
        ]
        if chosen:
            others = _unpack_new(ctx, chosen, grads, need_weights, need_z, results)
            grad_z = others if grad_z is None else grad_z + others
        elif grad_z is None and need_z:
            grad_z = torch.zeros_like(z)
        return grad_z if need_z else None, None, None, None, None, None, *results


def _lent(kept, weights, grads, need_weights) -> dict[int, Tensor]:
    """Memory for the gradients of those weights that have some which nobody uses."""
    if kept is None or _config.current_impl() not in ("auto", "cpp"):
        return {}
    wanted = [
        i
        for i, grad in enumerate(grads)
        if grad is not None and need_weights[i] and kept[i] is not None
    ]
    found = {i: kept[i].lend(weights[i]) for i in wanted}
    return {i: memory for i, memory in found.items() if memory is not None}


def _unpack_into(ctx, lent, grads, need_z, results) -> Tensor | None:
    z, index, maps, *weights = ctx.inputs
    spans = grouped(ctx.spans)
    grad_z = unpack_rows(
        [grads[i] for i in lent],
        [weights[i] for i in lent],
        z,
        index,
        maps,
        [number for i in lent for number in spans[i]],
        list(lent.values()),
        [ctx.kept[i].written for i in lent],
        need_z,
    )
    for i, memory in lent.items():
        ctx.kept[i].has_written(memory)
        results[i] = memory
    return grad_z


def _unpack_new(ctx, chosen, grads, need_weights, need_z, results) -> Tensor:
    z, index, maps, *weights = ctx.inputs
    spans = grouped(ctx.spans)
    *grad_weights, grad_z = _registry.chosen(_LIST_BACKWARD)(
        [grads[i] for i in chosen],
        [weights[i] for i in chosen],
        z,
        index,
        maps,
        [number for i in chosen for number in spans[i]],
        [need_weights[i] for i in chosen],
        need_z,
    )
    for i, grad_weight in zip(chosen, grad_weights, strict=True):
        results[i] = grad_weight if need_weights[i] else None
    return grad_z


def pack_weight(
    weight: Tensor,
    z: Tensor | None = None,
    rows: Tensor | None = None,
    row_map: Tensor | None = None,
    cols: Tensor | None = None,
    col_map: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gathers the open rows and columns of a weight, scaled by the gates of its columns.

    packed[r, c] = weight[rows[r], cols[c]] s_c with s_c = z[col_map[0, i]] z[col_map[1, i]] at
    i = cols[c]. Rows are not scaled. Rows and columns whose own scale is 0 (dummies) are exactly
    0, whatever the weight holds there. So a layer that reads x z, with x packed, is the plain
    layer on x with the packed weight.

    The backward pass gives, from g = dL/dpacked in one sweep,
    dweight[rows[r], cols[c]] = g[r, c] s_c and exactly 0 at all closed places, and
    dz[a] = sum over the columns c scaled by gate a of <g[:, c], weight[rows, cols[c]]> times the
    column's other gate; exactly 0 from columns with s_c = 0 and for the last entry of z. Sums run
    in a fixed order whatever the number of threads.

    Args:
        weight: [O, I, *kernel], 2 to 5 dimensions, or [O] (rows only); float64, float32, bfloat16
            or float16.
        z: [G + 1] gates, the last one always open; float64 for float64 weights, else float32.
            None: nothing is scaled.
        rows: int64 [n], the output features to pack, distinct; None: all.
        row_map: int64 [2, O], the two gates of each output feature; None: no row is a dummy.
        cols: int64 [m], the input features to pack, distinct; None: all.
        col_map: int64 [2, I], the two gates of each input feature; None: columns are not scaled.
        dtype: of the result; default weight's. float32 weights pack to bfloat16 and float16 too.

    Returns:
        [n, m, *kernel]: channels_last if the weight is 4-D and strided so, and on a CPU stored
        [m, n] if the weight is a matrix stored [I, O]; else contiguous.
        Differentiable in weight and z; the gradient of weight has weight's strides.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices, maps without z, columns of a
        1-D weight. RuntimeError: an index out of bounds (on a GPU it counts as closed).

    On a GPU this is `pack_weights` of one weight, which says what that costs.

    Source: the path-wise gate gradient of Louizos, Welling, Kingma, "Learning sparse neural
    networks through L0 regularization" (ICLR 2018), for gates folded into weights.
    """
    dtype = dtype or weight.dtype
    _check(weight, z, rows, row_map, cols, col_map, dtype)
    if _config.reference_asked(weight):
        return reference.pack_weight(weight, z, rows, row_map, cols, col_map, dtype)
    return _PackWeight.apply(weight, z, rows, row_map, cols, col_map, dtype)


def pack_weights(
    weights: Sequence[Tensor],
    z: Tensor,
    index: Tensor,
    maps: Tensor,
    spans: Sequence[Sequence[int]],
    dtype: torch.dtype | None = None,
    kept: Sequence[KeptGradient | None] | None = None,
) -> list[Tensor]:
    """Packs the weights of a whole model as `pack_weight` packs one, in one call.

    The gradient of z is the sum over the weights, in one fixed order.

    On a GPU, CUDA C++ takes one launch forward and two backward, the second for z, for every 184
    weights. Memory limits them: a packed number costs one multiplication forward, one and a
    float64 fma backward. Let weights of N numbers have a share a of open features on both axes,
    and w and p bytes per number, full and packed. Forward moves a w N (whole open rows) and
    a^2 p N bytes; backward a^2 p N, a w N and w N (zeros included), plus sums of products, 8 bytes
    for at most 64 chunks of each line, that the second launch reads. The 24 gated 3x3 weights of a
    28-10 wide residual network (36.2 million numbers), half open, float32 to bfloat16: 90 MB
    forward, at least 21 us on an H200 (4.3 TB/s); 239 MB backward, 56 us; 4 MB of sums and 5 MB of
    maps (each block, of 256 gates, looks through all maps) in the second launch, 2 us, where
    latency takes longer. Counted, not measured.

    On a GPU nobody waits for the kernels, so they do not raise: features and gates out of bounds
    count as closed, and nothing is read or written there.

    Args:
        weights: as in `pack_weight`, all of one dtype, on one device.
        z: [G + 1] gates, as in `pack_weight`.
        index: int64 [F], the packed features of all ports: `OpenLists.index`.
        maps: int64 [2, F], the two gates of each feature: `GateLayout.maps`.
        spans: for each weight (row_start, row_count, col_start, col_count): a port that starts at
            row_start has row_count packed features; its list is index[row_start:][:row_count] and
            its map maps[:, row_start:][:, :O], the `rows` and `row_map` of `pack_weight`. A start
            of -1: the axis is not packed.
        dtype: of the results; default the weights'.
        kept: memory for the gradient of each weight, of those on a CPU that have some.

    Returns:
        One packed weight for each weight, as from `pack_weight`.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices, spans outside of index or
        maps, columns of a 1-D weight. RuntimeError: an index out of bounds (not on a GPU).

    Source: as of `pack_weight`.
    """
    weights = tuple(weights)
    if not weights:
        return []
    dtype = dtype or weights[0].dtype
    _check_list(weights, z, index, maps, spans, dtype)
    if _config.reference_asked(index):
        spans = [Span(*span) for span in spans]
        return reference.pack_weights(weights, z, index, maps, spans, dtype)
    flat = [number for span in spans for number in span]
    return list(_PackWeights.apply(z, index, maps, flat, dtype, kept, *weights))


def _check(weight, z, rows, row_map, cols, col_map, dtype) -> None:
    _check_dtypes(weight, dtype)
    if not 1 <= weight.dim() <= 5:
        raise ValueError(f"weight: expected 1 to 5 dimensions; got {weight.dim()}")
    if weight.dim() == 1 and (cols is not None or col_map is not None):
        raise ValueError("cols, col_map: expected None with a 1-D weight; got a tensor")
    _check_gates(weight, z, row_map, col_map)
    for name, index in (("rows", rows), ("cols", cols)):
        if index is not None:
            _check_int64(name, index, weight.device)
            if index.dim() != 1:
                raise ValueError(f"{name}: expected 1 dimension; got {list(index.shape)}")
    for name, gates, dim in (("row_map", row_map, 0), ("col_map", col_map, 1)):
        if gates is not None:
            _check_int64(name, gates, weight.device)
            if gates.dim() != 2 or gates.shape[0] != 2 or gates.shape[1] != weight.shape[dim]:
                raise ValueError(
                    f"{name}: expected shape [2, {weight.shape[dim]}]; got {list(gates.shape)}"
                )


def _check_dtypes(weight, dtype) -> None:
    if weight.dtype not in _OUTPUT_DTYPES:
        raise TypeError(f"weight: expected a floating dtype; got {weight.dtype}")
    if dtype not in _OUTPUT_DTYPES[weight.dtype]:
        allowed = ", ".join(map(str, _OUTPUT_DTYPES[weight.dtype]))
        raise TypeError(f"dtype: expected {allowed} for {weight.dtype} weights; got {dtype}")


def _check_list(weights, z, index, maps, spans, dtype) -> None:
    first = weights[0]
    _check_dtypes(first, dtype)
    _check_gates(first, z, None, None)
    _check_int64("index", index, first.device)
    _check_int64("maps", maps, first.device)
    if index.dim() != 1:
        raise ValueError(f"index: expected 1 dimension; got {list(index.shape)}")
    if maps.dim() != 2 or maps.shape[0] != 2 or maps.shape[1] != index.shape[0]:
        raise ValueError(f"maps: expected shape [2, {index.shape[0]}]; got {list(maps.shape)}")
    if len(spans) != len(weights):
        raise ValueError(f"spans: expected one for each of {len(weights)}; got {len(spans)}")
    for i, (weight, span) in enumerate(zip(weights, spans, strict=True)):
        if weight.dtype != first.dtype:
            raise TypeError(
                f"weights[{i}]: expected {first.dtype} as the first; got {weight.dtype}"
            )
        if weight.device != first.device:
            raise ValueError(f"weights[{i}]: expected device {first.device}; got {weight.device}")
        if not 1 <= weight.dim() <= 5:
            raise ValueError(f"weights[{i}]: expected 1 to 5 dimensions; got {weight.dim()}")
        _check_span(i, weight, span, index.shape[0])


def _check_span(i: int, weight: Tensor, span: Sequence[int], features: int) -> None:
    if len(span) != 4:
        raise ValueError(f"spans[{i}]: expected 4 numbers; got {list(span)}")
    row_start, row_count, col_start, col_count = span
    if weight.dim() == 1 and col_start != -1:
        raise ValueError(f"spans[{i}]: expected col_start -1 with a 1-D weight; got {col_start}")
    for name, start, count, dim in (
        ("row", row_start, row_count, 0),
        ("col", col_start, col_count, 1),
    ):
        if start == -1:
            continue
        full = weight.shape[dim]
        if not (0 <= start <= features - full and 0 <= count <= full):
            raise ValueError(
                f"spans[{i}]: expected {name}_start from 0 to {features - full} or -1, and "
                f"{name}_count from 0 to {full}; got {start} and {count}"
            )


def _check_gates(weight, z, row_map, col_map) -> None:
    if z is None:
        if row_map is not None or col_map is not None:
            raise ValueError("row_map, col_map: expected z with them; got z=None")
        return
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if z.dtype != expected:
        raise TypeError(f"z: expected {expected} with {weight.dtype} weights; got {z.dtype}")
    if z.dim() != 1:
        raise ValueError(f"z: expected shape [G + 1]; got {list(z.shape)}")
    if z.device != weight.device:
        raise ValueError(f"z: expected weight's device {weight.device}; got {z.device}")


def _check_int64(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64; got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected weight's device {device}; got {tensor.device}")
