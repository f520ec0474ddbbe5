# SPDX-License-Identifier: Apache-2.0
"""Hard-concrete L0 training in plain PyTorch: every unit computed, then multiplied by its gate.

`MaskedAsWritten` is the published pattern: one gate module per layer, default memory format.
`MaskedAtBest` draws all gates at once; run it in channels_last. Both put the gate where
`l0kernels.convert` puts it, on the input of the layer that reads the gated units.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Group, full_widths

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SHIFT = BETA * math.log(-GAMMA / ZETA)
NOISE_MARGIN = 1e-6
# Gates are clamped to log alpha <= ln 100 in training (Louizos et al. 2018, authors' code).
MOST_OPEN = math.log(100)


def hard_concrete(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Return gates in [0, 1] for logistic noise (Louizos et al. 2018, eq. 10-11)."""
    s = torch.sigmoid((noise + log_alpha) / BETA)
    return F.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def draw_noise(like: Tensor) -> Tensor:
    """Return one logistic sample per gate, uniform noise kept off 0 and 1 as in public code."""
    return torch.rand_like(like).clamp_(NOISE_MARGIN, 1 - NOISE_MARGIN).logit_()


def noise_for(z: Tensor, log_alpha: Tensor) -> Tensor:
    """Return the noise with which `hard_concrete` yields z, to repeat a given draw."""
    s = ((z.double() - GAMMA) / (ZETA - GAMMA)).clamp(1e-9, 1 - 1e-9)
    inner = BETA * s.logit() - log_alpha.detach().double()
    far = torch.full_like(inner, 1e3)
    return torch.where(z <= 0, -far, torch.where(z >= 1, far, inner)).to(log_alpha.dtype)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z != 0) per gate (Louizos et al. 2018, eq. 12)."""
    return torch.sigmoid(log_alpha - SHIFT)


def log_alpha_for(keep: float) -> float:
    """Return the log alpha at which a gate is open with probability keep.

    At keep = 1 it is the most open gate that training allows: open with probability .998, and
    equal to 1 with probability .95.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"expected 0 < keep <= 1, got {keep}")
    return MOST_OPEN if keep == 1 else min(math.log(keep / (1 - keep)) + SHIFT, MOST_OPEN)


def costs(net: nn.Module, groups: Sequence[Group]) -> list[int]:
    """Return the weights that one gate of each group multiplies.

    These are a convolution's filter or, for a linear producer, the columns that read the unit, as
    in `l0kernels.penalty`.
    """
    found = []
    for group in groups:
        made = net.get_parameter(f"{group.producer}.weight")
        read = net.get_parameter(f"{group.consumer}.weight")
        found.append(made[0].numel() if made.dim() > 2 else read.shape[0] * group.spread)
    return found


