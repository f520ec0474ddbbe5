# SPDX-License-Identifier: Apache-2.0
# What Triton compiles is not Python: arguments are wrapped, launches have a grid.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""Triton kernels of the gated layers: matrix products and convolutions over open features.

Activations are rows of features, one row per pixel of a channels_last image. Every kernel reads
how many features are packed on the device: the grid covers the capacity, programs behind the
packed features leave at once, and loops over features end with them.

- `_layer_kernel`: y, and dx with the roles of inputs and outputs exchanged. It reads the weight
  in place, or from a packed copy that `_pack_kernel` wrote before, which pays as soon as several
  row blocks read it.
- `_tma_kernel`: the same from a packed weight for strides of 1, persistent, all operands by
  tensor descriptors that end at the packed features (Hopper and later).
- `_weight_kernel`: partial sums of the packed weight's gradient; `_finish_weight_kernel` adds
  them in order, scales, scatters and sums what the gates get; `_gates_kernel` adds that up.
- `_upstream_kernel`: relu's mask and partial sums of the bias gradient; `_finish_bias_kernel`.

All sums have a fixed order. Products of float32 are float32, not TensorFloat-32. Nobody waits for
the kernels, so they cannot raise: counts are cut to what the tensors hold, and features and gates
that do not exist count as closed. Lists must not repeat a feature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton
from l0kernels.ops.gated_linear import op
from l0kernels.ops.gated_linear.tiles import Tiles, tiles_at

PADDING = tl.constexpr(128)  # the axes of a packed weight are multiples of it


# ---- arguments of kernels ----


class Lists(NamedTuple):
    """The gates and flat lists of `gated_linear`, and how long the lists and the gates are."""

    z: Any
    index: Any
    counts: Any
    maps: Any
    listed: Any
    gates: Any


class Axis(NamedTuple):
    """The inputs or outputs of a layer.

    Args:
        start: of their features in the lists; None: nothing is packed.
        port: their place in the counts.
        limit: how many packed features the tensors hold.
        features: how many there are.
    """

    start: Any
    port: Any
    limit: Any
    features: Any


class Window(NamedTuple):
    """The options of a convolution, (height, width) each."""

    kernel: Any = (1, 1)
    stride: Any = (1, 1)
    padding: Any = (0, 0)
    dilation: Any = (1, 1)


class Strides(NamedTuple):
    """Of a weight, in numbers."""

    out: Any
    into: Any
    height: Any
    width: Any


# ---- pieces ----


@triton.jit
def _count(lists, axis):
    """How many features are packed; never more than the tensors hold."""
    if axis.start is None:
        count = axis.limit
    else:
        listed = tl.load(lists.counts + axis.port)
        count = tl.minimum(tl.maximum(listed, 0), axis.limit).to(tl.int32)
    return count


@triton.jit
def _divisor(count):
    """The count, but 1 instead of 0.

    Data of a loop's first step is asked for before it is known whether there is a first step. To
    divide by 0 there is undefined: compilers conclude that the loop is never empty, and read.
    """
    return tl.maximum(count, 1)


@triton.jit
def _gates_of(lists, axis, places, count):
    """The features at packed places, their two gates, and which of these exist."""
    exists = places < count
    feature = tl.load(lists.index + axis.start + places, mask=exists, other=0)
    exists &= (feature >= 0) & (feature < axis.features)
    entry = lists.maps + axis.start + feature
    mine = tl.load(entry, mask=exists, other=0)
    other = tl.load(entry + lists.listed, mask=exists, other=0)
    exists &= (mine >= 0) & (mine < lists.gates) & (other >= 0) & (other < lists.gates)
    return feature, mine, other, exists


@triton.jit
def _features(lists, axis, places, count):
    """The features at packed places and their scales, 0 where there is no packed feature."""
    if axis.start is None:
        feature = places.to(tl.int64)
        scale = tl.where(places < count, 1.0, 0.0)
    else:
        feature, mine, other, exists = _gates_of(lists, axis, places, count)
        scale = tl.load(lists.z + mine, mask=exists, other=0.0)
        scale *= tl.load(lists.z + other, mask=exists, other=0.0)
    return feature, scale


@triton.jit
def _source_rows(image, h, w, kh, kw, size, window: tl.constexpr, BACKWARD: tl.constexpr):
    """The row that a kernel position reads for each row of the result, and whether it exists."""
    if BACKWARD:
        stepped_h = h + window.padding[0] - kh * window.dilation[0]
        stepped_w = w + window.padding[1] - kw * window.dilation[1]
        h, w = stepped_h // window.stride[0], stepped_w // window.stride[1]
        inside = (stepped_h >= 0) & (stepped_w >= 0)
        inside &= (h * window.stride[0] == stepped_h) & (w * window.stride[1] == stepped_w)
    else:
        h = h * window.stride[0] - window.padding[0] + kh * window.dilation[0]
        w = w * window.stride[1] - window.padding[1] + kw * window.dilation[1]
        inside = (h >= 0) & (w >= 0)
    inside &= (h < size[0]) & (w < size[1])
    return (image * size[0] + h) * size[1] + w, inside


