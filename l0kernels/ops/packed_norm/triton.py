# SPDX-License-Identifier: Apache-2.0
# Triton's decorators hide what kernels take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The Triton kernels of `packed_norm` and its backward pass.

At most three launches each way: sums over chunks of the batch, what follows from them for each
channel, then the values. Channels lie side by side (rows: channels_last, [N, C]) or one behind the
other (planes); programs work on tiles of values and channels. A value is numbered by its place in
the batch and in the image.

A lane adds a few numbers in float32 and adds that to its sums in float64; lanes, chunks and
channels are added in an order that the shape alone decides. Nothing contracts a product and a sum,
so that the backward pass sees the very signs that ReLU saw.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton
from l0kernels.ops.packed_norm import op
from l0kernels.ops.packed_norm.reference import layout_of

PLANE_TILE = (1024, 1)  # values and channels of a tile
ROW_TILES = ((64, 16), (16, 64))  # the first for few features
SUM_PROGRAMS = 264  # two for each multiprocessor of an H200
VALUE_PROGRAMS = 1056
UNROLL = 4  # tiles that are asked for before the first is used
FINISH_TILE = (32, 16)  # chunks and channels
CONSTANTS = 6  # of a channel, see _constants


# ---- numbers and channels ----


@triton.jit
def _channels(channels, CHANNELS: tl.constexpr):
    """The channels of this program, and which of them exist."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < channels


@triton.jit
def _chunk(values, tiles, STEP: tl.constexpr, UNIT: tl.constexpr):
    """The first value of this program's chunk, and how many there are, a multiple of UNIT."""
    first = tl.program_id(1).to(tl.int64) * tiles * STEP
    size = tl.minimum(values - first, tiles * STEP).to(tl.int32)
    return first, size // UNIT * UNIT  # tells the compiler that masks do not cut vectors


