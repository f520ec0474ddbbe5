# SPDX-License-Identifier: Apache-2.0
# What Triton compiles is not Python: arguments are wrapped, launches have a grid.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportPrivateImportUsage=false
"""The Triton kernels of `pack_weight`, `pack_weights` and their backward passes.

Every weight is seen as lines of numbers: a channels_last weight has one line per output feature
and kernel position and one number per input feature; any other weight has one line per output
feature, with the kernel positions of an input feature side by side. Up to `WEIGHTS` weights share
a launch, whose programs work on tiles of packed lines and numbers.

The backward pass scatters gradients into zeroed tensors, in the first launch, which also sums
<grad, weight> of each packed number over chunks of lines; the second adds these up for each gate,
always in the same order.

Nobody waits for the kernels, so they cannot raise: features and gates out of bounds count as
closed, and nothing is read or written there. Lists must not repeat a feature.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton
from l0kernels.ops.pack_weight.reference import Span, is_channels_last, is_transposed

WEIGHTS = 48  # in one launch: their addresses and sizes must fit into 4 KiB of arguments
TILES = ((32, 32), (8, 128))  # lines and numbers of a program; the first for short lines
MAX_CHUNKS = 64  # of the lines of a weight, each with its own sums
GATES = 16  # of a program that adds up their gradients
SCANNED = 1024  # numbers that it looks through at once
ADDED = 128  # numbers that it adds at once


# ---- which weight, which numbers ----


@triton.jit
def _number(guarded):
    return guarded >> 4  # see _guarded


@triton.jit
def _pick(numbers, k):
    """Number k of a tuple."""
    value = numbers[0]
    for i in tl.static_range(1, len(numbers)):
        value = tl.where(k == i, numbers[i], value)
    return _number(value).to(tl.int64)


@triton.jit
def _pick_pointer(pointers, k):
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(k == i, pointers[i], pointer)
    return pointer


@triton.jit
def _weight_of(program, first_programs):
    """The weight that a program works on, and the program's number among those of that weight."""
    k = tl.full([], 0, tl.int32)
    first = _number(first_programs[0])
    for i in tl.static_range(1, len(first_programs)):
        begin = _number(first_programs[i])
        k = tl.where(program >= begin, i, k)
        first = tl.where(program >= begin, begin, first)
    return k, program - first


@triton.jit
def _features(index, start, full, packed, inside):
    """The full numbers of packed features, and which of them are features.

    A start of -1: all are packed, in order.
    """
    listed = tl.load(index + start + packed, mask=inside & (start >= 0), other=-1)
    feature = tl.where(start >= 0, listed, packed)
    return feature, inside & (feature >= 0) & (feature < full)


@triton.jit
def _gates(z, gates, maps, stride, start, feature, known):
    """The two gates of features and their values, 0 where unknown."""
    a = tl.load(maps + start + feature, mask=known, other=-1)
    b = tl.load(maps + stride + start + feature, mask=known, other=-1)
    known = known & (a >= 0) & (a <= gates) & (b >= 0) & (b <= gates)
    return a, b, tl.load(z + a, mask=known, other=0.0), tl.load(z + b, mask=known, other=0.0)


@triton.jit
def _scales(z, gates, maps, stride, start, feature, known):
    """The product of the two gates of features. A start of -1: 1, nothing is scaled."""
    _, _, z_a, z_b = _gates(z, gates, maps, stride, start, feature, known & (start >= 0))
    return tl.where(known & (start < 0), 1.0, z_a * z_b)


