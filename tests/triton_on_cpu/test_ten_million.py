# SPDX-License-Identifier: Apache-2.0
"""Ten million words, numbers and decisions of the Triton kernels are those of the reference.

By the functions that the kernels are made of: the values themselves would take the interpreter,
which calls C for every fused multiply-add, many minutes; test_sample_gates.py has fewer of them.
"""

import pytest
import torch
import triton
import triton.language as tl
from error_table import same
from ops.test_sample_gates import BETA, GAMMA, LAWS, ZETA, decisions, make_key, make_layout

from l0kernels.ops.sample_gates import reference
from l0kernels.ops.sample_gates.triton import _law_numbers, _mirrored, _noise, _odds, _thresholds

ONES = 0xFFFFFFFF
KEYS = [((5 << 32) + 3, 7), ((1 << 63) - 1, ONES)]
BLOCK = 1 << 16  # of programs as large as this the interpreter needs few


@triton.jit
def _words(words, key, blocks, BLOCK: tl.constexpr):
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z, w = tl.philox(tl.load(key), block, 0, 0, tl.load(key + 1).to(tl.int32))
    tl.store(words + 4 * block, x.to(tl.int32, bitcast=True), mask=block < blocks)
    tl.store(words + 4 * block + 1, y.to(tl.int32, bitcast=True), mask=block < blocks)
    tl.store(words + 4 * block + 2, z.to(tl.int32, bitcast=True), mask=block < blocks)
    tl.store(words + 4 * block + 3, w.to(tl.int32, bitcast=True), mask=block < blocks)


@pytest.mark.parametrize("seed, step", KEYS)
def test_ten_million_words_agree(seed, step):
    blocks = 2_500_001
    words = torch.empty(blocks, 4, dtype=torch.int32)
    _words[(triton.cdiv(blocks, BLOCK),)](words, make_key(seed, step), blocks, BLOCK)
    counter = [torch.arange(blocks), torch.tensor(0), torch.tensor(0), torch.tensor(step)]
    key = [torch.tensor(seed & ONES), torch.tensor(seed >> 32)]
    exact = torch.stack(reference.philox4x32(counter, key), 1)
    assert torch.equal(words.long() & ONES, exact)


@triton.jit
def _numbers(numbers, key, gates, BLOCK: tl.constexpr):
    gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(numbers + gate, _noise(tl.load(key), tl.load(key + 1), gate), mask=gate < gates)


@pytest.mark.parametrize("seed, step", KEYS)
def test_ten_million_numbers_are_the_reference_s(seed, step):
    gates = 10_000_019
    numbers = torch.empty(gates, dtype=torch.int32)
    _numbers[(triton.cdiv(gates, BLOCK),)](numbers, make_key(seed, step), gates, BLOCK)
    assert torch.equal(numbers.long(), reference.noise_k(make_key(seed, step), gates))


@triton.jit
def _decisions(
    log_alpha,
    key,
    closed,
    full,
    values,
    shift: tl.float64,
    full_ratio: tl.float64,
    LAW: tl.constexpr,
    VALUES: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """DRAWS gates in a row have one log_alpha; a program has VALUES of these."""
    value = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = value < values
    la = tl.load(log_alpha + value, mask=inside, other=0.0).to(tl.float64)
    p_open, p_closed, p_not_full = _odds(la, shift, full_ratio)
    closed_below, open_from = _thresholds(p_open, p_closed, p_not_full, LAW)
    gate = value[:, None] * DRAWS + tl.arange(0, DRAWS)[None, :]
    k = _mirrored(_noise(tl.load(key), tl.load(key + 1), gate), LAW)
    is_closed, is_full = k < closed_below[:, None], k >= open_from[:, None]
    if LAW != 0:
        is_closed, is_full = k >= open_from[:, None], k < open_from[:, None]
    tl.store(closed + gate, is_closed, mask=inside[:, None])
    tl.store(full + gate, is_full, mask=inside[:, None])


@pytest.mark.parametrize("law", LAWS)
def test_ten_million_decisions_equal_the_reference(impl, law):
    values, draws, key = 40_001, 256, make_key((1 << 40) + 3, ONES - 1)
    gates = values * draws
    log_alpha = 4 * torch.randn(values)
    numbers = _law_numbers(LAWS.index(law), BETA, GAMMA, ZETA)
    closed, full = torch.empty(2, gates, dtype=torch.bool)
    _decisions[(triton.cdiv(values, 256),)](
        log_alpha,
        key,
        closed,
        full,
        values,
        shift=numbers["shift"],
        full_ratio=numbers["full_ratio"],
        LAW=LAWS.index(law),
        VALUES=256,
        DRAWS=draws,
    )
    layout, cost = make_layout([gates], []), torch.rand(gates)
    of_gates = log_alpha.repeat_interleave(draws)
    exact, *_ = reference.sample_gates(of_gates, key, cost, layout, law)
    same("sample_gates", closed.int() - full.int(), decisions(exact[:-1]))
