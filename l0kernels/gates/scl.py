# SPDX-License-Identifier: Apache-2.0
"""SCL: Sparse Connectivity Learning, unit steps that learn by a straight-through gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from l0kernels import _registry
from l0kernels.functional import masked_weight
from l0kernels.gates.base import whole_number
from l0kernels.gates.weights import Sides, WeightGates

PROXIES = ("identity", "leaky_relu", "softplus")
NORMS = ("l2", "rms", "max", "none")
# Over which axes of a weight [groups, outputs, inputs, kernel] a feature's gradient extends.
FEATURES = {"output": (2, 3), "input": (1, 3), "layer": (0, 1, 2, 3)}


class StraightThrough(WeightGates):
    """Sparse Connectivity Learning (Tang et al., 2022, arXiv:2201.05020).

    A weight is theta H(m), H the unit step: 1 for m > 0, else 0, in training and at test.
    ``log_alpha`` holds the mask variables m. Nothing is random. With G the gradient of the data
    loss in the masked weight,

        dtheta = G H(m),    dm = normalise(G theta P'(m)),

    where the derivative of a proxy P stands in for that of the step: 1 for the identity, 1[m > 0] +
    slope 1[m <= 0] for leaky ReLU, sigmoid(m) for softplus. It has to be positive, the paper says,
    for mask variables to converge at their minima; the identity is what it uses. ``normalise``
    divides the gradient of each feature by its norm, or by epsilon where that is larger.

    The penalty is the number of connections, sum_j lam H(m_j) / n_train, with the gradient
    lam P'(m_j) / n_train, for all connections, open or closed. It is not normalised. So with the
    identity and plain SGD a closed connection opens once the sum of -dm, times the learning rate,
    has made up for lam / n_train in each step and for where m was.

    Only the paper's abstract was at hand. The proxies, the normalisation "per feature" and the one
    coefficient are its; the threshold (m = 0 is closed), what a feature is, its norm, epsilon, the
    order of normalisation and penalty, and the initial m are our choices. Learning rates, momentum
    and whether theta decays, closed or open, are the optimizer's (``param_groups``); which layers
    have gates is for ``select`` of ``convert`` to say.

    What is skipped: outputs and inputs of a layer whose weights are all closed, forward and in the
    gradient of the input, see `WeightGates`. dm needs the gradient of the whole weight.
    ``refresh_every=T`` computes that in every T-th step, the first included; in the others dm is 0
    for weights of closed outputs and inputs, which is an approximation: they follow the penalty
    alone then, and the norms lack them. Grouped convolutions are computed whole in each step.

    dm is normalised where a backward pass has added up all uses of a weight. It does not depend on
    the size of the loss, so a ``GradScaler`` would divide it by its scale (bfloat16 needs none),
    n backward passes before a step give n such gradients, and the ranks of DDP average gradients
    that each has normalised for its part of the batch. ``norm="none"`` has none of these.

    Args:
        groups: name -> shape of a weight (of ``nn.MaskedLinear``, ``nn.MaskedConv2d``).
        lam: price of a connection, one number or one per group.
        n_train: what the penalty is divided by.
        seed: kept for checkpoints, as all methods have one; nothing is drawn.
        lam_warmup: part of the training, up to 1, over which ``lam`` grows from 0: see
            ``set_progress``.
        initial: m that all connections start with; above 0 all are open.
        proxy: ``"identity"``, ``"leaky_relu"`` or ``"softplus"``.
        slope: of leaky ReLU for m <= 0, above 0.
        feature: what is normalised by itself: the weights of an ``"output"`` (a filter), of an
            ``"input"``, or of the ``"layer"``.
        norm: ``"l2"``, ``"rms"``, ``"max"`` (of absolute values), or ``"none"`` for no
            normalisation.
        epsilon: least norm to divide by, above 0.
        refresh_every: every how many steps closed outputs and inputs get their dm; 1 is exact.

    Raises:
        ValueError: a group that is no shape, an unknown proxy, feature or norm, or a number out of
            range.
    """

    granularities: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        groups: Mapping[str, Sequence[int]],
        *,
        lam: float | Mapping[str, float] = 1.0,
        n_train: int = 1,
        seed: int = 0,
        lam_warmup: float = 0.0,
        initial: float = 1.0,
        proxy: str = "identity",
        slope: float = 0.01,
        feature: str = "output",
        norm: str = "l2",
        epsilon: float = 1e-12,
        refresh_every: int = 1,
    ) -> None:
        super().__init__(groups, lam=lam, n_train=n_train, seed=seed, lam_warmup=lam_warmup)
        if not self.shapes:
            raise ValueError(f"groups: expected shapes of weights, got {dict(groups)}")
        if not math.isfinite(initial):
            raise ValueError(f"initial: expected a finite number, got {initial}")
        for name, value in (("slope", slope), ("epsilon", epsilon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name, value, known in (
            ("proxy", proxy, PROXIES),
            ("feature", feature, tuple(FEATURES)),
            ("norm", norm, NORMS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        self.proxy = Proxy(proxy, slope)
        self.feature, self.norm, self.epsilon = feature, norm, epsilon
        self.refresh_every = whole_number(
            "refresh_every", refresh_every, "a positive integer", 1, 2**63
        )
        self.log_alpha = nn.Parameter(torch.full((self.count,), float(initial)))

    # What all methods have.

    def open_probability(self) -> Tensor:
        return (self.alpha.detach() > 0).double()

    def draw(self) -> None:
        if self.frozen or not self.training:
            self._draw_test_gates()
            return
        self._settle()
        self.step.add_(1)
        sides = self._open_sides()
        dense = self.refresh_every == 1 or (int(self.step) - 1) % self.refresh_every == 0
        parts = self._parts(self._normalised(self.log_alpha))
        step = self.log_alpha.new_full((), math.inf)
        masks = {}
        for name, m in parts.items():
            without = None if dense else _closed(sides.get(name), m)
            masks[name] = StepMask(m, step, self.proxy, without)
        self._draw_masks(masks, sides, dense)

    def _normalised(self, m: Tensor) -> Tensor:
        """The same values, whose gradient is normalised."""
        if self.norm == "none":
            return m
        views = []
        for name, (outputs, inputs, *kernel) in self.shapes.items():
            groups = self.conv_groups[name]
            views.append((groups, outputs // groups, inputs, math.prod(kernel)))
        return _Normalised.apply(m, views, FEATURES[self.feature], self.norm, self.epsilon)

    def _expected(self, cost: Tensor) -> Tensor:
        if self.frozen:
            return super()._expected(cost)
        return (cost * _Step.apply(self.log_alpha, self.proxy)).sum()


class Proxy(NamedTuple):
    """What has a slope in place of the step."""

    name: str
    slope: float

    def backward(self, grad: Tensor, m: Tensor) -> Tensor:
        """grad P'(m)."""
        if self.name == "leaky_relu":
            return torch.where(m > 0, grad, grad * self.slope)
        return grad * torch.sigmoid(m) if self.name == "softplus" else grad


class StepMask(NamedTuple):
    """The gates of one weight in one draw: 1[m > 0], with a gradient for all m but `without`."""

    m: Tensor
    step: Tensor
    proxy: Proxy
    without: Tensor | None

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        masked = masked_weight(weight, self.m.detach(), self.step, dtype=dtype)
        return _MaskGradient.apply(masked, weight.detach(), self.m, self.without, self.proxy)


def _closed(sides: Sides | None, weight: Tensor) -> Tensor | None:
    """Which weights are of a closed output or input; broadcasts to the weight's shape."""
    if sides is None:
        return None
    closed = ~(sides.rows[:, None] & sides.columns)
    return closed.view(*closed.shape, *[1] * (weight.dim() - 2))


class _MaskGradient(torch.autograd.Function):
    """The masked weight as it is, which hands m the gradient G theta P'(m)."""

    @staticmethod
    def forward(ctx: Any, masked, weight, m, without, proxy):  # type: ignore[override]
        ctx.save_for_backward(weight, m, without)
        ctx.proxy = proxy
        return masked.view_as(masked)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        grad_m = None
        if ctx.needs_input_grad[2]:
            weight, m, without = ctx.saved_tensors
            grad_m = ctx.proxy.backward(grad.to(m.dtype) * weight.to(m.dtype), m)
            if without is not None:
                grad_m = grad_m.masked_fill(without, 0)
        return grad, None, grad_m, None, None


class _Normalised(torch.autograd.Function):
    """The mask variables as they are, which get a gradient normalised feature by feature.

    Norms are computed in float64: squares of small gradients do not underflow.
    """

    @staticmethod
    def forward(ctx: Any, m, views, axes, norm, epsilon):  # type: ignore[override]
        ctx.options = views, axes, norm, epsilon
        return m.view_as(m)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        views, axes, norm, epsilon = ctx.options
        result = torch.empty_like(grad)
        sizes = [math.prod(view) for view in views]
        for view, part, out in zip(views, grad.split(sizes), result.split(sizes), strict=True):
            part = part.reshape(view)
            torch.div(part, _divisors(part, axes, norm, epsilon), out=out.view(view))
        return result, None, None, None, None


def _divisors(grad: Tensor, axes: tuple[int, ...], norm: str, epsilon: float) -> Tensor:
    """The norms of a gradient, or epsilon where that is larger; they broadcast to the gradient.

    Args:
        grad: any shape.
        axes: over which a norm extends.
        norm: ``"l2"``, ``"rms"`` or ``"max"``.
        epsilon: above 0.
    """
    order = math.inf if norm == "max" else 2
    length = torch.linalg.vector_norm(grad, order, axes, keepdim=True, dtype=torch.float64)
    if norm == "rms":
        length = length * (length.numel() / grad.numel()) ** 0.5
    # A divisor below the least normal number may be 0 in grad's precision.
    least = max(epsilon, torch.finfo(grad.dtype).tiny)
    return length.to(grad.dtype).clamp_min(least)


class _Step(torch.autograd.Function):
    """1[m > 0], with the slope of the proxy."""

    @staticmethod
    def forward(ctx: Any, m, proxy):  # type: ignore[override]
        ctx.save_for_backward(m)
        ctx.proxy = proxy
        return (m > 0).to(m.dtype)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        (m,) = ctx.saved_tensors
        return ctx.proxy.backward(grad, m), None


__all__ = ["StraightThrough"]
