# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers that compute open features only."""

from l0kernels.nn import hf
from l0kernels.nn.activation import GatedPReLU
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.conv import GatedConv1d, GatedConv2d, GatedConvTranspose2d
from l0kernels.nn.linear import GatedLinear
from l0kernels.nn.lookup import gated_class
from l0kernels.nn.masked import MaskedConv2d, MaskedLayer, MaskedLinear, masked_class
from l0kernels.nn.norm import GatedBatchNorm1d, GatedBatchNorm2d

__all__ = [
    "GatedBatchNorm1d",
    "GatedBatchNorm2d",
    "GatedConv1d",
    "GatedConv2d",
    "GatedConvTranspose2d",
    "GatedLayer",
    "GatedLinear",
    "GatedPReLU",
    "MaskedConv2d",
    "MaskedLayer",
    "MaskedLinear",
    "gated_class",
    "hf",
    "masked_class",
]
