# SPDX-License-Identifier: Apache-2.0
"""Gate methods: one class per method, holding the gates of a whole model."""

from l0kernels.gates.base import Gates
from l0kernels.gates.dep import DependentHardConcrete
from l0kernels.gates.hard_concrete import HardConcrete
from l0kernels.gates.ref import GateRef, cat

METHODS: dict[str, type[Gates]] = {
    "dep": DependentHardConcrete,
    "hard_concrete": HardConcrete,
}

__all__ = [
    "METHODS",
    "DependentHardConcrete",
    "GateRef",
    "Gates",
    "HardConcrete",
    "cat",
]
