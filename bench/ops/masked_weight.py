# SPDX-License-Identifier: Apache-2.0
"""Masking weights, forward and backward, against sigmoid and multiply in PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from l0kernels.functional import masked_weight

from ..operators import Operator, Way, numbers
from . import main
from .pack_weight import ways_of

MEANING = "O x I x kernel x kernel or O x I"
BETA = 14.0  # about the middle of training, by the logarithm: it grows from 1 to 200
SCALE = 2.0  # of scores that start at 0


@dataclass
class Problem:
    """One weight with a score per number; 4-D weights and their scores are channels_last."""

    weight: Tensor
    scores: Tensor
    beta: Tensor
    upstream: list[Tensor]

    def ours(self) -> Tensor:
        return masked_weight(self.weight, self.scores, self.beta, SCALE)

    def plain(self) -> Tensor:
        gate = torch.sigmoid(self.beta * self.scores) * SCALE
        return (self.weight * gate).to(self.weight.dtype)

    def ways(self) -> dict[str, Way]:
        runs = {"ours": lambda: [self.ours()], "plain": lambda: [self.plain()]}
        return ways_of(runs, [self.weight, self.scores], self.upstream, [None, None])

    def work(self) -> dict[str, float]:
        """Bytes: everything is read and written once."""
        weight, scores = self.weight.nbytes, self.scores.nbytes
        return {"forward": 2.0 * weight + scores, "backward": 3.0 * weight + 2.0 * scores}


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws a weight and its scores.

    Args:
        shape: see `MEANING`.
        fraction: of the scores that are positive.
        dtype: of the weight; scores are float32, float64 where it is.
        device: of all tensors.

    Raises:
        ValueError: another shape.
    """
    sizes = numbers(shape, 4 if shape.count("x") == 3 else 2, MEANING)
    layout = torch.channels_last if len(sizes) == 4 else torch.contiguous_format
    floats = torch.promote_types(dtype, torch.float32)

    def drawn(kind: torch.dtype) -> Tensor:
        tensor = torch.randn(sizes, device=device, dtype=kind)
        return tensor.contiguous(memory_format=layout)

    size = torch.rand_like(drawn(floats)) / 2
    scores = torch.where(torch.rand_like(size) < fraction, size, -size)
    return Problem(
        drawn(dtype).requires_grad_(),
        scores.requires_grad_(),
        torch.tensor(BETA, device=device, dtype=floats),
        [drawn(dtype)],
    )


OPERATOR = Operator(
    "masked_weight",
    make_problem,
    MEANING,
    shapes=("640x640x3x3", "160x160x3x3", "4096x4096"),
    small=("12x10x3x3", "12x10"),
    dtypes=("f64", "f32", "bf16", "f16"),
    unit="GB/s",
)

if __name__ == "__main__":
    main("masked_weight")
