# SPDX-License-Identifier: Apache-2.0
"""Times packing weights, forward and backward, against index_select and multiply in PyTorch."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l0kernels.functional import GateLayout, open_lists, pack_weight, pack_weights

from ..timing import interleave, paired, spread

SHAPES = ((640, 640, 3, 3), (320, 320, 3, 3), (160, 160, 3, 3), (500, 800))
MODES = ("rows", "cols", "both")
FRACTIONS = (0.1, 0.5, 1.0)
WIDTHS = (16, *(160,) * 8, *(320,) * 8, *(640,) * 8)
"""Of the layers of a 28-10 wide residual network, all of them gated."""


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


@dataclass
class Chain:
    """The weights of convolutions that read each other's outputs, with one gate per channel."""

    weights: list[Tensor]
    z: Tensor
    index: Tensor
    maps: Tensor
    spans: list[tuple[int, int, int, int]]

    def ours(self) -> list[Tensor]:
        return pack_weights(self.weights, self.z, self.index, self.maps, self.spans)

    def one_by_one(self) -> list[Tensor]:
        return [
            pack_weight(
                weight,
                self.z,
                self.index[span[0] :][: span[1]],
                self.maps[:, span[0] :][:, : weight.shape[0]],
                self.index[span[2] :][: span[3]],
                self.maps[:, span[2] :][:, : weight.shape[1]],
            )
            for weight, span in zip(self.weights, self.spans, strict=True)
        ]

    def plain(self) -> list[Tensor]:
        return [
            weight.index_select(0, self.index[span[0] :][: span[1]]).index_select(
                1, self.index[span[2] :][: span[3]]
            )
            * self.z[span[2] :][self.index[span[2] :][: span[3]]].reshape(1, -1, 1, 1)
            for weight, span in zip(self.weights, self.spans, strict=True)
        ]

    def inputs(self) -> list[Tensor]:
        return [*self.weights, self.z]


