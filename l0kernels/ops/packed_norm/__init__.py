# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation and activation of the open channels."""

from l0kernels.ops.packed_norm.op import packed_norm

__all__ = ["packed_norm"]
