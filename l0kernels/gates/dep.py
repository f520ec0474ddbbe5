# SPDX-License-Identifier: Apache-2.0
"""Dep-L0: hard concrete gates whose logits depend on those of the neighbouring layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0kernels.functional import OpenLists, dep_chain, sample_gates
from l0kernels.gates.base import Constant, Gates, has_matrix, one_of, per_group, uses_of
from l0kernels.gates.draw import engine
from l0kernels.gates.examples import SCOPES
from l0kernels.gates.hard_concrete import HardConcrete, probability

DIRECTIONS = ("forward", "backward")
WIDTHS = ("connected", "chain")
BIAS_STD = 0.01


class Links(NamedTuple):
    """Which weights cost what: a tensor each, one entry per pair of ports that weights connect.

    Args:
        makes: port of the outputs; the number of ports stands for none.
        reads: port of the inputs, likewise.
        loose_out: outputs without a gate.
        loose_in: inputs that no port has.
        numbers: weights of an output and an input: the size of a filter.
        work: their multiply-adds per example.
    """

    makes: Tensor
    reads: Tensor
    loose_out: Tensor
    loose_in: Tensor
    numbers: Tensor
    work: Tensor


class DependentHardConcrete(HardConcrete):
    """Dep-L0 (Li, Ji, 2021, arXiv:2107.00070): logits of a layer from those of its neighbour.

    The gates follow the law of `HardConcrete`, training and test gate alike. Their logits are no
    parameters but made by a chain over the groups, in the order in which the groups are given:

        log_alpha_0 = ln(100) tanh(W_0 1 + b_0),
        log_alpha_l = ln(100) tanh(W_l log_alpha_(l-1) + b_l),

    or from the last group to the first with ``direction="backward"``. The bound stands in for the
    clamp, so nothing is clamped. ``log_alpha`` holds the parameters W_0, W_1, ..., b_0, b_1, ...,
    one behind the other, and ``alpha`` the logits. At first b ~ N(bias, 0.01^2) and
    W ~ U(-n^-.5, n^-.5) with n the logits that it reads, as in the authors' code. The vector of
    ones has as many entries as the group that reads it, which is our choice. VGG-16 has 1.6 million
    of these parameters.

    One draw serves the batch, so that closed channels can be skipped; the authors' code draws for
    each example, as ``scope="example"`` does. Penalty, with p = P(z != 0), sums over layers k,
    their outputs o and inputs i:

        (1 / n_train) sum_k numbers_k sum_o sum_i lam p_o p_i,

    the expected number of weights between open units (p = 1 where there is no gate; weights
    without any gate are left out; lam is that of the output's group, else of the input's).
    ``widths="chain"`` is the published penalty instead: outputs and inputs are those of
    neighbouring groups, whether they are connected or not; what reads the last group costs
    nothing, nor do groups that no layer makes. The authors do not divide by the size of the
    training set: that is n_train=1. They take Adam with learning rate 1e-3 for the gates, lam 1e-6
    for VGG-16, 5e-7 (forward) and 1e-6 (backward) for ResNet-56.

    Args:
        groups: name -> number of units; the chain takes them in this order.
        lam: weight of the penalty, one number or one per group.
        n_train: what the penalty is divided by.
        seed: key of the noise, 0 <= seed < 2**63; equal seeds and steps give equal gates.
        lam_warmup: part of the training, up to 1, over which ``lam`` grows from 0: see
            ``set_progress``.
        direction: ``"forward"`` or ``"backward"``.
        bias: mean of the initial b, one number or one per group.
        widths: ``"connected"`` or ``"chain"``, see above.
        scope: ``"batch"``, or ``"example"``, the published sampling, as in `HardConcrete`.

    Raises:
        ValueError: unknown direction or widths, values that are not finite or name other groups.
    """

    def __init__(
        self,
        groups: Mapping[str, int],
        *,
        lam: float | Mapping[str, float] = 1.0,
        n_train: int = 1,
        seed: int = 0,
        lam_warmup: float = 0.0,
        direction: str = "forward",
        bias: float | Mapping[str, float] = 3.0,
        widths: str = "connected",
        scope: str = "batch",
    ) -> None:
        # Not those of HardConcrete, which has a parameter for each gate.
        Gates.__init__(self, groups, lam=lam, n_train=n_train, seed=seed, lam_warmup=lam_warmup)
        for name, value, known in (
            ("direction", direction, DIRECTIONS),
            ("widths", widths, WIDTHS),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        self.scope = one_of("scope", scope, SCOPES)
        self.reverse, self.widths = direction == "backward", widths
        shift = 1 if self.reverse else -1
        ends = range(len(self.sizes))
        read = [self.sizes[min(max(i + shift, 0), ends[-1])] for i in ends]
        self._shapes = list(zip(self.sizes, read, strict=True))
        self._links: Links | None = None
        # What the latest sampled draw was drawn from.
        self._logits: Tensor | None = None
        means = per_group("bias", bias, self.names)
        generator = torch.Generator().manual_seed(int(self.seed))
        parts = [(2 * torch.rand(n * m, generator=generator) - 1) / m**0.5 for n, m in self._shapes]
        for name, size in zip(self.names, self.sizes, strict=True):
            parts.append(means[name] + BIAS_STD * torch.randn(size, generator=generator))
        self.log_alpha = nn.Parameter(torch.cat(parts))

    # Logits.

    @property
    def alpha(self) -> Tensor:
        """The logits that count, shape [gates], differentiable unless they are frozen."""
        numbers = super().alpha
        parts = numbers.split([*(n * m for n, m in self._shapes), *self.sizes])
        weights = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=False)]
        biases = parts[len(weights) :]
        ones = numbers.new_ones(self._shapes[-1 if self.reverse else 0][1])
        with engine():
            return dep_chain(ones, weights, biases, self.reverse)

    def project(self, values: Tensor) -> None:
        """Nothing: logits are bounded."""

    def sample(self, cost: Tensor, key: Tensor) -> tuple[Tensor, Tensor, OpenLists]:
        self._logits = self.alpha
        return sample_gates(self._logits, key, cost, self.layout, self.law)

    def _drop_draw(self) -> None:
        super()._drop_draw()
        self._logits = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_logits": None}

    # Penalty.

    def attach(self, root: nn.Module, positions: Mapping[str, int] | None = None) -> nn.Module:
        from l0kernels.nn.base import GatedLayer

        super().attach(root, positions)
        layers = [
            (layer, 1 if positions is None else uses_of(layer, name, positions))
            for name, layer in root.named_modules()
            if isinstance(layer, GatedLayer) and layer.gates is self and has_matrix(layer)
        ]
        rows = self._neighbours(layers) if self.widths == "chain" else self._connected(layers)
        columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(Links._fields)).t()
        links = Links(*columns.to(self.log_alpha.device))
        self._links = links._replace(makes=links.makes.long(), reads=links.reads.long())
        return root

    def _connected(self, layers: Sequence[tuple[Any, float]]) -> list[tuple[float, ...]]:
        """A link for each layer."""
        none, rows = len(self.port_maps), []
        for layer, uses in layers:
            outputs, inputs, numbers = layer.shape_out_in()
            makes, reads = layer.out_port, layer.in_port
            if makes >= 0:
                outputs = int((self.port_maps[makes] == self.count).all(0).sum())
            ports = (makes if makes >= 0 else none, reads if reads >= 0 else none)
            rows.append((*ports, outputs, 0 if reads >= 0 else inputs, numbers, numbers * uses))
        return rows

    def _neighbours(self, layers: Sequence[tuple[Any, float]]) -> list[tuple[float, ...]]:
        """A link for each group and the one before it."""
        none, rows = len(self.port_maps), []
        for group in range(len(self.names)):
            # The first ports are the groups themselves.
            makers = [(layer, uses) for layer, uses in layers if layer.out_port == group]
            shapes = [(*layer.shape_out_in(), uses) for layer, uses in makers]
            numbers = sum(elements for _, _, elements, _ in shapes)
            work = sum(elements * uses for _, _, elements, uses in shapes)
            loose = shapes[0][1] if shapes and group == 0 else 0
            rows.append((group, group - 1 if group else none, 0, loose, numbers, work))
        return rows

    def _apply(self, fn: Any, recurse: bool = True) -> Gates:
        super()._apply(fn, recurse)
        self._logits = None
        if self._links is not None:
            # To the device only: the numbers are exact.
            self._links = Links(*(t.to(self.log_alpha.device) for t in self._links))
        return self

    def _penalty(self, per: str, lam: float | Mapping[str, float] | None) -> Tensor:
        rates, links, numbers = self._prices(per, lam)
        if self.frozen:
            with torch.no_grad():
                value = self._cost_of_open(self.alpha, rates, links, numbers)
            return Constant.apply(self.log_alpha, value)
        return self._cost_of_open(self._take_logits(), rates, links, numbers)

    def density(self, per: str = "weight") -> Tensor:
        """Expected open part of the weights that the penalty counts, 0-d, differentiable.

        Args and raises: as of all gates.
        """
        all_open = self.log_alpha.new_full((self.count,), math.inf)
        return self.penalty(per, 1.0) / self._cost_of_open(all_open, *self._prices(per, 1.0))

    def _prices(
        self, per: str, lam: float | Mapping[str, float] | None
    ) -> tuple[Tensor, Links, Tensor]:
        """What a weight costs, by gate; which weights there are; how often each is used."""
        self.check_per(per)
        if self._links is None:
            raise ValueError("penalty: expected gates that are attached to a model, got others")
        lams = self._lam if lam is None else per_group("lam", lam, self.names)
        rates = self._prices_of("link", lams, lambda: torch.ones(self.count))
        return rates, self._links, self._links.work if per == "flop" else self._links.numbers

    def _take_logits(self) -> Tensor:
        """Those of the present draw, once: parameters can change in ways that no version shows."""
        draw, logits = self._draw, self._logits
        if draw is None or draw.expected is None or logits is None or not self._is_current(draw):
            return self.alpha
        draw.expected = None
        return logits

    def _cost_of_open(self, logits: Tensor, rates: Tensor, links: Links, numbers: Tensor) -> Tensor:
        """The sum over links of rate times the expected number of weights between open units."""
        p = torch.cat((probability(logits), logits.new_ones(1, dtype=torch.float64)))
        rate = torch.cat((rates.double(), rates.new_zeros(1, dtype=torch.float64)))
        made, extra = self.layout.maps
        features = p[made] * p[extra]
        charged = features * torch.where(made < self.count, rate[made], rate[extra])
        sizes = [ports.shape[1] for ports in self.port_maps]
        zero = p.new_zeros(())
        opened = torch.stack([*(part.sum() for part in features.split(sizes)), zero])
        paid = torch.stack([*(part.sum() for part in charged.split(sizes)), zero])
        by_outputs = paid[links.makes] * (opened[links.reads] + links.loose_in)
        by_inputs = links.loose_out * paid[links.reads]
        return (numbers * (by_outputs + by_inputs)).sum().to(logits.dtype)
