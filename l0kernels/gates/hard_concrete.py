# SPDX-License-Identifier: Apache-2.0
"""L0-HC: hard concrete gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from l0kernels._registry import once_differentiable
from l0kernels.gates.base import Gates, droprates, not_negative, one_of
from l0kernels.gates.examples import SCOPES, or_nan
from l0kernels.ops.sample_gates.reference import hard_concrete_decisions, hard_concrete_s

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
CLAMP = (math.log(0.01), math.log(100.0))
# What divides log_alpha in each test gate.
TEST_GATES = {"mean": 1.0, "median": BETA}


class HardConcrete(Gates):
    """Hard concrete gates (Louizos, Welling, Kingma, 2018, arXiv:1712.01312, eq. 10-13).

    Training gate: u ~ U(0, 1), s = sigmoid((log u - log(1 - u) + log_alpha) / beta),
    z = clip(s (zeta - gamma) + gamma, 0, 1). Test gate: z = clip(sigmoid(log_alpha)
    (zeta - gamma) + gamma, 0, 1), which is 0 from -ln 11 = -2.3979 down and 1 from 2.3979 up. With
    ``test_gate="median"`` it is the median of the training gate, sigmoid(log_alpha / beta) in place
    of sigmoid(log_alpha): 0 from -2/3 ln 11 = -1.5986 down, where half of all draws or more are 0
    (in the code of Gallego-Posada et al., 2022, arXiv:2208.04425).

    P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta)), with beta = 2/3, gamma = -0.1,
    zeta = 1.1. ``log_alpha`` is clamped to [ln .01, ln 100] before every training draw, as in the
    authors' code.

    Args:
        groups: name -> number of units.
        lam: weight of the penalty, one number or one per group.
        n_train: size of the training set; the penalty is divided by it.
        seed: key of the noise, 0 <= seed < 2**63; equal seeds and steps give equal gates.
        lam_warmup: part of the training, up to 1, over which ``lam`` grows from 0: see
            ``set_progress``.
        droprate: initial dropout rate, one number or one per group, in (0, 1);
            log_alpha ~ N(log((1 - droprate) / droprate), 0.01^2).
        l2: precision of the coupled L2, see ``l0kernels.penalty``; the authors take n_train times
            the weight decay.
        test_gate: ``"mean"``, the authors', or ``"median"``.
        scope: ``"batch"``, one training draw for all examples, or ``"example"``, one for each (the
            authors' ``local_rep``): gradients vary less, but nothing is skipped in training.
            Examples are in the first dimension of what layers get, see ``examples.ExampleGates``.

    Raises:
        ValueError: an option is out of range.
    """

    law: ClassVar[str] = "hard_concrete"
    test_gate: str = "mean"

    def __init__(
        self,
        groups: Mapping[str, int],
        *,
        lam: float | Mapping[str, float] = 1.0,
        n_train: int = 1,
        seed: int = 0,
        lam_warmup: float = 0.0,
        droprate: float | Mapping[str, float] = 0.5,
        l2: float = 0.0,
        test_gate: str = "mean",
        scope: str = "batch",
    ) -> None:
        super().__init__(groups, lam=lam, n_train=n_train, seed=seed, lam_warmup=lam_warmup)
        self.scope = one_of("scope", scope, SCOPES)
        self.l2 = not_negative("l2", l2)
        self.test_gate = one_of("test_gate", test_gate, tuple(TEST_GATES))
        rates = droprates(droprate, self.names)
        means = [math.log((1 - rates[name]) / rates[name]) for name in self.names]
        generator = torch.Generator().manual_seed(int(self.seed))
        noise = torch.randn(self.count, generator=generator) * 0.01
        mean = torch.tensor(means).repeat_interleave(torch.tensor(self.sizes))
        self.log_alpha = nn.Parameter(mean + noise)

    def deterministic(self) -> Tensor:
        s = torch.sigmoid(self.alpha.double() / TEST_GATES[self.test_gate])
        stretched = s * (ZETA - GAMMA) + GAMMA
        return stretched.clamp(0, 1).to(self.log_alpha.dtype)

    def open_probability(self) -> Tensor:
        return probability(self.alpha.detach())

    def openness(self) -> Tensor:
        return probability(self.log_alpha)

    def example_values(self, k: Tensor, law: str) -> Tensor:
        return _Examples.apply(self.alpha, k)

    def project(self, values: Tensor) -> None:
        values.clamp_(*CLAMP)


class _Examples(torch.autograd.Function):
    """Hard concrete gates [examples, gates] from logits [gates] and the noise of each example."""

    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, k: Tensor) -> Tensor:
        law, la = (BETA, GAMMA, ZETA), log_alpha.double()
        closed, full = hard_concrete_decisions(la, k, *law)
        s = hard_concrete_s(la, k, BETA)
        slope = (ZETA - GAMMA) / BETA * s * (1 - s)
        # Not saved tensors: a draw that is held serves several backward passes.
        ctx.slope = torch.where(closed | full, 0.0, slope).to(log_alpha.dtype)
        # What the integers call half open stays so, whatever rounding says.
        inside = (s * (ZETA - GAMMA) + GAMMA).clamp(torch.finfo(log_alpha.dtype).tiny, 1.0)
        z = torch.where(closed, 0.0, torch.where(full, 1.0, inside))
        return or_nan(z.to(log_alpha.dtype), k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return (grad.double() * ctx.slope).sum(0).to(ctx.slope.dtype), None


def probability(log_alpha: Tensor) -> Tensor:
    """P(z != 0) of hard concrete gates, fp64, differentiable."""
    return torch.sigmoid(log_alpha.double() - BETA * math.log(-GAMMA / ZETA))
