# SPDX-License-Identifier: Apache-2.0
"""The parts of a training run: rounds of a search, the training of its ticket, fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.prune import L1Unstructured

from l0kernels.nn import MaskedLayer
from l0kernels.training import gates_of

if TYPE_CHECKING:
    from l0kernels.recipes.arm import Arm
    from l0kernels.recipes.recipe import Settings


def _nothing(arm: Arm) -> None:
    pass


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Args:
        name: as in tables.
        epochs: its length.
        begin: called once, before its first epoch.
        passed: epochs of the schedule of learning rates that are over when it begins.
        hardens: whether the gates are told how far the phase is (``set_progress``).
        keep_after: epochs of it after which the weights are kept, to rewind to.
    """

    name: str
    epochs: int
    begin: Callable[[Arm], None] = _nothing
    passed: int = 0
    hardens: bool = False
    keep_after: int | None = None

    def progress(self, epoch: int) -> float:
        """How far the phase is, from 0 to 1.

        Args:
            epoch: from 0 on; the last one has 1.
        """
        return epoch / (self.epochs - 1) if self.epochs > 1 else 1.0


def one(settings: Settings) -> tuple[Phase, ...]:
    """Training and nothing else."""
    return (Phase("training", settings.epochs),)


def with_fine_tuning(settings: Settings) -> tuple[Phase, ...]:
    """Training, then ``fine_tune`` epochs with frozen gates; learning rates go on."""
    training = one(settings)
    if not settings.fine_tune:
        return training
    last = Phase("fine-tuning", settings.fine_tune, begin=_freeze, passed=settings.epochs)
    return (*training, last)


def sparsification(settings: Settings) -> tuple[Phase, ...]:
    """Rounds of Continuous Sparsification, then the training of the ticket.

    In each round beta grows from 1 to its end. Between rounds s becomes min(beta s, s_init), and
    learning rates start again; weights and momentum go on. The ticket, H(s), starts from the
    weights of an early epoch with a new optimizer.

    Source: Savarese, Silva, Maire, 2020, arXiv:1912.04427, and the authors' code.
    """
    first = Phase("round 1", settings.epochs, hardens=True, keep_after=settings.rewind)
    others = [
        Phase(f"round {number}", settings.epochs, begin=_next_round, hardens=True)
        for number in range(2, settings.rounds + 1)
    ]
    return (first, *others, Phase("ticket", settings.epochs, begin=_start_ticket))


def magnitude(settings: Settings) -> tuple[Phase, ...]:
    """Rounds of Iterative Magnitude Pruning: each trains the ticket that the one before left.

    A round trains with frozen gates, all open in the first. Between rounds the smallest of the
    open weights of all gated layers together are closed for good, and the others start again from
    an early epoch with a new optimizer.

    Source: Frankle, Carbin, 2019, arXiv:1803.03635; rewinding to an early epoch instead of the
    start: Frankle, Dziugaite, Roy, Carbin, 2019, arXiv:1903.01611.
    """
    first = Phase("round 1", settings.epochs, begin=_freeze, keep_after=settings.rewind)
    prune = partial(_prune, part=settings.prune)
    others = [
        Phase(f"round {number}", settings.epochs, begin=prune)
        for number in range(2, settings.rounds + 1)
    ]
    return (first, *others)


def _freeze(arm: Arm) -> None:
    gates_of(arm.net).freeze()


def _next_round(arm: Arm) -> None:
    gates_of(arm.net).next_round()  # pyright: ignore[reportCallIssue]


def _start_ticket(arm: Arm) -> None:
    gates_of(arm.net).freeze()
    arm.rewind()


def _prune(arm: Arm, part: float) -> None:
    gates = gates_of(arm.net)
    gates.unfreeze()
    with torch.no_grad():
        gates.log_alpha.copy_(pruned(gates.log_alpha, _weights(arm), part))
    gates.freeze()
    arm.rewind()


@torch.no_grad()
def pruned(scores: Tensor, weights: Tensor, part: float) -> Tensor:
    """Scores with those of the smallest open weights set to -1.

    Args:
        scores: [gates], open above 0.
        weights: [gates].
        part: of the open weights to close.
    """
    is_open = scores > 0
    weights = weights[is_open]
    kept = L1Unstructured(part).compute_mask(weights, torch.ones_like(weights))
    return scores.masked_scatter(is_open, torch.where(kept > 0, scores[is_open], -1.0))


def _weights(arm: Arm) -> Tensor:
    """The gated weights in the order of their gates, [gates]."""
    found = {
        layer.gate.name: layer.weight.detach().reshape(-1)
        for layer in arm.net.modules()
        if isinstance(layer, MaskedLayer) and layer.gate is not None
    }
    return torch.cat([found[name] for name in gates_of(arm.net).names])
