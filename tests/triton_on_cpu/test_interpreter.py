# SPDX-License-Identifier: Apache-2.0
"""The repaired interpreter: numbers as on a GPU, and planted bugs that it must find."""

import gc
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_on_cpu.interpreter import round_to_bf16

BF16 = torch.bfloat16
SPECIAL = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 1e-40, 3.0e38, 65504.0, 2.0**-126]


def random_bf16(size, seed=0):
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 8
    numbers[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return numbers.to(BF16)


def same(a, b):
    """Equal in every bit, but for the bits of NaN."""
    assert a.dtype == b.dtype
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


# ---- bfloat16 ----


@triton.jit
def elementwise(x, y, out, OPERATION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "sub":
        c = a - b
    elif OPERATION == "mul":
        c = a * b
    elif OPERATION == "div":
        c = a / b
    elif OPERATION == "neg":
        c = -a
    elif OPERATION == "abs":
        c = tl.abs(a)
    elif OPERATION == "where":
        c = tl.where(a < b, a, b)
    elif OPERATION == "scalar":
        c = a * 0.1 + 1.0
    elif OPERATION == "constant":
        c = tl.full([N], 0.3, tl.bfloat16) + a
    elif OPERATION == "zeros":
        c = tl.zeros([N], tl.bfloat16) + a
    elif OPERATION == "maximum":
        c = tl.maximum(a, b)
    tl.store(out + i, c.to(out.dtype.element_ty))


TORCH = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: (a.float() / b.float()).to(BF16),
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "where": lambda a, b: torch.where(a < b, a, b),
    "scalar": lambda a, b: a * torch.tensor(0.1, dtype=BF16) + 1.0,
    "constant": lambda a, b: torch.tensor(0.3, dtype=BF16) + a,
    "zeros": lambda a, b: 0 + a,
    "maximum": lambda a, b: torch.where(b.isnan(), a, torch.where(a.isnan(), b, a.maximum(b))),
}


@pytest.mark.parametrize("operation", TORCH)
def test_bf16_arithmetic(operation):
    x, y = random_bf16(1024), random_bf16(1024, 1).roll(5)
    if operation == "neg":  # 0 - x in Triton 3.6
        x = torch.where(x == 0, 1, x)
    if operation == "maximum":
        x, y = x.nan_to_num(), y.nan_to_num()
    out = torch.empty(1024, dtype=BF16)
    elementwise[(1,)](x, y, out, operation, 1024)
    assert same(out, TORCH[operation](x, y))


@triton.jit
def convert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int32])
def test_bf16_casts(dtype):
    x = random_bf16(1024)
    out = torch.empty(1024, dtype=dtype)
    if dtype == torch.int32:
        x = x.nan_to_num(0, 0, 0).clamp(-1e6, 1e6)
    convert[(1,)](x, out, 1024)
    assert same(out.float(), x.to(dtype).float())
    back = torch.empty(1024, dtype=BF16)
    wide = torch.randn(1024).mul(100).to(dtype)
    convert[(1,)](wide, back, 1024)
    assert same(back, wide.to(BF16))


def test_float32_is_rounded_to_the_nearest_even_bf16():
    x = torch.randn(1 << 16).view(torch.int32)
    ties = (x & -65536) | 0x8000
    for numbers in (x, ties, ties + 1, ties - 1):
        numbers = numbers.view(torch.float32)
        out = torch.empty(1 << 16, dtype=BF16)
        convert[(1,)](numbers, out, 1 << 16)
        assert same(out, numbers.to(BF16))
        assert same(torch.from_numpy(round_to_bf16(numbers.numpy())), numbers.to(BF16).float())


@triton.jit
def bits_of(x, bits, back, N: tl.constexpr):
    i = tl.arange(0, N)
    as_integers = tl.load(x + i).to(tl.int16, bitcast=True)
    tl.store(bits + i, as_integers)
    tl.store(back + i, as_integers.to(tl.bfloat16, bitcast=True))


def test_bf16_bitcasts():
    x = random_bf16(256)
    bits, back = torch.empty(256, dtype=torch.int16), torch.empty(256, dtype=BF16)
    bits_of[(1,)](x, bits, back, 256)
    known = ~x.isnan()
    assert torch.equal(bits[known], x.view(torch.int16)[known])
    assert same(back, x)


