# SPDX-License-Identifier: Apache-2.0
"""Times SGD on the open rows of a weight, check and catching up included, against PyTorch's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l0kernels.ops.sgd_rows import sgd_rows, sgd_rows_catch_up
from l0kernels.optim.sgd import step_matrix

from .. import row_steps

SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 5e-4,
    "nesterov": True,
}


@dataclass(kw_only=True)
class Problem(row_steps.Problem):
    velocity: Tensor
    table: Tensor

    def catch_up(self, rows: Tensor | None, mark: int) -> None:
        sgd_rows_catch_up(self.weight, self.velocity, self.last, rows, self.table, self.now, mark)

    def update(self, grad: Tensor) -> None:
        sgd_rows(self.weight, self.velocity, grad, self.last, self.now, **SETTINGS)


def make_problem(shape: Sequence[int], keep: float, device: torch.device | str = "cpu") -> Problem:
    """Draws a weight, and which rows are open in each step.

    Args:
        shape: [O, *].
        keep: share of open rows.
        device: where it runs.
    """
    weight = torch.randn(*shape, device=device)
    rows, grads = row_steps.draws(shape, keep, device)
    table = [torch.eye(2, dtype=torch.float64)]
    for _ in range(row_steps.REMEMBERED):
        table.append(step_matrix(SETTINGS) @ table[-1])
    twin = weight.clone()
    optimizer = torch.optim.SGD([twin], fused=True, **SETTINGS)
    optimizer.state[twin]["momentum_buffer"] = torch.zeros_like(twin)
    last = torch.zeros(shape[0], dtype=torch.int64, device=device)
    velocity = torch.zeros_like(weight)
    return Problem(
        weight, last, rows, grads, twin, optimizer, velocity=velocity, table=torch.stack(table)
    )


if __name__ == "__main__":
    title = "one step of SGD; other: how many times slower PyTorch's fused one is than ours"
    row_steps.main("sgd_rows", title, make_problem)