@triton.jit
def _full_lines(z, gates, index, maps, stride, list_start, gate_start, full, line, lines, height):
    """The full numbers of packed lines, which of them exist, and which of these are open."""
    inside = line < height * lines
    feature, known = _features(index, list_start, full, line // lines, inside)
    scale = _scales(z, gates, maps, stride, gate_start, feature, known)
    return feature * lines + line % lines, inside, known & (scale != 0)


@triton.jit
def _full_numbers(
    z, gates, index, maps, stride, list_start, gate_start, full, number, inner, width
):
    """The places of packed numbers in a full line, their scales, which exist, which are open."""
    inside = number < width * inner
    feature, known = _features(index, list_start, full, number // inner, inside)
    scale = _scales(z, gates, maps, stride, gate_start, feature, known)
    return feature * inner + number % inner, scale, inside, known & (scale != 0)


# ---- forward ----


@triton.jit(do_not_specialize=["gates", "row_stride", "col_stride"])
def _pack(
    weights,
    packed_weights,
    z,
    gates,
    row_index,
    row_maps,
    row_stride,
    col_index,
    col_maps,
    col_stride,
    row_lists,
    row_gates,
    col_lists,
    col_gates,
    heights,
    widths,
    full_heights,
    full_widths,
    all_lines,
    inners,
    first_programs,
    LINES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    k, tile = _weight_of(tl.program_id(0), first_programs)
    lines = _pick(all_lines, k)
    inner = _pick(inners, k)
    width = _pick(widths, k)
    packed_width = width * inner
    across = tl.cdiv(packed_width, NUMBERS)
    line = tile // across * LINES + tl.arange(0, LINES)
    number = tile % across * NUMBERS + tl.arange(0, NUMBERS)
    full_line, line_inside, line_open = _full_lines(
        z,
        gates,
        row_index,
        row_maps,
        row_stride,
        _pick(row_lists, k),
        _pick(row_gates, k),
        _pick(full_heights, k),
        line,
        lines,
        _pick(heights, k),
    )
    full_width = _pick(full_widths, k)
    full_number, scale, number_inside, number_open = _full_numbers(
        z,
        gates,
        col_index,
        col_maps,
        col_stride,
        _pick(col_lists, k),
        _pick(col_gates, k),
        full_width,
        number,
        inner,
        width,
    )
    is_open = line_open[:, None] & number_open[None, :]
    place = full_line[:, None] * (full_width * inner) + full_number[None, :]
    value = tl.load(_pick_pointer(weights, k) + place, mask=is_open, other=0.0)
    value = tl.where(is_open, value.to(z.dtype.element_ty) * scale[None, :], 0.0)
    packed = _pick_pointer(packed_weights, k)
    tl.store(
        packed + line[:, None] * packed_width + number[None, :],
        value.to(packed.dtype.element_ty),
        mask=line_inside[:, None] & number_inside[None, :],
    )


# ---- backward ----


@triton.jit(do_not_specialize=["gates", "row_stride", "col_stride"])
def _unpack(
    grads,
    weights,
    grad_weights,
    sums,
    z,
    gates,
    row_index,
    row_maps,
    row_stride,
    col_index,
    col_maps,
    col_stride,
    row_lists,
    row_gates,
    col_lists,
    col_gates,
    heights,
    widths,
    full_heights,
    full_widths,
    all_lines,
    inners,
    first_programs,
    needed,
    all_steps,
    first_sums,
    NEED_Z: tl.constexpr,
    LINES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Scatters the gradients of tiles of numbers in a chunk of lines, and sums over the chunk."""
    k, tile = _weight_of(tl.program_id(0), first_programs)
    lines = _pick(all_lines, k)
    inner = _pick(inners, k)
    width = _pick(widths, k)
    packed_width = width * inner
    across = tl.cdiv(packed_width, NUMBERS)
    chunk = tile // across
    number = tile % across * NUMBERS + tl.arange(0, NUMBERS)
    full_width = _pick(full_widths, k)
    full_number, scale, number_inside, number_open = _full_numbers(
        z,
        gates,
        col_index,
        col_maps,
        col_stride,
        _pick(col_lists, k),
        _pick(col_gates, k),
        full_width,
        number,
        inner,
        width,
    )
    row_list = _pick(row_lists, k)
    row_gate = _pick(row_gates, k)
    height = _pick(heights, k)
    full_height = _pick(full_heights, k)
    steps = _pick(all_steps, k)
    stored = _pick(needed, k) != 0
    grad = _pick_pointer(grads, k)
    weight = _pick_pointer(weights, k)
    grad_weight = _pick_pointer(grad_weights, k)
    total = tl.zeros([NUMBERS], tl.float64)
    for step in range(steps):
        line = (chunk * steps + step) * LINES + tl.arange(0, LINES)
        full_line, _, line_open = _full_lines(
            z,
            gates,
            row_index,
            row_maps,
            row_stride,
            row_list,
            row_gate,
            full_height,
            line,
            lines,
            height,
        )
        is_open = line_open[:, None] & number_open[None, :]
        place = full_line[:, None] * (full_width * inner) + full_number[None, :]
        upstream = tl.load(
            grad + line[:, None] * packed_width + number[None, :], mask=is_open, other=0.0
        ).to(z.dtype.element_ty)
        tl.store(
            grad_weight + place,
            (upstream * scale[None, :]).to(grad_weight.dtype.element_ty),
            mask=is_open & stored,
        )
        if NEED_Z:
            value = tl.load(weight + place, mask=is_open, other=0.0).to(z.dtype.element_ty)
            total += tl.sum(upstream * value, 0).to(tl.float64)
    if NEED_Z:
        own = sums + _pick(first_sums, k) + chunk * packed_width
        tl.store(own + number, total, mask=number_inside)


@triton.jit
def _add_numbers(
    total,
    gate,
    z,
    gates,
    sums,
    chunks,
    first,
    end,
    index,
    list_start,
    maps,
    stride,
    gate_start,
    full,
    inner,
    width,
    NUMBERS: tl.constexpr,
):
    """Adds the gradients of gates from packed numbers first up to end."""
    for start in range(first, end, NUMBERS):
        number = start + tl.arange(0, NUMBERS)
        inside = number < end
        feature, known = _features(index, list_start, full, number // inner, inside)
        a, b, z_a, z_b = _gates(z, gates, maps, stride, gate_start, feature, known)
        product = tl.zeros([NUMBERS], tl.float64)
        for chunk in range(chunks):
            product += tl.load(sums + chunk * width + number, mask=inside, other=0.0)
        for_a = product * z_b.to(tl.float64)
        for_b = product * z_a.to(tl.float64)
        total += tl.sum(tl.where(gate[:, None] == a[None, :], for_a[None, :], 0.0), 1)
        total += tl.sum(tl.where(gate[:, None] == b[None, :], for_b[None, :], 0.0), 1)
    return total


@triton.jit(do_not_specialize=["gates", "stride"])
def _add_gates(
    earlier,
    grad_z,
    sums,
    z,
    gates,
    index,
    maps,
    stride,
    col_lists,
    col_gates,
    widths,
    full_widths,
    inners,
    all_chunks,
    first_sums,
    GATES: tl.constexpr,
    SCANNED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Gradients of gates: what earlier launches have, and the numbers of these weights."""
    first_gate = tl.program_id(0).to(tl.int64) * GATES
    gate = first_gate + tl.arange(0, GATES)
    total = tl.zeros([GATES], tl.float64)
    if earlier is not None:
        total = tl.load(earlier + gate, mask=gate < gates, other=0.0)
    for k in range(len(widths)):
        gate_start = _pick(col_gates, k)
        list_start = _pick(col_lists, k)
        full = _pick(full_widths, k)
        inner = _pick(inners, k)
        width = _pick(widths, k) * inner
        own = sums + _pick(first_sums, k)
        for start in range(0, tl.where(gate_start >= 0, width, 0), SCANNED):
            number = start + tl.arange(0, SCANNED)
            feature, known = _features(index, list_start, full, number // inner, number < width)
            a = tl.load(maps + gate_start + feature, mask=known, other=-1) - first_gate
            b = tl.load(maps + stride + gate_start + feature, mask=known, other=-1) - first_gate
            ours = ((a >= 0) & (a < GATES)) | ((b >= 0) & (b < GATES))
            if tl.max((known & ours).to(tl.int32), 0) > 0:
                total = _add_numbers(
                    total,
                    gate,
                    z,
                    gates,
                    own,
                    _pick(all_chunks, k),
                    start,
                    tl.minimum(start + SCANNED, width),
                    index,
                    list_start,
                    maps,
                    stride,
                    gate_start,
                    full,
                    inner,
                    width,
                    ADDED,
                )
    total = tl.where(gate == gates, 0.0, total)  # the gate that is always open
    tl.store(grad_z + gate, total.to(grad_z.dtype.element_ty), mask=gate <= gates)


# ---- weights ----


class _Weight(NamedTuple):
    """A weight as the kernels see it; starts are -1 where there is no list or map."""

    row_list: int
    row_gate: int
    col_list: int
    col_gate: int
    height: int  # packed output features
    width: int  # packed input features
    full_height: int
    full_width: int
    lines: int  # of an output feature
    inner: int  # numbers of an input feature in a line

    @property
    def packed_lines(self) -> int:
        return self.height * self.lines

    @property
    def packed_width(self) -> int:
        return self.width * self.inner


def _describe(weight: Tensor, starts: Sequence[int], height: int, width: int) -> _Weight:
    features = weight.shape[1] if weight.dim() > 1 else 1
    kernel = 1
    for size in weight.shape[2:]:
        kernel *= size
    lines, inner = (kernel, 1) if is_channels_last(weight) else (1, kernel)
    return _Weight(*starts, height, width, weight.shape[0], features, lines, inner)


class _Axes(NamedTuple):
    """The lists and maps that the starts of `_Weight` count in; maps are [2, n], dense rows."""

    row_index: Tensor
    row_maps: Tensor
    col_index: Tensor
    col_maps: Tensor

    def arguments(self) -> tuple:
        return (
            self.row_index,
            self.row_maps,
            self.row_maps.stride(0),
            self.col_index,
            self.col_maps,
            self.col_maps.stride(0),
        )


def _guarded(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers that Triton does not compile kernels for.

    It makes another kernel for a 1 in a tuple, and for every multiple of 16; packed widths would
    become such numbers now and then.
    """
    return tuple(16 * number + 2 for number in numbers)


def _columns(weights: Sequence[_Weight]) -> tuple[tuple[int, ...], ...]:
    return tuple(_guarded(column) for column in zip(*weights, strict=True))


def _starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of some parts that lie one behind the other starts, and the size of all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += size
    return starts, end


def _tile(weights: Sequence[_Weight]) -> tuple[int, int]:
    """Lines and numbers of a program. Widths before packing decide: those after it vary."""
    widest = max(weight.full_width * weight.inner for weight in weights)
    return TILES[0] if widest <= TILES[0][1] else TILES[1]


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, laid out as `_describe` sees a weight."""
    channels_last = is_channels_last(like)
    return tensor.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _empty_packed(weight: Tensor, shape: _Weight, dtype: torch.dtype) -> Tensor:
    sizes = list(weight.shape)
    sizes[:2] = [shape.height, shape.width][: weight.dim()]
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return torch.empty(sizes, dtype=dtype, device=weight.device, memory_format=layout)


def _parts(count: int) -> Iterator[slice]:
    for begin in range(0, count, WEIGHTS):
        yield slice(begin, begin + WEIGHTS)


# ---- launches ----


def _launch_pack(
    weights: list[Tensor], shapes: list[_Weight], z: Tensor, axes: _Axes, dtype: torch.dtype
) -> list[Tensor]:
    packed = [
        _empty_packed(weight, shape, dtype) for weight, shape in zip(weights, shapes, strict=True)
    ]
    for part in _parts(len(weights)):
        lines, numbers = _tile(shapes[part])
        first_programs, programs = _starts(
            [
                _triton.cdiv(shape.packed_lines, lines) * _triton.cdiv(shape.packed_width, numbers)
                for shape in shapes[part]
            ]
        )
        if programs == 0:
            continue
        with _triton.on_device_of(z):
            _pack[(programs,)](
                tuple(_dense(weight, weight) for weight in weights[part]),
                tuple(packed[part]),
                z,
                z.shape[0] - 1,
                *axes.arguments(),
                *_columns(shapes[part]),
                _guarded(first_programs),
                LINES=lines,
                NUMBERS=numbers,
                num_warps=4,
            )
    # Triton's interpreter runs on a CPU, where matrices stored [I, O] are promised to stay so.
    return [
        one.new_empty(one.shape[::-1]).t().copy_(one) if is_transposed(weight) else one
        for weight, one in zip(weights, packed, strict=True)
    ]


class _Chunks(NamedTuple):
    """How the lines of weights are divided for the sums of the backward pass."""

    steps: list[int]  # tiles of lines in a chunk
    chunks: list[int]
    first_sums: list[int]
    sums: int

    @classmethod
    def of(cls, shapes: Sequence[_Weight], lines: int, need_z: bool) -> "_Chunks":
        steps, chunks = [], []
        for shape in shapes:
            tiles = _triton.cdiv(shape.packed_lines, lines)
            steps.append(_triton.cdiv(tiles, MAX_CHUNKS) if need_z and tiles else 1)
            chunks.append(_triton.cdiv(tiles, steps[-1]))
        sizes = [count * shape.packed_width for count, shape in zip(chunks, shapes, strict=True)]
        return cls(steps, chunks, *_starts(sizes))


def _launch_unpack(
    grads: list[Tensor],
    weights: list[Tensor],
    grad_weights: list[Tensor],
    shapes: list[_Weight],
    z: Tensor,
    axes: _Axes,
    needed: list[bool],
    need_z: bool,
) -> tuple[Tensor, _Chunks]:
    """Scatters into `grad_weights`, which are zero; returns the sums over chunks of lines."""
    lines, numbers = _tile(shapes)
    chunks = _Chunks.of(shapes, lines, need_z)
    sums = z.new_empty(chunks.sums if need_z else 0, dtype=torch.float64)
    first_programs, programs = _starts(
        [
            count * _triton.cdiv(shape.packed_width, numbers)
            for count, shape in zip(chunks.chunks, shapes, strict=True)
        ]
    )
    if programs > 0:
        with _triton.on_device_of(z):
            _unpack[(programs,)](
                tuple(grads),
                tuple(weights),
                tuple(grad_weights),
                sums,
                z,
                z.shape[0] - 1,
                *axes.arguments(),
                *_columns(shapes),
                _guarded(first_programs),
                _guarded(needed),
                _guarded(chunks.steps),
                _guarded(chunks.first_sums),
                NEED_Z=need_z,
                LINES=lines,
                NUMBERS=numbers,
                num_warps=4,
                **_triton.at_most_registers(255),
            )
    return sums, chunks


def _launch_add(
    earlier: Tensor | None,
    grad_z: Tensor,
    sums: Tensor,
    chunks: _Chunks,
    shapes: list[_Weight],
    z: Tensor,
    axes: _Axes,
) -> None:
    columns = _Weight(*_columns(shapes))  # type: ignore[arg-type]
    with _triton.on_device_of(z):
        _add_gates[(_triton.cdiv(z.shape[0], GATES),)](
            earlier,
            grad_z,
            sums,
            z,
            z.shape[0] - 1,
            axes.col_index,
            axes.col_maps,
            axes.col_maps.stride(0),
            columns.col_list,
            columns.col_gate,
            columns.width,
            columns.full_width,
            columns.inner,
            _guarded(chunks.chunks),
            _guarded(chunks.first_sums),
            GATES=GATES,
            SCANNED=SCANNED,
            ADDED=ADDED,
            num_warps=4,
        )


def _backward(
    grads: list[Tensor],
    weights: list[Tensor],
    shapes: list[_Weight],
    z: Tensor,
    axes: _Axes,
    needed: list[bool],
    need_z: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of weights (empty where not needed) and of z (empty if not needed)."""
    dense = [_dense(weight, weight) for weight in weights]
    upstream = [_dense(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    results = [
        torch.empty_like(weight) if wanted else weight.new_empty(0)
        for weight, wanted in zip(dense, needed, strict=True)
    ]
    if any(needed):
        torch._foreach_zero_([result for i, result in enumerate(results) if needed[i]])
    parts = list(_parts(len(weights)))
    earlier, grad_z = None, torch.zeros_like(z) if need_z else z.new_empty(0)
    for part in parts:
        sums, chunks = _launch_unpack(
            upstream[part], dense[part], results[part], shapes[part], z, axes, needed[part], need_z
        )
        if need_z:
            is_last = part is parts[-1]
            total = grad_z if is_last else torch.empty_like(z, dtype=torch.float64)
            _launch_add(earlier, total, sums, chunks, shapes[part], z, axes)
            earlier = total
    for i, weight in enumerate(weights):
        # Computed in another layout than the weight has.
        if needed[i] and dense[i] is not weight and dense[i].stride() != weight.stride():
            results[i] = torch.empty_like(weight).copy_(results[i])
    return results, grad_z


# ---- operators ----


def _single(weight, z, rows, row_map, cols, col_map) -> tuple[_Weight, Tensor, _Axes]:
    """The arguments of `pack_weight` in the terms of `pack_weights`."""
    if z is None:
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        z = weight.new_empty(0, dtype=compute)
    none = weight.new_empty((2, 0), dtype=torch.int64)
    axes = _Axes(
        none[0] if rows is None else rows.contiguous(),
        none if row_map is None else _dense_rows(row_map),
        none[0] if cols is None else cols.contiguous(),
        none if col_map is None else _dense_rows(col_map),
    )
    starts = [-1 if given is None else 0 for given in (rows, row_map, cols, col_map)]
    height = weight.shape[0] if rows is None else rows.shape[0]
    features = weight.shape[1] if weight.dim() > 1 else 1
    shape = _describe(weight, starts, height, features if cols is None else cols.shape[0])
    return shape, z.contiguous(), axes


def _several(weights, z, index, maps, spans) -> tuple[list[_Weight], Tensor, _Axes]:
    shapes = []
    for i, weight in enumerate(weights):
        span = Span(*spans[4 * i : 4 * i + 4])
        starts = (span.row_start, span.row_start, span.col_start, span.col_start)
        features = weight.shape[1] if weight.dim() > 1 else 1
        height = weight.shape[0] if span.row_start < 0 else span.row_count
        width = features if span.col_start < 0 else span.col_count
        shapes.append(_describe(weight, starts, height, width))
    index, maps = index.contiguous(), _dense_rows(maps)
    return shapes, z.contiguous(), _Axes(index, maps, index, maps)


def _dense_rows(maps: Tensor) -> Tensor:
    return maps if maps.stride(1) == 1 else maps.contiguous()


def pack_weight(
    weight: Tensor,
    z: Tensor | None,
    rows: Tensor | None,
    row_map: Tensor | None,
    cols: Tensor | None,
    col_map: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The raw operator `pack_weight`."""
    shape, z, axes = _single(weight, z, rows, row_map, cols, col_map)
    return _launch_pack([weight], [shape], z, axes, dtype)[0]


def pack_weight_backward(
    grad: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rows: Tensor | None,
    row_map: Tensor | None,
    cols: Tensor | None,
    col_map: Tensor | None,
    need_weight: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor]:
    """The raw operator `pack_weight_backward`."""
    shape, z, axes = _single(weight, z, rows, row_map, cols, col_map)
    arguments = ([grad], [weight], [shape], z, axes, [need_weight], need_z)
    (grad_weight,), grad_z = _backward(*arguments)
    return grad_weight, grad_z if need_z else weight.new_empty(0)


def pack_weights(
    weights: list[Tensor],
    z: Tensor,
    index: Tensor,
    maps: Tensor,
    spans: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The raw operator `pack_weights`."""
    weights = list(weights)
    shapes, z, axes = _several(weights, z, index, maps, spans)
    return _launch_pack(weights, shapes, z, axes, dtype)


def pack_weights_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    z: Tensor,
    index: Tensor,
    maps: Tensor,
    spans: list[int],
    need_weights: list[bool],
    need_z: bool,
) -> list[Tensor]:
    """The raw operator `pack_weights_backward`."""
    weights = list(weights)
    shapes, z, axes = _several(weights, z, index, maps, spans)
    arguments = (list(grads), weights, shapes, z, axes, list(need_weights), need_z)
    grad_weights, grad_z = _backward(*arguments)
    return [*grad_weights, grad_z]
