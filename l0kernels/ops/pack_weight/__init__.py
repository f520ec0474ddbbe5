# SPDX-License-Identifier: Apache-2.0
"""Gather the open rows and columns of weights, scaled by the gates."""

from l0kernels.ops.pack_weight.op import pack_weight, pack_weights

__all__ = ["pack_weight", "pack_weights"]
