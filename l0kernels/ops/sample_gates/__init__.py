# SPDX-License-Identifier: Apache-2.0
"""Draw every gate of a model in one call: values, expected L0, ordered open lists."""

from l0kernels.ops.sample_gates.op import arm_gradient, example_noise, open_lists, sample_gates
from l0kernels.ops.sample_gates.reference import GateLayout, OpenLists

__all__ = [
    "GateLayout",
    "OpenLists",
    "arm_gradient",
    "example_noise",
    "open_lists",
    "sample_gates",
]
