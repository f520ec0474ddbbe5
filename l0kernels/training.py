# SPDX-License-Identifier: Apache-2.0
"""What a training loop calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from l0kernels.gates.base import Gates
from l0kernels.gates.coupled import coupled_l2


def gates_of(model: nn.Module) -> Gates:
    """The gates of a model, also inside DDP, ``torch.compile``, averaged (EMA) and other modules.

    Raises:
        ValueError: the model has none, or more than one set.
    """
    gates = _find_gates(model)
    gates.finish_steps()
    return gates


def _find_gates(model: nn.Module) -> Gates:
    own = getattr(model, "l0", None)
    if isinstance(own, Gates):
        return own
    found = [m for m in model.modules() if isinstance(m, Gates)]
    if not found:
        raise ValueError(
            f"expected a model with gates (from convert or gates.attach), "
            f"got {type(model).__name__} without"
        )
    if len(found) > 1:
        raise ValueError(f"expected one set of gates, got {len(found)}; pass the part to work on")
    return found[0]


def root_of(model: nn.Module, gates: Gates) -> nn.Module:
    """The module inside ``model`` that the gates are attached to, without any wrapper."""
    return next(m for m in model.modules() if m._modules.get("l0") is gates)


def expected_loss(model: nn.Module, closure: Callable[[], Tensor]) -> Tensor:
    """The method's estimator of the expected loss over the gates.

    One draw of all gates; ``closure`` runs under it and every root forward in it shares the draw.
    ``"arm"`` runs it twice, see ``gates.ARM``.
    In eval mode the deterministic gates are used.

    Args:
        model: a converted model, or a wrapper around one.
        closure: computes the loss (0-d) with the model. With ``scope="example"`` it may return
            the losses of all examples, [examples], whose mean counts; ``"arm"`` then weighs every
            example's noise by its own loss.

    Returns:
        A scalar whose backward gives weights and gates their gradients.

    Raises:
        ValueError: the model has no gates, or the closure does not return a scalar tensor.
    """
    gates = gates_of(model)
    by_example = gates.scope == "example"

    def checked() -> Tensor:
        loss = closure()
        if isinstance(loss, Tensor) and (loss.numel() == 1 or (by_example and loss.dim() == 1)):
            return loss
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        more = ", or one of losses of all examples" if by_example else ""
        raise ValueError(
            f"expected_loss: expected a scalar tensor from the closure{more}, got {got}"
        )

    with gates.holding():
        return gates.estimate(checked, model)


def penalty(
    model: nn.Module, per: str = "weight", lam: float | Mapping[str, float] | None = None
) -> Tensor:
    """Expected L0 penalty (1 / n_train) sum_j P(z_j != 0) lam |G_j|, differentiable.

    |G_j| is the filter of a convolution's output channel, else the columns that read the unit
    (Louizos, Welling, Kingma, 2018, arXiv:1712.01312, eq. 9 and section 4). Continuous
    Sparsification has the gates themselves in place of P(z_j != 0), ``"scl"`` the number of
    connections with a straight-through gradient; ``"dep"`` has a penalty of its own, see
    ``gates.DependentHardConcrete``.

    ``"hard_concrete"`` and ``"arm"`` with the option ``l2`` add the coupled L2,
    (1 / n_train) sum_j P(z_j != 0) l2 / 2 ||W_j||^2 (section 2.3 there), where W_j are the weights
    that |G_j| counts, whatever ``per`` and ``lam``. Biases, norms and layers without gates are not
    in it; an optimizer's weight decay comes on top. Closed weights get gradients from it, so that
    ``l0kernels.optim`` leaves no row behind.

    Args:
        model: a converted model, or a wrapper around one.
        per: ``"weight"`` counts weights, ``"flop"`` their multiply-adds per example.
        lam: replaces the ``lam`` of ``convert``; one number or one per group.

    Returns:
        0-d tensor.

    Raises:
        ValueError: unknown ``per``, groups missing in ``lam``, or the model has no gates.
    """
    gates = gates_of(model)
    value = gates.penalty(per, lam)
    return value + coupled_l2(model, gates) if gates.l2 else value


def hold(model: nn.Module) -> AbstractContextManager[None]:
    """Keep one draw for all forwards in the scope (gradient accumulation, several inputs)."""
    return gates_of(model).holding()


def frozen(model: nn.Module) -> AbstractContextManager[None]:
    """Eval only: deterministic gates and weights packed once for the whole scope.

    Parameters must not change inside; they get no gradients there.

    Raises:
        RuntimeError: the model is in training mode, or inside ``hold``.
    """
    return gates_of(model).caching_eval()


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, gate_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights, then gates (never decayed).

    Args:
        model: a converted model, or a wrapper around one.
        lr: learning rate of the weights.
        weight_decay: of the weights.
        gate_lr: learning rate of the gates; ``lr`` if None.

    Returns:
        Two groups for any ``torch.optim`` optimizer.
    """
    gates = gates_of(model)
    own = set(gates.parameters())
    weights = [p for p in model.parameters() if p not in own]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {
            "params": list(gates.parameters()),
            "lr": lr if gate_lr is None else gate_lr,
            "weight_decay": 0.0,
        },
    ]