@triton.jit
def reductions(x, total, largest, running, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(total, tl.sum(a, 0))
    tl.store(largest, tl.max(a, 0))
    tl.store(running + i, tl.cumsum(a, 0))


def test_bf16_reductions():
    x = torch.randint(-8, 8, (128,)).to(BF16)
    total, largest = torch.empty(1), torch.empty(1)
    running = torch.empty(128, dtype=BF16)
    reductions[(1,)](x, total, largest, running, 128)
    assert total == x.float().sum() and largest == x.float().max()
    assert torch.equal(running.float(), x.float().cumsum(0))


@triton.jit
def multiply(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    x = tl.load(a + m * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, K)[:, None] * N + n)
    tl.store(out + m * N + n, tl.dot(x, y, input_precision=PRECISION).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    out = torch.empty(32, 16)
    multiply[(1,)](a, b, out, 32, 16, 64, "ieee")
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_dot_in_tf32_is_refused():
    a, b, out = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16)
    with pytest.raises(InterpreterError, match="ieee"):
        multiply[(1,)](a, b, out, 16, 16, 16, "tf32")


# ---- fma, arguments, loops, masks ----


@triton.jit
def fused(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


def test_fma_rounds_once():
    x, y = torch.randn(2, 2000, dtype=torch.float64)
    z = torch.where(torch.arange(2000) % 2 == 0, -x * y, torch.randn(2000, dtype=torch.float64))
    out = torch.empty(2000, dtype=torch.float64)
    x, y, z, out = (torch.nn.functional.pad(t, (0, 48)) for t in (x, y, z, out))
    fused[(1,)](x, y, z, out, 2048)
    numbers = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    assert out.tolist() == [float(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in numbers]
    assert not torch.equal(out, x * y + z)  # the test can tell


def test_fma_of_float32():
    x, y, z = torch.randn(3, 1024)
    out = torch.empty(1024)
    fused[(1,)](x, y, z, out, 1024)
    exact = (x.double() * y.double() + z.double()).float()  # wrong at most once in 2^29
    assert torch.equal(out, exact)


@triton.jit
def scalars(out, plain, annotated: tl.float64, large: tl.int64):
    zero = tl.full([], 0.0, tl.float64)
    tl.store(out, plain + zero)
    tl.store(out + 1, annotated + zero)
    tl.store(out + 2, (large * 65536).to(tl.float64))


def test_arguments_have_the_types_of_compiled_kernels():
    out = torch.empty(3, dtype=torch.float64)
    scalars[(1,)](out, 0.1, 0.1, 1 << 20)
    assert out.tolist() == [float(np.float32(0.1)), 0.1, float(1 << 36)]


@triton.jit
def repeat(out, begin, times):
    count = tl.load(out)
    for _ in range(begin, times):
        count += 1
    for step in range(tl.load(out), count, 2):
        count += step
    tl.store(out, count)


def test_loops_with_bounds_from_anywhere():
    out = torch.zeros(1, dtype=torch.int64)
    repeat[(1,)](out, 0, 5)
    assert out.item() == 5 + 0 + 2 + 4


@triton.jit
def load_some(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, BF16])
def test_lanes_that_are_not_loaded_have_no_number(dtype):
    out = torch.empty(8, dtype=dtype)
    load_some[(1,)](torch.ones(5, dtype=dtype), out, 5, 8)
    assert out.isnan().tolist() == [False] * 5 + [True] * 3


def test_integers_that_are_not_loaded_are_large():
    out = torch.empty(8, dtype=torch.int64)
    load_some[(1,)](torch.ones(5, dtype=torch.int64), out, 5, 8)
    assert out.tolist() == [1] * 5 + [(1 << 63) - 1] * 3


# ---- out of bounds ----


@triton.jit
def copy(x, out, n, shift, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i + shift, mask=i < n, other=0), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int64])
def test_a_copy_within_bounds(dtype):
    x, out = torch.arange(100).to(dtype), torch.empty(99, dtype=dtype)
    copy[(4,)](x, out, 99, 1, 32)
    assert torch.equal(out, x[1:])


@pytest.mark.parametrize("n, shift", [(101, 0), (100, 1), (100, -1), (1, 100), (1, 1 << 20)])
def test_overrunning_loads(n, shift):
    with pytest.raises(InterpreterError, match="load of program . is out of bounds.*float32"):
        copy[(4,)](torch.zeros(100), torch.empty(200), n, shift, 32)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_overrunning_stores(dtype):
    with pytest.raises(InterpreterError, match="store of program 3 is out of bounds at 1 addr"):
        copy[(4,)](torch.zeros(100, dtype=dtype), torch.empty(99, dtype=dtype), 100, 0, 32)


