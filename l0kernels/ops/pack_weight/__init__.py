# SPDX-License-Identifier: Apache-2.0
"""Gather the open rows and columns of a weight, scaled by the gates."""

from l0kernels.ops.pack_weight.op import pack_weight

__all__ = ["pack_weight"]
