# SPDX-License-Identifier: Apache-2.0
"""Convolutions over open channels, each implementation against the masked dense layer."""

from dataclasses import replace

import pytest
import torch
from ops.gated import GatedContract, check, leaves_of

from l0kernels.ops.gated_conv2d import op


class TestGatedConv2d(GatedContract):
    OP = op
    SHAPES = [
        ((13, 11, 3, 3), (2, 5, 4), (1, 1, 1)),
        ((4, 5, 2, 2), (1, 3, 3), (1, 0, 1)),
        ((1, 1, 1, 1), (1, 1, 1), (1, 0, 1)),
        ((8, 16, 1, 1), (3, 4, 5), (1, 0, 1)),
        ((9, 7, 1, 1), (2, 5, 5), (2, 0, 1)),
        ((7, 9, 3, 3), (2, 7, 6), (2, 1, 1)),
        ((5, 6, 3, 2), (1, 8, 7), ((2, 1), (2, 0), (1, 3))),
        ((6, 5, 2, 3), (2, 9, 9), ((3, 2), (1, 2), (2, 2))),
        ((5, 3, 3, 3), (0, 4, 4), (1, 1, 1)),
        ((4, 3, 5, 5), (1, 5, 5), (1, 0, 1)),
    ]
    LARGE = ((70, 66, 3, 3), (2, 9, 8), (1, 1, 1))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layouts_of_weights(self, impl, make, channels_last):
        problem = make()
        if channels_last:
            problem.weight = problem.weight.to(memory_format=torch.channels_last)
        check(impl, problem, self.upstream(problem))

    def test_inputs_that_are_not_channels_last(self, impl, make):
        problem = make()
        problem.x = problem.x.contiguous()
        check(impl, problem, self.upstream(problem))

    @pytest.mark.parametrize(
        "window, message",
        [
            ((0, 1, 1), "stride: expected one or two numbers of at least 1; got 0"),
            ((1, (0, -1), 1), r"padding: expected .* of at least 0; got \(0, -1\)"),
            ((1, 1, (1, 1, 1)), r"dilation: expected one or two numbers .*; got \(1, 1, 1\)"),
            ((1, 0, 3), "expected a height and width that the kernel fits into"),
        ],
    )
    def test_bad_windows_are_refused(self, impl, make, window, message):
        problem = replace(make(), window=window)
        with pytest.raises(ValueError, match=message):
            problem.run(*leaves_of(problem))

    def test_images_without_batch_are_refused(self, impl, make):
        problem = make()
        problem = replace(problem, x=problem.x[0])
        with pytest.raises(ValueError, match="x: expected shape"):
            problem.run(*leaves_of(problem))