def test_a_view_ends_with_its_last_element():
    whole = torch.zeros(100)
    with pytest.raises(InterpreterError, match=r"OutOfBounds.*float32 \[50\]"):
        copy[(2,)](whole[:50], torch.empty(100), 51, 0, 32)
    copy[(2,)](whole[50:], torch.empty(50), 50, 0, 32)


@triton.jit
def halves(x, out):
    as_integers = x.to(tl.pointer_type(tl.int16))
    tl.store(out, tl.load(as_integers))


def test_elements_of_another_width():
    with pytest.raises(InterpreterError, match="load of 2 bytes at once in float32"):
        halves[(1,)](torch.zeros(4), torch.empty(1, dtype=torch.int16))


@triton.jit
def follow(table, out):
    tl.store(out, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


def test_addresses_in_a_table():
    target = torch.full((1,), 7.0)
    hidden = torch.zeros(1)
    out = torch.empty(1)
    follow[(1,)](torch.tensor([target.data_ptr()]), out)
    assert out == 7
    address = target.data_ptr()
    del target
    gc.collect()
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        follow[(1,)](torch.tensor([address]), out)
    with pytest.raises(InterpreterError, match="OutOfBounds"):
        follow[(1,)](torch.tensor([hidden.untyped_storage().data_ptr()]), out)


@triton.jit
def count(counts, x, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.atomic_add(counts + tl.load(x + i, mask=i < n, other=0), 1, mask=i < n)


def test_integer_atomics():
    x, counts = torch.randint(0, 8, (100,)), torch.zeros(8, dtype=torch.int32)
    count[(4,)](counts, x, 100, 32)
    assert torch.equal(counts.long(), torch.bincount(x, minlength=8))
    x[50] = 8
    with pytest.raises(InterpreterError, match="atomic of program 1 is out of bounds"):
        count[(4,)](counts, x, 100, 32)


def test_atomics_on_floating_point_are_refused():
    with pytest.raises(InterpreterError, match="order of programs"):
        count[(1,)](torch.zeros(8), torch.zeros(32, dtype=torch.int64), 32, 32)


# ---- races ----


@triton.jit
def scatter(x, places, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + tl.load(places + i), tl.load(x + i))


def test_distinct_stores():
    x, places, out = torch.randn(64), torch.randperm(64), torch.empty(64)
    scatter[(2,)](x, places, out, 32)
    assert torch.equal(out[places], x)


@pytest.mark.parametrize("other, message", [(40, "program 0 of the same"), (9, "two lanes")])
def test_two_stores_to_one_address(other, message):
    places = torch.arange(64)
    places[other] = places[8]
    with pytest.raises(InterpreterError, match=f"Race.*{message}"):
        scatter[(2,)](torch.randn(64), places, torch.empty(64), 32)


@triton.jit
def store_twice(out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, i.to(tl.float32))
    tl.store(out + (N - 1 - i), i.to(tl.float32))


def test_a_program_that_stores_twice():
    # Other threads of the program store the second time, and nothing makes them wait.
    with pytest.raises(InterpreterError, match="Race.*program 0 of the same launch has stored"):
        store_twice[(1,)](torch.empty(32), 32)


@triton.jit
def chain(x, N: tl.constexpr, READS_AHEAD: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    if READS_AHEAD:
        tl.store(x + i, tl.load(x + i + N))
    else:
        tl.store(x + i + N, tl.load(x + i))


@pytest.mark.parametrize(
    "reads_ahead, message", [(False, "load of program 1.*program 0"), (True, "another program")]
)
def test_programs_that_hand_on_results(reads_ahead, message):
    # One after the other they would give an ordinary result.
    with pytest.raises(InterpreterError, match=f"Race.*{message}"):
        chain[(3,)](torch.randn(64), 16, reads_ahead)


@triton.jit
def double(x, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + i, tl.load(x + i) * 2)


def test_in_place_updates_are_no_race():
    x = torch.ones(64)
    double[(2,)](x, 32)
    double[(2,)](x, 32)
    assert bool((x == 4).all())


@triton.jit
def finish(counts, N: tl.constexpr):
    tl.atomic_add(counts, 1)
    tl.store(counts + tl.program_id(0), 5)


def test_atomics_beside_stores():
    with pytest.raises(InterpreterError, match="Race"):
        finish[(2,)](torch.zeros(2, dtype=torch.int32), 1)
