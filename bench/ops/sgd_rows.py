# SPDX-License-Identifier: Apache-2.0
"""Times SGD on the open rows of a weight, check and catching up included, against PyTorch's."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l0kernels.ops.open_rows import open_rows
from l0kernels.ops.sgd_rows import sgd_rows, sgd_rows_catch_up
from l0kernels.optim.sgd import step_matrix

from ..timing import interleave, paired, spread

SHAPES = ((640, 640, 3, 3), (320, 320, 3, 3), (4096, 1024))
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 5e-4,
    "nesterov": True,
}
DRAWS = 8
REMEMBERED = 1024


@dataclass
class Problem:
    """A weight, its twin for PyTorch's optimizer, and draws with a gradient each."""

    weight: Tensor
    velocity: Tensor
    last: Tensor
    table: Tensor
    rows: list[Tensor]
    grads: list[Tensor]
    twin: Tensor
    optimizer: torch.optim.Optimizer
    now: int = 0
    twins: int = 0  # steps of the twin

    def ours(self) -> None:
        """What a step does: catch up at the draw, check the gradient, update.

        Raises:
            RuntimeError: a row that is behind has a gradient.
        """
        rows, grad, now = self.rows[self.now % DRAWS], self.grads[self.now % DRAWS], self.now
        sgd_rows_catch_up(self.weight, self.velocity, self.last, rows, self.table, now, now + 1)
        if stale := open_rows(grad, self.last, now):
            raise RuntimeError(f"expected gradients in open rows only, got {stale} others")
        sgd_rows(self.weight, self.velocity, grad, self.last, now, **SETTINGS)
        self.now += 1

    def plain(self) -> None:
        self.twin.grad = self.grads[self.twins % DRAWS]
        self.optimizer.step()
        self.twins += 1

    def flush(self) -> None:
        now = self.now
        sgd_rows_catch_up(self.weight, self.velocity, self.last, None, self.table, now, now)


def make_problem(shape: Sequence[int], keep: float, device: torch.device | str = "cpu") -> Problem:
    """Draws a weight, and which rows are open in each of `DRAWS` steps.

    Args:
        shape: [O, *].
        keep: share of open rows.
        device: where it runs.
    """
    weight = torch.randn(*shape, device=device)
    count = max(1, round(keep * shape[0]))
    rows = [torch.randperm(shape[0], device=device)[:count] for _ in range(DRAWS)]
    grads = [torch.zeros_like(weight) for _ in rows]
    for grad, chosen in zip(grads, rows, strict=True):
        grad[chosen] = torch.randn(count, *shape[1:], device=device)
    table = [torch.eye(2, dtype=torch.float64)]
    for _ in range(REMEMBERED):
        table.append(step_matrix(SETTINGS) @ table[-1])
    twin = weight.clone()
    optimizer = torch.optim.SGD([twin], fused=True, **SETTINGS)
    optimizer.state[twin]["momentum_buffer"] = torch.zeros_like(twin)
    last = torch.zeros(shape[0], dtype=torch.int64, device=device)
    velocity = torch.zeros_like(weight)
    return Problem(weight, velocity, last, torch.stack(table), rows, grads, twin, optimizer)


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 30,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Times both in turn.

    Args:
        shapes: of the weights.
        fractions: shares of open rows.
        rounds: how many times each is timed, below `REMEMBERED`.
        device: where they run.

    Returns:
        One row per problem: microseconds of ours, and how many times slower PyTorch's fused SGD
        is (medians of ratios within rounds).
    """
    found = []
    for shape in shapes:
        for keep in fractions:
            problem = make_problem(shape, keep, device)
            steps = {"ours": problem.ours, "plain": problem.plain}
            times = interleave(steps, rounds, device=device)
            slower = vars(paired(times, over="plain", under="ours"))
            micros = 1e3 * spread(times["ours"]).median
            found.append({"shape": list(shape), "open": keep, "us": micros, "times_slower": slower})
    return found


def table(rows: list[dict]) -> str:
    """Formats the rows of `measure`."""
    lines = [f"{'weight':<15} {'open':>5} {'us':>9} {'PyTorch':>8}"]
    for row in rows:
        shape, slower = "x".join(map(str, row["shape"])), row["times_slower"]["median"]
        lines.append(f"{shape:<15} {row['open']:>5} {row['us']:>9.1f} {slower:>7.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.ops.sgd_rows", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    rows = measure(rounds=options.rounds, device=options.device)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("one step of SGD; PyTorch: how many times slower its fused one is than ours")
        print(table(rows))


if __name__ == "__main__":
    main()
