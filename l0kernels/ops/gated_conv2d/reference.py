# SPDX-License-Identifier: Apache-2.0
"""The oracle of `gated_conv2d`: a masked dense layer, differentiable by PyTorch's own autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.ops.gated_linear.spans import Axis


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int],
    out_span: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """Computes all channels; the arguments are those of `l0kernels.functional.gated_conv2d`."""
    inputs = Axis(weight.shape[1], in_span, z, index, counts, maps)
    outputs = Axis(weight.shape[0], out_span, z, index, counts, maps)
    weight = outputs.without_closed(inputs.without_closed(weight, 1), 0).to(x.dtype)
    if bias is not None:
        bias = outputs.without_closed(bias, 0).to(x.dtype)
    y = F.conv2d(inputs.unpack(x, 1), weight, bias, stride, padding, dilation)
    y = outputs.pack(F.relu(y) if activation == "relu" else y, 1)
    return y.contiguous(memory_format=torch.channels_last)
