# SPDX-License-Identifier: Apache-2.0
"""What goes into a model and what comes out of it, whatever the containers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Inputs = tuple[Any, ...] | Mapping[str, Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a forward with positional (tuple) or keyword (mapping) arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a nested structure in another dtype, all tensors detached."""
    return tree_map_only(
        Tensor, lambda t: t.detach().to(dtype) if t.is_floating_point() else t.detach(), value
    )


def to_double(value: Any) -> Any:
    """Floating tensors of a nested structure in fp64, all tensors detached."""
    return to_dtype(value, torch.float64)


def named_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value with the way to it: ``("output.logits", ...)``.

    Looks into mappings, sequences, sets, dataclasses and plain objects (caches, named results),
    so that no tensor leaves a model unseen.
    """
    yield from _walk(value, name, set())


def _walk(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes)):
        return
    seen.add(id(value))
    for key, item in _items(value):
        yield from _walk(item, f"{name}{key}", seen)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f".{key}", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif dataclasses.is_dataclass(value):
        yield from ((f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not callable(value):
        yield from ((f".{key}", item) for key, item in vars(value).items())


def kept_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep as plain attributes, such as features stored for a later loss."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, item in vars(module).items():
            if key not in _OF_MODULES:
                yield from _walk(item, f"attribute {path}.{key}".replace(" .", " "), seen)


_OF_MODULES = frozenset(vars(nn.Module()))
