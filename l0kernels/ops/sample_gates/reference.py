# SPDX-License-Identifier: Apache-2.0
"""The oracle of `sample_gates`: plain PyTorch, differentiable by PyTorch's own autograd."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAWS = ("hard_concrete", "bernoulli", "antithetic")
MIN_WIDTH = 2
"""A packed width is never below this: missing units are dummies with z = 0."""

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NOISE_BITS = 23


class GateLayout(NamedTuple):
    """How gates form groups and which gates scale which features; int64 tensors on one device.

    Gates are numbered 0..G-1; the number G means "always open". A port is one feature axis
    that layers read or produce; the ports lie behind each other in `maps`.

    Args:
        group_offsets: [groups + 1], group i holds the gates group_offsets[i] up to the next.
        maps: [2, F], the two gates that scale each feature: the one of its producer, by which it
            is born packed, and an extra one without a producer.
        port_offsets: [ports + 1], port p holds the features port_offsets[p] up to the next.
    """

    group_offsets: Tensor
    maps: Tensor
    port_offsets: Tensor


class OpenLists(NamedTuple):
    """The packed features of every port.

    Args:
        index: int64 [F], port p's packed features, ascending and counted from the port's start,
            at port_offsets[p] and on; zeros fill the rest.
        position: int64 [F], the rank of each among the features that arrive packed.
        counts: int64 [ports], how many features of each port are packed.
    """

    index: Tensor
    position: Tensor
    counts: Tensor


def _multiply32(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product, by 16-bit halves so that int64 does not overflow."""
    high = (a >> 16) * multiplier
    low = (a & 0xFFFF) * multiplier
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK32


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Computes Philox4x32-10 words.

    Args:
        counter: four int64 tensors of values in [0, 2^32), broadcast together.
        key: two int64 tensors of values in [0, 2^32).

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply32(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def noise_k(key: Tensor, gates: int, row: int = 0, kind: int = 0, sample: int = 0) -> Tensor:
    """Draws the 23-bit integers k of gates 0..gates-1; the uniform number is (k + .5) 2^-23.

    Args:
        key: int64 [2], seed and step.
        gates: how many.
        row, kind, sample: the other counter words: (gate // 4, row, kind << 24 | sample, step).
    """
    rows = torch.full((1,), row, device=key.device)
    return _noise_of_rows(key, gates, rows, kind << 24 | sample)[0]


def _noise_of_rows(key: Tensor, gates: int, rows: Tensor, draw: int) -> Tensor:
    """The integers of gates 0..gates-1 in some rows of the counter, int64 [rows, gates]."""
    blocks = torch.arange((gates + 3) // 4, device=key.device).expand(len(rows), -1)
    counter = (
        blocks,
        rows[:, None].expand_as(blocks),
        torch.full_like(blocks, draw),
        key[1].expand_as(blocks),
    )
    words = philox4x32(counter, (key[0] & _MASK32, key[0] >> 32))
    flat = torch.stack(words, 2).reshape(len(rows), 4 * blocks.shape[1])
    return flat[:, :gates] >> (32 - _NOISE_BITS)


def check_key(key: Tensor) -> None:
    """Raises ValueError for a negative seed and a step outside 32 bits."""
    seed, step = (int(word) for word in key.tolist())
    if seed < 0:
        raise ValueError(f"seed: expected 0 <= seed < 2^63; got {seed}")
    if not 0 <= step <= _MASK32:
        raise ValueError(f"step: expected 0 <= step < 2^32; got {step}")


def check_draw(log_alpha: Tensor, key: Tensor) -> None:
    """Raises ValueError for values no draw can use: NaN, a negative seed, a step past 32 bits."""
    check_key(key)
    nan = torch.isnan(log_alpha)
    if bool(nan.any()):
        first = int(nan.nonzero()[0])
        raise ValueError(
            f"log_alpha: expected no NaN; got {int(nan.sum())} of {nan.numel()}, first at {first}"
        )


def closed_shift(beta: float, gamma: float, zeta: float) -> float:
    """K0 = beta ln(-gamma / zeta): P(z = 0) = sigma(K0 - log_alpha)."""
    return beta * math.log(-gamma / zeta)


def open_shift(beta: float, gamma: float, zeta: float) -> float:
    """K1 = beta ln((1 - gamma) / (zeta - 1)): P(z = 1) = sigma(log_alpha - K1)."""
    return beta * math.log((1 - gamma) / (zeta - 1))


def hard_concrete_decisions(
    log_alpha: Tensor, k: Tensor, beta: float, gamma: float, zeta: float
) -> tuple[Tensor, Tensor]:
    """Tells which gates are exactly 0 and which exactly 1, by comparing integers."""
    scale = 1 << _NOISE_BITS
    p_closed = torch.sigmoid(closed_shift(beta, gamma, zeta) - log_alpha)
    p_not_full = torch.sigmoid(open_shift(beta, gamma, zeta) - log_alpha)
    closed_below = torch.floor(p_closed * scale + 0.5).clamp(0, scale)
    open_from = torch.ceil(p_not_full * scale - 0.5).clamp(0, scale)
    closed = k < closed_below
    return closed, ~closed & (k >= open_from)


def hard_concrete_s(log_alpha: Tensor, k: Tensor, beta: float) -> Tensor:
    """The concrete variable s = sigma((logit(u) + log_alpha) / beta) in float64."""
    u = (k.double() + 0.5) / (1 << _NOISE_BITS)
    return torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / beta)


def _hard_concrete(
    log_alpha: Tensor, k: Tensor, dtype: torch.dtype, beta: float, gamma: float, zeta: float
) -> Tensor:
    closed, full = hard_concrete_decisions(log_alpha.detach(), k, beta, gamma, zeta)
    stretched = hard_concrete_s(log_alpha, k, beta) * (zeta - gamma) + gamma
    # A gate that the integers call half open stays so, and keeps its slope, whatever rounding says.
    inside = stretched.detach().clamp(torch.finfo(dtype).tiny, 1.0)
    between = inside + (stretched - stretched.detach())
    return torch.where(closed, 0.0, torch.where(full, 1.0, between))


def _bernoulli(log_alpha: Tensor, k: Tensor) -> Tensor:
    scale = 1 << _NOISE_BITS
    threshold = torch.ceil(torch.sigmoid(log_alpha.detach()) * scale - 0.5).clamp(0, scale)
    # A gate of this law has a derivative, 0, like those of the other.
    return (k < threshold).double() + 0 * torch.sigmoid(log_alpha)


def sample_gates(
    log_alpha: Tensor,
    key: Tensor,
    cost: Tensor,
    layout: GateLayout,
    law: str,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> tuple[Tensor, Tensor, OpenLists]:
    """Draws every gate; the arguments are those of `l0kernels.functional.sample_gates`."""
    if not torch.compiler.is_compiling():
        check_draw(log_alpha.detach(), key)
    dtype = log_alpha.dtype
    la = log_alpha.double()
    k = noise_k(key, log_alpha.shape[0])
    if law == "hard_concrete":
        z = _hard_concrete(la, k, dtype, beta, gamma, zeta)
        probability = torch.sigmoid(la - closed_shift(beta, gamma, zeta))
    else:
        z = _bernoulli(la, k if law == "bernoulli" else (1 << _NOISE_BITS) - 1 - k)
        probability = torch.sigmoid(la)
    expected = (cost.double() * probability).sum().to(dtype)
    z = torch.cat([z.to(dtype), log_alpha.new_ones(1)])
    return z, expected, open_lists(z.detach(), layout)


def arm_gradient(difference: Tensor, factor: Tensor, key: Tensor) -> Tensor:
    """Weighs noise; the arguments are those of `l0kernels.functional.arm_gradient`."""
    if not torch.compiler.is_compiling():
        check_key(key)
    u = (noise_k(key, factor.shape[0]).double() + 0.5) / (1 << _NOISE_BITS)
    grad = difference.double() * factor.double() * (u - 0.5)
    return torch.where(factor == 0, 0.0, grad).to(factor.dtype)


def example_noise(key: Tensor, examples: int, gates: int, first: int, stride: int) -> Tensor:
    """Noise of rows; the arguments are those of `l0kernels.functional.example_noise`."""
    if not torch.compiler.is_compiling():
        check_key(key)
    rows = first + stride * torch.arange(examples, device=key.device)
    return _noise_of_rows(key, gates, rows, 0).int()


def open_lists(z: Tensor, layout: GateLayout) -> OpenLists:
    """Lists packed features; the arguments are those of `l0kernels.functional.open_lists`."""
    gates = z.shape[0] - 1
    kept = torch.cat([_kept_gates(z[:-1] != 0, layout.group_offsets), z.new_ones(1).bool()])
    born, extra = layout.maps[0], layout.maps[1]
    offsets = layout.port_offsets
    port = _segment_of(offsets, born.shape[0])
    arriving = kept[born]
    has_extra = _segment_sums(extra != gates, offsets) > 0
    wanted = arriving & ((z[born] * z[extra] != 0) | ~has_extra[port])
    packed = _fill(wanted, arriving & ~wanted, _segment_sums(arriving, offsets), offsets, port)
    counts = _segment_sums(packed, offsets)
    rank = _rank(packed, offsets, port)
    features = torch.arange(born.shape[0], device=z.device)
    # Features that are not packed all land on one place behind the end, which is cut off.
    target = torch.where(packed, offsets[port] + rank, born.shape[0])
    return OpenLists(
        _scatter(target, features - offsets[port]),
        _scatter(target, _rank(arriving, offsets, port)),
        counts,
    )


def _kept_gates(is_open: Tensor, offsets: Tensor) -> Tensor:
    """The open gates, and the lowest-numbered closed ones where a group has too few."""
    group = _segment_of(offsets, is_open.shape[0])
    return _fill(is_open, ~is_open, offsets.diff(), offsets, group)


def _fill(
    wanted: Tensor, spare: Tensor, available: Tensor, offsets: Tensor, segment: Tensor
) -> Tensor:
    """Adds the lowest-numbered spare elements until each segment has min(MIN_WIDTH, available)."""
    missing = available.clamp(max=MIN_WIDTH) - _segment_sums(wanted, offsets)
    return wanted | (spare & (_rank(spare, offsets, segment) < missing[segment]))


def _segment_of(offsets: Tensor, size: int) -> Tensor:
    return torch.searchsorted(
        offsets[1:].contiguous(), torch.arange(size, device=offsets.device), right=True
    )


def _prefix(flags: Tensor) -> Tensor:
    """Exclusive prefix sums with the total at the end: [n] -> [n + 1]."""
    return torch.cat([flags.new_zeros(1, dtype=torch.int64), flags.long().cumsum(0)])


def _segment_sums(flags: Tensor, offsets: Tensor) -> Tensor:
    return _prefix(flags)[offsets].diff()


def _rank(flags: Tensor, offsets: Tensor, segment: Tensor) -> Tensor:
    """How many flagged elements of the same segment come before each element."""
    before = _prefix(flags)
    return before[:-1] - before[offsets[segment]]


def _scatter(target: Tensor, values: Tensor) -> Tensor:
    size = target.shape[0]
    return values.new_zeros(size + 1).scatter(0, target, values)[:size]