@triton.jit
def _places(first, value, channel, channels, inner, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Where the numbers of values, counted from `first`, and channels lie."""
    if ROWS:
        places = (first + value)[:, None] * channels + channel[None, :]
    else:
        in_image = tl.multiple_of((first % inner).to(tl.int32), VECTOR) + value
        line = (first // inner + in_image // inner)[:, None] * channels + channel[None, :]
        places = line * inner + (in_image % inner)[:, None]
    return places


@triton.jit
def _parameter(numbers, feature, exists, otherwise: tl.constexpr, COMPUTE: tl.constexpr):
    """Packed entries of a parameter; one that is None has the same number everywhere."""
    if numbers is None:
        packed = tl.full([feature.shape[0]], otherwise, COMPUTE)
    else:
        packed = tl.load(numbers + feature, mask=exists, other=0.0).to(COMPUTE)
    return packed


@triton.jit
def _is_open(z, map, features, feature, exists):
    a = tl.load(map + feature, mask=exists, other=0)
    b = tl.load(map + features + feature, mask=exists, other=0)
    return exists & (tl.load(z + a) * tl.load(z + b) != 0)


@triton.jit
def _finite(numbers):
    return tl.where(numbers - numbers == 0, numbers, 0.0)


@triton.jit
def _lost_digits(mean, COMPUTE: tl.constexpr):
    """What a mean loses where numbers are computed."""
    return _finite(mean - mean.to(COMPUTE).to(tl.float64))


@triton.jit
def _constants(mean, rstd, weight, bias, COMPUTE: tl.constexpr):
    """mean, alpha and beta of y = (x - mean) alpha + beta.

    What `mean` lacks is in beta, so that y is right to rounding however far x is from zero.
    """
    alpha = rstd * weight
    lost = _lost_digits(mean, COMPUTE) * alpha.to(tl.float64)
    return mean.to(COMPUTE), alpha, (bias.to(tl.float64) - lost).to(COMPUTE)


@triton.jit
def _shift(mean, magnitude, INPUT: tl.constexpr):
    """A number near the mean, of so few digits that less it numbers of few digits stay exact.

    Otherwise all would be rounded to the same side. Means near zero need no shift.
    """
    few_digits = mean.to(INPUT).to(mean.dtype)
    return _finite(tl.where(tl.abs(mean) * 64 < magnitude, 0.0, few_digits))


@triton.jit
def _passes_relu(value):
    return ~(value <= 0)  # NaN passes


# ---- moments ----


@triton.jit(do_not_specialize=["values", "tiles", "channel_vectors", "inner_vectors"])
def _moments(
    x,
    moments,
    values,
    tiles,
    channel_vectors,
    inner_vectors,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel, [chunks, 2, channels]."""
    channels = channel_vectors * (VECTOR if ROWS else 1)
    inner = inner_vectors * (1 if ROWS else VECTOR)
    channel, exists = _channels(channels, CHANNELS)
    first, size = _chunk(values, tiles, VALUES * UNROLL, 1 if ROWS else VECTOR)

    # Differences from any number near the mean are summed.
    near = tl.zeros([VALUES, CHANNELS], COMPUTE)
    magnitudes = tl.zeros([VALUES, CHANNELS], COMPUTE)
    for u in tl.static_range(UNROLL):
        value = u * VALUES + tl.arange(0, VALUES)
        inside = (value < size)[:, None] & exists[None, :]
        place = _places(first, value, channel, channels, inner, ROWS, VECTOR)
        number = tl.load(x + place, mask=inside, other=0.0).to(COMPUTE)
        near += number
        magnitudes += tl.abs(number)
    count = tl.minimum(size, VALUES * UNROLL).to(COMPUTE)
    mean = tl.sum(near, 0) / count
    shift = _shift(mean, tl.sum(magnitudes, 0) / count, x.dtype.element_ty)

    total = tl.zeros([VALUES, CHANNELS], tl.float64)
    squares = tl.zeros([VALUES, CHANNELS], tl.float64)
    for step in range(tl.cdiv(size, VALUES * UNROLL)):
        some = tl.zeros([VALUES, CHANNELS], COMPUTE)
        some_squares = tl.zeros([VALUES, CHANNELS], COMPUTE)
        for u in tl.static_range(UNROLL):
            value = (step * UNROLL + u) * VALUES + tl.arange(0, VALUES)
            inside = (value < size)[:, None] & exists[None, :]
            place = _places(first, value, channel, channels, inner, ROWS, VECTOR)
            number = tl.load(x + place, mask=inside, other=0.0).to(COMPUTE)
            difference = tl.where(inside, number - shift[None, :], 0.0)
            some += difference
            some_squares += difference * difference
        total += some.to(tl.float64)
        squares += some_squares.to(tl.float64)

    part = moments + tl.program_id(1).to(tl.int64) * 2 * channels + channel
    rest = tl.sum(total, 0) / size
    deviations = tl.sum(squares, 0) - tl.sum(total, 0) * rest
    tl.store(part, shift.to(tl.float64) + rest, mask=exists)
    tl.store(part + channels, tl.where(deviations < 0, 0.0, deviations), mask=exists)


@triton.jit
def _batch_moments(
    moments, values, chunk_values, chunks, channel, channels, exists, CHUNKS: tl.constexpr
):
    """Mean and sum of squared deviations of channels, from those of all chunks."""
    shift = _finite(tl.load(moments + channel, mask=exists, other=0.0))
    total = tl.zeros([CHUNKS, channel.shape[0]], tl.float64)
    squares = tl.zeros([CHUNKS, channel.shape[0]], tl.float64)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS).to(tl.int64)
        inside = (chunk < chunks)[:, None] & exists[None, :]
        part = moments + chunk[:, None] * 2 * channels + channel[None, :]
        count = tl.minimum(values - chunk * chunk_values, chunk_values).to(tl.float64)[:, None]
        difference = tl.load(part, mask=inside, other=0.0) - shift[None, :]
        deviations = tl.load(part + channels, mask=inside, other=0.0)
        total += tl.where(inside, count * difference, 0.0)
        squares += tl.where(inside, deviations + count * difference * difference, 0.0)
    mean = tl.sum(total, 0) / values
    deviations = tl.sum(squares, 0) - tl.sum(total, 0) * mean
    return shift + mean, tl.where(deviations < 0, 0.0, deviations)


@triton.jit
def _move(running, place, new, momentum, is_open):
    """Moves running statistics towards those of the batch."""
    old = tl.load(running + place, mask=is_open, other=0.0).to(tl.float64)
    mixed = (1.0 - momentum) * old + momentum * new
    tl.store(running + place, mixed.to(running.dtype.element_ty), mask=is_open)


