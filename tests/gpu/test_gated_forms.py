# SPDX-License-Identifier: Apache-2.0
"""Triton's gated layers in the forms that small layers do not get: packed, by descriptors."""

import pytest
import torch
from harness import offload
from triton_on_cpu import test_gated_conv2d, test_gated_linear

from l0kernels.ops.gated_linear import triton as kernels

pytestmark = pytest.mark.gpu


class OnGpu:
    """Runs the tests on a GPU, and leaves out those that reach no other code there."""

    STEM: str
    DESCRIPTORS = False
    test_axes_that_are_not_packed = None
    test_any_capacity = None
    test_closed_parameters_do_not_matter = None
    test_open_features_keep_nan = None

    @pytest.fixture
    def impl(self, monkeypatch):
        if reason := offload.why_not("triton"):
            pytest.skip(reason)
        device = torch.device("cuda", torch.cuda.current_device())
        if self.DESCRIPTORS and not kernels.has_tma(device):
            pytest.skip("this GPU has no tensor memory accelerator")
        for patch in offload.patches("triton", self.STEM):
            monkeypatch.setattr(*patch)
        monkeypatch.setattr(kernels, "IN_PLACE_ROWS", -1)
        return "triton"


class TestPackedLinear(OnGpu, test_gated_linear.TestPackedLinear):
    STEM = "gated_linear"


class TestPackedConv2d(OnGpu, test_gated_conv2d.TestPackedConv2d):
    STEM = "gated_conv2d"


class TestDescriptorLinear(OnGpu, test_gated_linear.TestDescriptorLinear):
    STEM = "gated_linear"
    DESCRIPTORS = True


class TestDescriptorConv2d(OnGpu, test_gated_conv2d.TestDescriptorConv2d):
    STEM = "gated_conv2d"
    DESCRIPTORS = True
