# SPDX-License-Identifier: Apache-2.0
"""Multiply a weight by its gates, one for each of its numbers."""

from l0kernels.ops.masked_weight.op import masked_weight

__all__ = ["masked_weight"]
