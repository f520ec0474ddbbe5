# SPDX-License-Identifier: Apache-2.0
"""Multiplying features by gates, forward and backward, against a product in PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from l0kernels.functional import gate_apply

from ..operators import Operator, Way, numbers
from . import main
from .pack_weight import ways_of

MEANING = "N x F, or N x F x H x W for channels_last, either with :example for gates per example"


@dataclass
class Problem:
    """Activations and a gate for each feature."""

    x: Tensor
    z: Tensor
    gate_map: Tensor
    upstream: list[Tensor]

    def ours(self) -> Tensor:
        return gate_apply(self.x, self.z, self.gate_map)

    def plain(self) -> Tensor:
        own = self.z[..., self.gate_map[0]]
        return (self.x * own.reshape(*own.shape, *[1] * (self.x.dim() - 2))).to(self.x.dtype)

    def ways(self) -> dict[str, Way]:
        runs = {"ours": lambda: [self.ours()], "plain": lambda: [self.plain()]}
        # The plain product has gradients for closed gates.
        return ways_of(runs, [self.x, self.z], self.upstream, [None, self.z.detach() != 0])

    def work(self) -> dict[str, float]:
        """Bytes: everything is read and written once."""
        x, z, gates = self.x.nbytes, self.z.nbytes, self.gate_map.nbytes
        return {"forward": 2.0 * x + z + gates, "backward": 3.0 * x + 2.0 * z + gates}


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws activations and gates.

    Args:
        shape: see `MEANING`.
        fraction: of the gates that are open.
        dtype: of the activations; gates are float32, float64 where they are.
        device: of all tensors.

    Raises:
        ValueError: another shape.
    """
    plain, _, scope = shape.partition(":")
    if scope not in ("", "example"):
        raise ValueError(f"expected a shape of {MEANING}, got {shape!r}")
    sizes = numbers(plain, 4 if plain.count("x") == 3 else 2, MEANING)
    layout = torch.channels_last if len(sizes) == 4 else torch.contiguous_format
    floats = torch.promote_types(dtype, torch.float32)
    features = sizes[1]
    z = torch.rand(*sizes[: bool(scope)], features + 1, device=device, dtype=floats)
    z = torch.where(torch.rand_like(z) < fraction, 0.1 + 0.9 * z, 0)
    z[..., -1] = 1
    own = torch.arange(features, device=device)
    x, upstream = (
        torch.randn(sizes, device=device, dtype=dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    return Problem(
        x.requires_grad_(),
        z.requires_grad_(),
        torch.stack([own, torch.full_like(own, features)]),
        [upstream],
    )


OPERATOR = Operator(
    "gate_apply",
    make_problem,
    MEANING,
    shapes=("128x300", "512x4096", "512x4096:example", "128x160x32x32"),
    small=("12x10", "12x10:example", "6x5x3x3"),
    dtypes=("f64", "f32", "bf16", "f16"),
    unit="GB/s",
)

if __name__ == "__main__":
    main("gate_apply")
