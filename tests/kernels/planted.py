# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that `make kernels` must refuse, and one that it must not."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from kernels.triton_aot import Case


@triton.jit
def _product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left, right = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    tl.store(out + m * N + n, tl.dot(left, right, input_precision="ieee"))


@triton.jit
def _sum(x, out, N: tl.constexpr):
    tl.atomic_add(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


def product_cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, size: int, **options: int) -> None:
        a, b, out = torch.zeros(3, size, size)
        _product[(1,)](a.to(dtype), b.to(dtype), out, size, size, size, **options)

    yield "good", lambda: call(torch.bfloat16, 64)
    yield "float32", lambda: call(torch.float32, 16)
    # Four warps of a wgmma take 64 rows.
    yield "short", lambda: call(torch.float16, 32)
    yield "crowded", lambda: call(torch.float32, 64, maxnreg=32)


def sum_cases() -> Iterator[Case]:
    yield "sum", lambda: _sum[(4,)](torch.zeros(128), torch.zeros(1), 128)


CASES = {"products": product_cases, "sums": sum_cases}
