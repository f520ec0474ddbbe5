# SPDX-License-Identifier: Apache-2.0
"""A small plain model from a gated one, its files and its ONNX export."""

from l0kernels.compact.files import load_compact, save_compact
from l0kernels.compact.onnx import export_onnx
from l0kernels.compact.shrink import compact

__all__ = ["compact", "export_onnx", "load_compact", "save_compact"]
