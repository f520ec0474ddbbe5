# SPDX-License-Identifier: Apache-2.0
"""SGD that updates the open rows of gated weights only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from l0kernels.ops.sgd_rows import sgd_rows, sgd_rows_catch_up
from l0kernels.optim.rows import FollowsDraws, Rows, in_order, turned


class SGD(FollowsDraws, torch.optim.SGD):
    """``torch.optim.SGD`` that touches only the open rows of gated weights.

    After :meth:`flush` all parameters and the state are those of ``torch.optim.SGD``, to rounding.

    A step with gradient zero takes each element (w, v), v its momentum buffer, to M (w, v) with

        v' = momentum v + (1 - dampening) weight_decay w,
        w' = w - lr v',  with nesterov  w - lr (weight_decay w + momentum v'),

    and without momentum w' = (1 - lr weight_decay) w. M depends on nothing but the settings of the
    group, so the steps that a row has missed are one product of 2 x 2 matrices in float64, applied
    when the row opens or is flushed. Learning rates and all other settings may change at any step:
    each step has the matrix of its own settings.

    Weights whose first dimension has gates are treated so (``row_weights`` names them): float32 or
    float64, contiguous or channels_last, of at least 262,144 elements, read by one layer. On a CPU,
    and not where ``torch.distributed`` is initialised, so are linear layers of which only the input
    features have gates: their weights and state are stored [I, O] from then on (strides change,
    shapes do not; ``parameters_to_vector`` refuses them), and [O, I] again after ``revert``. All
    other parameters, and every weight in the step that makes its momentum buffer, are updated by
    PyTorch. On a CPU open rows are updated in
    C++; on a GPU, and where the library is not built, by PyTorch operations. On a GPU these are
    many small launches, and the host waits several times per weight and step, at the draw and in
    ``step``: ``torch.optim.SGD`` is the better choice there. ``use_impl`` of "cuda" or "triton",
    which have no kernels for it, raises.

    On a CPU, and not where ``torch.distributed`` is initialised, the gradient of such a weight lies
    in memory that is kept, as large as the weight, and used again as soon as nobody has the
    gradient any more: its closed rows are zero already. PyTorch counts writes to a gradient; every
    16th step looks for those that it does not count (through ``.data``, ``.numpy()``), which raise.

    Draws in training mode bring their open rows up to date. These flush: draws in eval mode (thus
    evaluation and ``frozen``), ``state_dict`` and ``load_state_dict`` of the optimizer and of the
    model, ``copy.deepcopy`` and pickling of the model, ``compact``, ``revert``, every 1024th step.
    Call ``flush()`` yourself before anything else reads or writes weights: ``layer.weight``,
    ``parameters()``, ``AveragedModel.update_parameters``, a submodule's ``state_dict``, another
    optimizer. A write in between (unless through ``.data``, which nobody can see), or a gradient
    that is not zero in closed rows (a penalty on weights), raises; after a flush before each
    forward both work, at the cost of all rows.

    Clipping, ``GradScaler`` (unscales here; skipped steps), accumulation over several draws,
    ``hold``, several groups, DDP and ``zero_grad`` of both kinds work as with PyTorch's. A weight
    without gradient is left alone, as PyTorch's leaves it. Pickles and copies of the optimizer
    follow no draws: they do what PyTorch's does. A new optimizer of this kind for the same weights
    flushes the one before and takes over.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in
            ``torch.optim.SGD``.
        model: a converted model, or a wrapper around one, on the device and in the dtype and
            memory format in which it stays.
        foreach, fused: how PyTorch updates the other parameters.
        differentiable: not supported.

    Raises:
        ValueError: the model has no gates, or ``differentiable``.

    Source: lazy updates without momentum in Carpenter, "Lazy sparse stochastic gradient descent for
    regularized multinomial logistic regression" (Alias-i, 2008).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        model: nn.Module,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable: expected False, got True")
        self._follow(model)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        # A GradScaler is to unscale gradients and to skip steps itself.
        self.__dict__.pop("_step_supports_amp_scaling", None)
        self._begin()

    def _has_state(self, weight: Tensor, group: dict[str, Any]) -> bool:
        return group["momentum"] == 0 or self._velocity(weight) is not None

    def _velocity(self, weight: Tensor) -> Tensor | None:
        return self.state[weight].get("momentum_buffer") if weight in self.state else None

    def _update(self, rows: Rows, group: dict[str, Any]) -> None:
        weight = rows.weight
        assert weight.grad is not None
        velocity = self._velocity(weight) if group["momentum"] else None
        sgd_rows(
            rows.view(weight.data),
            None if velocity is None else rows.view(velocity),
            rows.view(weight.grad),
            rows.last,
            self._now,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )

    def _update_whole(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        momentum = group["momentum"]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        found = [self._velocity(weight) if momentum else None for weight in weights]
        turns = [turned(*tensors) for tensors in zip(weights, grads, found, strict=True)]
        buffers = in_order(found, turns) if momentum else []
        sgd(
            in_order(weights, turns),
            in_order(grads, turns),
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for i, buffer in enumerate(buffers):
            if found[i] is None:  # made in this step
                made = buffer.permute(0, 3, 1, 2) if turns[i] else buffer
                self.state[weights[i]]["momentum_buffer"] = made

    def _catch_up(self, rows: Rows, group: int, which: Tensor | None, mark: int) -> None:
        # Through .data: rows that a graph has read are up to date and stay as they are, so that
        # backward may follow; and the version counter would say that they have changed.
        velocity = self._velocity(rows.weight)
        sgd_rows_catch_up(
            rows.view(rows.weight.data),
            None if velocity is None else rows.view(velocity),
            rows.last,
            which,
            self._tables[group],
            self._now,
            mark,
        )

    def _no_steps(self) -> Tensor:
        return _identity()

    def _with_step(self, table: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.cat((_identity(), step_matrix(group) @ table))


def _identity() -> Tensor:
    return torch.eye(2, dtype=torch.float64)[None]


def step_matrix(group: dict[str, Any]) -> Tensor:
    """The matrix of one step with gradient zero on (w, v), float64 of shape [2, 2]."""
    lr, momentum, decay = float(group["lr"]), group["momentum"], float(group["weight_decay"])
    if momentum == 0:
        return torch.tensor([[1 - lr * decay, 0.0], [0.0, 1.0]], dtype=torch.float64)
    of_w, of_v = (1 - group["dampening"]) * decay, momentum  # the new v
    if group["nesterov"]:
        row = [1 - lr * (decay + momentum * of_w), -lr * momentum * of_v]
    else:
        row = [1 - lr * of_w, -lr * of_v]
    return torch.tensor([row, [of_w, of_v]], dtype=torch.float64)
