# SPDX-License-Identifier: Apache-2.0
"""L0-ARM: binary gates whose gradients come from losses alone, of two forward passes or of one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.functional import OpenLists, arm_gradient, sample_gates
from l0kernels.gates.base import Constant, Gates, droprates, not_negative, one_of
from l0kernels.gates.draw import Draw, engine, on_host
from l0kernels.gates.examples import SCOPES, mean_loss, mixes_examples, or_nan, uniform
from l0kernels.gates.prefix import Prefix, has_compiled

Elementwise = Callable[[Tensor], Tensor]

ESTIMATORS = ("arm", "ar")
TEST_GATES = ("soft", "binary")
# Up to this probability, and from 1 less than it on, noise of 23 bits decides nothing.
LEAST_PROBABILITY = 2.0**-24
FURTHEST = 100.0  # where the search for initial parameters ends


class GateFunction(NamedTuple):
    """pi = g(phi), nondecreasing and within [0, 1], with its derivative; elementwise on float64."""

    value: Elementwise
    slope: Elementwise


def _sigmoid(phi: Tensor, k: float) -> Tensor:
    return torch.sigmoid(k * phi)


def _sigmoid_slope(phi: Tensor, k: float) -> Tensor:
    return k * torch.sigmoid(k * phi) * torch.sigmoid(-k * phi)


def _hard_sigmoid(phi: Tensor, k: float) -> Tensor:
    return (k / 7 * phi + 0.5).clamp(0, 1)


def _hard_sigmoid_slope(phi: Tensor, k: float) -> Tensor:
    pi = _hard_sigmoid(phi, k)
    return torch.where((pi > 0) & (pi < 1), k / 7, 0.0)


NAMED = {
    "sigmoid": (_sigmoid, _sigmoid_slope),
    "hard_sigmoid": (_hard_sigmoid, _hard_sigmoid_slope),
}


class ARM(Gates):
    """Binary gates of L0-ARM (Li, Ji, 2019, arXiv:1904.04432), and of its one-pass form, AR.

    Training gate: z ~ Bernoulli(pi) with pi = g(phi); the parameter ``log_alpha`` holds phi. No
    gradient passes through z. With one uniform number u per gate, z1 = 1[u < pi] and
    z2 = 1[u > 1 - pi], and f the loss:

    - ARM: d E f / d phi is estimated by c (f(z2) - f(z1)) (u - 1/2), from two forward passes
      (Yin, Zhou, 2019, theorem 1).
    - AR: by c f(z1) (1 - 2 u), from one. It has no bias either, but noise that grows with the
      level of the loss.

    Both are unbiased for any g with c = g'(phi) / (pi (1 - pi)), because the expectation of
    either without c is pi (1 - pi) (E f|z=1 - E f|z=0). For the sigmoid c = k, as published; the
    authors' code has k for the hard sigmoid too, which is not its factor. Where pi is so close to
    0 or 1 that no noise changes the gate, the gradient is 0 instead of the noise of other gates.

    The pass of z1 gives weights their gradients, and its loss is the value of ``expected_loss``
    (with several samples, the mean). The pass of z2 runs before it, without gradients, in the same
    mode, from the same buffers of ``model`` and states of the random generators, which are then put
    back; a module that the closure runs outside ``model`` sees both passes. Dropout draws the same
    numbers in both until it acts on packed features of another count; from there on they may
    differ, which has no bias but lets the losses differ more. The pass of z2 is not run if no gate
    differs (with gates per example: if no noise can change any; in captured steps always); what
    both passes compute before the first layer whose gates differ is computed once on a CPU, unless
    anything in the process is compiled (see ``prefix``). The closure runs once per pass; what it
    leaves behind is of the last, z1's.

    With a draw for each example (``scope="example"``) u has a row for each of B examples and the
    loss is the mean of f_b. If no example's loss depends on another's gates, the estimate is
    c (1/B) sum_b (f_b(z2) - f_b(z1)) (u_b - 1/2). If one does, as where a batch norm of ``model``
    is in training mode, or if the closure returns only the mean f, it is
    c (f(z2) - f(z1)) sum_b (u_b - 1/2), which is as exact and varies more. Return the mean where
    examples mix in another way, which is not seen: a norm outside ``model`` or by
    ``F.batch_norm``, or a loss over pairs of examples; a SyncBatchNorm even lets losses depend on
    other ranks' gates, of which no estimate here knows. The authors' code has the mean over u_b in
    place of this sum: 1/B of the gradient.

    Test gate: pi where pi >= 1/2, else 0 (``"soft"``, the authors'), or 1[pi >= 1/2].
    P(z != 0) = pi, so the penalty's gradient has the factor g'(phi).

    Args:
        groups: name -> number of units.
        lam: weight of the penalty, one number or one per group.
        n_train: size of the training set; the penalty is divided by it.
        seed: key of the noise, 0 <= seed < 2**63; equal seeds and steps give equal gates.
        lam_warmup: part of the training, up to 1, over which ``lam`` grows from 0: see
            ``set_progress``.
        droprate: initial P(z = 0), one number or one per group, in (0, 1);
            phi ~ N(g^-1(1 - droprate), (0.01 / k)^2).
        estimator: ``"arm"`` or ``"ar"``.
        gate: g: ``"sigmoid"``, sigma(k phi); ``"hard_sigmoid"``, clip(k phi / 7 + 1/2, 0, 1); or a
            pair (g, g') of elementwise functions of float64 tensors, g nondecreasing within [0, 1].
        k: slope of the named functions, positive.
        samples: noise samples per ``expected_loss``, each a draw of its own with its own passes,
            whose estimates are averaged.
        test_gate: ``"soft"`` or ``"binary"``.
        l2: precision of the coupled L2, see ``l0kernels.penalty``; the authors take n_train times
            the weight decay.
        scope: ``"batch"``, one training draw for all examples, or ``"example"``, one for each;
            then the closure returns the losses of all examples, [examples], or their mean.

    Raises:
        ValueError: an option is out of range.
    """

    law: ClassVar[str] = "bernoulli"

    def __init__(
        self,
        groups: Mapping[str, int],
        *,
        lam: float | Mapping[str, float] = 1.0,
        n_train: int = 1,
        seed: int = 0,
        lam_warmup: float = 0.0,
        droprate: float | Mapping[str, float] = 0.5,
        estimator: str = "arm",
        gate: str | tuple[Elementwise, Elementwise] = "sigmoid",
        k: float = 7.0,
        samples: int = 1,
        test_gate: str = "soft",
        l2: float = 0.0,
        scope: str = "batch",
    ) -> None:
        super().__init__(groups, lam=lam, n_train=n_train, seed=seed, lam_warmup=lam_warmup)
        self.scope = one_of("scope", scope, SCOPES)
        self.l2 = not_negative("l2", l2)
        rates = droprates(droprate, self.names)
        self.estimator = one_of("estimator", estimator, ESTIMATORS)
        self.test_gate = one_of("test_gate", test_gate, TEST_GATES)
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples: expected a positive integer, got {samples!r}")
        self.samples = samples
        if not 0 < k < math.inf:
            raise ValueError(f"k: expected a positive number, got {k!r}")
        self.gate = _gate_function(gate, float(k))
        # logit(pi) of the latest sampled draw.
        self._logits: Tensor | None = None
        kept = torch.tensor([1 - rates[name] for name in self.names], dtype=torch.float64)
        mean = _inverse(self.gate.value, kept).repeat_interleave(torch.tensor(self.sizes))
        generator = torch.Generator().manual_seed(int(self.seed))
        noise = torch.randn(self.count, generator=generator) * (0.01 / k)
        self.log_alpha = nn.Parameter(mean.float() + noise)

    def deterministic(self) -> Tensor:
        pi = self.open_probability()
        kept = pi if self.test_gate == "soft" else pi.clamp(min=1)  # NaN stays NaN
        return torch.where(pi < 0.5, 0.0, kept).to(self.log_alpha.dtype)

    def open_probability(self) -> Tensor:
        return self.gate.value(self.alpha.detach().double())

    def openness(self) -> Tensor:
        slope = self.gate.slope(self.alpha.detach().double())
        return _Probability.apply(self.log_alpha, self.open_probability(), slope)

    def sample(self, cost: Tensor, key: Tensor) -> tuple[Tensor, Tensor, OpenLists]:
        pi = self.open_probability()
        slope = self.gate.slope(self.alpha.detach().double())
        logits = torch.logit(pi).to(self.log_alpha.dtype)
        z, _, lists = self._binary(logits, cost, key, self.law)
        self._logits = logits.detach()
        # The graph of a draw reaches the parameter: DDP looks for it there.
        expected = _Expected.apply(self.log_alpha, cost, pi, slope)
        return Constant.apply(self.log_alpha, z), expected, lists

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_logits": None}

    def example_values(self, k: Tensor, law: str) -> Tensor:
        pi, u = self.open_probability(), uniform(k)
        z = (u if law == self.law else 1 - u) < pi
        return Constant.apply(self.log_alpha, or_nan(z.to(self.log_alpha.dtype), k))

    def _binary(
        self, logits: Tensor, cost: Tensor, key: Tensor, law: str
    ) -> tuple[Tensor, Tensor, OpenLists]:
        return sample_gates(logits, key, cost, self.layout, law)

    def estimate(self, closure: Callable[[], Tensor], model: nn.Module) -> Tensor:
        draw = self._draw
        assert draw is not None
        learns = torch.is_grad_enabled() and self.log_alpha.requires_grad
        if draw.key is None or not learns:  # eval mode, frozen or given gates: no noise
            return mean_loss(closure())
        if self.samples > 1 and self._held > 1:
            raise RuntimeError(f"hold keeps one draw: expected samples=1, got {self.samples}")
        losses, gradient = [], torch.zeros_like(self.log_alpha)
        for sample in range(self.samples):
            if sample > 0:
                self.draw()
            loss, its_gradient = self._one_sample(closure, model)
            losses.append(loss)
            gradient += its_gradient / self.samples
        return _Estimate.apply(sum(losses) / self.samples, self.log_alpha, gradient)

    def _one_sample(
        self, closure: Callable[[], Tensor], model: nn.Module
    ) -> tuple[Tensor, Tensor | float]:
        """Loss of the pass that learns and the estimate of the gates' gradient, without a graph."""
        draw = self._draw
        assert draw is not None and draw.key is not None
        if draw.version != self.log_alpha._version:
            raise RuntimeError(
                "expected_loss: expected log_alpha as the gates were drawn from it, but it was "
                "modified in place since; step the optimizer after the hold scope"
            )
        if draw.examples is not None:
            draw.examples.begin_estimate()
        pi = self.open_probability()
        if self.estimator == "ar":
            losses = closure()
            difference = -2 * losses.detach().double()
        else:
            other = self._antithetic(draw, pi, draw.key)
            if other is None:
                return mean_loss(closure()), 0.0
            losses, again = self._two_passes(closure, model, other)
            difference = again.double() - losses.detach().double()
        if difference.numel() > 1 and mixes_examples(model):
            difference = difference.mean()
        return mean_loss(losses), self._weighed(difference, pi, draw)

    def _weighed(self, difference: Tensor, pi: Tensor, draw: Draw) -> Tensor:
        """c difference (u - 1/2) of every gate."""
        assert draw.key is not None
        slope = self.gate.slope(self.alpha.detach().double())
        factor = torch.where(_decided(pi), 0.0, slope / (pi * (1 - pi)))
        dtype = self.log_alpha.dtype
        if draw.examples is not None:
            noise = draw.examples.weigh_noise(difference)
            return torch.where(factor == 0, 0.0, factor * noise).to(dtype)
        with engine():
            return arm_gradient(difference.reshape(()).to(dtype), factor.to(dtype), draw.key)

    @torch.no_grad()
    def _antithetic(self, draw: Draw, pi: Tensor, key: Tensor) -> Draw | None:
        """The draw from 1 - u, None where it is the one from u.

        Before both passes, when the host has waited for the device anyway. How many examples there
        are is not known then: with gates for each, None only where no noise decides.
        """
        if draw.examples is not None:
            if bool(_decided(pi).all()):
                return None
            return self._by_example("antithetic", key)
        with engine():
            assert self._logits is not None
            z, _, lists = self._binary(self._logits, self._cost, key, "antithetic")
        # Of widths that are planned the host reads nothing: equal passes have no difference.
        if not draw.is_planned and on_host((z != draw.z).sum().reshape(1)) == [0]:
            return None
        return self._make_draw(z, lists, dense=self._dense_ports)

    def _two_passes(
        self, closure: Callable[[], Tensor], model: nn.Module, other: Draw
    ) -> tuple[Tensor, Tensor]:
        """Losses of the pass that learns and of the other one, which leaves no trace."""
        from l0kernels.convert.randomness import Generators
        from l0kernels.convert.tensors import KeptBuffers

        draw, prefix = self._draw, self._common(other, model)
        assert draw is not None
        first = nullcontext() if prefix is None else prefix.recording(other)
        # While a step is captured nobody may put generators back: l0kernels.graph takes no models
        # with dropout.
        generators = None if draw.is_planned else Generators({self.log_alpha.device})
        buffers = KeptBuffers(model)
        try:
            with torch.no_grad(), self.instead(other), first:
                again = closure()
        finally:
            buffers.restore()
            if generators is not None:
                generators.restore()
        with nullcontext() if prefix is None else prefix.replaying(draw):
            return closure(), again

    def _common(self, other: Draw, model: nn.Module) -> Prefix | None:
        """What the passes have in common; None where that is nothing, or cannot be told.

        On a CPU only: to see an operator costs about as much as a GPU takes to start it. Not where
        the host reads nothing.
        """
        from l0kernels.nn.base import GatedLayer

        draw = self._draw
        assert draw is not None
        compiled = has_compiled()
        by_example, masked = draw.examples is not None, current_impl() == "reference"
        if self.log_alpha.is_cuda or by_example or compiled or masked or draw.is_planned:
            return None
        gates = draw.z != other.z
        first = next(m for m in model.modules() if m._parameters)
        if isinstance(first, GatedLayer):
            ports = (port for port in (first.in_port, first.out_port) if port >= 0)
            if any(bool(gates[self.port_maps[port]].any()) for port in ports):
                return None
        return Prefix(self._differs(gates, draw, other), model)

    def _differs(self, gates: Tensor, draw: Draw, other: Draw) -> list[bool]:
        """For each port whether its gates or packed features differ between two draws.

        Args:
            gates: whether each gate does, shape [gates + 1].
        """
        ends = self.layout.port_offsets
        features = gates[self.layout.maps].any(0) | (draw.whole_index != other.whole_index)
        counts = torch.cat((ends.new_zeros(1), features.cumsum(0)))[ends].diff().tolist()
        return [
            count > 0
            or draw.widths[port] != other.widths[port]
            or (port in draw.dense) != (port in other.dense)
            for port, count in enumerate(counts)
        ]


def _decided(pi: Tensor) -> Tensor:
    """Where no noise changes the gate."""
    return (pi <= LEAST_PROBABILITY) | (pi > 1 - LEAST_PROBABILITY)


class _Probability(torch.autograd.Function):
    """pi, whose derivative with respect to the parameters is g'(phi)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, pi: Tensor, slope: Tensor) -> Tensor:
        ctx.slope, ctx.dtype = slope, parameter.dtype
        return pi.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (grads[0] * ctx.slope).to(ctx.dtype), None, None


class _Expected(torch.autograd.Function):
    """sum_j cost_j pi_j, whose derivative with respect to the parameters is cost g'(phi)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, cost: Tensor, pi: Tensor, slope: Tensor) -> Tensor:
        ctx.slope = (cost.double() * slope).to(cost.dtype)
        return (cost.double() * pi).sum().to(cost.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.slope, None, None, None


class _Estimate(torch.autograd.Function):
    """A loss that hands a parameter a gradient computed beforehand."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], grads[0].to(ctx.gradient.dtype) * ctx.gradient, None


def _gate_function(gate: Any, k: float) -> GateFunction:
    if isinstance(gate, str) and gate in NAMED:
        return GateFunction(*(functools.partial(function, k=k) for function in NAMED[gate]))
    if not isinstance(gate, tuple) or len(gate) != 2 or not all(map(callable, gate)):
        raise ValueError(
            f"gate: expected one of {tuple(NAMED)} or a pair (g, g') of functions, got {gate!r}"
        )
    phi = torch.linspace(-4, 4, 33, dtype=torch.float64)
    pi, slope = (function(phi) for function in gate)
    if pi.shape != phi.shape or slope.shape != phi.shape:
        raise ValueError(
            f"gate: expected elementwise functions, got {list(pi.shape)} and {list(slope.shape)} "
            f"from {list(phi.shape)}"
        )
    if not bool(((pi >= 0) & (pi <= 1)).all()) or bool((pi.diff() < 0).any()):
        raise ValueError(f"gate: expected g nondecreasing within [0, 1], got {pi.tolist()}")
    if not bool((slope >= 0).all()) or not bool(slope.isfinite().all()):
        raise ValueError(f"gate: expected g' finite and not negative, got {slope.tolist()}")
    return GateFunction(*gate)


def _inverse(function: Elementwise, values: Tensor) -> Tensor:
    """Where a nondecreasing function takes these values, by bisection."""
    low, high = torch.full_like(values, -FURTHEST), torch.full_like(values, FURTHEST)
    for _ in range(64):
        middle = (low + high) / 2
        below = function(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    reached = function(high)
    if not torch.allclose(reached, values, rtol=1e-6, atol=0):
        raise ValueError(
            f"gate: expected g to take the values 1 - droprate = {values.tolist()} within "
            f"+-{FURTHEST}, got {reached.tolist()}"
        )
    return high
