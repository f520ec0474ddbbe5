# SPDX-License-Identifier: Apache-2.0
"""Ten million words, numbers and decisions of the Triton kernels are those of the reference."""

import pytest
import torch
import triton
import triton.language as tl
from ops import test_sample_gates as shared

from l0kernels.ops.sample_gates import reference
from l0kernels.ops.sample_gates import triton as kernels

ONES = 0xFFFFFFFF
BLOCK = 1 << 16  # the interpreter takes as long for a program whatever its size


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", BLOCK)


@triton.jit
def _words(words, key, blocks, BLOCK: tl.constexpr):
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.load(key + 1).to(tl.int32)
    x, y, z, w = tl.philox(tl.load(key), block, 0, 0, step)
    tl.store(words + 4 * block, x.to(tl.int32, bitcast=True), mask=block < blocks)
    tl.store(words + 4 * block + 1, y.to(tl.int32, bitcast=True), mask=block < blocks)
    tl.store(words + 4 * block + 2, z.to(tl.int32, bitcast=True), mask=block < blocks)
    tl.store(words + 4 * block + 3, w.to(tl.int32, bitcast=True), mask=block < blocks)


def test_ten_million_words_agree():
    blocks = 1_250_001
    for seed, step in [((5 << 32) + 3, 7), ((1 << 63) - 1, ONES)]:
        words = torch.empty(blocks, 4, dtype=torch.int32)
        _words[(triton.cdiv(blocks, BLOCK),)](words, shared.make_key(seed, step), blocks, BLOCK)
        counter = [torch.arange(blocks), torch.tensor(0), torch.tensor(0), torch.tensor(step)]
        key = [torch.tensor(seed & ONES), torch.tensor(seed >> 32)]
        exact = torch.stack(reference.philox4x32(counter, key), 1)
        assert torch.equal(words.long() & ONES, exact)


def test_ten_million_numbers_are_the_reference_s(impl):
    shared.test_ten_million_numbers_are_the_reference_s(impl)


@pytest.mark.parametrize("law", shared.LAWS)
def test_ten_million_decisions_equal_the_reference(impl, law):
    shared.test_ten_million_decisions_equal_the_reference(impl, law)
