# SPDX-License-Identifier: Apache-2.0
"""AdamW that updates the open rows of gated weights only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from l0kernels.ops.adam_rows import adam_rows, adam_rows_catch_up
from l0kernels.optim.rows import FollowsDraws, Rows, in_order, turned

UNSUPPORTED = ("amsgrad", "capturable", "differentiable")


class AdamW(FollowsDraws, torch.optim.AdamW):
    """``torch.optim.AdamW`` that touches only the open rows of gated weights.

    After :meth:`flush` all parameters and the state are those of ``torch.optim.AdamW``, to
    rounding.

    With gradients of zero a weight still moves, by its momentum and its decay. The steps that a row
    has missed are replayed when it opens or is flushed
    (``l0kernels.ops.adam_rows.adam_rows_catch_up`` has the formula). Learning rates and all other
    settings may change at any step: each is replayed with its own.

    In C++, on a CPU, a missed step costs a division for each element. Steps from which nothing is
    left but rounding are left out, so that with the usual settings rows that have been closed for
    long take as much as those that were for some hundred steps. On a GPU, and where the library is
    not built, every missed step is replayed by several PyTorch operations, small launches on a GPU,
    whose host also waits several times per weight and step: ``torch.optim.AdamW`` is the better
    choice there.

    Which weights are treated so, when rows are brought up to date, when to call ``flush()`` and
    what raises is as in :class:`l0kernels.optim.SGD`. The first step of a weight is PyTorch's.
    Sparse gradients and what is not supported raise in ``step`` before anything is changed.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        amsgrad, capturable, differentiable: not supported.
        model: a converted model, or a wrapper around one, on the device and in the dtype and
            memory format in which it stays.
        foreach, fused: how PyTorch updates the other parameters.

    Raises:
        ValueError: the model has no gates, or a group asks for what is not supported.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        model: nn.Module,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._follow(model)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        # A GradScaler is to unscale gradients and to skip steps itself.
        self.__dict__.pop("_step_supports_amp_scaling", None)
        self._begin()

    def _has_state(self, weight: Tensor, group: dict[str, Any]) -> bool:
        return bool(self.state.get(weight))

    def _check_group(self, group: dict[str, Any]) -> None:
        _check(group)
        for weight in group["params"]:
            if weight.grad is not None and weight.grad.is_sparse:
                raise RuntimeError(
                    f"expected dense gradients, got a sparse one of shape {list(weight.shape)}"
                )

    def _update(self, rows: Rows, group: dict[str, Any]) -> None:
        weight = rows.weight
        assert weight.grad is not None
        state = self.state[weight]
        lr, beta1, beta2, eps, weight_decay = _settings(group)
        adam_rows(
            rows.view(weight.data),
            rows.view(state["exp_avg"]),
            rows.view(state["exp_avg_sq"]),
            rows.view(weight.grad),
            rows.last,
            self._now,
            number=int(state["step"]) + 1,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            maximize=group["maximize"],
        )
        state["step"] += 1

    def _update_whole(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        found: list[list[Any]] = [[] for _ in range(6)]
        # Makes the state of weights that have none.
        has_complex = self._init_group({**group, "params": weights}, *found)
        steps = found.pop()
        turns = [turned(*tensors) for tensors in zip(*found[:4], strict=True)]
        params, grads, means, squares = (in_order(tensors, turns) for tensors in found[:4])
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            means,
            squares,
            [],
            steps,
            foreach=group["foreach"],
            fused=group["fused"],
            has_complex=has_complex,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _catch_up(self, rows: Rows, group: int, which: Tensor | None, mark: int) -> None:
        state = self.state.get(rows.weight)
        if not state:
            return  # no step yet that a row could have missed
        adam_rows_catch_up(
            rows.view(rows.weight.data),
            rows.view(state["exp_avg"]),
            rows.view(state["exp_avg_sq"]),
            rows.last,
            which,
            self._tables[group],
            self._now,
            number=int(state["step"]),
            mark=mark,
        )

    def _no_steps(self) -> Tensor:
        return torch.empty(0, 5, dtype=torch.float64)

    def _with_step(self, table: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.cat((table, torch.tensor([_settings(group)], dtype=torch.float64)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # PyTorch refuses others
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            _check(group)
        super().load_state_dict(state_dict)


def _check(group: dict[str, Any]) -> None:
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"{name}: expected False, got {group[name]}")


def _settings(group: dict[str, Any]) -> tuple[float, float, float, float, float]:
    """What a step depends on, in the order of the operators' tables."""
    beta1, beta2 = group["betas"]
    lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
    return float(lr), float(beta1), float(beta2), float(eps), float(weight_decay)
