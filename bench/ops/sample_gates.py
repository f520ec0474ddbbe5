# SPDX-License-Identifier: Apache-2.0
"""Drawing all gates, forward and backward, against the same in PyTorch operations.

For draws, the PyTorch arms draw, clamp, stretch and penalise as networks with L0 layers commonly
do, once per layer or once over all gates in one tensor. They do not list the open gates;
`sample_gates` does.

A shape that ends in `:arm` is `arm_gradient`: the noise of a draw, weighed by the difference of two
losses. The PyTorch arm has kept the noise; ours draws it again. One that ends in `:noise` is
`example_noise` for 128 examples, the PyTorch arm PyTorch's own random integers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l0kernels.functional import GateLayout, arm_gradient, example_noise, sample_gates
from l0kernels.gates.examples import NOISE as NUMBERS
from l0kernels.gates.examples import uniform
from l0kernels.ops.sample_gates.reference import noise_k

from ..masked import draw_noise, hard_concrete, log_alpha_for, open_probability
from ..operators import GRADIENT, Operator, Way, layer_sizes
from . import main

MODELS = {
    "wrn-28-10": (160,) * 4 + (320,) * 4 + (640,) * 4,
    "llama-7b": (11008,) * 32,
}
"""Gates of each layer: a wide residual network's inner channels, a language model's neurons."""
ARM, NOISE = ":arm", ":noise"
EXAMPLES = 128
MEANING = f"{' or '.join(MODELS)}, or layers x gates; then {ARM}, {NOISE} or nothing"


def one_port_per_group(sizes: Sequence[int], device: torch.device | str = "cpu") -> GateLayout:
    """Returns a layout whose ports are its groups."""
    gates = sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
    maps = torch.stack([torch.arange(gates), torch.full((gates,), gates)]).to(device)
    return GateLayout(offsets, maps, offsets)


def plain_draw(log_alpha: Tensor, cost: Tensor) -> list[Tensor]:
    """Hard concrete gates and their expected cost in PyTorch operations."""
    z = hard_concrete(log_alpha, draw_noise(log_alpha))
    return [z, (cost * open_probability(log_alpha)).sum()]


@dataclass
class Problem:
    """All gates of a network.

    Args:
        log_alpha: of all gates.
        cost: of each open gate.
        grad_z: gradient of each gate, and of the one that is always open.
        key: seed and step.
        sizes: gates of each layer.
        layout: of the gates.
    """

    log_alpha: Tensor
    cost: Tensor
    grad_z: Tensor
    key: Tensor
    sizes: tuple[int, ...]
    layout: GateLayout

    def ours(self) -> list[Tensor]:
        found = sample_gates(self.log_alpha, self.key, self.cost, self.layout, "hard_concrete")
        return [found[0], found[1]]

    def ways(self) -> dict[str, Way]:
        one = torch.ones_like(self.cost[0])
        leaves = [part.detach().requires_grad_() for part in self.log_alpha.split(self.sizes)]
        costs, grads = self.cost.split(self.sizes), self.grad_z[:-1].split(self.sizes)

        def per_layer() -> list[Tensor]:
            drawn = [plain_draw(*layer) for layer in zip(leaves, costs, strict=True)]
            return [*(z for z, _ in drawn), torch.stack([cost for _, cost in drawn]).sum()]

        # Other noise, other gates: the PyTorch arms have only the expected cost in common.
        return {
            "ours": Way(
                self.ours,
                [self.log_alpha],
                [self.grad_z, one],
                lambda y, grads: {"z": y[0], "cost": y[1], GRADIENT + "log_alpha": grads[0]},
            ),
            "plain": Way(
                lambda: plain_draw(self.log_alpha, self.cost),
                [self.log_alpha],
                [self.grad_z[:-1], one],
                lambda y, grads: {"cost": y[-1]},
            ),
            "plain-per-layer": Way(
                per_layer, leaves, [*grads, one], lambda y, grads: {"cost": y[-1]}
            ),
        }

    def work(self) -> dict[str, float]:
        """Bytes: reads log alpha and cost, writes z and the lists; backward reads three."""
        gates, size = len(self.log_alpha), self.log_alpha.itemsize
        return {"forward": gates * (3.0 * size + 16), "backward": 4.0 * gates * size}


@dataclass
class ArmProblem:
    """The estimate of ARM for all gates of a network.

    Args:
        difference: of the two losses.
        factor: of each gate.
        noise: of each gate, what the plain way has kept.
        key: seed and step.
    """

    difference: Tensor
    factor: Tensor
    noise: Tensor
    key: Tensor

    def ours(self) -> list[Tensor]:
        return [arm_gradient(self.difference, self.factor, self.key)]

    def plain(self) -> list[Tensor]:
        return [self.difference * self.factor * (self.noise - 0.5)]

    def ways(self) -> dict[str, Way]:
        def way(run: Callable[[], list[Tensor]]) -> Way:
            return Way(run, [], [], lambda y, _: {"estimate": y[0]})

        return {"ours": way(self.ours), "plain": way(self.plain)}

    def work(self) -> dict[str, float]:
        """Bytes: reads a factor and writes an estimate for each gate."""
        return {"forward": 2.0 * len(self.factor) * self.factor.itemsize}


@dataclass
class NoiseProblem:
    """The noise of all gates of a network, for each example.

    Args:
        key: seed and step.
        gates: numbers per example.
    """

    key: Tensor
    gates: int

    def ours(self) -> list[Tensor]:
        return [example_noise(self.key, EXAMPLES, self.gates)]

    def plain(self) -> list[Tensor]:
        size, device = (EXAMPLES, self.gates), self.key.device
        return [torch.randint(NUMBERS, size, dtype=torch.int32, device=device)]

    def ways(self) -> dict[str, Way]:
        # Other noise: there is nothing to compare.
        return {
            "ours": Way(self.ours, [], [], lambda y, _: {"k": y[0].double()}),
            "plain": Way(self.plain, [], [], lambda y, _: {}),
        }

    def work(self) -> dict[str, float]:
        """Bytes: writes a number for each gate and example."""
        return {"forward": 4.0 * EXAMPLES * self.gates}


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws gates that are open with a probability.

    Args:
        shape: name of a model, or layers x gates.
        fraction: probability that a gate is open.
        dtype: of all floating tensors.
        device: where it runs.
    """
    sizes = layer_sizes(shape, MODELS, MEANING)
    log_alpha = torch.full((sum(sizes),), log_alpha_for(fraction), dtype=dtype, device=device)
    return Problem(
        log_alpha.requires_grad_(),
        torch.rand(sum(sizes), dtype=dtype, device=device),
        torch.randn(sum(sizes) + 1, dtype=dtype, device=device),
        torch.tensor([0, 1], device=device),
        sizes,
        one_port_per_group(sizes, device),
    )


