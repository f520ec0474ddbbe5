# SPDX-License-Identifier: Apache-2.0
"""The benchmark of SGD on open rows: both arms make the same steps."""

import pytest
import torch

from l0kernels.bench.ops import sgd_rows


@pytest.fixture(autouse=True)
def passive(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_arms_compute_the_same(keep):
    problem = sgd_rows.make_problem((40, 6), keep)
    for _ in range(20):
        problem.ours()
        problem.plain()
    problem.flush()
    torch.testing.assert_close(problem.weight, problem.twin)
    assert problem.now == problem.twins == 20


def test_arms_are_timed():
    rows = sgd_rows.measure([(40, 6)], [0.5], rounds=1)
    assert [(row["shape"], row["open"]) for row in rows] == [([40, 6], 0.5)]
    assert rows[0]["us"] > 0 and rows[0]["times_slower"]["median"] > 0
    assert "40x6" in sgd_rows.table(rows)
