# SPDX-License-Identifier: Apache-2.0
"""Example inputs and the outputs they give."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from l0kernels.gates import Gates
from l0kernels.nn import GatedLayer

Inputs = tuple[Any, ...] | dict[str, Any]


def check_inputs(who: str, model: Any, example_inputs: Any) -> None:
    """Refuse what is not a module, or not a tuple or dict of arguments.

    Raises:
        TypeError: naming ``who`` asks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_inputs, (tuple, dict)):
        raise TypeError(
            f"{who}: expected example_inputs as a tuple (positional arguments) or a dict (keyword "
            f"arguments), got {type(example_inputs).__name__}"
        )


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns, in order."""
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def check_plain(who: str, model: Any) -> None:
    """Refuse what is not a module, or a module with gates.

    Raises:
        TypeError, ValueError: naming ``who`` asks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, (Gates, GatedLayer)) for m in model.modules()):
        raise ValueError(f"{who}: expected a plain model, got one with gates")