@triton.jit
def _finished(acc, scale, shift, RELU: tl.constexpr):
    """Adds the bias, applies the activation, zeroes columns without an open feature."""
    if shift is not None:
        acc += shift[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # keeps NaN
    return tl.where((scale != 0)[None, :], acc, 0.0)


# ---- packing ----


@triton.jit
def _pack_kernel(
    weight, bias, packed, columns, lists, inputs, outputs, strides, padded_out, padded_in,
    window: tl.constexpr, BACKWARD: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """packed[tap, n, k] = weight[index_out[n], index_in[k], tap] s_k; zeros behind to PADDING.

    `columns` gets what `_finished` asks for: of the outputs, or backward of the inputs.
    """
    n_out = _count(lists, outputs)
    n_in = _count(lists, inputs)
    first_out = tl.program_id(0) * BO
    first_in = tl.program_id(1) * BI
    tap = tl.program_id(2)
    out_places = first_out + tl.arange(0, BO)
    in_places = first_in + tl.arange(0, BI)
    row, row_scale = _features(lists, outputs, out_places, n_out)
    col, scale = _features(lists, inputs, in_places, n_in)
    if tap == 0:
        if BACKWARD:
            if first_out == 0:
                tl.store(columns + in_places, scale)
        elif first_in == 0:
            tl.store(columns + out_places, row_scale)
            if bias is not None:
                shift = tl.load(bias + row, mask=row_scale != 0, other=0.0).to(tl.float32)
                tl.store(columns + padded_out + out_places, shift)
    if first_out >= tl.cdiv(n_out, PADDING) * PADDING:
        return
    if first_in >= tl.cdiv(n_in, PADDING) * PADDING:
        return
    is_open = (row_scale != 0)[:, None] & (scale != 0)[None, :]
    source = row[:, None] * strides.out + col[None, :] * strides.into
    source += tap // window.kernel[1] * strides.height + tap % window.kernel[1] * strides.width
    value = tl.load(weight + source, mask=is_open, other=0.0).to(tl.float32) * scale[None, :]
    place = (tap.to(tl.int64) * padded_out + out_places[:, None]) * padded_in + in_places[None, :]
    tl.store(packed + place, value.to(packed.dtype.element_ty))


# ---- y and dx ----


@triton.jit
def _layer_kernel(
    a, weight, bias, packed_columns, out, lists, reduced, columns, images, size, a_size, a_stride,
    out_width, strides, window: tl.constexpr, steps: tl.constexpr, firsts: tl.constexpr,
    BACKWARD: tl.constexpr, IN_PLACE: tl.constexpr, RELU: tl.constexpr,
    A_VEC: tl.constexpr, OUT_VEC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r, c] = act(sum over taps and k of a[source(r, tap), k] weight[tap, k, c] + bias[c]).

    Backward, a row of the result meets only every steps-th kernel position: the rows are sorted
    into steps[0] x steps[1] classes, one per second grid axis, whose first positions come from
    firsts, the inverses of the dilations modulo the strides. `a_stride` and `out_width` come in
    units of A_VEC and OUT_VEC numbers, so that the compiler knows what divides them.
    """
    a_stride *= A_VEC
    out_width *= OUT_VEC
    n_k = _count(lists, reduced)
    n_c = _count(lists, columns)
    tiles_c = tl.cdiv(out_width, BN)
    # Programs that share rows of `a` follow each other.
    column = tl.program_id(0) % tiles_c * BN
    row = tl.program_id(0) // tiles_c * BM + tl.arange(0, BM)
    class_h = tl.program_id(1) // steps[1]
    class_w = tl.program_id(1) % steps[1]
    rows_w = tl.cdiv(size[1], steps[1])
    rows = tl.cdiv(size[0], steps[0]) * rows_w
    image = row // rows
    h = row % rows // rows_w * steps[0] + class_h
    w = row % rows_w * steps[1] + class_w
    live = (image < images) & (h < size[0]) & (w < size[1])
    places = column + tl.arange(0, BN)
    target = ((image * size[0] + h) * size[1] + w).to(tl.int64)[:, None] * out_width
    target += places[None, :]
    stored = live[:, None] & (places < out_width)[None, :]
    if column >= n_c:
        tl.store(out + target, tl.zeros((BM, BN), out.dtype.element_ty), mask=stored)
        return

    if IN_PLACE:
        feature, scale = _features(lists, columns, places, n_c)
    else:
        feature, scale = places.to(tl.int64), tl.load(packed_columns + places)
    first_h = (class_h + window.padding[0]) * firsts[0] % steps[0]
    first_w = (class_w + window.padding[1]) * firsts[1] % steps[1]
    taps_w = (window.kernel[1] - first_w + steps[1] - 1) // steps[1]
    taps = (window.kernel[0] - first_h + steps[0] - 1) // steps[0] * taps_w
    whole = n_k // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(taps * whole):
        tap = step // _divisor(whole)
        kh = first_h + tap // _divisor(taps_w) * steps[0]
        kw = first_w + tap % _divisor(taps_w) * steps[1]
        source, inside = _source_rows(image, h, w, kh, kw, a_size, window, BACKWARD)
        k = step % _divisor(whole) * BK + tl.arange(0, BK)
        left = source.to(tl.int64)[:, None] * a_stride + k[None, :]
        left = tl.load(a + left, mask=(inside & live)[:, None], other=0.0)
        right = _weights(
            weight, lists, reduced, strides, feature, scale, k, n_k, kh, kw,
            BACKWARD, IN_PLACE,
        ).to(left.dtype)  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision="ieee")
    rest = n_k - whole * BK
    for tap in range(tl.where(rest > 0, taps, 0)):
        kh = first_h + tap // _divisor(taps_w) * steps[0]
        kw = first_w + tap % _divisor(taps_w) * steps[1]
        source, inside = _source_rows(image, h, w, kh, kw, a_size, window, BACKWARD)
        k = whole * BK + tl.arange(0, BK)
        left = source.to(tl.int64)[:, None] * a_stride + k[None, :]
        # What lies behind the packed features may be NaN. Whole vectors are read nevertheless.
        near = (inside & live)[:, None] & (k // A_VEC * A_VEC < n_k)[None, :]
        left = tl.load(a + left, mask=near, other=0.0)
        left = tl.where((k < n_k)[None, :], left, 0.0)
        right = _weights(
            weight, lists, reduced, strides, feature, scale, k, n_k, kh, kw,
            BACKWARD, IN_PLACE,
        ).to(left.dtype)  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision="ieee")
    shift = None
    if bias is not None:
        if IN_PLACE:
            shift = tl.load(bias + feature, mask=scale != 0, other=0.0).to(tl.float32)
        else:
            shift = tl.load(bias + places)
    acc = _finished(acc, scale, shift, RELU)
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _weights(
    weight, lists, reduced, strides, column, column_scale, k, n_k, kh, kw,
    BACKWARD: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """A block of the packed weight, [reduced, columns], at one kernel position."""
    tap = weight + kh.to(tl.int64) * strides.height + kw.to(tl.int64) * strides.width
    if IN_PLACE:
        feature, scale = _features(lists, reduced, k, n_k)
        is_open = (scale != 0)[:, None] & (column_scale != 0)[None, :]
        # Gates multiply input features: the reduced ones forward, the columns backward.
        if BACKWARD:
            place = feature[:, None] * strides.out + column[None, :] * strides.into
            factor = column_scale[None, :]
        else:
            place = feature[:, None] * strides.into + column[None, :] * strides.out
            factor = scale[:, None]
        values = tl.load(tap + place, mask=is_open, other=0.0).to(tl.float32) * factor
    elif BACKWARD:
        values = tl.load(tap + k.to(tl.int64)[:, None] * strides.out + column[None, :])
    else:
        values = tl.load(tap + k[:, None] + column[None, :] * strides.out)
    return values


@triton.jit
def _tma_kernel(
    a, weight, bias, packed_columns, out, lists, reduced, columns, images, size, a_size, a_stride,
    out_width, padded_out, padded_in,
    window: tl.constexpr, BACKWARD: tl.constexpr, RELU: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`_layer_kernel` for strides of 1 and a packed weight; a block is a patch of BI x BH x BW.

    The descriptor of `a` ends at the packed features and at the image's borders, so what it reads
    beyond is 0 without a mask. Blocks are computed transposed: Triton leaves a patch that is
    reshaped to rows in shared memory only as the second factor of a product.
    """
    n_k = _count(lists, reduced)
    n_c = _count(lists, columns)
    a_tensor = tl.make_tensor_descriptor(
        a,
        shape=[images, a_size[0], a_size[1], tl.maximum(n_k, 1)],
        strides=[a_size[0] * a_size[1] * a_stride, a_size[1] * a_stride, a_stride, 1],
        block_shape=[BI, BH, BW, BK],
    )
    weight_tensor = tl.make_tensor_descriptor(
        weight,
        shape=[window.kernel[0] * window.kernel[1] * padded_out, padded_in],
        strides=[padded_in, 1],
        block_shape=[BK if BACKWARD else BN, BN if BACKWARD else BK],
    )
    out_tensor = tl.make_tensor_descriptor(
        out,
        shape=[images, size[0], size[1], out_width],
        strides=[size[0] * size[1] * out_width, size[1] * out_width, out_width, 1],
        block_shape=[BI, BH, BW, BN],
    )
    patches_h = tl.cdiv(size[0], BH)
    patches_w = tl.cdiv(size[1], BW)
    patches = tl.cdiv(images, BI) * patches_h * patches_w
    tiles_c = tl.cdiv(n_c, BN)
    depth = tl.cdiv(n_k, BK)
    for tile in tl.range(tl.program_id(0), patches * tiles_c, tl.num_programs(0), flatten=True):
        patch = tile // _divisor(tiles_c)
        column = tile % _divisor(tiles_c) * BN
        image = patch // (patches_h * patches_w) * BI
        h = patch // patches_w % patches_h * BH
        w = patch % patches_w * BW
        acc = tl.zeros((BN, BI * BH * BW), tl.float32)
        for step in range(window.kernel[0] * window.kernel[1] * depth):
            tap = step // _divisor(depth)
            k = step % _divisor(depth) * BK
            shift_h = tap // window.kernel[1] * window.dilation[0] - window.padding[0]
            shift_w = tap % window.kernel[1] * window.dilation[1] - window.padding[1]
            if BACKWARD:
                pixels = a_tensor.load([image, h - shift_h, w - shift_w, k])
                weights = weight_tensor.load([tap * padded_out + k, column]).T
            else:
                pixels = a_tensor.load([image, h + shift_h, w + shift_w, k])
                weights = weight_tensor.load([tap * padded_out + column, k])
            acc = tl.dot(weights, pixels.reshape(BI * BH * BW, BK).T, acc)
        scale = tl.load(packed_columns + column + tl.arange(0, BN))
        shift = None
        if bias is not None:
            shift = tl.load(bias + column + tl.arange(0, BN))
        acc = _finished(acc.T, scale, shift, RELU).to(out.dtype.element_ty)
        out_tensor.store([image, h, w, column], acc.reshape(BI, BH, BW, BN))
    closed = tl.cdiv(out_width, BN) - tiles_c
    nothing = tl.zeros((BI, BH, BW, BN), out.dtype.element_ty)
    for tile in tl.range(tl.program_id(0), patches * closed, tl.num_programs(0)):
        patch = tile // _divisor(closed)
        column = (tiles_c + tile % _divisor(closed)) * BN
        image = patch // (patches_h * patches_w) * BI
        h = patch // patches_w % patches_h * BH
        out_tensor.store([image, h, patch % patches_w * BW, column], nothing)


# ---- dweight, dz ----


@triton.jit
def _weight_kernel(
    grad, x, partial, lists, inputs, outputs, rows, size, x_size, grad_width, x_width, x_stride,
    rows_per_split, padded_out, padded_in, window: tl.constexpr,
    GRAD_VEC: tl.constexpr, X_VEC: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """partial[split, tap, n, k] = sum over the split's rows of grad[m, n] x[source(m, tap), k].

    Widths and strides come in units of GRAD_VEC and X_VEC numbers.
    """
    grad_width *= GRAD_VEC
    x_width *= X_VEC
    x_stride *= X_VEC
    n_out = _count(lists, outputs)
    n_in = _count(lists, inputs)
    tiles_in = tl.cdiv(x_width, BI)
    first_out = tl.program_id(0) // tiles_in * BO
    first_in = tl.program_id(0) % tiles_in * BI
    tap = tl.program_id(1)
    split = tl.program_id(2)
    if (first_out >= n_out) | (first_in >= n_in):
        return
    out_places = first_out + tl.arange(0, BO)
    in_places = first_in + tl.arange(0, BI)
    kh = tap // window.kernel[1]
    kw = tap % window.kernel[1]
    end = tl.minimum((split + 1) * rows_per_split, rows)
    acc = tl.zeros((BO, BI), tl.float32)
    for first in range(split * rows_per_split, end, BM):
        row = first + tl.arange(0, BM)
        live = row < end
        image = row // (size[0] * size[1])
        h = row // size[1] % size[0]
        w = row % size[1]
        source, inside = _source_rows(image, h, w, kh, kw, x_size, window, False)
        # Columns behind the packed ones may hold NaN; it stays in rows and columns of no use.
        of_y = tl.load(
            grad + row.to(tl.int64)[:, None] * grad_width + out_places[None, :],
            mask=live[:, None] & (out_places < grad_width)[None, :],
            other=0.0,
        )
        of_x = tl.load(
            x + source.to(tl.int64)[:, None] * x_stride + in_places[None, :],
            mask=(live & inside)[:, None] & (in_places < x_width)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(of_y), of_x, acc, input_precision="ieee")
    place = (split * tl.num_programs(1) + tap).to(tl.int64) * padded_out
    place = (place + out_places[:, None]) * padded_in + in_places[None, :]
    tl.store(partial + place, acc)


@triton.jit
def _finish_weight_kernel(
    partial, weight, grad_weight, column_sums, lists, inputs, outputs, splits, strides,
    padded_out, padded_in, window: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Adds the splits, writes the weight's gradient, sums <gradient, weight> over BO outputs."""
    n_out = _count(lists, outputs)
    n_in = _count(lists, inputs)
    first_out = tl.program_id(0) * BO
    first_in = tl.program_id(1) * BI
    tap = tl.program_id(2)
    out_places = first_out + tl.arange(0, BO)
    in_places = first_in + tl.arange(0, BI)
    line = (tap * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * padded_in + in_places
    if (first_out >= n_out) | (first_in >= n_in):
        if column_sums is not None:
            tl.store(column_sums + line, tl.zeros((BI,), tl.float32))
        return
    row, row_scale = _features(lists, outputs, out_places, n_out)
    col, scale = _features(lists, inputs, in_places, n_in)
    is_open = (row_scale != 0)[:, None] & (scale != 0)[None, :]
    place = (tap.to(tl.int64) * padded_out + out_places[:, None]) * padded_in + in_places[None, :]
    total = tl.zeros((BO, BI), tl.float32)
    for _ in range(splits):
        total += tl.load(partial + place, mask=is_open, other=0.0)
        place += tl.num_programs(2).to(tl.int64) * padded_out * padded_in
    target = row[:, None] * strides.out + col[None, :] * strides.into
    target += tap // window.kernel[1] * strides.height + tap % window.kernel[1] * strides.width
    if grad_weight is not None:
        scaled = total * scale[None, :]
        tl.store(grad_weight + target, scaled.to(grad_weight.dtype.element_ty), mask=is_open)
    if column_sums is not None:
        factor = tl.load(weight + target, mask=is_open, other=0.0).to(tl.float32)
        tl.store(column_sums + line, tl.sum(total * factor, 0))


@triton.jit
def _gates_kernel(
    column_sums, grad_z, lists, inputs, lines, padded_in,
    BG: tl.constexpr, BI: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """grad_z[g] = sum over the columns that gate g scales of their sums times their other gate."""
    n_in = _count(lists, inputs)
    gate = tl.program_id(0) * BG + tl.arange(0, BG)
    acc = tl.zeros((BG,), tl.float64)
    for first in range(0, n_in, BI):
        places = first + tl.arange(0, BI)
        total = tl.zeros((BI,), tl.float64)
        for first_line in range(0, lines, BL):
            line = first_line + tl.arange(0, BL)
            source = column_sums + line.to(tl.int64)[:, None] * padded_in + places[None, :]
            live = (line < lines)[:, None] & (places < n_in)[None, :]
            total += tl.sum(tl.load(source, mask=live, other=0.0).to(tl.float64), 0)
        _, mine, other, exists = _gates_of(lists, inputs, places, n_in)
        by_mine = total * tl.load(lists.z + other, mask=exists, other=0.0)
        by_other = total * tl.load(lists.z + mine, mask=exists, other=0.0)
        mine = tl.where(exists, mine, -1)
        other = tl.where(exists, other, -1)
        acc += tl.sum(tl.where(mine[None, :] == gate[:, None], by_mine[None, :], 0.0), 1)
        acc += tl.sum(tl.where(other[None, :] == gate[:, None], by_other[None, :], 0.0), 1)
    # The last gate is no gate: it is always open.
    acc = tl.where(gate == lists.gates - 1, 0.0, acc)
    tl.store(grad_z + gate, acc.to(tl.float32), mask=gate < lists.gates)


# ---- relu and the bias ----


@triton.jit
def _upstream_kernel(
    grad, y, masked, bias_sums, lists, outputs, rows, rows_per_chunk, width,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """masked = grad where relu let something through; bias_sums[chunk] = its sums over rows."""
    n_out = _count(lists, outputs)
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BN
    if column >= n_out:
        return
    places = column + tl.arange(0, BN)
    end = tl.minimum((chunk + 1) * rows_per_chunk, rows)
    total = tl.zeros((BN,), tl.float32)
    for first in range(chunk * rows_per_chunk, end, BM):
        row = first + tl.arange(0, BM)
        place = row.to(tl.int64)[:, None] * width + places[None, :]
        live = (row < end)[:, None] & (places < width)[None, :]
        value = tl.load(grad + place, mask=live, other=0.0)
        if y is not None:
            stopped = tl.load(y + place, mask=live, other=0.0).to(tl.float32) <= 0
            value = tl.where(stopped, 0.0, value)
            tl.store(masked + place, value, mask=live)
        if bias_sums is not None:
            total += tl.sum(value.to(tl.float32), 0)
    if bias_sums is not None:
        tl.store(bias_sums + chunk.to(tl.int64) * width + places, total, mask=places < width)


@triton.jit
def _finish_bias_kernel(
    bias_sums, grad_bias, lists, outputs, chunks, width, BC: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Adds the chunks in order and writes the sums of open features to their places."""
    n_out = _count(lists, outputs)
    places = tl.program_id(0) * BN + tl.arange(0, BN)
    row, scale = _features(lists, outputs, places, n_out)
    total = tl.zeros((BN,), tl.float64)
    for first in range(0, chunks, BC):
        chunk = first + tl.arange(0, BC)
        live = (chunk < chunks)[:, None] & (places < n_out)[None, :]
        source = bias_sums + chunk.to(tl.int64)[:, None] * width + places[None, :]
        total += tl.sum(tl.load(source, mask=live, other=0.0).to(tl.float64), 0)
    rounded = total.to(tl.float32).to(grad_bias.dtype.element_ty)
    tl.store(grad_bias + row, rounded, mask=scale != 0)


# ---- host ----


PROGRAMS = 512  # about as many as keep a large GPU busy
WEIGHT_BLOCK = (32, 64)  # outputs and inputs that a program packs, or whose gradients it finishes
MAX_ROWS = (1 << 31) - (1 << 16)  # blocks and parts of them are rounded up
IN_PLACE_ROWS = 128  # up to so many rows, reading the weight once in place is cheapest


def layer_tiles(a: Tensor, columns: int, in_place: bool) -> Tiles:
    """Chooses the tiles of the kernels of y and dx from what the host knows."""
    kind = "narrow" if columns <= 64 else "wide"
    if a.dtype == torch.float32:
        kind = "float32"
    elif in_place:
        kind = "in place"
    elif _vector(a) == 1:
        kind = "uneven"
    return tiles_at(("layer", kind), a.device)


def weight_tiles(grad: Tensor, x: Tensor) -> Tiles:
    """Chooses the tiles of `_weight_kernel`: outputs, inputs, and rows added at once."""
    kind = "narrow" if min(grad.shape[1], x.shape[1]) <= 64 else "wide"
    if x.dtype == torch.float32:
        kind = "float32"
    elif _vector(grad) == 1 or _vector(x) == 1:
        kind = "uneven"
    return tiles_at(("weight", kind), x.device)


def has_tma(device: torch.device) -> bool:
    """Whether a device moves blocks of tensors by descriptor: Hopper and later."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] >= 9


def multiprocessors(device: torch.device) -> int:
    """How many persistent programs run at once."""
    if device.type != "cuda":
        return 2  # the interpreter's programs run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def use_tma(geometry: "Geometry", a: Tensor, out: Tensor) -> bool:
    """Whether `_tma_kernel` takes these rows: not below 16 bytes, and not expanded."""
    aligned = all(
        rows.stride(0) * rows.itemsize % 16 == 0
        and rows.data_ptr() % 16 == 0
        and rows.stride(0) >= rows.shape[1]
        for rows in (a, out)
    )
    is_short = a.dtype in (torch.bfloat16, torch.float16)
    return aligned and is_short and geometry.window.stride == (1, 1) and has_tma(a.device)


@cache
def best_patch(rows: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """The block of images, lines and pixels, `rows` pixels in all, that covers most tightly."""
    powers = [1 << i for i in range(rows.bit_length())]
    patches = [(rows // (h * w), h, w) for w in powers for h in powers if h * w <= rows]

    def blocks(patch: tuple[int, int, int]) -> int:
        return prod(map(_triton.cdiv, (images, height, width), patch))

    return min(patches, key=lambda patch: (blocks(patch), patch[0], patch[1]))


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)


class Geometry(NamedTuple):
    """Sizes of a convolution; a linear layer has one pixel per image."""

    images: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    window: Window

    @property
    def taps(self) -> int:
        return prod(self.window.kernel)


def pointwise(rows: int) -> Geometry:
    """The geometry of layers that compute every row from the row at the same place."""
    return Geometry(rows, (1, 1), (1, 1), Window())


def as_rows(tensor: Tensor) -> Tensor:
    """Views [..., features] as [rows, features] with adjacent features; copies if it must.

    Raises:
        ValueError: the kernels number rows by 32 bits, and there are too many.
    """
    rows = tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])
    if rows.shape[0] > MAX_ROWS:
        raise ValueError(f"expected at most {MAX_ROWS} rows or pixels; got {rows.shape[0]}")
    return rows if rows.stride(1) == 1 else rows.contiguous()


@dataclass
class Layer:
    """The parameters of a layer and where its open features are listed.

    Args:
        weight: [O, I, height, width], any strides.
        z, index, counts, maps, in_span, out_span: as in `gated_linear`.
        in_capacity: width of the rows of x.
        geometry: of the convolution.
    """

    weight: Tensor
    z: Tensor
    index: Tensor
    counts: Tensor
    maps: Tensor
    in_span: Sequence[int]
    out_span: Sequence[int]
    in_capacity: int
    geometry: Geometry

    def __post_init__(self) -> None:
        # Gradients have these strides, and share offsets with the weight.
        dense = torch.empty_like(self.weight)
        if dense.stride() != self.weight.stride():
            self.weight = dense.copy_(self.weight)
        lists = (t.contiguous() for t in (self.z, self.index, self.counts, self.maps))
        self.lists = Lists(*lists, self.index.shape[0], self.z.shape[0])
        outputs, features = self.weight.shape[:2]
        limit = min(features, self.in_capacity)
        self.inputs = Axis(*(self.in_span or (None, None)), limit, features)
        self.outputs = Axis(*(self.out_span or (None, None)), outputs, outputs)
        self.padded = [_round_up(max(n, 1), PADDING.value) for n in (outputs, self.in_capacity)]

    def pack(
        self, dtype: torch.dtype, bias: Tensor | None, backward: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Packed copies of weight and bias, and the scales of the columns of the result.

        The weight is [taps, padded outputs, padded inputs].
        """
        packed = self.weight.new_empty((self.geometry.taps, *self.padded), dtype=dtype)
        columns = self.z.new_empty((2, self.padded[1] if backward else self.padded[0]))
        blocks = [n // b for n, b in zip(self.padded, WEIGHT_BLOCK, strict=True)]
        _pack_kernel[(*blocks, self.geometry.taps)](
            self.weight, bias, packed, columns, self.lists, self.inputs, self.outputs,
            Strides(*self.weight.stride()), *self.padded, self.geometry.window, backward,
            *WEIGHT_BLOCK,
        )  # fmt: skip
        return packed, None if bias is None else columns[1], columns[0]

    def run(self, a: Tensor, bias: Tensor | None, relu: bool, out: Tensor, backward: bool) -> None:
        """Writes y, or dx from dy, to `out`; all are rows."""
        size, a_size = self.geometry.out_size, self.geometry.in_size
        reduced, columns = self.inputs, self.outputs
        if backward:
            size, a_size, reduced, columns = a_size, size, columns, reduced
        shape = (self.geometry.images, size, a_size)
        in_place = out.shape[0] <= IN_PLACE_ROWS
        weight, scale = self.weight, None
        if not in_place:
            weight, bias, scale = self.pack(a.dtype, bias, backward)
        tensors = (a, weight, bias, scale, out, self.lists, reduced, columns)
        if not in_place and use_tma(self.geometry, a, out):
            self._launch_tma(tensors, shape, backward, relu)
            return
        strides = Strides(*weight.stride()) if in_place else self._packed_strides()
        steps, firsts = (1, 1), (0, 0)
        if backward:
            window = self.geometry.window
            steps, firsts = zip(*map(_classes, window.stride, window.dilation), strict=True)
        rows = prod([shape[0], *(-(-n // step) for n, step in zip(size, steps, strict=True))])
        tiles = layer_tiles(a, out.shape[1], in_place)
        blocks = _triton.cdiv(rows, tiles.rows) * _triton.cdiv(out.shape[1], tiles.columns)
        vec, out_vec = _vector(a), _vector(out)
        _layer_kernel[(blocks, prod(steps))](
            *tensors, *shape, a.stride(0) // vec, out.shape[1] // out_vec,
            strides, self.geometry.window, steps, firsts,
            BACKWARD=backward, IN_PLACE=in_place, RELU=relu, A_VEC=vec, OUT_VEC=out_vec,
            BM=tiles.rows, BN=tiles.columns, BK=tiles.depth,
            num_warps=tiles.warps, num_stages=tiles.stages, **_triton.at_most_registers(255),
        )  # fmt: skip

    def _packed_strides(self) -> Strides:
        tap = prod(self.padded)
        return Strides(self.padded[1], 1, tap * self.geometry.window.kernel[1], tap)

    def _launch_tma(self, tensors, shape, backward: bool, relu: bool) -> None:
        (a, _, _, _, out, *_), (images, size, _) = tensors, shape
        tiles = layer_tiles(a, out.shape[1], False)
        patch = best_patch(tiles.rows, images, *size)
        blocks = _triton.cdiv(out.shape[1], tiles.columns)
        blocks *= prod(map(_triton.cdiv, (images, *size), patch))
        triton.set_allocator(_scratch)  # where the descriptors are kept
        _tma_kernel[(min(blocks, multiprocessors(a.device)),)](
            *tensors, *shape, a.stride(0), out.shape[1], *self.padded,
            self.geometry.window, backward, relu,
            *patch, tiles.columns, tiles.depth,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def weight_gradients(
        self, grad: Tensor, x: Tensor, need_weight: bool, need_z: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the weight [O, I, height, width] and of z from rows of dy and x."""
        geometry, rows = self.geometry, grad.shape[0]
        tiles = weight_tiles(grad, x)
        vec, grad_vec = _vector(x), _vector(grad)
        blocks = _triton.cdiv(grad.shape[1], tiles.rows) * _triton.cdiv(x.shape[1], tiles.columns)
        splits = PROGRAMS // max(1, blocks * geometry.taps)
        splits = max(1, min(splits, rows // (8 * tiles.depth)))
        per_split = _round_up(_triton.cdiv(rows, splits), tiles.depth)
        partial = x.new_empty((splits, geometry.taps, *self.padded), dtype=torch.float32)
        _weight_kernel[(blocks, geometry.taps, splits)](
            grad, x, partial, self.lists, self.inputs, self.outputs,
            rows, geometry.out_size, geometry.in_size,
            grad.shape[1] // grad_vec, x.shape[1] // vec, x.stride(0) // vec,
            per_split, *self.padded, geometry.window, GRAD_VEC=grad_vec, X_VEC=vec,
            BM=tiles.depth, BO=tiles.rows, BI=tiles.columns,
            num_warps=tiles.warps, num_stages=tiles.stages, **_triton.at_most_registers(255),
        )  # fmt: skip
        grad_weight = torch.zeros_like(self.weight) if need_weight else None
        grad_z = torch.zeros_like(self.z) if need_z else self.z.new_empty(0)
        finished = [n // b for n, b in zip(self.padded, WEIGHT_BLOCK, strict=True)]
        lines = geometry.taps * finished[0]
        column_sums = None
        if need_z and self.in_span:
            column_sums = partial.new_empty((lines, self.padded[1]))
        _finish_weight_kernel[(*finished, geometry.taps)](
            partial, self.weight, grad_weight, column_sums, self.lists, self.inputs, self.outputs,
            splits, Strides(*self.weight.stride()), *self.padded, geometry.window, *WEIGHT_BLOCK,
        )  # fmt: skip
        if column_sums is not None:
            _gates_kernel[(_triton.cdiv(self.z.shape[0], 32),)](
                column_sums, grad_z, self.lists, self.inputs, lines, self.padded[1],
                BG=32, BI=64, BL=32,
            )  # fmt: skip
        return self.weight.new_empty(0) if grad_weight is None else grad_weight, grad_z

    def upstream(self, grad: Tensor, y: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
        """Rows of dL/dy with relu's mask, and the gradient of the bias."""
        rows, width = grad.shape
        masked = grad if y is None else torch.empty_like(grad)
        grad_bias = self.weight.new_zeros(width if need_bias else 0)
        if rows == 0 or (y is None and not need_bias):
            return masked, grad_bias
        columns = _triton.cdiv(width, 64)
        per_chunk = _round_up(_triton.cdiv(rows, max(1, PROGRAMS // columns)), 64)
        chunks = _triton.cdiv(rows, per_chunk)
        bias_sums = grad.new_empty((chunks, width), dtype=torch.float32) if need_bias else None
        _upstream_kernel[(chunks, columns)](
            grad, y, masked, bias_sums, self.lists, self.outputs, rows, per_chunk, width,
            BM=64, BN=64,
        )  # fmt: skip
        if need_bias:
            _finish_bias_kernel[(columns,)](
                bias_sums, grad_bias, self.lists, self.outputs, chunks, width, BC=32, BN=64
            )
        return masked, grad_bias

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        grad_x: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Writes dx to `grad_x` if there is one; the gradients of weight, bias and z.

        Args:
            grad, x, y: rows; y only where its activation is relu.
            grad_x: rows to be written, or None.
            needs: whether weight, bias and z need gradients.
        """
        need_weight, need_bias, need_z = needs
        grad, grad_bias = self.upstream(grad.contiguous(), y, need_bias)
        if grad_x is not None and grad_x.numel():
            self.run(grad, None, False, grad_x, True)
        grad_weight, grad_z = self.weight.new_empty(0), self.z.new_empty(0)
        if need_weight or need_z:
            grad_weight, grad_z = self.weight_gradients(grad, x, need_weight, need_z)
        return grad_weight, grad_bias, grad_z


def _round_up(value: int, unit: int) -> int:
    return _triton.cdiv(value, unit) * unit


def _vector(rows: Tensor) -> int:
    """How many numbers of a row can be read at once, wherever it starts."""
    numbers = 16 // rows.dtype.itemsize
    return numbers if rows.shape[1] % numbers == rows.stride(0) % numbers == 0 else 1


def _classes(stride: int, dilation: int) -> tuple[int, int]:
    """`steps` and `firsts` of `_layer_kernel` for one dimension."""
    # Where stride and dilation share a factor, a row's kernel positions are no such sequence.
    if stride == 1 or gcd(stride, dilation) > 1:
        return 1, 0
    return stride, pow(dilation, -1, stride)


def float64_by(stand_in: Callable) -> Callable[[Callable], Callable]:
    """Leaves float64 to PyTorch operations: GPUs have no more for it than those use."""

    def decorate(kernels: Callable) -> Callable:
        @wraps(kernels)
        @torch.no_grad()
        def run(first: Tensor, *arguments: Any) -> Any:
            chosen = stand_in if first.dtype == torch.float64 else kernels
            return chosen(first, *arguments)

        return run

    return decorate


def _linear_layer(x: Tensor, weight: Tensor, lists: Sequence[Any]) -> Layer:
    return Layer(weight[:, :, None, None], *lists, x.shape[-1], pointwise(prod(x.shape[:-1])))


@float64_by(op._forward_python)
def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int],
    out_span: Sequence[int],
    activation: str,
) -> Tensor:
    """The raw operator `gated_linear`."""
    layer = _linear_layer(x, weight, (z, index, counts, maps, in_span, out_span))
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        with _triton.on_device_of(x):
            layer.run(as_rows(x), bias, activation == "relu", as_rows(y), False)
    return y


@float64_by(op._backward_python)
def gated_linear_backward(
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
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator `gated_linear_backward`."""
    layer = _linear_layer(x, weight, (z, index, counts, maps, in_span, out_span))
    grad_x = x.new_empty(x.shape if need_x else 0)
    of_relu = as_rows(y).contiguous() if activation == "relu" and y is not None else None
    needs = (need_weight, need_bias, need_z)
    grad_rows = as_rows(grad_x) if need_x else None
    with _triton.on_device_of(x):
        grad_weight, grad_bias, grad_z = layer.backward(
            as_rows(grad), as_rows(x), of_relu, grad_rows, needs
        )
    if need_weight:
        grad_weight = grad_weight.reshape(weight.shape)
    return grad_x, grad_weight, grad_bias, grad_z
