# SPDX-License-Identifier: Apache-2.0
"""Tests that take a GPU of their own: more than 2^31 elements, many repetitions."""

from collections.abc import Iterator

import pytest
import torch

import l0kernels as l0
from l0kernels._config import why_unavailable


@pytest.fixture(params=["cuda", "triton"])
def gpu_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that runs on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := why_unavailable(request.param):
        pytest.skip(reason)
    with l0.use_impl(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_fill() -> Iterator[None]:
    """Gigabytes are not filled with NaN first."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.cuda.empty_cache()
