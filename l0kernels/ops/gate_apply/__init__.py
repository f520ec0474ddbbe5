# SPDX-License-Identifier: Apache-2.0
"""Multiply the features of activations by their gates."""

from l0kernels.ops.gate_apply.op import gate_apply

__all__ = ["gate_apply"]