def make_chain(widths: Sequence[int], fraction: float, device: torch.device | str = "cpu") -> Chain:
    """Draws the weights and gates of 3x3 convolutions between layers of the given widths."""
    gates = sum(widths)
    offsets = torch.tensor([0, *widths]).cumsum(0)
    z = torch.zeros(gates + 1)
    for first, width in zip(offsets.tolist(), widths, strict=False):
        z[first + some_of(width, fraction)] = 0.5
    z[-1] = 1
    maps = torch.stack([torch.arange(gates), torch.full((gates,), gates)])
    lists = open_lists(z, GateLayout(offsets, maps, offsets))
    ports = list(zip(offsets.tolist(), lists.counts.tolist(), strict=False))
    weights = [
        torch.randn(out, width, 3, 3, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for width, out in zip(widths[:-1], widths[1:], strict=True)
    ]
    return Chain(
        weights,
        z.to(device).requires_grad_(),
        lists.index.to(device),
        maps.to(device),
        [(*row, *col) for col, row in zip(ports[:-1], ports[1:], strict=True)],
    )


def make_problem(
    shape: Sequence[int], mode: str, fraction: float, device: torch.device | str = "cpu"
) -> Problem:
    """Draws a weight, gates and which of them are open.

    Args:
        shape: [O, I, *kernel].
        mode: "rows", "cols" or "both": what is packed.
        fraction: of the features that are open.
        device: of all tensors.
    """
    out, width = shape[:2]
    gates = out + width
    weight = torch.randn(*shape, device=device)
    if weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    z = torch.rand(gates + 1, device=device) + 0.1
    problem = Problem(weight.requires_grad_(), z, None, None)
    problem.z[-1] = 1
    problem.z.requires_grad_()
    if mode != "cols":
        problem.rows = some_of(out, fraction).to(device)
        problem.row_map = torch.stack([torch.arange(out), torch.full((out,), gates)]).to(device)
    if mode != "rows":
        problem.cols = some_of(width, fraction).to(device)
        col_map = torch.stack([torch.arange(out, gates), torch.full((width,), gates)])
        problem.col_map = col_map.to(device)
    return problem


def some_of(size: int, fraction: float) -> Tensor:
    return torch.randperm(size)[: max(2, round(size * fraction))].sort().values


def backward_of(packed: Sequence[Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Returns a step that runs the backward pass of packed weights."""
    upstream = [torch.randn_like(one) for one in packed]
    return lambda: torch.autograd.grad(packed, inputs, upstream, retain_graph=True)


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    modes: Sequence[str] = MODES,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 30,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Times both passes of both arms in turn, for every shape, mode and open fraction.

    Args:
        shapes: of the weights, [O, I, *kernel].
        modes: of "rows", "cols" and "both".
        fractions: of the features that are open.
        rounds: how many times each is timed.
        device: of all tensors.

    Returns:
        One row per problem: microseconds of our passes, how many times slower PyTorch's are
        (medians of ratios within rounds), bytes that each of our passes must move at least.
    """
    rows = []
    for shape in shapes:
        for mode in modes:
            for fraction in fractions:
                row = {"shape": list(shape), "mode": mode, "open": fraction}
                problem = make_problem(shape, mode, fraction, device)
                rows.append(row | measure_one(problem, rounds, device))
    return rows


def measure_one(problem: Problem, rounds: int, device: torch.device | str = "cpu") -> dict:
    """Times one problem; see `measure`."""
    packed, inputs = problem.ours(), problem.inputs()
    steps = {
        "ours forward": problem.ours,
        "plain forward": problem.plain,
        "ours backward": backward_of([packed], inputs),
        "plain backward": backward_of([problem.plain()], inputs),
    }
    times = interleave(steps, rounds, device=device)
    moved = {"forward": 2 * packed.nbytes, "backward": packed.nbytes + problem.weight.nbytes}
    if problem.cols is not None:  # the gradient of the gates reads the weight's open entries
        moved["backward"] += packed.nbytes
    return {direction: compare(times, direction, moved[direction]) for direction in moved}


def compare(times: dict[str, list[float]], direction: str, moved: int) -> dict:
    """Our microseconds and bytes per second, and how many times slower PyTorch is."""
    micros = 1e3 * spread(times[f"ours {direction}"]).median
    slower = vars(paired(times, over=f"plain {direction}", under=f"ours {direction}"))
    return {"us": micros, "gb_per_s": moved / micros / 1e3, "times_slower": slower}


def measure_chain(
    widths: Sequence[int] = WIDTHS,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 10,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Times both passes over all weights of a model: in one call, one by one, and in PyTorch.

    Args:
        widths: of the layers.
        fractions: of the channels that are open.
        rounds: how many times each is timed.
        device: of all tensors.

    Returns:
        One row per fraction: what `measure` says of one weight, and under "one_by_one" how many
        times slower one call per weight is.
    """
    rows = []
    for fraction in fractions:
        chain = make_chain(widths, fraction, device)
        arms = {"ours": chain.ours, "one by one": chain.one_by_one, "plain": chain.plain}
        steps: dict[str, Callable[[], object]] = {}
        for name, forward in arms.items():
            steps[f"{name} forward"] = forward
            steps[f"{name} backward"] = backward_of(forward(), chain.inputs())
        times = interleave(steps, rounds, device=device)
        packed = sum(one.nbytes for one in chain.ours())
        full = sum(weight.nbytes for weight in chain.weights)
        row: dict = {"shape": [len(widths) - 1], "mode": "model", "open": fraction}
        for direction, moved in (("forward", 2 * packed), ("backward", 2 * packed + full)):
            row[direction] = compare(times, direction, moved)
            slower = paired(times, over=f"one by one {direction}", under=f"ours {direction}")
            row[direction]["one_by_one"] = vars(slower)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Formats the rows of `measure` and `measure_chain`."""
    lines = [
        f"{'weight':<16} {'packed':<6} {'open':>5}"
        f" {'fwd us':>8} {'GB/s':>6} {'PyTorch':>9} {'bwd us':>8} {'GB/s':>6} {'PyTorch':>9}"
    ]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        if row["mode"] == "model":
            shape = f"{shape} weights"
        line = f"{shape:<16} {row['mode']:<6} {row['open']:>5.2f}"
        for direction in ("forward", "backward"):
            part = row[direction]
            slower = f"{part['times_slower']['median']:.2f}x"
            line += f" {part['us']:>8.1f} {part['gb_per_s']:>6.1f} {slower:>9}"
        lines.append(line)
    for row in rows:
        if row["mode"] == "model":
            forward, backward = (
                row[way]["one_by_one"]["median"] for way in ("forward", "backward")
            )
            lines.append(
                f"{row['open']:.2f} open, one call per weight: forward {forward:.2f}x,"
                f" backward {backward:.2f}x as long"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.ops.pack_weight", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, default: %(default)s")
    options = parser.parse_args()
    rows = measure(rounds=options.rounds, device=options.device)
    rows += measure_chain(rounds=max(1, options.rounds // 3), device=options.device)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("float32, channels_last kernels; PyTorch: how many times slower than ours")
        print(table(rows))


if __name__ == "__main__":
    main()
