# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `gated_linear` by the tests of every implementation."""

from ops import test_gated_linear
from triton_on_cpu.gated import Descriptors, GatedContract, Interpreted, Values

from l0kernels.ops.gated_linear import op as linear_op


class TestInPlaceLinear(Interpreted, test_gated_linear.TestGatedLinear):
    IN_PLACE = True


class TestPackedLinear(Interpreted, Values):
    OP = linear_op
    SHAPES = test_gated_linear.TestGatedLinear.SHAPES
    LARGE = test_gated_linear.TestGatedLinear.LARGE
    test_any_capacity = GatedContract.test_any_capacity


class TestDescriptorLinear(Descriptors):
    OP = linear_op
    SHAPES = [
        ((16, 24), (7, 3), None),
        ((8, 16), (1,), None),
        ((40, 8), (130,), None),
        ((72, 136), (5,), None),
    ]
    LARGE = ((160, 144), (300,), None)
