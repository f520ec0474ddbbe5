# SPDX-License-Identifier: Apache-2.0
"""The operators, stateless."""

from l0kernels.ops.dep_chain import dep_chain
from l0kernels.ops.gate_apply import gate_apply
from l0kernels.ops.gated_conv2d import gated_conv2d
from l0kernels.ops.gated_linear import gated_linear
from l0kernels.ops.masked_weight import masked_weight
from l0kernels.ops.pack_weight import pack_weight, pack_weights
from l0kernels.ops.packed_norm import packed_norm
from l0kernels.ops.sample_gates import (
    GateLayout,
    OpenLists,
    arm_gradient,
    example_noise,
    open_lists,
    sample_gates,
)

__all__ = [
    "GateLayout",
    "OpenLists",
    "arm_gradient",
    "dep_chain",
    "example_noise",
    "gate_apply",
    "gated_conv2d",
    "gated_linear",
    "masked_weight",
    "open_lists",
    "pack_weight",
    "pack_weights",
    "packed_norm",
    "sample_gates",
]
