# SPDX-License-Identifier: Apache-2.0
"""Convolutions over open channels, forward and backward, against the masked dense layer."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import gated_conv2d

from ..operators import Operator, numbers
from . import main
from .gated_linear import GatedLayer, inputs_of, make_gates

MEANING = "inputs x outputs x kernel x size x images"


@dataclass
class Problem(GatedLayer):
    """A convolution of stride 1 that keeps the size, without bias and activation."""

    @property
    def padding(self) -> int:
        return self.weight.shape[2] // 2

    def ours(self) -> Tensor:
        return gated_conv2d(
            self.x, self.weight, None, *self.gates.arguments(), padding=self.padding
        )

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding)


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws a layer and its input, both channels_last.

    Args:
        shape: inputs x outputs x kernel x size x images.
        fraction: of the channels that are open.
        dtype: of x and the weight.
        device: where it runs.
    """
    inputs, outputs, kernel, size, images = numbers(shape, 5, MEANING)
    gates = make_gates(outputs, inputs, fraction, dtype, device)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, device=device, dtype=dtype)
        return tensor.to(memory_format=torch.channels_last)

    x, wide_x = inputs_of(normal(images, inputs, size, size), gates)
    weight = normal(outputs, inputs, kernel, kernel).requires_grad_()
    return Problem(x, wide_x, weight, None, gates, normal(images, outputs, size, size))


OPERATOR = Operator(
    "gated_conv2d",
    make_problem,
    MEANING,
    shapes=("160x160x3x32x4", "320x320x3x16x4", "640x640x3x8x4", "640x640x1x8x4"),
    small=("8x6x3x5x2",),
    dtypes=("f64", "f32", "bf16", "f16"),
    unit="GFLOP/s",
    batched=lambda shape, batch: f"{shape.rsplit('x', 1)[0]}x{batch}",
)

if __name__ == "__main__":
    main("gated_conv2d")
