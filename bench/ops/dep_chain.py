# SPDX-License-Identifier: Apache-2.0
"""The logits of all gates from a chain of layers, against a loop over linear layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import dep_chain
from l0kernels.ops.dep_chain.reference import BOUND

from ..masked import log_alpha_for
from ..operators import GRADIENT, Operator, Way, layer_sizes
from . import main

MODELS = {
    "vgg16": (64, 64, 128, 128, 256, 256, 256, *[512] * 6),
    "resnet56": (16, *[16] * 9, *[32] * 9, *[64] * 9),
}
"""Gates of each layer, as Dep-L0 places them (Li, Ji, 2021)."""
MEANING = f"{' or '.join(MODELS)}, or layers x gates"


def plain_chain(first: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The chain as users write it: one linear layer after the other."""
    made = []
    for weight, bias in zip(weights, biases, strict=True):
        first = BOUND * torch.tanh(F.linear(first, weight, bias))
        made.append(first)
    return torch.cat(made)


@dataclass
class Problem:
    """The chain of a network.

    Args:
        first: what the first layer reads.
        weights: of each layer.
        biases: of each layer.
        upstream: gradient of all logits.
    """

    first: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    upstream: Tensor

    def ways(self) -> dict[str, Way]:
        leaves = [*self.weights, *self.biases]
        names = [f"{GRADIENT}{what} {i}" for what in "Wb" for i in range(len(self.weights))]

        def found(y: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
            return {"logits": y[0], **dict(zip(names, grads, strict=True))}

        def way(call) -> Way:
            arguments = self.first, self.weights, self.biases
            return Way(lambda: [call(*arguments)], leaves, [self.upstream], found)

        return {"ours": way(dep_chain), "plain": way(plain_chain)}

    def work(self) -> dict[str, float]:
        """Bytes: forward reads the weights, backward reads them and writes their gradients."""
        size = self.first.itemsize
        weights, gates = sum(w.numel() for w in self.weights), len(self.upstream)
        return {
            "forward": float(size * (weights + 4 * gates)),
            "backward": float(size * (2 * weights + 6 * gates)),
        }


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws a chain whose gates are open with about a probability.

    Args:
        shape: name of a model, or layers x gates.
        fraction: probability that a gate is open; it decides no work.
        dtype: of all tensors.
        device: where it runs.
    """
    sizes = layer_sizes(shape, MODELS, MEANING)
    # Small weights: the biases say how open gates are.
    mean = torch.atanh(torch.tensor(0.99 * log_alpha_for(fraction) / BOUND)).item()
    weights = [
        (0.1 * torch.randn(n, m) / m).to(device, dtype).requires_grad_()
        for n, m in zip(sizes, (sizes[0], *sizes[:-1]), strict=True)
    ]
    biases = [(mean + 0.01 * torch.randn(n)).to(device, dtype).requires_grad_() for n in sizes]
    first = torch.ones(sizes[0], dtype=dtype, device=device)
    return Problem(first, weights, biases, torch.randn(sum(sizes), dtype=dtype, device=device))


OPERATOR = Operator(
    "dep_chain",
    make_problem,
    MEANING,
    shapes=tuple(MODELS),
    small=("3x20",),
    dtypes=("f64", "f32"),
    unit="GB/s",
)

if __name__ == "__main__":
    main("dep_chain")
