# SPDX-License-Identifier: Apache-2.0
"""A linear layer over open features, read from lists and counts on the device."""

from l0kernels.ops.gated_linear.op import gated_linear

__all__ = ["gated_linear"]
