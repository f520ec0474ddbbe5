# SPDX-License-Identifier: Apache-2.0
"""Gated layers for classes of transformers.

``GatedConv1D`` derives from ``transformers.pytorch_utils.Conv1D`` and is made when it is first
asked for, so that nothing here imports transformers before.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from l0kernels._config import current_impl
from l0kernels.gates.ref import GateRef
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.matmul import linear


class _GatedConv1D(GatedLayer):
    """transformers' ``Conv1D`` (GPT-2) that computes open features only: y = (x * z_in) W + b.

    Args:
        nf: number of output features.
        nx: number of input features; the weight is [nx, nf] and keeps its full shape.
        in_gate: gates that multiply the input features.
        out_gate: gates of the output features; they are multiplied where the output is read.

    Shape: x [..., packed nx]; y [..., packed nf].

    Raises:
        ValueError: a gate has another number of features than the layer.
    """

    nf: int
    nx: int
    stored_in_out = True

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        in_gate: GateRef | None = None,
        out_gate: GateRef | None = None,
    ) -> None:
        super().__init__(nf, nx)
        self.connect(in_gate, out_gate)

    def _in_width(self) -> int:
        return self.nx

    def _out_width(self) -> int:
        return self.nf

    def resize(self, inputs: int, outputs: int) -> None:
        self.nx, self.nf = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        if self.gates is None:
            return super().forward(x)
        draw = self.current_draw()
        if current_impl() == "reference":
            return super().forward(self.mask_inputs(x, -1, draw))
        weight, bias = self.packed_parameters(draw)
        return self.compute(self.select_inputs(x, -1, draw, weight), weight, bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight.t(), bias)


@functools.cache
def _make_conv1d() -> type[GatedLayer]:
    from transformers.pytorch_utils import Conv1D

    body = {
        "__doc__": _GatedConv1D.__doc__,
        # Pickle finds the class by it.
        "__module__": __name__,
        "plain_class": Conv1D,
    }
    return type("GatedConv1D", (_GatedConv1D, Conv1D), body)


def __getattr__(name: str) -> Any:
    if name == "GatedConv1D":
        return _make_conv1d()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