@triton.jit(
    do_not_specialize=[
        "mean_stride",
        "var_stride",
        "features",
        "channels",
        "values",
        "chunk_values",
        "chunks",
    ]
)
def _finish_moments(
    moments,
    weight,
    bias,
    running_mean,
    running_var,
    mean_stride,
    var_stride,
    index,
    z,
    map,
    mean,
    rstd,
    constants,
    features,
    channels,
    values,
    chunk_values,
    chunks,
    momentum: tl.float64,
    eps: tl.float64,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The statistics of channels, batch or running, and what turns their numbers into results."""
    COMPUTE: tl.constexpr = rstd.dtype.element_ty
    channel, exists = _channels(channels, CHANNELS)
    feature = tl.load(index + channel, mask=exists, other=0)
    is_open = _is_open(z, map, features, feature, exists)
    if moments is not None:
        average, deviations = _batch_moments(
            moments, values, chunk_values, chunks, channel, channels, exists, CHUNKS
        )
        variance = deviations / values
        if running_mean is not None:
            _move(running_mean, feature * mean_stride, average, momentum, is_open)
            unbiased = deviations / (values.to(tl.float64) - 1.0)
            _move(running_var, feature * var_stride, unbiased, momentum, is_open)
    else:
        place = feature * mean_stride
        average = tl.load(running_mean + place, mask=exists, other=0.0).to(tl.float64)
        place = feature * var_stride
        variance = tl.load(running_var + place, mask=exists, other=0.0).to(tl.float64)
    average = tl.where(is_open, average, 0.0)
    deviation = tl.where(is_open, 1.0 / tl.sqrt(variance + eps), 0.0).to(COMPUTE)
    tl.store(mean + channel, average, mask=exists)
    tl.store(rstd + channel, deviation, mask=exists)
    scale = _parameter(weight, feature, exists, 1.0, COMPUTE)
    offset = _parameter(bias, feature, exists, 0.0, COMPUTE)
    center, alpha, beta = _constants(average, deviation, scale, offset, COMPUTE)
    own = constants + channel
    tl.store(own, center, mask=exists)
    tl.store(own + channels, alpha, mask=exists)
    tl.store(own + 2 * channels, beta, mask=exists)
    tl.store(own + 3 * channels, is_open.to(COMPUTE), mask=exists)


# ---- values ----


@triton.jit(do_not_specialize=["values", "tiles", "channel_vectors", "inner_vectors"])
def _values(
    x,
    grad,
    result,
    constants,
    values,
    tiles,
    channel_vectors,
    inner_vectors,
    RELU: tl.constexpr,
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """y, or with `grad` the gradient of x."""
    COMPUTE: tl.constexpr = constants.dtype.element_ty
    channels = channel_vectors * (VECTOR if ROWS else 1)
    inner = inner_vectors * (1 if ROWS else VECTOR)
    channel, exists = _channels(channels, CHANNELS)
    own = constants + channel
    mean = tl.load(own, mask=exists, other=0.0)[None, :]
    alpha = tl.load(own + channels, mask=exists, other=0.0)[None, :]
    beta = tl.load(own + 2 * channels, mask=exists, other=0.0)[None, :]
    is_open = tl.load(own + 3 * channels, mask=exists, other=0.0)[None, :] != 0
    if TRAINING and grad is not None:
        grad_mean = tl.load(own + 4 * channels, mask=exists, other=0.0)[None, :]
        slope = tl.load(own + 5 * channels, mask=exists, other=0.0)[None, :]
    first, size = _chunk(values, tiles, VALUES * UNROLL, 1 if ROWS else VECTOR)
    for step in range(tl.cdiv(size, VALUES * UNROLL)):
        for u in tl.static_range(UNROLL):
            value = (step * UNROLL + u) * VALUES + tl.arange(0, VALUES)
            inside = (value < size)[:, None] & exists[None, :]
            place = _places(first, value, channel, channels, inner, ROWS, VECTOR)
            shifted = tl.load(x + place, mask=inside, other=0.0).to(COMPUTE) - mean
            found = shifted * alpha + beta
            if RELU:
                passes = _passes_relu(found)
                found = tl.where(passes, found, 0.0)
            if grad is not None:
                found = tl.load(grad + place, mask=inside, other=0.0).to(COMPUTE)
                if RELU:
                    found = tl.where(passes, found, 0.0)
                if TRAINING:
                    found = found - grad_mean - shifted * slope
                found = found * alpha
            found = tl.where(is_open, found, 0.0)
            tl.store(result + place, found.to(result.dtype.element_ty), mask=inside)


# ---- sums of the backward pass ----


@triton.jit
def _clear(numbers, size, BLOCK: tl.constexpr):
    """Fills with zeros, all programs together."""
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    for start in range(program * BLOCK, size, programs * BLOCK):
        place = start + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], numbers.dtype.element_ty)
        tl.store(numbers + place, zeros, mask=place < size)


@triton.jit(do_not_specialize=["features", "values", "tiles", "channel_vectors", "inner_vectors"])
def _grads(
    grad,
    x,
    sums,
    weight,
    bias,
    mean,
    rstd,
    index,
    grad_weight,
    grad_bias,
    features,
    values,
    tiles,
    channel_vectors,
    inner_vectors,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    VALUES: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of grad and grad (x - mean), [chunks, 2, channels]; grad is the one before ReLU.

    Closed features get their zeros here, open ones their gradients when the sums are finished.
    """
    COMPUTE: tl.constexpr = rstd.dtype.element_ty
    if grad_weight is not None:
        _clear(grad_weight, features, 1024)
    if grad_bias is not None:
        _clear(grad_bias, features, 1024)
    channels = channel_vectors * (VECTOR if ROWS else 1)
    inner = inner_vectors * (1 if ROWS else VECTOR)
    channel, exists = _channels(channels, CHANNELS)
    feature = tl.load(index + channel, mask=exists, other=0)
    center, alpha, beta = _constants(
        tl.load(mean + channel, mask=exists, other=0.0),
        tl.load(rstd + channel, mask=exists, other=0.0),
        _parameter(weight, feature, exists, 1.0, COMPUTE),
        _parameter(bias, feature, exists, 0.0, COMPUTE),
        COMPUTE,
    )
    total = tl.zeros([VALUES, CHANNELS], tl.float64)
    products = tl.zeros([VALUES, CHANNELS], tl.float64)
    first, size = _chunk(values, tiles, VALUES * UNROLL, 1 if ROWS else VECTOR)
    for step in range(tl.cdiv(size, VALUES * UNROLL)):
        some = tl.zeros([VALUES, CHANNELS], COMPUTE)
        some_products = tl.zeros([VALUES, CHANNELS], COMPUTE)
        for u in tl.static_range(UNROLL):
            value = (step * UNROLL + u) * VALUES + tl.arange(0, VALUES)
            inside = (value < size)[:, None] & exists[None, :]
            place = _places(first, value, channel, channels, inner, ROWS, VECTOR)
            shifted = tl.load(x + place, mask=inside, other=0.0).to(COMPUTE) - center[None, :]
            upstream = tl.load(grad + place, mask=inside, other=0.0).to(COMPUTE)
            if RELU:
                before = shifted * alpha[None, :] + beta[None, :]
                upstream = tl.where(_passes_relu(before), upstream, 0.0)
            some += upstream
            some_products += tl.where(inside, upstream * shifted, 0.0)
        total += some.to(tl.float64)
        products += some_products.to(tl.float64)
    part = sums + tl.program_id(1).to(tl.int64) * 2 * channels + channel
    tl.store(part, tl.sum(total, 0), mask=exists)
    tl.store(part + channels, tl.sum(products, 0), mask=exists)


@triton.jit(do_not_specialize=["features", "channels", "values", "chunks"])
def _finish_grads(
    sums,
    weight,
    bias,
    mean,
    rstd,
    index,
    z,
    map,
    grad_weight,
    grad_bias,
    constants,
    features,
    channels,
    values,
    chunks,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of parameters, and what turns the numbers of channels into gradients of x."""
    COMPUTE: tl.constexpr = rstd.dtype.element_ty
    channel, exists = _channels(channels, CHANNELS)
    feature = tl.load(index + channel, mask=exists, other=0)
    is_open = _is_open(z, map, features, feature, exists)
    average = tl.load(mean + channel, mask=exists, other=0.0)
    deviation = tl.load(rstd + channel, mask=exists, other=0.0)
    own = constants + channel
    if sums is not None:
        all_total = tl.zeros([CHUNKS, CHANNELS], tl.float64)
        all_products = tl.zeros([CHUNKS, CHANNELS], tl.float64)
        for start in range(0, chunks, CHUNKS):
            chunk = start + tl.arange(0, CHUNKS).to(tl.int64)
            inside = (chunk < chunks)[:, None] & exists[None, :]
            part = sums + chunk[:, None] * 2 * channels + channel[None, :]
            all_total += tl.load(part, mask=inside, other=0.0)
            all_products += tl.load(part + channels, mask=inside, other=0.0)
        total = tl.sum(all_total, 0)
        lost = _lost_digits(average, COMPUTE)
        product = tl.sum(all_products, 0) - lost * total
        precise = deviation.to(tl.float64)
        if grad_weight is not None:
            found = (product * precise).to(grad_weight.dtype.element_ty)
            tl.store(grad_weight + feature, found, mask=is_open)
        if grad_bias is not None:
            found = total.to(grad_bias.dtype.element_ty)
            tl.store(grad_bias + feature, found, mask=is_open)
        slope = product / values * precise * precise
        tl.store(own + 4 * channels, (total / values - lost * slope).to(COMPUTE), mask=exists)
        tl.store(own + 5 * channels, slope.to(COMPUTE), mask=exists)
    scale = _parameter(weight, feature, exists, 1.0, COMPUTE)
    offset = _parameter(bias, feature, exists, 0.0, COMPUTE)
    center, alpha, beta = _constants(average, deviation, scale, offset, COMPUTE)
    tl.store(own, center, mask=exists)
    tl.store(own + channels, alpha, mask=exists)
    tl.store(own + 2 * channels, beta, mask=exists)
    tl.store(own + 3 * channels, is_open.to(COMPUTE), mask=exists)


# ---- launches ----


class _Plan(NamedTuple):
    """How a kernel goes through the numbers."""

    values: int  # of each channel
    channels: int
    inner: int  # values of an image; 1 for rows
    is_rows: bool
    vector: int  # numbers that lie side by side and can be loaded at once
    tile: tuple[int, int]
    unroll: int
    steps: int  # of a chunk
    chunks: int

    @classmethod
    def of(cls, x: Tensor, features: int, programs: int, unroll: int) -> "_Plan":
        """Widths before packing decide the tile: those after it vary, and kernels with them."""
        images, channels = x.shape[:2]
        values = x.numel() // channels
        is_rows = layout_of(x) != torch.contiguous_format or values == images
        inner = 1 if is_rows else values // images
        tile = ROW_TILES[features > ROW_TILES[0][1]] if is_rows else PLANE_TILE
        vector = 16 // x.element_size()
        if (channels if is_rows else inner) % vector:
            vector = 1
        steps = _triton.cdiv(values, tile[0] * unroll)
        wanted = min(steps, max(1, programs // _triton.cdiv(channels, tile[1])))
        per_chunk = _triton.cdiv(steps, wanted)
        chunks = _triton.cdiv(steps, per_chunk)
        return cls(values, channels, inner, is_rows, vector, tile, unroll, per_chunk, chunks)

    @property
    def chunk_values(self) -> int:
        return self.steps * self.unroll * self.tile[0]

    @property
    def grid(self) -> tuple[int, int]:
        return _triton.cdiv(self.channels, self.tile[1]), self.chunks

    def numbers(self) -> tuple[int, int, int, int]:
        channel_part, inner_part = (self.vector, 1) if self.is_rows else (1, self.vector)
        return (
            self.values,
            self.steps,
            self.channels // channel_part,
            self.inner // inner_part,
        )

    def options(self) -> dict[str, Any]:
        return {
            "ROWS": self.is_rows,
            "VECTOR": self.vector,
            "VALUES": self.tile[0],
            "CHANNELS": self.tile[1],
            "UNROLL": self.unroll,
            "num_warps": 4,
            "enable_fp_fusion": False,
        }


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """In the layout of the result, at a multiple of 16 bytes; a copy if need be."""
    dense = tensor.contiguous(memory_format=layout_of(like))
    return dense.clone() if dense.data_ptr() % 16 else dense


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _finish_options() -> dict[str, Any]:
    chunks, channels = FINISH_TILE
    return {"CHUNKS": chunks, "CHANNELS": channels, "num_warps": 4, "enable_fp_fusion": False}


def _launch_moments(x: Tensor, features: int) -> tuple[Tensor, _Plan]:
    plan = _Plan.of(x, features, SUM_PROGRAMS, UNROLL)
    moments = x.new_empty((plan.chunks, 2, plan.channels), dtype=torch.float64)
    compute = tl.float64 if x.dtype == torch.float64 else tl.float32
    _moments[plan.grid](x, moments, *plan.numbers(), COMPUTE=compute, **plan.options())
    return moments, plan


def _launch_values(
    x: Tensor,
    grad: Tensor | None,
    result: Tensor,
    constants: Tensor,
    features: int,
    is_relu: bool,
    training: bool,
) -> None:
    plan = _Plan.of(x, features, VALUE_PROGRAMS, UNROLL if grad is None else UNROLL // 2)
    _values[plan.grid](
        x,
        grad,
        result,
        constants,
        *plan.numbers(),
        RELU=is_relu,
        TRAINING=training and grad is not None,  # forward is the same
        **plan.options(),
    )


# ---- operators ----


@torch.no_grad()
def packed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    index: Tensor,
    z: Tensor,
    map: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator `packed_norm`."""
    y, mean, rstd = op._empty_results(x)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    dense, features, channels = _dense(x, x), map.shape[1], x.shape[1]
    constants = rstd.new_empty((CONSTANTS, channels))
    with _triton.on_device_of(x):
        moments, chunk_values, chunks = None, 0, 0
        if training:
            moments, plan = _launch_moments(dense, features)
            chunk_values, chunks = plan.chunk_values, plan.chunks
        _finish_moments[(_triton.cdiv(channels, FINISH_TILE[1]),)](
            moments,
            *_contiguous(weight, bias),
            running_mean,
            running_var,
            0 if running_mean is None else running_mean.stride(0),
            0 if running_var is None else running_var.stride(0),
            *_contiguous(index, z, map),
            mean,
            rstd,
            constants,
            features,
            channels,
            x.numel() // channels,
            chunk_values,
            chunks,
            momentum,
            eps,
            **_finish_options(),
        )
        _launch_values(dense, None, y, constants, features, activation == 1, training)
    return y, mean, rstd


@torch.no_grad()
def packed_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor,
    z: Tensor,
    map: Tensor,
    training: bool,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator `packed_norm_backward`."""
    needs = (need_x, need_weight, need_bias)
    grad_x, grad_weight, grad_bias = op._empty_gradients(x, weight, bias, *needs)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    of_weight, of_bias = (t if t.numel() else None for t in (grad_weight, grad_bias))
    has_sums = of_weight is not None or of_bias is not None or (training and need_x)
    if not has_sums and not need_x:
        return grad_x, grad_weight, grad_bias
    is_relu, features, channels = activation == 1, map.shape[1], x.shape[1]
    grad, x = _dense(grad, x), _dense(x, x)
    index, z, map, mean, rstd = (t.contiguous() for t in (index, z, map, mean, rstd))
    statistics = (*_contiguous(weight, bias), mean, rstd, index)
    constants = rstd.new_empty((CONSTANTS, channels))
    with _triton.on_device_of(x):
        sums, chunks = None, 0
        if has_sums:
            plan = _Plan.of(x, features, SUM_PROGRAMS, UNROLL // 2)
            chunks = plan.chunks
            sums = x.new_empty((chunks, 2, channels), dtype=torch.float64)
            arguments = (grad, x, sums, *statistics, of_weight, of_bias, features)
            _grads[plan.grid](*arguments, *plan.numbers(), RELU=is_relu, **plan.options())
        _finish_grads[(_triton.cdiv(channels, FINISH_TILE[1]),)](
            sums,
            *statistics,
            z,
            map,
            of_weight,
            of_bias,
            constants,
            features,
            channels,
            x.numel() // channels,
            chunks,
            **_finish_options(),
        )
        if need_x:
            _launch_values(x, grad, grad_x, constants, features, is_relu, training)
    return grad_x, grad_weight, grad_bias
