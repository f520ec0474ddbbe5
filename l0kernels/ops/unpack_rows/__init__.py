# SPDX-License-Identifier: Apache-2.0
"""Gradients of packed weights in memory that is used again."""

from l0kernels.ops.unpack_rows.kept import KeptGradient
from l0kernels.ops.unpack_rows.op import unpack_rows

__all__ = ["KeptGradient", "unpack_rows"]
