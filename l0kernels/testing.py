# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of numerical code."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Returns max |actual - exact| in float64; infinity where only one of them is finite.

    Args:
        actual: any floating dtype.
        exact: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"expected shape {list(exact.shape)}; got {list(actual.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - exact.detach().double()).abs()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    return float(difference.masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf).max())


def error_ratio(actual: Tensor, exact: Tensor, plain: Tensor) -> float:
    """Returns the error of a kernel over that of plain PyTorch in the same dtype.

    Args:
        actual: the kernel's result.
        exact: the result computed in float64.
        plain: PyTorch's result in the kernel's dtype; one rounding unit of the largest exact
            value is added to its error, as it may be exact by luck.
    """
    error, budget = max_error(actual, exact), _plain_error(actual, exact, plain)
    if error in (0, budget):
        return float(error != 0)
    return error / budget if budget else math.inf


def assert_within_budget(actual: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """Asserts that a kernel errs at most twice as much as plain PyTorch in the same dtype.

    Args:
        actual: the kernel's result.
        exact: the result computed in float64.
        plain: PyTorch's result in the kernel's dtype; see `error_ratio`.
        factor: how many times PyTorch's error is allowed.

    Raises:
        AssertionError: the error is larger; the message has both.
    """
    if not error_ratio(actual, exact, plain) <= factor:
        budget = factor * _plain_error(actual, exact, plain)
        error = max_error(actual, exact)
        raise AssertionError(f"expected an error of at most {budget:.3g}; got {error:.3g}")


def _plain_error(actual: Tensor, exact: Tensor, plain: Tensor) -> float:
    finite = exact[exact.isfinite()].abs().double()
    unit = torch.finfo(actual.dtype).eps * (float(finite.max()) if finite.numel() else 0.0)
    return max_error(plain, exact) + unit


def z_score(successes: int, trials: int, probability: float) -> float:
    """Returns by how many standard deviations a count differs from its binomial expectation."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    return (successes - trials * probability) / deviation


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN (integers: the largest value) inside the block.

    Holds for allocations of PyTorch and of the compiled ops; a result that was not written
    completely shows.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
