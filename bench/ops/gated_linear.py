# SPDX-License-Identifier: Apache-2.0
"""Linear layers over open features, forward and backward, against the masked dense layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import GateLayout, OpenLists, gated_linear, open_lists

from ..operators import GRADIENT, Operator, Way, numbers, off_kinks
from . import main

MEANING = "inputs x outputs x rows"


@dataclass
class Gates:
    """Gates of a layer's inputs, port 0, and of its outputs, port 1, with their open lists."""

    z: Tensor
    layout: GateLayout
    lists: OpenLists
    inputs: int

    def arguments(self) -> tuple:
        spans = ((0, 0), (self.inputs, 1))
        return self.z, self.lists.index, self.lists.counts, self.layout.maps, *spans

    def open_inputs(self) -> Tensor:
        return self.lists.index[: self.lists.counts[0]]

    def open_outputs(self) -> Tensor:
        return self.lists.index[self.inputs :][: self.lists.counts[1]]


def make_gates(
    outputs: int, inputs: int, fraction: float, dtype: torch.dtype, device: torch.device | str
) -> Gates:
    """Draws gates of which a fraction is open, one for each feature.

    Args:
        outputs, inputs: features of the layer.
        fraction: of the features that are open, on both sides.
        dtype: of the layer; gates are at least float32.
        device: where everything lies.
    """
    z = torch.zeros(inputs + outputs + 1, dtype=torch.promote_types(dtype, torch.float32))
    for first, width in ((0, inputs), (inputs, outputs)):
        is_open = torch.randperm(width)[: max(2, round(width * fraction))]
        z[first + is_open] = torch.rand(len(is_open), dtype=z.dtype) + 0.1
    z[-1] = 1
    ends = torch.tensor([0, inputs, inputs + outputs])
    gates = torch.arange(inputs + outputs)
    maps = torch.stack([gates, torch.full_like(gates, inputs + outputs)])
    layout = GateLayout(*(tensor.to(device) for tensor in (ends, maps, ends)))
    z = z.to(device)
    return Gates(z.requires_grad_(), layout, open_lists(z.detach(), layout), inputs)


@dataclass
class GatedLayer:
    """One gated layer. Features are dimension 1 of inputs and results.

    Args:
        x: input whose first features are the open ones, in order.
        wide_x: input with all features.
        weight: of the full layer.
        bias: of the full layer, None without one.
        gates: of both sides.
        upstream: gradient of the result at full width.
    """

    x: Tensor
    wide_x: Tensor
    weight: Tensor
    bias: Tensor | None
    gates: Gates
    upstream: Tensor

    def ours(self) -> Tensor:
        """The operator."""
        raise NotImplementedError

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer in PyTorch, with its activation."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """The masked dense layer."""
        z = self.gates.z
        y = self.layer(self.wide_x * self.scale().to(self.wide_x.dtype), self.weight, self.bias)
        return y * along_features(z[self.gates.inputs : -1] != 0, y)

    def scale(self) -> Tensor:
        return along_features(self.gates.z[: self.gates.inputs], self.wide_x)

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def ways(self) -> dict[str, Way]:
        rows, cols = self.gates.open_outputs(), self.gates.open_inputs()
        packed_upstream = torch.zeros_like(self.upstream)
        open_upstream = self.upstream[:, rows]
        packed_upstream[:, : len(rows)] = open_upstream
        names = [GRADIENT + name for name in ("weight", "bias")][: len(self.parameters())]

        def found(y: Tensor, grads: Sequence[Tensor]) -> dict[str, Tensor]:
            grad_x, *of_parameters, grad_z = grads
            return {
                "y": y,
                GRADIENT + "x": grad_x,
                **dict(zip(names, of_parameters, strict=True)),
                GRADIENT + "gates": grad_z[cols],
            }

        small = self.packed()
        shared = [*self.parameters(), self.gates.z]
        return {
            "ours": Way(
                lambda: [self.ours()],
                [self.x, *shared],
                [packed_upstream],
                lambda y, grads: found(
                    y[0][:, : len(rows)], [grads[0][:, : len(cols)], *grads[1:]]
                ),
            ),
            "plain": Way(
                lambda: [self.plain()],
                [self.wide_x, *shared],
                [self.upstream],
                lambda y, grads: found(y[0][:, rows], [grads[0][:, cols], *grads[1:]]),
            ),
            "oracle": Way(
                lambda: [self.layer(*small)],
                [leaf for leaf in small if leaf is not None],
                [open_upstream],
                lambda y, grads: {"y": y[0], GRADIENT + "x": grads[0]},
            ),
        }

    @torch.no_grad()
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias at the open widths: as fast as skipping can get."""
        rows, cols = self.gates.open_outputs(), self.gates.open_inputs()
        scale = along_features(self.gates.z[cols], self.weight).to(self.weight.dtype)
        layout = torch.channels_last if self.x.dim() == 4 else torch.contiguous_format
        x, weight = self.x[:, : len(cols)], self.weight[rows][:, cols] * scale
        x, weight = (t.clone(memory_format=layout).requires_grad_() for t in (x, weight))
        return x, weight, None if self.bias is None else self.bias[rows].requires_grad_()

    def work(self) -> dict[str, float]:
        """Operations of the forward pass, and of the gradients of input and weight."""
        counts = self.gates.lists.counts.tolist()
        places = self.upstream.numel() // self.upstream.shape[1]
        forward = 2.0 * places * counts[0] * counts[1] * self.weight[0, 0].numel()
        return {"forward": forward, "backward": 2 * forward}


def along_features(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 2))


def inputs_of(inputs: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """Returns packed and wide inputs, both leaves, from those of all features."""
    x = torch.zeros_like(inputs)
    packed = inputs[:, gates.open_inputs()]
    x[:, : packed.shape[1]] = packed
    return x.requires_grad_(), inputs.requires_grad_()


@dataclass
class Problem(GatedLayer):
    """A linear layer with bias and ReLU."""

    def ours(self) -> Tensor:
        return gated_linear(
            self.x, self.weight, self.bias, *self.gates.arguments(), activation="relu"
        )

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.relu(F.linear(x, weight, bias))


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws a layer and its input.

    Args:
        shape: inputs x outputs x rows.
        fraction: of the features that are open.
        dtype: of x and the parameters.
        device: where it runs.
    """
    inputs, outputs, rows = numbers(shape, 3, MEANING)
    gates = make_gates(outputs, inputs, fraction, dtype, device)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    x, wide_x = inputs_of(normal(rows, inputs), gates)
    weight, bias = (normal(*size).requires_grad_() for size in ((outputs, inputs), (outputs,)))
    problem = Problem(x, wide_x, weight, bias, gates, normal(rows, outputs))
    with torch.no_grad():
        wide, *parameters = (t.double() for t in (wide_x * problem.scale(), weight, bias))
        problem.upstream = off_kinks(problem.upstream, F.linear(wide, *parameters))
    return problem


OPERATOR = Operator(
    "gated_linear",
    make_problem,
    MEANING,
    shapes=("800x500x128", "640x640x1024", "3072x768x512"),
    small=("20x12x5",),
    dtypes=("f64", "f32", "bf16", "f16"),
    unit="GFLOP/s",
    batched=lambda shape, batch: f"{shape.rsplit('x', 1)[0]}x{batch}",
)

if __name__ == "__main__":
    main("gated_linear")
