# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 in Python, C++ and CUDA C++, and the noise made from it."""

import ctypes
import math
from pathlib import Path

import pytest
import torch
from harness import build

from l0kernels.ops.sample_gates import reference

ONES = 0xFFFFFFFF
# Counter, key and words of the authors' known-answer tests (Random123, kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture
def scalar_math():
    return pytest.importorskip("l0kernels._math", reason="the scalar C++ math is not built")


def python_words(counter, key):
    words = reference.philox4x32(
        [torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key]
    )
    return tuple(int(word) for word in words)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers_in_python(counter, key, words):
    assert python_words(counter, key) == words


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers_in_cpp(scalar_math, counter, key, words):
    assert scalar_math.philox4x32(counter, key) == words


def test_python_and_cpp_words_agree(scalar_math):
    counters = torch.randint(0, 1 << 32, (4, 500))
    keys = torch.randint(0, 1 << 32, (2, 500))
    words = torch.stack(reference.philox4x32(list(counters), list(keys)), 1).tolist()
    assert words == [
        list(scalar_math.philox4x32(tuple(counter), tuple(key)))
        for counter, key in zip(counters.T.tolist(), keys.T.tolist(), strict=True)
    ]


@pytest.fixture(scope="session")
def bulk(need_harness, tmp_path_factory):
    source = Path(__file__).with_name("philox_words.cu")
    return ctypes.CDLL(str(build.build([source], tmp_path_factory.mktemp("philox") / "words.so")))


@pytest.mark.parametrize("language", ["cpu", "cuda"])
def test_ten_million_words_agree(bulk, language):
    blocks = 1_250_001
    for seed, step in [((5 << 32) + 3, 7), ((1 << 63) - 1, ONES)]:
        words = torch.empty(blocks, 4, dtype=torch.int32)
        write = getattr(bulk, f"{language}_words")
        write(
            ctypes.c_uint64(seed),
            ctypes.c_uint32(step),
            ctypes.c_int64(blocks),
            ctypes.c_void_p(words.data_ptr()),
        )
        counter = [torch.arange(blocks), torch.tensor(0), torch.tensor(0), torch.tensor(step)]
        key = [torch.tensor(seed & ONES), torch.tensor(seed >> 32)]
        exact = torch.stack(reference.philox4x32(counter, key), 1)
        assert torch.equal(words.long() & ONES, exact)


@pytest.mark.parametrize("seed", [0, 1, (1 << 32) + 5, (1 << 63) - 1])
@pytest.mark.parametrize("step", [0, 7, (1 << 32) - 1])
@pytest.mark.parametrize("row, kind, sample", [(0, 0, 0), (3, 1, 2), (ONES, 255, (1 << 24) - 1)])
def test_python_and_cpp_noise_agree(scalar_math, seed, step, row, kind, sample):
    k = reference.noise_k(torch.tensor([seed, step]), 11, row, kind, sample).tolist()
    assert k == [scalar_math.noise_k(seed, step, gate, row, kind, sample) for gate in range(11)]


def test_noise_follows_the_counter_scheme():
    seed, step = (9 << 32) + 4, 17
    words = [python_words((block, 0, 0, step), (4, 9)) for block in range(2)]
    expected = [word >> 9 for block in words for word in block][:7]
    assert reference.noise_k(torch.tensor([seed, step]), 7).tolist() == expected


def test_streams_differ():
    base = (torch.tensor([5, 6]), 64)
    streams = [
        reference.noise_k(*base),
        reference.noise_k(torch.tensor([6, 5]), 64),
        reference.noise_k(torch.tensor([5, 7]), 64),
        reference.noise_k(torch.tensor([5 + (1 << 32), 6]), 64),
        reference.noise_k(*base, row=1),
        reference.noise_k(*base, kind=1),
        reference.noise_k(*base, sample=1),
    ]
    same = torch.stack(streams).unsqueeze(1) == torch.stack(streams).unsqueeze(0)
    assert int(same.all(2).sum()) == len(streams)  # each equals itself only


def test_noise_is_uniform():
    k = reference.noise_k(torch.tensor([2, 3]), 1 << 18)
    assert int(k.min()) >= 0 and int(k.max()) < 1 << 23
    counts = torch.bincount(k >> 19, minlength=16).double()
    expected = k.numel() / 16
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 15) < 5 * math.sqrt(2 * 15)
    u = (k.double() + 0.5) / (1 << 23)
    neighbours = float(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean()) * 12
    assert abs(neighbours) < 5 / math.sqrt(k.numel())


def test_exp_is_accurate(scalar_math):
    for x in (1400 * torch.rand(20000, dtype=torch.float64) - 700).tolist():
        assert scalar_math.exp(x) == pytest.approx(math.exp(x), rel=2**-51)
    for x in (0.0, 1e-300, -1e-17, 700.0, -700.0):
        assert scalar_math.exp(x) == pytest.approx(math.exp(x), rel=2**-51)


def test_exp_is_constant_far_out(scalar_math):
    assert scalar_math.exp(math.inf) == scalar_math.exp(1e9) == scalar_math.exp(700.0)
    assert scalar_math.exp(-math.inf) == scalar_math.exp(-1e9) == scalar_math.exp(-700.0)


def test_log_ratio_is_accurate(scalar_math):
    for k in torch.randint(0, 1 << 23, (20000,)).tolist() + [0, (1 << 22) - 1, (1 << 23) - 1]:
        a, b = 2 * k + 1, (1 << 24) - 2 * k - 1
        exact = math.log(a) - math.log(b) if abs(a - b) > b / 4 else math.log1p((a - b) / b)
        assert scalar_math.log_ratio(a, b) == pytest.approx(exact, rel=2**-49)


def test_log_ratio_of_equals_is_zero(scalar_math):
    assert [scalar_math.log_ratio(x, x) for x in (1.0, 3.0, 1e-9, 1.7e7)] == [0.0] * 4
