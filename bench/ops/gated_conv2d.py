# SPDX-License-Identifier: Apache-2.0
"""Times convolutions over open channels, forward and backward, against the masked dense layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import gated_conv2d

from .gated_linear import Gates, Packed, make_gates, run

SHAPES = ((160, 160, 3, 32, 4), (320, 320, 3, 16, 4), (640, 640, 3, 8, 4), (640, 640, 1, 8, 4))


@dataclass
class Problem:
    """One layer of stride 1 that keeps the size; `x` holds the packed channels, `wide_x` all."""

    x: Tensor
    wide_x: Tensor
    weight: Tensor
    gates: Gates

    @property
    def padding(self) -> int:
        return self.weight.shape[2] // 2

    def ours(self) -> Tensor:
        return gated_conv2d(
            self.x, self.weight, None, *self.gates.arguments(), padding=self.padding
        )

    def plain(self) -> Tensor:
        z = self.gates.z
        scale = z[: self.gates.inputs].to(self.wide_x.dtype).reshape(-1, 1, 1)
        y = F.conv2d(self.wide_x * scale, self.weight, padding=self.padding)
        return y * (z[self.gates.inputs : -1] != 0).reshape(-1, 1, 1)

    def packed(self) -> Packed:
        """The layer at the open widths, with nothing to gather: as fast as skipping can get."""
        rows, cols = self.gates.open_outputs(), self.gates.open_inputs()
        x, weight = self.x[:, : len(cols)].detach(), self.weight.detach()[rows][:, cols]
        layout = torch.channels_last
        x, weight = (t.clone(memory_format=layout).requires_grad_() for t in (x, weight))
        return Packed(lambda: F.conv2d(x, weight, padding=self.padding), [x, weight])

    def inputs(self, ours: bool) -> list[Tensor]:
        return [self.x if ours else self.wide_x, self.weight, self.gates.z]


def make_problem(
    shape: Sequence[int],
    fraction: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Draws a layer and its input, both channels_last.

    Args:
        shape: inputs, outputs, kernel size, image size, images.
        fraction: of the channels that are open.
        device: where it runs.
        dtype: of x and the weight.
    """
    inputs, outputs, kernel, size, images = shape
    gates = make_gates(outputs, inputs, fraction, device)
    layout = torch.channels_last
    wide_x = torch.randn(images, inputs, size, size, device=device, dtype=dtype)
    wide_x = wide_x.to(memory_format=layout)
    x = torch.zeros_like(wide_x)
    packed = wide_x[:, gates.open_inputs()]
    x[:, : packed.shape[1]] = packed
    weight = torch.randn(outputs, inputs, kernel, kernel, device=device, dtype=dtype)
    weight = weight.to(memory_format=layout)
    for t in (x, wide_x, weight):
        t.requires_grad_()
    return Problem(x, wide_x, weight, gates)


if __name__ == "__main__":
    run("gated_conv2d", "inputs x outputs x kernel x size x images", make_problem, SHAPES)
