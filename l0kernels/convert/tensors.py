# SPDX-License-Identifier: Apache-2.0
"""What goes into a model and what comes out of it, whatever the containers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, ValuesView
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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


class InDouble(TorchFunctionMode):
    """Lets a forward in fp64 stay there where it would go to a lower precision and back.

    Many transformers compute norms and softmax in fp32 whatever their dtype. Two runs equal to
    1e-16 then differ by 1e-8 wherever an element lies between two numbers of fp32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16"):
            func = Tensor.double
        elif func is not Tensor.view:  # view(dtype) looks at bits
            args = tuple(map(_to_fp64, args))
            kwargs = {name: _to_fp64(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


_LOWER = (torch.float32, torch.float16, torch.bfloat16)


def _to_fp64(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _LOWER else argument


def own_copy(value: Any) -> Any:
    """A copy that a forward may change, of the containers too."""
    return copy.deepcopy(tree_map_only(Tensor, Tensor.detach, value))


def named_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value with the way to it: ``("output.logits", ...)``.

    Looks into mappings, iterables, dataclasses and plain objects (caches, named results), so that
    nothing leaves a model unseen; arrays and numbers count as tensors.
    """
    yield from _walk(value, name, set(), numbers=True)


def _walk(value: Any, name: str, seen: set[int], numbers: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        yield name, torch.as_tensor(np.asarray(value))
        return
    if isinstance(value, (bool, int, float, complex)):
        if numbers:
            yield name, torch.tensor(value)
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes)):
        return
    seen.add(id(value))
    for key, item in _items(value):
        yield from _walk(item, f"{name}{key}", seen, numbers)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f".{key}", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, ValuesView, Iterator)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif not callable(value):
        names = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
        yield from ((f".{n}", getattr(value, n)) for n in names if hasattr(value, n))
        yield from ((f".{key}", item) for key, item in getattr(value, "__dict__", {}).items())


def kept_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep as plain attributes, such as features stored for a later loss."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, item in vars(module).items():
            if key not in _OF_MODULES:
                name = f"attribute {path}.{key}".replace(" .", " ")
                yield from _walk(item, name, seen, numbers=False)


_OF_MODULES = frozenset(vars(nn.Module()))


class KeptBuffers:
    """The buffers of a model, to be put back: what they held, and which tensors they were."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo every change since."""
        for module, name, buffer, value in self._kept:
            module._buffers[name] = buffer
            # Without a new version: graphs that have saved it may wait for backward.
            buffer.data.copy_(value)
