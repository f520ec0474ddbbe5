# SPDX-License-Identifier: Apache-2.0
"""Times packing weights, forward and backward, against index_select and multiply in PyTorch."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l0kernels.functional import pack_weight

from ..timing import interleave, paired, spread

SHAPES = ((640, 640, 3, 3), (320, 320, 3, 3), (160, 160, 3, 3), (500, 800))
MODES = ("rows", "cols", "both")
FRACTIONS = (0.1, 0.5, 1.0)


@dataclass
class Problem:
    """One weight with one gate per row and per column; 4-D weights are channels_last."""

    weight: Tensor
    z: Tensor
    rows: Tensor | None
    cols: Tensor | None
    row_map: Tensor | None = None
    col_map: Tensor | None = None

    def ours(self) -> Tensor:
        return pack_weight(self.weight, self.z, self.rows, self.row_map, self.cols, self.col_map)

    def plain(self) -> Tensor:
        packed = self.weight
        if self.rows is not None:
            packed = packed.index_select(0, self.rows)
        if self.cols is None:
            return packed
        first = self.weight.shape[0]  # the columns' gates follow those of the rows
        scale = self.z.index_select(0, self.cols + first)
        return packed.index_select(1, self.cols) * scale.reshape(1, -1, *[1] * (packed.dim() - 2))

    def inputs(self) -> list[Tensor]:
        return [self.weight] if self.cols is None else [self.weight, self.z]


def make_problem(shape: Sequence[int], mode: str, fraction: float) -> Problem:
    """Draws a weight, gates and which of them are open.

    Args:
        shape: [O, I, *kernel].
        mode: "rows", "cols" or "both": what is packed.
        fraction: of the features that are open.
    """
    out, width = shape[:2]
    gates = out + width
    weight = torch.randn(*shape)
    if weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    problem = Problem(weight.requires_grad_(), (torch.rand(gates + 1) + 0.1), None, None)
    problem.z[-1] = 1
    problem.z.requires_grad_()
    if mode != "cols":
        problem.rows = some_of(out, fraction)
        problem.row_map = torch.stack([torch.arange(out), torch.full((out,), gates)])
    if mode != "rows":
        problem.cols = some_of(width, fraction)
        problem.col_map = torch.stack([torch.arange(out, gates), torch.full((width,), gates)])
    return problem


def some_of(size: int, fraction: float) -> Tensor:
    return torch.randperm(size)[: max(2, round(size * fraction))].sort().values


def backward_of(packed: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    """Returns a step that runs the backward pass of a packed weight."""
    upstream = torch.randn_like(packed)
    return lambda: torch.autograd.grad(packed, inputs, upstream, retain_graph=True)


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    modes: Sequence[str] = MODES,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 30,
) -> list[dict]:
    """Times both passes of both arms in turn, for every shape, mode and open fraction.

    Args:
        shapes: of the weights, [O, I, *kernel].
        modes: of "rows", "cols" and "both".
        fractions: of the features that are open.
        rounds: how many times each is timed.

    Returns:
        One row per problem: microseconds of our passes, how many times slower PyTorch's are
        (medians of ratios within rounds), bytes that each of our passes must move at least.
    """
    rows = []
    for shape in shapes:
        for mode in modes:
            for fraction in fractions:
                row = {"shape": list(shape), "mode": mode, "open": fraction}
                rows.append(row | measure_one(make_problem(shape, mode, fraction), rounds))
    return rows


def measure_one(problem: Problem, rounds: int) -> dict:
    """Times one problem; see `measure`."""
    packed, plain, inputs = problem.ours(), problem.plain(), problem.inputs()
    steps = {
        "ours forward": problem.ours,
        "plain forward": problem.plain,
        "ours backward": backward_of(packed, inputs),
        "plain backward": backward_of(plain, inputs),
    }
    times = interleave(steps, rounds)
    moved = {"forward": 2 * packed.nbytes, "backward": packed.nbytes + problem.weight.nbytes}
    if problem.cols is not None:  # the gradient of the gates reads the weight's open entries
        moved["backward"] += packed.nbytes
    row: dict = {}
    for direction in ("forward", "backward"):
        ours, plain_name = f"ours {direction}", f"plain {direction}"
        micros = 1e3 * spread(times[ours]).median
        row[direction] = {
            "us": micros,
            "gb_per_s": moved[direction] / micros / 1e3,
            "times_slower": vars(paired(times, over=plain_name, under=ours)),
        }
    return row


def table(rows: list[dict]) -> str:
    """Formats the rows of `measure`."""
    lines = [
        f"{'weight':<16} {'packed':<6} {'open':>5}"
        f" {'fwd us':>8} {'GB/s':>6} {'PyTorch':>9} {'bwd us':>8} {'GB/s':>6} {'PyTorch':>9}"
    ]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        line = f"{shape:<16} {row['mode']:<6} {row['open']:>5.2f}"
        for direction in ("forward", "backward"):
            part = row[direction]
            slower = f"{part['times_slower']['median']:.2f}x"
            line += f" {part['us']:>8.1f} {part['gb_per_s']:>6.1f} {slower:>9}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.ops.pack_weight", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    rows = measure(rounds=options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("float32, channels_last kernels; PyTorch: how many times slower than ours")
        print(table(rows))


if __name__ == "__main__":
    main()
