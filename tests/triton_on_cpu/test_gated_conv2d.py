# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `gated_conv2d` by the tests of every implementation."""

from ops import test_gated_conv2d
from triton_on_cpu.gated import Descriptors, GatedContract, Interpreted, Values

from l0kernels.ops.gated_conv2d import op as conv2d_op


class TestInPlaceConv2d(Interpreted, test_gated_conv2d.TestGatedConv2d):
    IN_PLACE = True
    SHAPES = [((13, 11, 2, 2), (2, 5, 4), (1, 1, 1)), *test_gated_conv2d.TestGatedConv2d.SHAPES]
    test_bad_windows_are_refused = None
    test_images_without_batch_are_refused = None


class TestPackedConv2d(Interpreted, Values):
    OP = conv2d_op
    SHAPES = TestInPlaceConv2d.SHAPES
    LARGE = test_gated_conv2d.TestGatedConv2d.LARGE
    test_any_capacity = GatedContract.test_any_capacity


class TestDescriptorConv2d(Descriptors):
    OP = conv2d_op
    SHAPES = [
        ((16, 24, 2, 2), (2, 5, 4), (1, 1, 1)),
        ((8, 8, 1, 1), (3, 4, 5), (1, 0, 1)),
        ((24, 16, 1, 1), (1, 2, 3), (1, 1, 1)),
        ((8, 16, 2, 3), (2, 9, 10), (1, (0, 2), (2, 1))),
        ((8, 8, 3, 3), (1, 17, 3), (1, (3, 4), (3, 1))),
    ]
    LARGE = ((72, 136, 3, 3), (3, 9, 8), (1, 1, 1))
