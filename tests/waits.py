# SPDX-License-Identifier: Apache-2.0
"""Operators for which the host would wait on a GPU."""

from typing import Any

import torch
from torch import Tensor

OPERATORS = (
    "_local_scalar_dense",
    "nonzero",
    "equal.default",
    "masked_select",
    "unique",
    "is_nonzero",
)


def waits(func: Any, args: tuple) -> bool:
    """Whether an operator reads values, or has shapes that depend on them."""
    name = str(func)
    masks = [i.dtype in (torch.bool, torch.uint8) for i in _indices(name, args)]
    return any(each in name for each in OPERATORS) or any(masks)


def _indices(name: str, args: tuple) -> list[Tensor]:
    if not name.startswith(("aten.index.", "aten.index_put")):
        return []
    return [index for index in args[1] if index is not None]
