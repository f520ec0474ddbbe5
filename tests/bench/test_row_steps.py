# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of optimizers on open rows: both arms make the same steps."""

import pytest
import torch

from l0kernels.bench import row_steps
from l0kernels.bench.ops import adam_rows, sgd_rows, unpack_rows


@pytest.fixture(autouse=True)
def passive(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


@pytest.fixture(params=[adam_rows, sgd_rows], ids=["adam_rows", "sgd_rows"])
def module(request):
    return request.param


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_arms_compute_the_same(module, keep):
    problem = module.make_problem((40, 6), keep)
    for _ in range(20):
        problem.ours()
        problem.plain()
    problem.flush()
    torch.testing.assert_close(problem.weight, problem.twin)
    assert problem.now == problem.twins == 20


def test_arms_are_timed(module):
    rows = row_steps.measure(module.make_problem, [(40, 6)], [0.5], rounds=1)
    assert [(row["shape"], row["open"]) for row in rows] == [([40, 6], 0.5)]
    assert rows[0]["us"] > 0 and rows[0]["times_slower"]["median"] > 0
    assert "40x6" in row_steps.table(rows)


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_memory_that_is_used_again_gets_the_same(keep):
    problem = unpack_rows.make_problem((40, 6), keep)
    for _ in range(20):
        problem.ours()
        problem.plain()
        assert torch.equal(problem.into, problem.new)
        assert bool(problem.into.any())


def test_memory_that_is_used_again_is_timed():
    rows = row_steps.measure(unpack_rows.make_problem, [(40, 6)], [0.5], rounds=1)
    assert rows[0]["us"] > 0 and rows[0]["times_slower"]["median"] > 0
