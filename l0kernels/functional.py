# SPDX-License-Identifier: Apache-2.0
"""The operators, stateless."""

from l0kernels.ops.pack_weight import pack_weight
from l0kernels.ops.sample_gates import GateLayout, OpenLists, open_lists, sample_gates

__all__ = ["GateLayout", "OpenLists", "open_lists", "pack_weight", "sample_gates"]