def replace(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the submodule `name` is."""
    parent, _, child = name.rpartition(".")
    net.get_submodule(parent).add_module(child, module)


class Gate(nn.Module):
    """The gates of one layer: draws them and multiplies its input by them at every forward."""

    def __init__(self, width: int, cost: int, spread: int):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(width))
        self.cost, self.spread = cost, spread
        self.noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        noise = draw_noise(self.log_alpha) if self.noise is None else self.noise
        return multiply(x, hard_concrete(self.log_alpha, noise), self.spread)

    def penalty(self) -> Tensor:
        return self.cost * open_probability(self.log_alpha).sum()


def multiply(x: Tensor, z: Tensor, spread: int) -> Tensor:
    """Return x with feature (channel) f times z[f // spread]."""
    scale = z if spread == 1 else z.repeat_interleave(spread)
    return x * scale.view(1, -1, *(1,) * (x.dim() - 2))


class MaskedAsWritten(nn.Module):
    """A network with one gate module before each consumer, as users write it.

    Args:
        net: full-width network; taken over.
        groups: its gated producers.
        n_train: training-set size N; the penalty is divided by it.
    """

    def __init__(self, net: nn.Module, groups: Sequence[Group], n_train: int):
        super().__init__()
        self.net, self.n_train = net, n_train
        sizes = zip(groups, full_widths(net, groups), costs(net, groups), strict=True)
        self.gates = nn.ModuleList(Gate(width, cost, g.spread) for g, width, cost in sizes)
        for group, gate in zip(groups, self.gates, strict=True):
            self.put(group, gate)

    def put(self, group: Group, gate: nn.Module) -> None:
        """Put the gates of a group into the network."""
        consumer = self.net.get_submodule(group.consumer)
        replace(self.net, group.consumer, nn.Sequential(gate, consumer))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def penalty(self) -> Tensor:
        return torch.stack([gate.penalty() for gate in self.each_gate()]).sum() / self.n_train

    def gate_parameters(self) -> list[nn.Parameter]:
        return [gate.log_alpha for gate in self.each_gate()]

    def each_gate(self) -> list[Gate]:
        return [gate for gate in self.gates if isinstance(gate, Gate)]

    def pin(self, z: Sequence[Tensor] | None) -> None:
        """Repeat this draw (one tensor per group) from now on; None draws anew."""
        for index, gate in enumerate(self.each_gate()):
            gate.noise = None if z is None else noise_for(z[index], gate.log_alpha)


class AsWrittenBeforeNorm(MaskedAsWritten):
    """The same with one gate module behind each producer, before its norm."""

    def put(self, group: Group, gate: nn.Module) -> None:
        producer = self.net.get_submodule(group.producer)
        replace(self.net, group.producer, nn.Sequential(producer, gate))


class FlatGates(nn.Module):
    """All gates of a network in one vector, drawn at once and handed out per group.

    Args:
        sizes: units per group.
        cost: weights per unit of each group.
    """

    cost: Tensor

    def __init__(self, sizes: Sequence[int], cost: Sequence[int]):
        super().__init__()
        self.sizes = list(sizes)
        self.log_alpha = nn.Parameter(torch.zeros(sum(sizes)))
        each = torch.tensor(cost, dtype=torch.float32)
        self.register_buffer("cost", each.repeat_interleave(torch.tensor(self.sizes)))
        self.noise: Tensor | None = None
        self.z: tuple[Tensor, ...] = ()

    def draw(self) -> None:
        noise = draw_noise(self.log_alpha) if self.noise is None else self.noise
        self.z = hard_concrete(self.log_alpha, noise).split(self.sizes)

    def penalty(self) -> Tensor:
        return open_probability(self.log_alpha) @ self.cost

    def pin(self, z: Sequence[Tensor] | None) -> None:
        """Repeat this draw (one tensor per group) from now on; None draws anew."""
        self.noise = None if z is None else noise_for(torch.cat(list(z)), self.log_alpha)


class MaskedInput(nn.Module):
    """A consumer whose input is multiplied by group `index` of the flat gates."""

    def __init__(self, layer: nn.Module, gates: FlatGates, index: int, spread: int):
        super().__init__()
        self.layer, self.index, self.spread = layer, index, spread
        self.source = (gates,)  # a tuple: the gates are registered once, by the root

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(multiply(x, self.source[0].z[self.index], self.spread))


class MaskedOutput(MaskedInput):
    """A producer whose output is multiplied by group `index` of the flat gates."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self.layer(x), self.source[0].z[self.index], self.spread)


class FlatGated(nn.Module):
    """A network whose gates are one flat vector, drawn at the start of each forward.

    Args:
        net: full-width network; taken over.
        groups: its gated producers.
        n_train: training-set size N; the penalty is divided by it.
    """

    def __init__(self, net: nn.Module, groups: Sequence[Group], n_train: int):
        super().__init__()
        self.net, self.n_train = net, n_train
        self.gates = FlatGates(full_widths(net, groups), costs(net, groups))

    def forward(self, x: Tensor) -> Tensor:
        self.gates.draw()
        found = self.net(x)
        # They would keep this step's graph alive, and no later one could be captured.
        self.gates.z = ()
        return found

    def penalty(self) -> Tensor:
        return self.gates.penalty() / self.n_train

    def gate_parameters(self) -> list[nn.Parameter]:
        return [self.gates.log_alpha]

    def pin(self, z: Sequence[Tensor] | None) -> None:
        """Repeat this draw (one tensor per group) from now on; None draws anew."""
        self.gates.pin(z)


class MaskedAtBest(FlatGated):
    """A network with one flat draw and a multiplication before each consumer."""

    def __init__(self, net: nn.Module, groups: Sequence[Group], n_train: int):
        super().__init__(net, groups, n_train)
        for index, group in enumerate(groups):
            self.put(index, group)

    def put(self, index: int, group: Group) -> None:
        """Put the gates of a group into the network."""
        layer = self.net.get_submodule(group.consumer)
        replace(self.net, group.consumer, MaskedInput(layer, self.gates, index, group.spread))


class AtBestBeforeNorm(MaskedAtBest):
    """The same with a multiplication behind each producer, before its norm."""

    def put(self, index: int, group: Group) -> None:
        layer = self.net.get_submodule(group.producer)
        replace(self.net, group.producer, MaskedOutput(layer, self.gates, index, group.spread))
