# SPDX-License-Identifier: Apache-2.0
"""Gated activation with parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.gates.ref import GateRef
from l0kernels.nn.base import GatedLayer


class GatedPReLU(GatedLayer, nn.PReLU):
    """``nn.PReLU`` with a slope per channel that works on the open channels only.

    One slope for all channels (``num_parameters=1``) needs no gate: use ``nn.PReLU``.

    Args:
        num_parameters, init, device, dtype: as in ``nn.PReLU``; the slopes keep their full shape.
        out_gate: gates of the channels, those of the layer that makes them.

    Shape: x and y [N, packed channels, ...].

    Raises:
        ValueError: the gate has another number of features than there are slopes.
    """

    plain_class = nn.PReLU
    bias = None

    def __init__(
        self, num_parameters: int = 1, *args: Any, out_gate: GateRef | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_parameters, *args, **kwargs)
        self.connect(None, out_gate)

    def _in_width(self) -> int:
        return self.num_parameters

    def _out_width(self) -> int:
        return self.num_parameters

    def resize(self, inputs: int, outputs: int) -> None:
        self.num_parameters = outputs

    def forward(self, input: Tensor) -> Tensor:
        if self.gates is None:
            return super().forward(input)
        draw = self.current_draw()
        if current_impl() == "reference":
            return super().forward(input)
        return F.prelu(input, self.packed_parameters(draw)[0])
