# SPDX-License-Identifier: Apache-2.0
"""The training steps that `bench networks` times: ours, masked, and the plain oracle."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.compact.shrink import shrink
from l0kernels.gates import Gates
from l0kernels.training import gates_of

from . import oracle, zoo
from .arms import N_TRAIN, Arm
from .masked import draw_noise, hard_concrete, open_probability

OPEN = 0.5
WARM_UP = 2  # steps of a rebuilt network outside the clock


def convert(net: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return l0.convert(net, "hard_concrete", example_inputs=inputs, n_train=N_TRAIN)


def in_channels_last(value: Any) -> Any:
    """Return a network or a tuple of inputs with 4-D tensors as [N, H, W, C] in memory."""
    if isinstance(value, nn.Module):
        return value.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    form = torch.channels_last
    return tuple(t.contiguous(memory_format=form) if t.dim() == 4 else t for t in value)


def masked_formats(
    plain: nn.Module, inputs: tuple[Tensor, ...]
) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Copies of the plain network in the memory formats that differ for it, with inputs."""
    default = copy.deepcopy(plain)
    for parameter in default.parameters():
        parameter.data = parameter.data.contiguous()
    yield "masked", default, inputs
    if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in plain.modules()):
        yield "masked, channels_last", copy.deepcopy(plain), in_channels_last(inputs)


def best_masked(times: dict[str, list[float]]) -> str:
    """Return the faster masked arm."""
    return min((n for n in times if n.startswith("masked")), key=lambda name: median(times[name]))


def our_arm(entry: zoo.Entry, net: nn.Module, inputs: tuple[Tensor, ...]) -> Arm:
    gates = gates_of(net.train())

    def loss(*_: Tensor) -> Tensor:
        return l0.expected_loss(net, lambda: entry.loss(net(*inputs))) + l0.penalty(net)

    return at_half_open(Arm(net, loss, [gates.log_alpha], inputs[0], inputs[0]))


def at_half_open(arm: Arm) -> Arm:
    arm.set_open(OPEN)
    return arm


class MaskedTraining(nn.Module):
    """A plain network that computes every unit, with one flat draw for all gates.

    Args:
        net: the network; taken over.
        twins: say which layers read which gates.
    """

    cost: Tensor

    def __init__(self, net: nn.Module, twins: oracle.Twins):
        super().__init__()
        self.net = net
        gates = gates_of(twins.packed)
        self.log_alpha = nn.Parameter(torch.zeros(gates.count))
        self.register_buffer("cost", gates.unit_weights.float() / N_TRAIN)
        self.z = torch.ones(gates.count)
        for name, scale in twins.reads.items():
            net.get_submodule(name).register_forward_pre_hook(partial(self._multiply, scale))

    def _multiply(
        self, scale: oracle.Scale, layer: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return oracle.multiply(scale(self.z), layer, args)

    def forward(self, *inputs: Tensor) -> Any:
        self.z = hard_concrete(self.log_alpha, draw_noise(self.log_alpha))
        return self.net(*inputs)

    def penalty(self) -> Tensor:
        return open_probability(self.log_alpha) @ self.cost


def masked_arm(
    entry: zoo.Entry, net: nn.Module, twins: oracle.Twins, inputs: tuple[Tensor, ...]
) -> Arm:
    masked = MaskedTraining(net, twins).train()

    def loss(*_: Tensor) -> Tensor:
        return entry.loss(masked(*inputs)) + masked.penalty()

    return at_half_open(Arm(masked, loss, [masked.log_alpha], inputs[0], inputs[0]))


class Oracle:
    """The plain network, rebuilt outside the clock at the units that the next draw leaves open.

    Args:
        entry: the network.
        ours: the arm whose next draw is looked ahead.
        inputs: of every step.
    """

    def __init__(self, entry: zoo.Entry, ours: Arm, inputs: tuple[Tensor, ...]):
        self.entry, self.ours, self.inputs = entry, ours, inputs
        self.full = copy.deepcopy(ours.net)
        self.arm: Arm | None = None

    def rebuild(self) -> None:
        """Build the network of the next draw and warm it up."""
        self.arm = None
        gc.collect()
        net = copy.deepcopy(self.full)
        shrink(net, next_open(gates_of(self.ours.net)))
        inputs = self.inputs

        def loss(*_: Tensor) -> Tensor:
            return self.entry.loss(net(*inputs))

        self.arm = Arm(net.train(), loss, [], inputs[0], inputs[0])
        for _ in range(WARM_UP):
            self.arm.step()

    def step(self) -> None:
        """One whole step.

        Raises:
            RuntimeError: nothing was built yet.
        """
        if self.arm is None:
            raise RuntimeError("expected rebuild() before step()")
        self.arm.step()


@torch.no_grad()
def next_open(gates: Gates) -> Tensor:
    """Return 1 for every gate that the next draw opens, else 0: it depends on seed and step."""
    ahead = copy.deepcopy(gates)
    ahead.draw()
    return (ahead.current_draw().z[: gates.count] != 0).to(gates.log_alpha.dtype)
