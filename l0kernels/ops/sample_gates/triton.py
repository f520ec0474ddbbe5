# SPDX-License-Identifier: Apache-2.0
# What Triton compiles is not Python: arguments are wrapped, launches have a grid.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The Triton kernels of `sample_gates`, its backward pass, and what goes with it.

The twin of csrc/common and csrc/cuda/sample_gates_cuda.cu: the same operations on float64 in the
same order, fused where those say fma and nowhere else (`enable_fp_fusion=False` at every launch),
so that every decision and every value has the same bits.

Nobody waits for the kernels, so bad values are reported in counts[0]: -1 NaN in log_alpha, -2 a
negative seed, -3 a step outside 32 bits; any count of -4 means a malformed layout.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton

# A number that a kernel has as a literal, or gets from its caller, is float32 to Triton unless it
# meets a float64 operand in +, -, *, / or a comparison: tl.fma takes float64 constants from _f64.
_LN2_HIGH = tl.constexpr(6.93147180369123816490e-01)  # low 20 bits zero: n * _LN2_HIGH is exact
_LN2_LOW = tl.constexpr(1.90821492927058770002e-10)
_LOG2_E = tl.constexpr(1.44269504088896338700e00)
_ROUND = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: adding it rounds to an integer
_NOISE_SCALE = tl.constexpr(8388608.0)  # 2^23
_LAST_NOISE = tl.constexpr(8388607)
_HARD_CONCRETE = tl.constexpr(0)
_ANTITHETIC = tl.constexpr(2)
_MIN_WIDTH = tl.constexpr(2)  # a packed width is never below this

_NAN = tl.constexpr(-1)
_SEED = tl.constexpr(-2)
_STEP = tl.constexpr(-3)
_LAYOUT = tl.constexpr(-4)
_MAX_STEP = tl.constexpr(0xFFFFFFFF)

BLOCK = 256  # gates of a program
LIST_BLOCKS = ((128, 4), (512, 8))  # features that a program looks at at once, its warps


# ---- float64 mathematics, as in csrc/common/exp_log.h ----


@triton.jit
def _f64(value: tl.constexpr):
    return tl.full([], value, tl.float64)


@triton.jit
def _line(slope: tl.constexpr, x, offset: tl.constexpr):
    """fma(slope, x, offset)."""
    return tl.fma(_f64(slope), x, _f64(offset))


@triton.jit
def _exp(x):
    """e^x, constant beyond |x| = 700."""
    x = tl.where(x < -700.0, -700.0, x)
    x = tl.where(x > 700.0, 700.0, x)
    shifted = tl.fma(x, _f64(_LOG2_E), _f64(_ROUND))  # its lowest bits hold the integer n
    n = shifted - _ROUND
    r = tl.fma(-n, _f64(_LN2_LOW), tl.fma(-n, _f64(_LN2_HIGH), x))
    r2 = r * r
    r4 = r2 * r2
    q01 = _line(0.16666666666666669, r, 0.5000000000000001)
    q23 = _line(0.008333333333330062, r, 0.04166666666662413)
    q45 = _line(0.00019841269863053618, r, 0.0013888888917213717)
    q67 = _line(2.7557268459997064e-06, r, 2.4801521295954376e-05)
    q89 = _line(2.510038549551032e-08, r, 2.7620088445409746e-07)
    q47 = tl.fma(q67, r2, q45)
    q = tl.fma(r4, tl.fma(r4, q89, q47), tl.fma(q23, r2, q01))
    e_r = 1.0 + tl.fma(r2, q, r)
    bits = e_r.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)
    return bits.to(tl.float64, bitcast=True)  # e_r 2^n


@triton.jit
def _log_ratio(a, b):
    """ln(a / b) for a, b in [2^-500, 2^500]."""
    bits_a = a.to(tl.int64, bitcast=True)
    bits_b = b.to(tl.int64, bitcast=True)
    # The power of two 2^e next to a / b: after scaling b by it, a / b lies in [2/3, 3/2].
    scale = (bits_a - bits_b + 0x0008000000000000) & -0x0010000000000000
    scaled = (bits_b + scale).to(tl.float64, bitcast=True)
    biased = (scale + 0x3FF0000000000000).to(tl.uint64, bitcast=True) >> 52  # e + 1023
    e_bits = biased.to(tl.int64, bitcast=True) | 0x4330000000000000
    e = e_bits.to(tl.float64, bitcast=True) - 4503599627371519.0  # 2^52 + 1023
    s = (a - scaled) / (a + scaled)  # ln(a / scaled) = 2 atanh(s)
    t = s * s
    t2 = t * t
    p01 = _line(0.1999999999964694, t, 0.3333333333333348)
    p23 = _line(0.11111090564284265, t, 0.14285714424931004)
    p45 = _line(0.07640786424129725, t, 0.09092348993117236)
    p46 = tl.fma(_f64(0.07568865412658467), t2, p45)
    p = tl.fma(t2 * t2, p46, tl.fma(p23, t2, p01))
    tail = tl.fma(2.0 * s * t, p, e * _LN2_LOW)
    return tl.fma(e, _f64(_LN2_HIGH), 2.0 * s + tail)


