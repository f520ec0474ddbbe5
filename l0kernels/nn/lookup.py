# SPDX-License-Identifier: Apache-2.0
"""Which gated class belongs to a plain one."""

from __future__ import annotations

import sys

from torch import nn

from l0kernels.nn import hf
from l0kernels.nn.activation import GatedPReLU
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.conv import GatedConv1d, GatedConv2d, GatedConvTranspose2d
from l0kernels.nn.linear import GatedLinear
from l0kernels.nn.norm import GatedBatchNorm1d, GatedBatchNorm2d

_GATED: dict[type[nn.Module], type[GatedLayer]] = {
    gated.plain_class: gated
    for gated in (
        GatedBatchNorm1d,
        GatedBatchNorm2d,
        GatedConv1d,
        GatedConv2d,
        GatedConvTranspose2d,
        GatedLinear,
        GatedPReLU,
    )
}


def gated_class(cls: type[nn.Module]) -> type[GatedLayer] | None:
    """The gated class of a plain layer class, or None where there is none.

    Besides torch's layers it knows transformers' ``Conv1D``, which it does not import: whoever has
    a class to ask for has imported it.

    Args:
        cls: looked up exactly: a subclass may compute something else.
    """
    utils = sys.modules.get("transformers.pytorch_utils")
    if utils is not None and cls is getattr(utils, "Conv1D", None):
        return hf.GatedConv1D
    return _GATED.get(cls)
