# SPDX-License-Identifier: Apache-2.0
"""The training steps that `bench networks` times: ours, masked, and the plain oracle."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
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
from .timing import interleave

FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
OPEN = 0.5
WARM_UP = 2  # steps of a rebuilt network outside the clock
HEATS = 3  # rounds that decide which format is faster


def convert(net: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return l0.convert(net, "hard_concrete", example_inputs=inputs, n_train=N_TRAIN)


def in_format(value: Any, form: str) -> Any:
    """Return a network, in place, or a tuple of inputs with 4-D tensors in a memory format."""
    memory = FORMATS[form]
    if isinstance(value, nn.Module):
        return value.to(memory_format=memory)  # pyright: ignore[reportCallIssue]
    return tuple(t.contiguous(memory_format=memory) if t.dim() == 4 else t for t in value)


def formats_of(net: nn.Module) -> list[str]:
    """Return the memory formats that differ for a network, the one that ours runs in first."""
    images = any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in net.modules())
    return list(FORMATS) if images else ["NHWC"]


def fastest(arms: Mapping[str, Arm] | Mapping[str, Oracle], label: str) -> str:
    """Return the format with the smallest median over a few paired rounds."""
    if len(arms) == 1:
        return next(iter(arms))
    times = interleave({form: arm.step for form, arm in arms.items()}, HEATS, warmup=1, label=label)
    return min(arms, key=lambda form: median(times[form]))


def best_masked(
    entry: zoo.Entry, twins: oracle.Twins, inputs: tuple[Tensor, ...]
) -> tuple[str, Arm]:
    """Return the masked arm in its faster format."""
    arms = {form: masked_arm(entry, twins, inputs, form) for form in formats_of(twins.plain)}
    form = fastest(arms, f"{entry.name}: masked")
    return form, arms[form]


def best_oracle(entry: zoo.Entry, ours: Arm, inputs: tuple[Tensor, ...]) -> tuple[str, Oracle]:
    """Return the oracle in its faster format at the last draw of ours."""
    arms = {form: Oracle(entry, ours, inputs, form) for form in formats_of(ours.net)}
    for arm in arms.values():
        arm.rebuild()
    form = fastest(arms, f"{entry.name}: oracle")
    return form, arms[form]


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


def masked_arm(entry: zoo.Entry, twins: oracle.Twins, inputs: tuple[Tensor, ...], form: str) -> Arm:
    masked = MaskedTraining(in_format(copy.deepcopy(twins.plain), form), twins).train()
    inputs = in_format(inputs, form)

    def loss(*_: Tensor) -> Tensor:
        return entry.loss(masked(*inputs)) + masked.penalty()

    return at_half_open(Arm(masked, loss, [masked.log_alpha], inputs[0], inputs[0]))


class Oracle:
    """The plain network, rebuilt outside the clock at the units that the last draw left open.

    It stands for a network that is built once and trained for long, so it is warmed up. Rebuild it
    after ours has taken its step at these widths: oneDNN keeps what it prepares for a shape for the
    whole process, and the warm-up would prepare everything for ours.

    Args:
        entry: the network.
        ours: the arm whose draw counts.
        inputs: of every step.
        form: memory format of the network and its inputs.
    """

    def __init__(self, entry: zoo.Entry, ours: Arm, inputs: tuple[Tensor, ...], form: str):
        self.entry, self.ours, self.form = entry, ours, form
        self.inputs = in_format(inputs, form)
        self.arm: Arm | None = None

    def rebuild(self) -> None:
        """Build the network of the last draw and warm it up."""
        self.arm = None
        gc.collect()
        net = copy.deepcopy(self.ours.net)
        shrink(net, last_open(gates_of(self.ours.net)))
        net, inputs = in_format(net, self.form), self.inputs

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


def last_open(gates: Gates) -> Tensor:
    """Return 1 for every gate that the last draw opened, else 0."""
    return (gates.current_draw().z.detach()[: gates.count] != 0).to(gates.log_alpha.dtype)
