# SPDX-License-Identifier: Apache-2.0
"""A target for what stays open, in place of a weight of the penalty."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from l0kernels.gates.base import whole_number
from l0kernels.training import gates_of


class Budget(nn.Module):
    """Trains towards an expected density: ``loss = expected_loss(...) + budget()``.

    It stands for the constraint density <= target, where the density is ``model.l0.density(per)``,
    the expected open part of all gated weights or of their work. ``budget()`` returns the term of
    the Lagrangian,

        multiplier (density - level),

    whose gradient is multiplier d density, and then ascends in the multiplier, once per call:

        multiplier <- max(0, multiplier + lr (density - level)),

    or 0 as soon as density < level (``restart``, the authors' dual restarts: a multiplier that has
    grown while the density was too high would go on closing gates). The k-th ascent has
    level = target + (1 - target) max(0, 1 - k / warmup), the target itself without ``warmup``.

    Call it once per optimizer step, next to or in place of ``penalty``, with gradient accumulation
    once per accumulated step. Nothing ascends without gradients, in eval mode of the budget or of
    the model's gates, or while these are frozen. ``multiplier`` (0-d, float64) and ``step`` (0-d,
    int64) are buffers: save ``budget.state_dict()`` beside the model's. Both follow from the gates
    alone, so ranks under DDP agree without talking, and a GPU is not waited for.

    A multiplier grows by at most lr per step, and has to become as large as the data's pull on
    the gates, so gates that move slowly need patience: the authors gave those of WRN-28-10 a
    learning rate of 6. Their lr is 7e-4 there, 1e-4 on MNIST, 3e-4 for ResNet-50 on ImageNet.

    Args:
        model: a converted model, or a wrapper around one. It is not a submodule of the budget.
        target: the density to reach, above 0 and up to 1.
        per: ``"flop"`` for multiply-adds per example, ``"weight"`` for weights.
        lr: of the multiplier, positive.
        warmup: number of calls over which the level falls from 1 to the target.
        restart: whether the multiplier returns to 0 where the density is below the level.

    Raises:
        ValueError: an argument is out of range, the model has no gates, or work per layer is not
            known.

    Source: Gallego-Posada, Ramirez, Erraqabi, Bengio, Lacoste-Julien, "Controlled sparsity via
    constrained optimization" (2022, arXiv:2208.04425); restarts by default and learning rates as
    in their code, github.com/gallego-posada/constrained_sparsity.
    """

    multiplier: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        target: float,
        per: str = "flop",
        *,
        lr: float = 7e-4,
        warmup: int = 0,
        restart: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < target <= 1:
            raise ValueError(f"target: expected a density above 0 and up to 1, got {target!r}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr: expected a positive number, got {lr!r}")
        gates_of(model).check_per(per)
        self._model = (model,)  # a tuple: parameters of the model are not the budget's
        self.target, self.per, self.lr, self.restart = float(target), per, float(lr), restart
        self.warmup = whole_number("warmup", warmup, "a number of calls, 0 or more", 0, 2**63)
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def level(self) -> Tensor:
        """The density that the latest ascent aimed at, 0-d, float64."""
        if self.warmup == 0:
            return torch.full_like(self.multiplier, self.target)
        left = (1 - self.step.double() / self.warmup).clamp(min=0)
        return self.target + (1 - self.target) * left

    def forward(self) -> Tensor:
        """The term of the loss, 0-d, in the dtype of the gates; see the class."""
        gates = gates_of(self._model[0])
        density = gates.density(self.per)
        if self.multiplier.device != density.device:
            self.to(density.device)
        multiplier = self.multiplier.to(density.dtype, copy=True)  # of the graph: it changes below
        changing = torch.is_grad_enabled() and not gates.frozen
        ascends = changing and self.training and gates.training
        with torch.no_grad():
            self.step += int(ascends)
            level = self.level()
            if ascends:
                self._ascend(density.double() - level)
        return multiplier * (density - level.to(density.dtype))

    def _ascend(self, excess: Tensor) -> None:
        self.multiplier.add_(excess, alpha=self.lr).clamp_(min=0)
        if self.restart:
            self.multiplier.masked_fill_(excess < 0, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Budget:
        multiplier = self.multiplier
        super()._apply(fn, recurse)
        # To the device only: a narrow dtype would lose small steps.
        self.multiplier = multiplier.to(self.multiplier.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"target={self.target}, per={self.per!r}, lr={self.lr}, warmup={self.warmup}, "
            f"restart={self.restart}"
        )


__all__ = ["Budget"]
