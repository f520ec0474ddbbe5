# SPDX-License-Identifier: Apache-2.0
"""Packing weights, forward and backward, against index_select and multiply in PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l0kernels.functional import GateLayout, open_lists, pack_weight, pack_weights

from ..operators import GRADIENT, Operator, Way, numbers
from . import main

MODES = ("rows", "cols", "both")
CHAINS = {"wrn-28-10": (16, *(160,) * 8, *(320,) * 8, *(640,) * 8)}
"""Widths of the layers of a network, all of them gated."""
MEANING = f"O x I x kernel x kernel or O x I, then :{', :'.join(MODES)}; or {', '.join(CHAINS)}"


@dataclass
class Problem:
    """One weight with one gate per row and per column; 4-D weights are channels_last."""

    weight: Tensor
    z: Tensor
    rows: Tensor | None
    cols: Tensor | None
    row_map: Tensor | None = None
    col_map: Tensor | None = None
    upstream: list[Tensor] = field(default_factory=list)

    def ours(self) -> Tensor:
        return pack_weight(self.weight, self.z, self.rows, self.row_map, self.cols, self.col_map)

    def plain(self) -> Tensor:
        packed = self.weight
        if self.rows is not None:
            packed = packed.index_select(0, self.rows)
        if self.cols is None:
            return packed
        first = self.weight.shape[0]  # the columns' gates follow those of the rows
        scale = self.z.index_select(0, self.cols + first).to(packed.dtype)
        return packed.index_select(1, self.cols) * scale.reshape(1, -1, *[1] * (packed.dim() - 2))

    def inputs(self) -> list[Tensor]:
        return [self.weight] if self.cols is None else [self.weight, self.z]

    def ways(self) -> dict[str, Way]:
        runs = {"ours": lambda: [self.ours()], "plain": lambda: [self.plain()]}
        return ways_of(runs, self.inputs(), self.upstream, [None] * len(self.inputs()))

    def work(self) -> dict[str, float]:
        """Bytes: reads and writes what is packed; its gradient is read, a full one is written."""
        packed = self.plain().nbytes
        # The gradient of the gates reads the weight's open entries.
        backward = packed + self.weight.nbytes + (0 if self.cols is None else packed)
        return {"forward": 2.0 * packed, "backward": float(backward)}


@dataclass
class Chain:
    """The weights of convolutions that read each other's outputs, with one gate per channel."""

    weights: list[Tensor]
    z: Tensor
    index: Tensor
    maps: Tensor
    spans: list[tuple[int, int, int, int]]
    upstream: list[Tensor] = field(default_factory=list)

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
            * self.z[span[2] :][self.index[span[2] :][: span[3]]].to(weight).reshape(1, -1, 1, 1)
            for weight, span in zip(self.weights, self.spans, strict=True)
        ]

    def inputs(self) -> list[Tensor]:
        return [*self.weights, self.z]

    def ways(self) -> dict[str, Way]:
        runs = {"ours": self.ours, "one-by-one": self.one_by_one, "plain": self.plain}
        is_open = (self.z.detach() != 0).nonzero().squeeze(1)[:-1]
        return ways_of(runs, self.inputs(), self.upstream, [*[None] * len(self.weights), is_open])

    def work(self) -> dict[str, float]:
        """Bytes, as of one weight."""
        packed = sum(one.nbytes for one in self.ours())
        full = sum(weight.nbytes for weight in self.weights)
        return {"forward": 2.0 * packed, "backward": 2.0 * packed + full}


def ways_of(
    runs: dict[str, Callable[[], list[Tensor]]],
    leaves: list[Tensor],
    upstream: list[Tensor],
    kept: Sequence[Tensor | None],
) -> dict[str, Way]:
    """Returns ways to pack the same leaves, and the oracle, which copies what is packed.

    Args:
        runs: the ways by name.
        leaves: weights, then gates.
        upstream: gradients of what is packed.
        kept: of each gradient what all ways have; None: everything.
    """
    with torch.no_grad():
        packed = runs["plain"]()

    def found(results: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
        named = {f"weight {i}": one for i, one in enumerate(results)}
        for i, (gradient, where) in enumerate(zip(grads, kept, strict=bool(grads))):
            named[f"{GRADIENT}{i}"] = gradient if where is None else gradient[where]
        return named

    ways = {name: Way(run, leaves, upstream, found) for name, run in runs.items()}
    return ways | {"oracle": Way(lambda: [t.clone() for t in packed], [], [], found)}


def make_chain(
    widths: Sequence[int],
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Chain:
    """Draws the weights and gates of 3x3 convolutions between layers of the given widths."""
    gates = sum(widths)
    offsets = torch.tensor([0, *widths]).cumsum(0)
    z = torch.zeros(gates + 1, dtype=torch.promote_types(dtype, torch.float32))
    for first, width in zip(offsets.tolist(), widths, strict=False):
        z[first + some_of(width, fraction)] = 0.5
    z[-1] = 1
    maps = torch.stack([torch.arange(gates), torch.full((gates,), gates)])
    lists = open_lists(z, GateLayout(offsets, maps, offsets))
    ports = list(zip(offsets.tolist(), lists.counts.tolist(), strict=False))
    weights = [
        torch.randn(out, width, 3, 3, device=device, dtype=dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for width, out in zip(widths[:-1], widths[1:], strict=True)
    ]
    chain = Chain(
        weights,
        z.to(device).requires_grad_(),
        lists.index.to(device),
        maps.to(device),
        [(*row, *col) for col, row in zip(ports[:-1], ports[1:], strict=True)],
    )
    chain.upstream = [torch.randn_like(one) for one in chain.plain()]
    return chain


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem | Chain:
    """Draws a weight, gates and which of them are open, or all weights of a network.

    Args:
        shape: see `MEANING`.
        fraction: of the features that are open.
        dtype: of the weights.
        device: of all tensors.

    Raises:
        ValueError: another shape.
    """
    if shape in CHAINS:
        return make_chain(CHAINS[shape], fraction, dtype, device)
    size, _, mode = shape.partition(":")
    if mode not in MODES:
        raise ValueError(f"expected a shape of {MEANING}, got {shape!r}")
    out, width, *kernel = numbers(size, 4 if size.count("x") == 3 else 2, MEANING)
    gates = out + width
    weight = torch.randn(out, width, *kernel, device=device, dtype=dtype)
    if kernel:
        weight = weight.to(memory_format=torch.channels_last)
    z = torch.rand(gates + 1, device=device, dtype=torch.promote_types(dtype, torch.float32)) + 0.1
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
    problem.upstream = [torch.randn_like(problem.plain())]
    return problem


def some_of(size: int, fraction: float) -> Tensor:
    return torch.randperm(size)[: max(2, round(size * fraction))].sort().values


OPERATOR = Operator(
    "pack_weight",
    make_problem,
    MEANING,
    shapes=(
        *(f"640x640x3x3:{mode}" for mode in MODES),
        "320x320x3x3:both",
        "160x160x3x3:both",
        "500x800:both",
        *CHAINS,
    ),
    small=("12x10x3x3:both", "12x10:rows"),
    dtypes=("f64", "f32", "bf16", "f16"),
    unit="GB/s",
)

if __name__ == "__main__":
    main("pack_weight")
