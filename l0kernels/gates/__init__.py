# SPDX-License-Identifier: Apache-2.0
"""Gate methods: one class per method, holding the gates of a whole model."""

from l0kernels.gates.arm import ARM
from l0kernels.gates.base import Gates
from l0kernels.gates.cs import ContinuousSparsification
from l0kernels.gates.dep import DependentHardConcrete
from l0kernels.gates.hard_concrete import HardConcrete
from l0kernels.gates.ref import GateRef, WeightRef, cat
from l0kernels.gates.scl import StraightThrough

METHODS: dict[str, type[Gates]] = {
    "arm": ARM,
    "cs": ContinuousSparsification,
    "dep": DependentHardConcrete,
    "hard_concrete": HardConcrete,
    "scl": StraightThrough,
}

__all__ = [
    "ARM",
    "METHODS",
    "ContinuousSparsification",
    "DependentHardConcrete",
    "GateRef",
    "Gates",
    "HardConcrete",
    "StraightThrough",
    "WeightRef",
    "cat",
]
