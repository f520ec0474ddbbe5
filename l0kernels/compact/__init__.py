# SPDX-License-Identifier: Apache-2.0
"""A small plain model from a gated one, its files and its ONNX export."""

from l0kernels.compact.shrink import compact

__all__ = ["compact"]
