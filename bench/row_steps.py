# SPDX-License-Identifier: Apache-2.0
"""Times optimizers on the open rows of a weight, check and catching up included."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l0kernels.ops.open_rows import open_rows

from .timing import interleave, paired, spread

SHAPES = ((640, 640, 3, 3), (320, 320, 3, 3), (4096, 1024))
FRACTIONS = (0.1, 0.25, 0.5, 1.0)
DRAWS = 8
REMEMBERED = 1024


@dataclass
class Problem:
    """A weight, its twin for PyTorch's optimizer, and draws with a gradient each."""

    weight: Tensor
    last: Tensor
    rows: list[Tensor]
    grads: list[Tensor]
    twin: Tensor
    optimizer: torch.optim.Optimizer
    now: int = 0
    twins: int = 0  # steps of the twin

    def catch_up(self, rows: Tensor | None, mark: int) -> None:
        raise NotImplementedError

    def update(self, grad: Tensor) -> None:
        raise NotImplementedError

    def ours(self) -> None:
        """What a step does: catch up at the draw, check the gradient, update.

        Raises:
            RuntimeError: a row that is behind has a gradient.
        """
        rows, grad = self.rows[self.now % DRAWS], self.grads[self.now % DRAWS]
        self.catch_up(rows, self.now + 1)
        if stale := open_rows(grad, self.last, self.now):
            raise RuntimeError(f"expected gradients in open rows only, got {stale} others")
        self.update(grad)
        self.now += 1

    def plain(self) -> None:
        self.twin.grad = self.grads[self.twins % DRAWS]
        self.optimizer.step()
        self.twins += 1

    def flush(self) -> None:
        self.catch_up(None, self.now)


class Timed(Protocol):
    """Two ways to do the same."""

    def ours(self) -> None: ...

    def plain(self) -> None: ...


MakeProblem = Callable[[Sequence[int], float, torch.device | str], Timed]


def draws(
    shape: Sequence[int], keep: float, device: torch.device | str
) -> tuple[list[Tensor], list[Tensor]]:
    """Which rows are open in each of `DRAWS` steps, and gradients.

    Args:
        shape: [O, *].
        keep: share of open rows.
        device: where they are.
    """
    count = max(1, round(keep * shape[0]))
    rows = [torch.randperm(shape[0], device=device)[:count] for _ in range(DRAWS)]
    grads = [torch.zeros(*shape, device=device) for _ in rows]
    for grad, chosen in zip(grads, rows, strict=True):
        grad[chosen] = torch.randn(count, *shape[1:], device=device)
    return rows, grads


def measure(
    make_problem: MakeProblem,
    shapes: Sequence[Sequence[int]] = SHAPES,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 30,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Times both in turn.

    Args:
        make_problem: of a shape, a share of open rows and a device.
        shapes: of the weights.
        fractions: shares of open rows.
        rounds: how many times each is timed, below `REMEMBERED`.
        device: where they run.

    Returns:
        One row per problem: microseconds of ours, and how many times slower the other way is
        (medians of ratios within rounds).
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
    lines = [f"{'weight':<15} {'open':>5} {'us':>9} {'other':>8}"]
    for row in rows:
        shape, slower = "x".join(map(str, row["shape"])), row["times_slower"]["median"]
        lines.append(f"{shape:<15} {row['open']:>5} {row['us']:>9.1f} {slower:>7.2f}x")
    return "\n".join(lines)


def main(op: str, title: str, make_problem: MakeProblem) -> None:
    """Prints the table, or JSON.

    Args:
        op: name of the operator and of the module that is run.
        title: what is timed, and how many times slower what is.
        make_problem: see `measure`.
    """
    parser = argparse.ArgumentParser(prog=f"l0kernels.bench.ops.{op}", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    rows = measure(make_problem, rounds=options.rounds, device=options.device)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(title)
        print(table(rows))
