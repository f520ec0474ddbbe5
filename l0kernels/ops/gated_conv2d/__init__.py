# SPDX-License-Identifier: Apache-2.0
"""A convolution over open channels, read from lists and counts on the device."""

from l0kernels.ops.gated_conv2d.op import gated_conv2d

__all__ = ["gated_conv2d"]
