# SPDX-License-Identifier: Apache-2.0
"""Gate values that tests of layers force."""

import torch
from torch import Tensor

PATTERNS = ("closed", "open", "one", "half")


def gate_values(pattern: str, units: int) -> Tensor:
    """Values from .3 to 1 of which some are 0, as a pattern says; fp64 of shape [units]."""
    z = torch.linspace(0.3, 1.0, units, dtype=torch.float64)
    if pattern == "closed":
        z.zero_()
    if pattern == "one":
        z[torch.arange(units) != units // 2] = 0.0
    if pattern == "half":
        z[::2] = 0.0
    return z
