# SPDX-License-Identifier: Apache-2.0
"""Which gated class belongs to a plain one."""

from __future__ import annotations

from torch import nn

from l0kernels.nn.base import GatedLayer
from l0kernels.nn.conv import GatedConv2d
from l0kernels.nn.linear import GatedLinear
from l0kernels.nn.norm import GatedBatchNorm1d, GatedBatchNorm2d

_GATED: dict[type[nn.Module], type[GatedLayer]] = {
    gated.plain_class: gated
    for gated in (GatedBatchNorm1d, GatedBatchNorm2d, GatedConv2d, GatedLinear)
}


def gated_class(cls: type[nn.Module]) -> type[GatedLayer] | None:
    """The gated class of a plain layer class, or None where there is none.

    Args:
        cls: looked up exactly: a subclass may compute something else.
    """
    return _GATED.get(cls)
