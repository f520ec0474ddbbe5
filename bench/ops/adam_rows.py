# SPDX-License-Identifier: Apache-2.0
"""Times AdamW on the open rows of a weight, check and catching up included, against PyTorch's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l0kernels.ops.adam_rows import adam_rows, adam_rows_catch_up

from .. import row_steps

SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 1e-2,
}


@dataclass(kw_only=True)
class Problem(row_steps.Problem):
    mean: Tensor
    square: Tensor
    table: Tensor

    def catch_up(self, rows: Tensor | None, mark: int) -> None:
        adam_rows_catch_up(
            self.weight,
            self.mean,
            self.square,
            self.last,
            rows,
            self.table[: self.now],
            self.now,
            number=self.now,
            mark=mark,
        )

    def update(self, grad: Tensor) -> None:
        adam_rows(
            self.weight,
            self.mean,
            self.square,
            grad,
            self.last,
            self.now,
            number=self.now + 1,
            **SETTINGS,
        )


def make_problem(shape: Sequence[int], keep: float, device: torch.device | str = "cpu") -> Problem:
    """Draws a weight, and which rows are open in each step.

    Args:
        shape: [O, *].
        keep: share of open rows.
        device: where it runs.
    """
    weight = torch.randn(*shape, device=device)
    rows, grads = row_steps.draws(shape, keep, device)
    options = {name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")}
    betas = SETTINGS["beta1"], SETTINGS["beta2"]
    twin = weight.clone()
    optimizer = torch.optim.AdamW([twin], betas=betas, fused=True, **options)
    last = torch.zeros(shape[0], dtype=torch.int64, device=device)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    settings = torch.tensor([list(SETTINGS.values())], dtype=torch.float64)
    table = settings.expand(row_steps.REMEMBERED, 5)
    return Problem(
        weight, last, rows, grads, twin, optimizer, mean=mean, square=square, table=table
    )


if __name__ == "__main__":
    title = "one step of AdamW; other: how many times slower PyTorch's fused one is than ours"
    row_steps.main("adam_rows", title, make_problem)