# ---- noise, as in csrc/common/philox.h ----


@triton.jit
def _noise(seed, step, gate, row=0):
    """The 23-bit integer k of each gate."""
    block = (gate // 4).to(tl.int32)
    x, y, z, w = tl.philox(seed, block, row, 0, step.to(tl.int32))
    lane = gate % 4
    word = tl.where(lane < 2, tl.where(lane == 0, x, y), tl.where(lane == 2, z, w))
    return (word >> 9).to(tl.int32)


@triton.jit
def _is_usable(seed, step):
    return (seed >= 0) & (step >= 0) & (step <= _MAX_STEP)


# ---- laws, as in csrc/common/gate_laws.h ----


@triton.jit
def _odds(log_alpha, shift, full_ratio):
    """P(z != 0), P(z = 0), P(z < 1)."""
    x = log_alpha - shift
    e = _exp(x)
    a = 1.0 + e
    b = tl.fma(e, full_ratio, _f64(1.0))
    inverse = 1.0 / (a * b)  # one division for both
    closed = tl.where(x > 690.0, 0.0, b * inverse)
    is_open = tl.where(x < 0.0, e * closed, 1.0 - closed)
    return tl.where(x < -690.0, 0.0, is_open), closed, a * inverse


@triton.jit
def _count_up_to(q):
    """The number of k with u <= q."""
    return _line(_NOISE_SCALE, q, 0.5).to(tl.int32)


@triton.jit
def _count_below(q):
    """The number of k with u < q."""
    x = _line(_NOISE_SCALE, q, -0.5)
    whole = x.to(tl.int32)
    return whole + (whole.to(tl.float64) < x).to(tl.int32)


@triton.jit
def _thresholds(p_open, p_closed, p_not_full, LAW: tl.constexpr):
    """z = 0 iff k < closed_below, z = 1 iff k >= open_from; Bernoulli gates swap 0 and 1."""
    if LAW == _HARD_CONCRETE:
        closed_below = _count_up_to(p_closed)
        open_from = tl.maximum(_count_below(p_not_full), closed_below)
    else:
        open_from = _count_below(p_open)
        closed_below = tl.zeros_like(open_from)
    return closed_below, open_from


@triton.jit
def _mirrored(k, LAW: tl.constexpr):
    """The noise that a binary gate compares: of u, or of 1 - u."""
    if LAW == _ANTITHETIC:
        k = _LAST_NOISE - k
    return k


@triton.jit
def _concrete(k, log_alpha, inverse_beta):
    """s = sigma((logit(u) + log_alpha) / beta)."""
    twice = _line(2.0, k.to(tl.float64), 1.0)
    logit = _log_ratio(twice, 16777216.0 - twice)  # 2^24
    return 1.0 / (1.0 + _exp(-(logit + log_alpha) * inverse_beta))


# ---- drawing ----


@triton.jit(do_not_specialize=["gates"])
def _draw(
    log_alpha,
    key,
    cost,
    z,
    sums,
    nans,
    gates,
    gamma: tl.float64,
    width: tl.float64,
    inverse_beta: tl.float64,
    shift: tl.float64,
    full_ratio: tl.float64,
    LAW: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values of gates; their expected cost and the number of NaN, one sum for each program."""
    program = tl.program_id(0)
    gate = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = gate < gates
    seed = tl.load(key)
    step = tl.load(key + 1)
    la = tl.load(log_alpha + gate, mask=inside, other=0.0).to(tl.float64)
    is_nan = la != la
    la = tl.where(is_nan, 0.0, la)
    k = _noise(seed, step, gate)
    p_open, p_closed, p_not_full = _odds(la, shift, full_ratio)
    closed_below, open_from = _thresholds(p_open, p_closed, p_not_full, LAW)
    if LAW == _HARD_CONCRETE:
        value = tl.fma(_concrete(k, la, inverse_beta), width, gamma)
        # A half-open gate stays within [tiny, 1] whatever rounding says.
        value = tl.where(value < TINY, TINY, value)
        value = tl.where(value > 1.0, 1.0, value)
        value = tl.where(k >= open_from, 1.0, value)
        value = tl.where(k < closed_below, 0.0, value)
    else:
        value = tl.where(_mirrored(k, LAW) < open_from, _f64(1.0), 0.0)
    value = tl.where(is_nan | ~_is_usable(seed, step), float("nan"), value)
    value = tl.where(gate == gates, 1.0, value)  # the gate that is always open
    tl.store(z + gate, value.to(z.dtype.element_ty), mask=gate <= gates)
    price = tl.load(cost + gate, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums + program, tl.sum(tl.where(inside & ~is_nan, p_open * price, 0.0), 0))
    tl.store(nans + program, tl.sum((inside & is_nan).to(tl.int32), 0))


@triton.jit(do_not_specialize=["gates"])
def _slopes(
    log_alpha,
    key,
    cost,
    grad_z,
    grad_expected,
    grad,
    gates,
    width: tl.float64,
    inverse_beta: tl.float64,
    shift: tl.float64,
    full_ratio: tl.float64,
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = gate < gates
    seed = tl.load(key)
    step = tl.load(key + 1)
    la = tl.load(log_alpha + gate, mask=inside, other=0.0).to(tl.float64)
    is_nan = la != la
    la = tl.where(is_nan, 0.0, la)
    p_open, p_closed, p_not_full = _odds(la, shift, full_ratio)
    total = tl.zeros([BLOCK], tl.float64)
    if grad_expected is not None:
        price = tl.load(cost + gate, mask=inside, other=0.0).to(tl.float64)
        total = p_open * p_closed * (tl.load(grad_expected).to(tl.float64) * price)
    if grad_z is not None and LAW == _HARD_CONCRETE:
        k = _noise(seed, step, gate)
        closed_below, open_from = _thresholds(p_open, p_closed, p_not_full, LAW)
        s = _concrete(k, la, inverse_beta)
        slope = width * inverse_beta * s * (1.0 - s)
        slope = tl.where((k < closed_below) | (k >= open_from), 0.0, slope)
        upstream = tl.load(grad_z + gate, mask=inside, other=0.0).to(tl.float64)
        # Selected, not multiplied: a saturated gate has gradient 0 even where grad_z is infinite.
        total += tl.where(slope == 0.0, 0.0, slope * upstream)
    total = tl.where(is_nan | ~_is_usable(seed, step), float("nan"), total)
    tl.store(grad + gate, total.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["gates"])
def _arm(difference, factor, key, grad, gates, BLOCK: tl.constexpr):
    gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = gate < gates
    seed = tl.load(key)
    step = tl.load(key + 1)
    u_less_half = (_noise(seed, step, gate).to(tl.float64) - 4194303.5) / _NOISE_SCALE
    its = tl.load(factor + gate, mask=inside, other=0.0).to(tl.float64)
    value = (tl.load(difference).to(tl.float64) * its) * u_less_half
    value = tl.where(its == 0.0, 0.0, value)
    value = tl.where(_is_usable(seed, step), value, float("nan"))
    tl.store(grad + gate, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["gates", "slices", "first", "stride"])
def _example_noise(key, k, gates, slices, first, stride, BLOCK: tl.constexpr):
    """Programs are numbered through all slices of all rows."""
    program = tl.program_id(0).to(tl.int64)
    example = program // slices
    gate = program % slices * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(key)
    step = tl.load(key + 1)
    found = _noise(seed, step, gate, (first + stride * example).to(tl.int32))
    found = tl.where(_is_usable(seed, step), found, -1)
    tl.store(k + example * gates + gate, found, mask=gate < gates)


# ---- lists ----


@triton.jit
def _add_costs(sums, nans, key, expected, slices, BLOCK: tl.constexpr):
    """Stores the expected cost of all gates; returns what is wrong with the draw."""
    cost = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, slices, BLOCK):
        slice_ = first + tl.arange(0, BLOCK)
        cost += tl.load(sums + slice_, mask=slice_ < slices, other=0.0)
        bad += tl.load(nans + slice_, mask=slice_ < slices, other=0)
    total = tl.sum(cost, 0)
    seed = tl.load(key)
    step = tl.load(key + 1)
    error = tl.where(tl.sum(bad, 0) > 0, _NAN, 0).to(tl.int64)
    error = tl.where((step < 0) | (step > _MAX_STEP), _STEP, error)
    error = tl.where(seed < 0, _SEED, error)
    total = tl.where(error == 0, total, float("nan"))
    tl.store(expected, total.to(expected.dtype.element_ty))
    return error


@triton.jit
def _count_open(z, begin, end, BLOCK: tl.constexpr):
    """The number of open gates from begin on, counted until there are _MIN_WIDTH."""
    found = tl.full([], 0, tl.int32)
    first = begin
    while (first < end) & (found < _MIN_WIDTH):
        gate = first + tl.arange(0, BLOCK)
        value = tl.load(z + gate, mask=gate < end, other=0.0)
        found += tl.sum((value != 0).to(tl.int32), 0)
        first += BLOCK
    return found


@triton.jit
def _dummies(z, group_offsets, groups, halvings, gates, gate, closed, BLOCK: tl.constexpr):
    """Which closed gates are kept because their group has too few open ones, which are lost.

    A closed gate is kept if the number of closed gates before it and of all open ones is below
    min(_MIN_WIDTH, size of its group). So it is the first or second of its group. Lost are gates
    in no group, or in one that does not end with the gates.
    """
    low = tl.zeros_like(gate)
    high = tl.zeros_like(gate) + groups
    for _ in range(halvings):
        middle = (low + high) // 2
        searching = closed & (low < high)
        above = tl.load(group_offsets + middle + 1, mask=searching, other=0) <= gate
        low = tl.where(searching & above, middle + 1, low)
        high = tl.where(searching & ~above, middle, high)
    found = closed & (low < groups)
    begin = tl.load(group_offsets + low, mask=found, other=0)
    end = tl.load(group_offsets + low + 1, mask=found, other=0)
    found = found & (begin >= 0) & (begin <= gate) & (end <= gates)
    begin = begin.to(tl.int32)
    end = end.to(tl.int32)
    pending = found & (gate - begin < _MIN_WIDTH)
    first_is_closed = tl.load(z + begin, mask=pending, other=1.0) == 0
    before = (pending & (gate > begin) & first_is_closed).to(tl.int32)
    kept = pending & (gate < 0)
    while tl.max(pending.to(tl.int32), 0) > 0:  # one group after the other
        asked = tl.min(tl.where(pending, begin, gates), 0)
        answered = pending & (begin == asked)
        asked_end = tl.max(tl.where(answered, end, 0), 0)
        is_open = _count_open(z, asked, asked_end, BLOCK)
        kept = kept | (answered & (before + is_open < tl.minimum(end - begin, _MIN_WIDTH)))
        pending = pending & (begin != asked)
    return kept, closed & ~found


@triton.jit
def _only(condition, value):
    """The value at the one place where the condition holds; 0 if nowhere."""
    return tl.sum(tl.where(condition, value, 0), 0)


@triton.jit
def _list_port(
    z,
    group_offsets,
    born_gates,
    extra_gates,
    index,
    position,
    size,
    groups,
    halvings,
    gates,
    BLOCK: tl.constexpr,
):
    """Lists the packed features of one port of `size`; returns how many there are, or _LAYOUT."""
    has_extra = tl.full([], 0, tl.int32)
    for first in range(0, size, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        extra = tl.load(extra_gates + feature, mask=feature < size, other=gates)
        has_extra = tl.maximum(has_extra, tl.max((extra != gates).to(tl.int32), 0))
    illegal = tl.full([], 0, tl.int32)
    packed = tl.full([], 0, tl.int32)
    arrived = tl.full([], 0, tl.int32)
    # The first two features that arrive, and the first two of the packed ones with their ranks:
    # stored at the end, because dummies may change them, and a place is stored only once.
    early0 = tl.full([], 0, tl.int32)
    early1 = tl.full([], 0, tl.int32)
    packed0 = tl.full([], 0, tl.int32)
    packed1 = tl.full([], 0, tl.int32)
    rank0 = tl.full([], 0, tl.int32)
    rank1 = tl.full([], 0, tl.int32)
    for first in range(0, size, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        inside = feature < size
        born = tl.load(born_gates + feature, mask=inside, other=gates)
        extra = tl.load(extra_gates + feature, mask=inside, other=gates)
        legal = (born >= 0) & (born <= gates) & (extra >= 0) & (extra <= gates)
        illegal = tl.maximum(illegal, tl.max((~legal).to(tl.int32), 0))
        born = tl.where(legal, born, gates).to(tl.int32)
        extra = tl.where(legal, extra, gates).to(tl.int32)
        value = tl.load(z + born)
        is_open = (born == gates) | (value != 0)
        kept, lost = _dummies(
            z, group_offsets, groups, halvings, gates, born, inside & ~is_open, BLOCK
        )
        illegal = tl.maximum(illegal, tl.max(lost.to(tl.int32), 0))
        arrives = inside & (is_open | kept)
        packs = arrives & ((has_extra == 0) | (value * tl.load(z + extra) != 0))
        # One scan for both ranks: a block has fewer than 2^15 features.
        both = (arrives.to(tl.int32) << 16) | packs.to(tl.int32)
        before = tl.cumsum(both, 0) - both
        total = tl.sum(both, 0)
        rank = arrived + (before >> 16)
        place = packed + (before & 0xFFFF)
        tl.store(index + place, feature, mask=packs & (place >= _MIN_WIDTH))
        tl.store(position + place, rank, mask=packs & (place >= _MIN_WIDTH))
        early0 += _only(arrives & (rank == 0), feature)
        early1 += _only(arrives & (rank == 1), feature)
        packed0 += _only(packs & (place == 0), feature)
        packed1 += _only(packs & (place == 1), feature)
        rank0 += _only(packs & (place == 0), rank)
        rank1 += _only(packs & (place == 1), rank)
        packed += total & 0xFFFF
        arrived += total >> 16
    # Where more arrive than are packed, the first of them fill up to _MIN_WIDTH.
    count = tl.maximum(packed, tl.minimum(arrived, _MIN_WIDTH))
    filled = packed < count
    second = filled & (packed == 1) & (rank0 > 0)  # the packed one comes after the filled one
    packed1 = tl.where(filled, tl.where(second, packed0, early1), packed1)
    rank1 = tl.where(filled, tl.where(second, rank0, 1), rank1)
    packed0 = tl.where(filled, early0, packed0)
    rank0 = tl.where(filled, 0, rank0)
    tl.store(index, packed0, mask=count > 0)
    tl.store(position, rank0, mask=count > 0)
    tl.store(index + 1, packed1, mask=count > 1)
    tl.store(position + 1, rank1, mask=count > 1)
    zeros = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(index + place, zeros, mask=(place >= count) & (place < size))
        tl.store(position + place, zeros, mask=(place >= count) & (place < size))
    return tl.where(illegal > 0, _LAYOUT, count)


@triton.jit(do_not_specialize=["gates", "slices", "groups", "halvings", "features", "ports"])
def _list(
    z,
    sums,
    nans,
    key,
    expected,
    group_offsets,
    maps,
    port_offsets,
    index,
    position,
    counts,
    gates,
    slices,
    groups,
    halvings,
    features,
    ports,
    BLOCK: tl.constexpr,
):
    """A program for each port; the first one, which is always there, adds up the costs as well."""
    port = tl.program_id(0)
    error = tl.full([], 0, tl.int64)
    if expected is not None and port == 0:
        error = _add_costs(sums, nans, key, expected, slices, BLOCK)
    begin = tl.load(port_offsets + port)
    end = tl.load(port_offsets + port + 1, mask=port < ports, other=0)
    legal = (begin >= 0) & (begin <= end) & (end <= features)
    legal = legal & ((port > 0) | (begin == 0)) & ((port + 1 < ports) | (end == features))
    begin = tl.where(legal, begin, 0)
    size = tl.where(legal, end - begin, 0).to(tl.int32)
    count = _list_port(
        z,
        group_offsets,
        maps + begin,
        maps + features + begin,
        index + begin,
        position + begin,
        size,
        groups,
        halvings,
        gates,
        BLOCK,
    )
    count = tl.where(legal, count, _LAYOUT)
    tl.store(counts + port, tl.where(error == 0, count, error), mask=port < ports)


# ---- operators ----


def _law_numbers(law: int, beta: float, gamma: float, zeta: float) -> dict[str, float]:
    """What the kernels know of a law; make_hard_concrete of csrc/common/gate_laws.h."""
    if law != _HARD_CONCRETE.value:
        return {"width": 1.0, "inverse_beta": 1.0, "shift": 0.0, "full_ratio": 1.0}
    shift = beta * math.log(-gamma / zeta)
    full_shift = beta * math.log((1.0 - gamma) / (zeta - 1.0))
    return {
        "width": zeta - gamma,
        "inverse_beta": 1.0 / beta,
        "shift": shift,
        "full_ratio": math.exp(shift - full_shift),
    }


def _lists(z, draw, group_offsets, maps, port_offsets) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `_list`; `draw` has sums, nans, key, expected, or None for each."""
    features, ports = maps.shape[1], port_offsets.shape[0] - 1
    groups = group_offsets.shape[0] - 1
    index, position = maps.new_empty(features), maps.new_empty(features)
    counts = maps.new_empty(ports)
    sums = draw[0]
    if sums is None and ports == 0:
        return index, position, counts
    block, warps = LIST_BLOCKS[0] if features <= LIST_BLOCKS[0][0] else LIST_BLOCKS[1]
    with _triton.on_device_of(z):
        _list[(max(1, ports),)](
            z,
            *draw,
            group_offsets.contiguous(),
            maps.contiguous(),
            port_offsets.contiguous(),
            index,
            position,
            counts,
            z.shape[0] - 1,
            0 if sums is None else sums.shape[0],
            groups,
            groups.bit_length(),
            features,
            ports,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
            **_triton.at_most_registers(128),
        )
    return index, position, counts


def sample_gates(
    log_alpha: Tensor,
    key: Tensor,
    cost: Tensor,
    group_offsets: Tensor,
    maps: Tensor,
    port_offsets: Tensor,
    law: int,
    beta: float,
    gamma: float,
    zeta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw operator `sample_gates`."""
    gates = log_alpha.shape[0]
    slices = _triton.cdiv(gates + 1, BLOCK)
    z, expected = log_alpha.new_empty(gates + 1), log_alpha.new_empty(())
    sums = log_alpha.new_empty(slices, dtype=torch.float64)
    nans = log_alpha.new_empty(slices, dtype=torch.int32)
    key = key.contiguous()
    with _triton.on_device_of(z):
        _draw[(slices,)](
            log_alpha.contiguous(),
            key,
            cost.contiguous(),
            z,
            sums,
            nans,
            gates,
            gamma=gamma,
            **_law_numbers(law, beta, gamma, zeta),
            LAW=law,
            TINY=torch.finfo(log_alpha.dtype).tiny,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    lists = _lists(z, (sums, nans, key, expected), group_offsets, maps, port_offsets)
    return z, expected, *lists


def sample_gates_backward(
    log_alpha: Tensor,
    key: Tensor,
    cost: Tensor,
    grad_z: Tensor | None,
    grad_expected: Tensor | None,
    law: int,
    beta: float,
    gamma: float,
    zeta: float,
) -> Tensor:
    """The raw operator `sample_gates_backward`."""
    gates = log_alpha.shape[0]
    grad = log_alpha.new_empty(gates)
    if gates == 0:
        return grad
    with _triton.on_device_of(grad):
        _slopes[(_triton.cdiv(gates, BLOCK),)](
            log_alpha.contiguous(),
            key.contiguous(),
            cost.contiguous(),
            None if grad_z is None else grad_z.contiguous(),
            grad_expected,
            grad,
            gates,
            **_law_numbers(law, beta, gamma, zeta),
            LAW=law,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return grad


def arm_gradient(difference: Tensor, factor: Tensor, key: Tensor) -> Tensor:
    """The raw operator `arm_gradient`."""
    gates = factor.shape[0]
    grad = factor.new_empty(gates)
    if gates == 0:
        return grad
    with _triton.on_device_of(grad):
        _arm[(_triton.cdiv(gates, BLOCK),)](
            difference,
            factor.contiguous(),
            key.contiguous(),
            grad,
            gates,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return grad


def example_noise(key: Tensor, examples: int, gates: int, first: int, stride: int) -> Tensor:
    """The raw operator `example_noise`."""
    k = key.new_empty((examples, gates), dtype=torch.int32)
    slices = _triton.cdiv(gates, BLOCK)
    if k.numel() > 0:
        with _triton.on_device_of(k):
            _example_noise[(examples * slices,)](
                key.contiguous(),
                k,
                gates,
                slices,
                first,
                stride,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return k


def open_lists(
    z: Tensor, group_offsets: Tensor, maps: Tensor, port_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator `open_lists`."""
    return _lists(z.contiguous(), (None,) * 4, group_offsets, maps, port_offsets)
