# SPDX-License-Identifier: Apache-2.0
"""Times linear layers over open features, forward and backward, against the masked dense layer."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import GateLayout, OpenLists, gated_linear, open_lists

from ..timing import interleave, paired, spread

SHAPES = ((800, 500, 128), (640, 640, 1024), (3072, 768, 512))
FRACTIONS = (0.1, 0.5, 1.0)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


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


def make_gates(outputs: int, inputs: int, fraction: float, device: torch.device | str) -> Gates:
    """Draws gates of which a fraction is open, one for each feature.

    Args:
        outputs, inputs: features of the layer.
        fraction: of the features that are open, on both sides.
        device: where everything lies.
    """
    z = torch.zeros(inputs + outputs + 1)
    for first, width in ((0, inputs), (inputs, outputs)):
        is_open = torch.randperm(width)[: max(2, round(width * fraction))]
        z[first + is_open] = torch.rand(len(is_open)) + 0.1
    z[-1] = 1
    ends = torch.tensor([0, inputs, inputs + outputs])
    gates = torch.arange(inputs + outputs)
    maps = torch.stack([gates, torch.full_like(gates, inputs + outputs)])
    layout = GateLayout(*(tensor.to(device) for tensor in (ends, maps, ends)))
    z = z.to(device)
    return Gates(z.requires_grad_(), layout, open_lists(z.detach(), layout), inputs)


@dataclass
class Packed:
    """A plain layer at the open widths: what it computes, and its leaves."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]


@dataclass
class Problem:
    """One layer with relu; `x` holds the packed inputs and `wide_x` all of them."""

    x: Tensor
    wide_x: Tensor
    weight: Tensor
    bias: Tensor
    gates: Gates

    def ours(self) -> Tensor:
        return gated_linear(
            self.x, self.weight, self.bias, *self.gates.arguments(), activation="relu"
        )

    def plain(self) -> Tensor:
        z = self.gates.z
        scale = z[: self.gates.inputs].to(self.wide_x.dtype)
        y = F.linear(self.wide_x * scale, self.weight.to(self.wide_x.dtype), self.bias)
        return F.relu(y) * (z[self.gates.inputs : -1] != 0)

    def packed(self) -> "Packed":
        """The layer at the open widths, with nothing to gather: as fast as skipping can get."""
        rows, cols = self.gates.open_outputs(), self.gates.open_inputs()
        x, weight = self.x[:, : len(cols)].detach(), self.weight.detach()[rows][:, cols]
        x, weight, bias = (
            t.clone().requires_grad_() for t in (x, weight, self.bias.detach()[rows])
        )
        return Packed(lambda: F.relu(F.linear(x, weight, bias)), [x, weight, bias])

    def inputs(self, ours: bool) -> list[Tensor]:
        return [self.x if ours else self.wide_x, self.weight, self.bias, self.gates.z]


def make_problem(
    shape: Sequence[int],
    fraction: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Draws a layer and its input.

    Args:
        shape: inputs, outputs, rows.
        fraction: of the features that are open.
        device: where it runs.
        dtype: of x and the parameters.
    """
    inputs, outputs, rows = shape
    gates = make_gates(outputs, inputs, fraction, device)
    wide_x = torch.randn(rows, inputs, device=device, dtype=dtype)
    x = torch.zeros_like(wide_x)
    packed = wide_x[:, gates.open_inputs()]
    x[:, : packed.shape[1]] = packed
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    bias = torch.randn(outputs, device=device, dtype=dtype)
    for t in (x, wide_x, weight, bias):
        t.requires_grad_()
    return Problem(x, wide_x, weight, bias, gates)


def backward_of(output: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    """Returns a step that runs the backward pass of an output."""
    upstream = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True)


def measure_one(problem, rounds: int, device: torch.device | str = "cpu") -> dict:
    """Times one problem, both passes of both arms in turn.

    Args:
        problem: has `ours`, `plain`, `packed` and `inputs`.
        rounds: how many times each is timed.
        device: where the problem lies.
    """
    packed = problem.packed()
    steps = {
        "ours forward": problem.ours,
        "plain forward": problem.plain,
        "packed forward": packed.run,
        "ours backward": backward_of(problem.ours(), problem.inputs(True)),
        "plain backward": backward_of(problem.plain(), problem.inputs(False)),
        "packed backward": backward_of(packed.run(), packed.leaves),
    }
    times = interleave(steps, rounds, device=torch.device(device))
    row: dict = {}
    for direction in ("forward", "backward"):
        ours, plain, packed_too = (f"{arm} {direction}" for arm in ("ours", "plain", "packed"))
        row[direction] = {
            "us": 1e3 * spread(times[ours]).median,
            "times_slower": vars(paired(times, over=plain, under=ours)),
            "over_oracle": vars(paired(times, over=ours, under=packed_too)),
        }
    return row


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 30,
    device: torch.device | str = "cpu",
    make: Callable = make_problem,
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """Times every shape at every open fraction.

    Args:
        shapes: for `make`.
        fractions: of the features that are open, on both sides.
        rounds: how many times each is timed.
        device: where it runs.
        make: draws a problem of a shape and a fraction.
        dtype: of x and the parameters.

    Returns:
        One row per problem: microseconds of our passes, how many times slower the masked dense
        layer is, and our time over that of the plain layer at the open widths (medians of ratios
        within rounds).
    """
    rows = []
    for shape in shapes:
        for fraction in fractions:
            row = {"shape": list(shape), "open": fraction}
            problem = make(shape, fraction, device, dtype)
            rows.append(row | measure_one(problem, rounds, device))
    return rows


def table(rows: list[dict]) -> str:
    """Formats the rows of `measure`."""
    head = "".join(f" {way + ' us':>9} {'masked':>9} {'oracle':>9}" for way in ("fwd", "bwd"))
    lines = [f"{'shape':<20} {'open':>5}{head}"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        line = f"{shape:<20} {row['open']:>5.2f}"
        for direction in ("forward", "backward"):
            part = row[direction]
            slower = f"{part['times_slower']['median']:.2f}x"
            oracle = f"{part['over_oracle']['median']:.2f}x"
            line += f" {part['us']:>9.1f} {slower:>9} {oracle:>9}"
        lines.append(line)
    return "\n".join(lines)


def run(name: str, shape: str, make: Callable, shapes: Sequence[Sequence[int]]) -> None:
    """Prints the table of one operator, or JSON.

    Args:
        name: of the operator.
        shape: what its shapes mean.
        make: draws a problem of a shape and a fraction.
        shapes: to time.
    """
    parser = argparse.ArgumentParser(
        prog=f"l0kernels.bench.ops.{name}",
        description="Times a layer over open features against the masked dense layer.",
    )
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="replaces the last number of each shape")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    if options.batch:
        shapes = [(*one[:-1], options.batch) for one in shapes]
    dtype = DTYPES[options.dtype]
    rows = measure(shapes, rounds=options.rounds, device=options.device, make=make, dtype=dtype)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{shape}, {options.dtype}; masked: how many times slower than ours, oracle: our")
        print("time over that of the plain layer at the open widths")
        print(table(rows))


if __name__ == "__main__":
    run("gated_linear", "inputs x outputs x rows", make_problem, SHAPES)
