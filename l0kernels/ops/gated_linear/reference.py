# SPDX-License-Identifier: Apache-2.0
"""The oracle of `gated_linear`: a masked dense layer, differentiable by PyTorch's own autograd."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from l0kernels.ops.gated_linear.spans import Axis


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int],
    out_span: Sequence[int],
    activation: str,
) -> Tensor:
    """Computes all features; the arguments are those of `l0kernels.functional.gated_linear`."""
    inputs = Axis(weight.shape[1], in_span, z, index, counts, maps)
    outputs = Axis(weight.shape[0], out_span, z, index, counts, maps)
    weight = outputs.without_closed(inputs.without_closed(weight, 1), 0).to(x.dtype)
    if bias is not None:
        bias = outputs.without_closed(bias, 0).to(x.dtype)
    y = F.linear(inputs.unpack(x, -1), weight, bias)
    return outputs.pack(F.relu(y) if activation == "relu" else y, -1)
