# SPDX-License-Identifier: Apache-2.0
"""Example inputs and the outputs they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from l0kernels.convert.tensors import Inputs, call, named_tensors
from l0kernels.gates import Gates
from l0kernels.nn import GatedLayer


def check_inputs(who: str, model: Any, example_inputs: Any) -> None:
    """Refuse what is not a module, or not a tuple or mapping of arguments.

    Raises:
        TypeError: naming ``who`` asks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_inputs, (tuple, Mapping)):
        raise TypeError(
            f"{who}: expected example_inputs as a tuple (positional arguments) or a mapping "
            f"(keyword arguments), got {type(example_inputs).__name__}"
        )


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns, in order."""
    return [tensor for _, tensor in named_tensors(call(model, inputs))]


def check_plain(who: str, model: Any) -> None:
    """Refuse what is not a module, or a module with gates.

    Raises:
        TypeError, ValueError: naming ``who`` asks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, (Gates, GatedLayer)) for m in model.modules()):
        raise ValueError(f"{who}: expected a plain model, got one with gates")
