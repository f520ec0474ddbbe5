# SPDX-License-Identifier: Apache-2.0
"""CS: Continuous Sparsification."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from l0kernels._registry import once_differentiable
from l0kernels.gates.base import Constant, Gates
from l0kernels.gates.weights import Mask, WeightGates
from l0kernels.ops.masked_weight.reference import closed_below


class _Soft(torch.autograd.Function):
    """scale sigmoid(beta s), 0 where closed."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, beta: Tensor, scale: float, closed: Tensor) -> Tensor:
        m = torch.sigmoid(scores * beta).masked_fill_(closed, 0)
        # Not saved tensors: a draw that is held serves several backward passes.
        ctx.slope = scale * beta * m * (1 - m)
        return m * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return grad * ctx.slope, None, None, None


class ContinuousSparsification(WeightGates):
    """Gates that harden as training goes on (Savarese, Silva, Maire, 2020, arXiv:1912.04427).

    Training gate: z = c sigmoid(beta s). Test gate: c 1[s > 0], the ticket. ``log_alpha`` holds the
    scores s. Nothing is random. c = 1 / sigmoid(initial), as in the authors' code, makes training
    start at the network itself; ``rescale=False`` is the paper's c = 1.

    ``set_progress(t)`` sets beta = final_beta^t, t from 0 at the start of a round to 1 at its end;
    the authors do so once per epoch. ``next_round()`` then sets s to min(final_beta s, initial)
    and beta to 1: what has lost stays closed, as sigmoid(1 final_beta s) is the gate that it had,
    and what has won starts anew. ``freeze()`` makes the test gates those of training, too: the
    ticket, to be trained from an early checkpoint of all but ``l0.*``.

    The penalty is the sum of all training gates, sum_j lam |G_j| z_j / n_train, with |G_j| = 1 for
    weight gates; the authors' is lam = 1e-8 with n_train = 1. Its gradient in s is
    c lam beta sigmoid(beta s) sigmoid(-beta s) per weight.

    No gate is exactly 0 before sigmoid underflows (see ``functional.masked_weight``), so training
    computes everything until then; ``skip_below`` closes gates earlier and is an approximation.
    With it, outputs and inputs whose weights are all closed are left out, too: from the second
    round on there are such from its start, because what has lost stays where it was.

    Args:
        groups: name -> number of units, or for gates of single weights (``nn.MaskedLinear``,
            ``nn.MaskedConv2d``) the shape of the weight; all of one kind.
        lam: weight of the penalty, one number or one per group.
        n_train: size of the training set; the penalty is divided by it.
        seed: kept for checkpoints, as all methods have one; nothing is drawn.
        lam_warmup: part of the round, up to 1, over which ``lam`` grows from 0: see
            ``set_progress``.
        initial: score that all gates start with: with more, more stay open.
        final_beta: beta at the end of a round, above 1.
        rescale: whether c is 1 / sigmoid(initial), else 1.
        skip_below: gates with sigmoid(beta s) below it are closed in training, and get no
            gradient; from 0, for none, up to, and without, 1.

    Raises:
        ValueError: groups of both kinds, or a number out of range.
    """

    granularities: ClassVar[tuple[str, ...]] = (*Gates.granularities, "weight")
    beta: Tensor

    def __init__(
        self,
        groups: Mapping[str, int | Sequence[int]],
        *,
        lam: float | Mapping[str, float] = 1.0,
        n_train: int = 1,
        seed: int = 0,
        lam_warmup: float = 0.0,
        initial: float = 0.0,
        final_beta: float = 200.0,
        rescale: bool = True,
        skip_below: float = 0.0,
    ) -> None:
        super().__init__(groups, lam=lam, n_train=n_train, seed=seed, lam_warmup=lam_warmup)
        if not math.isfinite(initial):
            raise ValueError(f"initial: expected a finite number, got {initial}")
        if not 1 < final_beta < math.inf:
            raise ValueError(f"final_beta: expected a number above 1, got {final_beta}")
        if not 0 <= skip_below < 1:
            raise ValueError(f"skip_below: expected a number from 0 up to 1, got {skip_below}")
        self.initial, self.final_beta, self.skip_below = initial, final_beta, skip_below
        self.scale = 1 + math.exp(-initial) if rescale else 1.0
        self.log_alpha = nn.Parameter(torch.full((self.count,), float(initial)))
        self.register_buffer("beta", torch.ones(()))

    # What all methods have.

    def open_probability(self) -> Tensor:
        s = self.alpha.detach()
        return (s > 0 if self.frozen else ~self._closed(s)).double()

    def draw(self) -> None:
        soft = self.training and not self.frozen
        if soft:
            self._settle()
            self.step.add_(1)
        if self.shapes and soft:
            beta = self.beta.clone()
            parts = self._parts(self.log_alpha)
            options = beta, self.scale, self.skip_below
            masks = {name: Mask(part, *options) for name, part in parts.items()}
            # Without skip_below gates are closed by underflow alone, late in a round: not looked
            # for, because the host would wait for it.
            sides = self._open_sides(self._closed) if self.skip_below > 0 else None
            self._draw_masks(masks, sides, dense=False)
        elif self.shapes:
            self._draw_test_gates()
        elif soft:
            self.draw_given(self._soft())
        else:
            super().draw()

    def _expected(self, cost: Tensor) -> Tensor:
        if self.frozen:
            value = (cost * self.deterministic().detach()).sum()
            return Constant.apply(self.log_alpha, value)
        return (cost * self._soft()).sum()

    def density(self, per: str = "weight") -> Tensor:
        """sum_j |G_j| sigmoid(beta s_j) / sum_j |G_j|, which becomes that of the ticket.

        Args and raises: as of all gates.
        """
        return super().density(per) / self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        beta = self.beta
        super()._apply(fn, recurse)
        # As log_alpha: a detour over a narrow dtype would lose digits.
        self.beta = beta.to(self.log_alpha)
        return self

    # Its schedule.

    def set_progress(self, t: float) -> None:
        """Set beta to final_beta^t.

        Args:
            t: how much of the round is over, from 0 to 1; e / (epochs - 1) in epoch e.

        Raises:
            ValueError: t is out of range.
            RuntimeError: inside ``hold`` or ``expected_loss``.
        """
        super().set_progress(t)
        self.beta.fill_(self.final_beta**t)
        self._draw = None

    @torch.no_grad()
    def next_round(self) -> None:
        """Set s to min(final_beta s, initial), and beta to 1; call it at the end of a round.

        Raises:
            RuntimeError: inside ``hold`` or ``expected_loss``, or the gates are frozen.
        """
        self._check_free("next_round")
        if self.frozen:
            raise RuntimeError("next_round: expected gates that change, got frozen ones")
        self.log_alpha.mul_(self.final_beta).clamp_(max=self.initial)
        self.set_progress(0)

    def _closed(self, scores: Tensor) -> Tensor:
        """Which gates are exactly 0 in training."""
        return scores * self.beta < closed_below(self.skip_below, scores.dtype)

    def _soft(self) -> Tensor:
        """Training gates, shape [gates]."""
        closed = self._closed(self.log_alpha.detach())
        return _Soft.apply(self.log_alpha, self.beta, self.scale, closed)


__all__ = ["ContinuousSparsification"]
