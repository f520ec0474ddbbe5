# SPDX-License-Identifier: Apache-2.0
"""Gates that every example of a batch draws for itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l0kernels.functional import example_noise
from l0kernels.gates.draw import Graph, engine

if TYPE_CHECKING:
    from l0kernels.gates.base import Gates

SCOPES = ("batch", "example")
NOISE = 1 << 23
"""How many different numbers the noise of a gate takes."""


class ExampleGates:
    """The gates of one draw, example by example, made when a layer says how many there are.

    An example is known by its place in the batch, counted over all ranks of ``torch.distributed``
    in turn, as ``DistributedSampler`` deals them out: place p on rank r of w has the number
    p w + r, and counter row 1 + p w + r of the noise. So every forward under one draw gives the
    same place the same gates.

    Args:
        gates: the gates of the model.
        law: of the values, see ``Gates.example_values``.
        key: int64 [2], seed and step.
        graph: what lives as long as a graph with these values.
    """

    def __init__(self, gates: Gates, law: str, key: Tensor, graph: Graph) -> None:
        self._gates, self._law, self._key, self._graph = gates, law, key, graph
        self._version = gates.log_alpha._version
        # Of each number of examples, with gradients and without.
        self._made: dict[tuple[int, bool], Tensor] = {}
        self.examples: int | None = None
        """Of the forward that runs, or ran last; None before a layer has seen them."""
        self._sizes: set[int] = set()  # of all forwards of an estimate

    def begin_estimate(self) -> None:
        """What runs from now on belongs to another estimate."""
        self._sizes.clear()

    def begin_forward(self) -> None:
        """The next batch may have another size."""
        self.examples = None

    def of_last(self) -> Tensor:
        """Those of the latest forward.

        Raises:
            RuntimeError: there was none.
        """
        if self.examples is None:
            raise RuntimeError("gates per example: expected a forward first, got none in this draw")
        return self.of(self.examples)

    def of(self, examples: int) -> Tensor:
        """Gates of so many examples and a final 1 for each, shape [examples, gates + 1].

        Raises:
            ValueError: another layer of the same forward has seen another number.
            RuntimeError: parameters have changed since the draw.
        """
        key = (examples, torch.is_grad_enabled())
        if torch._C._current_graph_task_id() != -1 and key in self._made:
            return self._made[key]  # one of several forwards is recomputed in backward
        if self.examples is None:
            self.examples = examples
        if examples != self.examples:
            raise ValueError(
                f"gates per example: expected {self.examples} examples in the first dimension, "
                f"got {examples}; scope='example' needs layers that keep examples there"
            )
        self._sizes.add(examples)
        if key not in self._made:
            self._made[key] = self._make(examples)
        return self._made[key]

    def noise(self, examples: int) -> Tensor:
        """The 23-bit integers of the examples, int32 of shape [examples, gates].

        Where no draw has such a key, a GPU makes -1 of all of them; a CPU raises ValueError.
        """
        ranks, rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            ranks, rank = dist.get_world_size(), dist.get_rank()
        with engine():
            return example_noise(self._key, examples, self._gates.count, 1 + rank, ranks)

    def weigh_noise(self, differences: Tensor) -> Tensor:
        """The sums that ARM's estimate is made of, float64 of shape [gates].

        Args:
            differences: float64 numbers d_b, one for each example: (1 / B) sum_b d_b (u_b - 1/2);
                or one number d for all: d sum_b (u_b - 1/2), over the largest forward.

        Raises:
            ValueError: a forward of the estimate had another number of examples than there are
                losses.
        """
        sizes = sorted(self._sizes)
        if not sizes or (differences.numel() > 1 and sizes != [differences.numel()]):
            raise ValueError(
                f"expected_loss: expected one loss or one for each example of the forward, of "
                f"which there were {sizes}, got {differences.numel()}"
            )
        centred = uniform(self.noise(sizes[-1])) - 0.5
        if differences.numel() == 1:
            return differences.reshape(()) * centred.sum(0)
        return (differences[:, None] * centred).mean(0)

    def _make(self, examples: int) -> Tensor:
        if self._gates.log_alpha._version != self._version:
            raise RuntimeError(
                "gates per example: expected log_alpha as it was when the gates were drawn, but "
                "it was modified in place since; step the optimizer after the hold scope"
            )
        values = self._gates.example_values(self.noise(examples), self._law)
        z = torch.cat((values, values.new_ones(examples, 1)), 1)
        if z.requires_grad:
            z.register_hook(self._graph.hold)
        return z


def uniform(k: Tensor) -> Tensor:
    """The numbers in (0, 1) that the integers stand for, float64; NaN for negative ones."""
    return or_nan((k.double() + 0.5) / NOISE, k)


def or_nan(made: Tensor, k: Tensor) -> Tensor:
    """What was made of the integers, NaN where these are negative, which are no noise."""
    return made.masked_fill(k < 0, math.nan)


def mean_loss(losses: Tensor) -> Tensor:
    """One number, 0-d, from what a closure returns."""
    return losses.mean() if losses.dim() else losses


def mixes_examples(model: nn.Module) -> bool:
    """Whether a batch norm makes the loss of one example depend on the others."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        for m in model.modules()
    )
