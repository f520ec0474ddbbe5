# SPDX-License-Identifier: Apache-2.0
"""Gate methods: one class per method, holding the gates of a whole model."""

from l0kernels.gates.arm import ARM
from l0kernels.gates.base import Gates
from l0kernels.gates.hard_concrete import HardConcrete
from l0kernels.gates.ref import GateRef, cat

METHODS: dict[str, type[Gates]] = {
    "arm": ARM,
    "hard_concrete": HardConcrete,
}

__all__ = ["ARM", "METHODS", "GateRef", "Gates", "HardConcrete", "cat"]
