# SPDX-License-Identifier: Apache-2.0
"""Linear layers over open features, each implementation against the masked dense layer."""

import pytest
import torch
from ops.gated import GatedContract, check, gradients

from l0kernels.ops.gated_linear import op


class TestGatedLinear(GatedContract):
    OP = op
    SHAPES = [
        ((13, 11), (3, 5), None),
        ((6, 5), (4,), None),
        ((1, 1), (1,), None),
        ((17, 16), (33,), None),
        ((8, 31), (1,), None),
        ((5, 3), (0,), None),
        ((24, 40), (2, 3, 2), None),
    ]
    LARGE = ((150, 140), (131,), None)

    def test_one_row_without_batch(self, impl, make):
        problem = make(((7, 9), (), None))
        check(impl, problem)

    def test_many_rows_of_small_numbers(self, impl, make):
        problem = make(((3, 4), (700,), None), 1.0)
        check(impl, problem, torch.full((700, 3), 0.01))

    def test_numbers_are_refused(self, impl, make):
        problem = make()
        with pytest.raises(ValueError, match="x: expected shape"):
            problem.run(torch.ones(()), problem.weight, problem.bias, problem.z)

    def test_relu_passes_nothing_at_zero(self, impl, make):
        problem = make(share=1.0, activation="relu")
        problem.bias.zero_()
        problem.weight.zero_()
        upstream = torch.ones(self.upstream(problem).shape)
        for result in gradients(problem, problem.run, upstream):
            assert bool((result == 0).all())
