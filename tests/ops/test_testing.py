# SPDX-License-Identifier: Apache-2.0
"""The helpers that other tests rely on fail when they should."""

import math

import pytest
import torch

from l0kernels.testing import assert_within_budget, max_error, poisoned_memory, z_score


def test_max_error():
    exact = torch.tensor([1.0, math.inf, math.nan, -2.0], dtype=torch.float64)
    assert max_error(torch.tensor([1.5, math.inf, math.nan, -2.0]), exact) == 0.5
    assert max_error(torch.tensor([1.0, 3.0, math.nan, -2.0]), exact) == math.inf
    assert max_error(torch.tensor([1.0, math.inf, 0.0, -2.0]), exact) == math.inf
    assert max_error(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match=r"expected shape \[4\]; got \[3\]"):
        max_error(torch.zeros(3), exact)


def test_budget_is_twice_the_plain_error():
    exact = torch.full((10,), 4.0, dtype=torch.float64)
    plain = torch.full((10,), 4.0 + 1e-3)
    assert_within_budget(torch.full((10,), 4.0 - 1.9e-3), exact, plain)
    with pytest.raises(AssertionError, match="expected an error of at most 0.002"):
        assert_within_budget(torch.full((10,), 4.0 - 2.1e-3), exact, plain)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.full((10,), math.nan), exact, plain)


def test_budget_has_room_for_rounding_where_plain_is_exact():
    exact = torch.tensor([1.0, 0.0], dtype=torch.float64)
    nearly = torch.tensor([1.0 + 2**-23, 0.0])
    assert_within_budget(nearly, exact, exact.float())
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0 + 2**-20, 0.0]), exact, exact.float())


def test_z_score():
    assert z_score(50, 100, 0.5) == 0
    assert z_score(60, 100, 0.5) == pytest.approx(2)


@pytest.mark.parametrize("before", [False, True])
def test_poisoned_memory_is_undone(before):
    torch.use_deterministic_algorithms(before)
    with poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert bool((torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all())
    assert torch.are_deterministic_algorithms_enabled() == before
