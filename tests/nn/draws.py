# SPDX-License-Identifier: Apache-2.0
"""Gate values that tests of layers force, and upstream gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

PATTERNS = ("closed", "open", "one", "half")
STRIDES = ("expanded", "transposed", "sliced")


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


def upstream(strides: str, shape: Sequence[int]) -> Tensor:
    """A gradient of this shape that is not contiguous, fp64."""
    if strides == "expanded":
        return torch.randn((), dtype=torch.float64).expand(shape)
    if strides == "transposed":
        backwards = range(len(shape))[::-1]
        return torch.randn(*reversed(shape), dtype=torch.float64).permute(*backwards)
    return torch.randn(*shape, 2, dtype=torch.float64)[..., 1]
