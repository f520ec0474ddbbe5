# SPDX-License-Identifier: Apache-2.0
"""Packed widths that are known before gates are drawn.

With X the number of open units of a group, a sum of independent gates, the capacity is

    ceil16(E X + 4 sqrt(Var X)), at most the size of the group,

16 channels being what a tensor core's instruction takes.
"""

from __future__ import annotations

import math

from l0kernels.gates.base import GPU_MULTIPLE
from l0kernels.gates.draw import LEAST

SIGMAS = 4


def capacity(mean: float, variance: float, size: int) -> int:
    """How many units of a group are packed.

    Args:
        mean: expected number of open units.
        variance: of that number.
        size: of the group; also what is returned where the others are not finite.
    """
    wanted = mean + SIGMAS * math.sqrt(variance) if variance >= 0 else math.inf
    if not wanted <= size:
        return size
    return min(size, max(LEAST, math.ceil(wanted / GPU_MULTIPLE) * GPU_MULTIPLE))