def make_arm_problem(shape: str, dtype: torch.dtype, device: torch.device | str) -> ArmProblem:
    """Draws the noise of all gates, and what it is weighed by."""
    gates, key = sum(layer_sizes(shape, MODELS, MEANING)), torch.tensor([0, 1], device=device)
    return ArmProblem(
        torch.randn((), dtype=dtype, device=device),
        torch.rand(gates, dtype=dtype, device=device),
        uniform(noise_k(key, gates)).to(dtype),
        key,
    )


def make(
    shape: str, fraction: float, dtype: torch.dtype, device: torch.device
) -> Problem | ArmProblem | NoiseProblem:
    """Makes the problem of a shape; the open fraction decides something for draws only."""
    if shape.endswith(NOISE):
        gates = sum(layer_sizes(shape.removesuffix(NOISE), MODELS, MEANING))
        return NoiseProblem(torch.tensor([0, 1], device=device), gates)
    if shape.endswith(ARM):
        return make_arm_problem(shape.removesuffix(ARM), dtype, device)
    return make_problem(shape, fraction, dtype, device)


OPERATOR = Operator(
    "sample_gates",
    make,
    MEANING,
    shapes=(*MODELS, *(model + ARM for model in MODELS), f"wrn-28-10{NOISE}"),
    small=("3x20", f"3x20{ARM}", f"3x20{NOISE}"),
    dtypes=("f64", "f32"),
    unit="GB/s",
)

if __name__ == "__main__":
    main("sample_gates")
