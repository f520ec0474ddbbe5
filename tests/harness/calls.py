# SPDX-License-Identifier: Apache-2.0
"""Calls of operators: recorded while tests run, then run again."""

import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.build import HERE, ROOT, build, preload

Call = tuple[str, tuple]
"""An operator's name without its namespace, and its arguments."""

MOST_ELEMENTS = 1 << 16
SCALAR_TYPES = {torch.float64: 7, torch.float32: 6, torch.bfloat16: 15, torch.float16: 5}
# In a container's larger address space ThreadSanitizer may not find its place at the first attempt.
NO_PLACE = "unexpected memory mapping"


class Recorder:
    """Keeps the largest call of each kind: same operator, dtypes, ranks and plain arguments."""

    def __init__(self) -> None:
        self._calls: dict[tuple, tuple[int, Call]] = {}

    def around(self, name: str, function: Callable) -> Callable:
        def run(*args):
            self._note(name, args)
            return function(*args)

        return run

    def _note(self, name: str, args: tuple) -> None:
        size = sum(tensor.numel() for tensor in tensors(args))
        kind = (name, *map(_kind, args))
        known, _ = self._calls.get(kind, (-1, None))
        if known < size <= MOST_ELEMENTS:
            self._calls[kind] = size, (name, copy_of(args))

    def save(self, path: str | Path) -> None:
        torch.save([call for _, call in self._calls.values()], path)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.dim()
    if isinstance(argument, float):
        return None
    if isinstance(argument, (list, tuple)):  # numbers in lists are sizes and places
        return bool(argument), *{_kind(item) for item in argument if isinstance(item, Tensor)}
    return argument


def tensors(args: Iterable) -> list[Tensor]:
    lists = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in args)
    return [item for items in lists for item in items if isinstance(item, Tensor)]


def copy_of(args: Iterable) -> tuple:
    """The arguments with tensors of their own, laid out alike."""
    return tuple(_map(argument, lambda tensor: tensor.detach().clone()) for argument in args)


def _map(argument: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_map(item, function) for item in argument]
    return function(argument) if isinstance(argument, Tensor) else argument


def _without_dtypes(args: Iterable) -> tuple:
    """C++ knows dtypes by their numbers."""
    return tuple(SCALAR_TYPES[arg] if isinstance(arg, torch.dtype) else arg for arg in args)


def load(path: str | Path) -> list[Call]:
    return torch.load(path, weights_only=True)


def replay(
    schemas: Sequence[str],
    calls: Sequence[Call],
    libraries: Sequence[Path],
    sanitize: str,
    folder: Path,
) -> subprocess.CompletedProcess[str]:
    """Runs calls in a C++ program without Python.

    Args:
        schemas: of the operators, without their namespace.
        calls: what to run.
        libraries: built with `sanitize`.
        sanitize: "address" or "thread".
        folder: for the file with the calls.
    """
    program = build([HERE / "replay.cpp"], ROOT / "build/harness/replay", shared=False)
    file = folder / "calls.pt"
    torch.save((list(schemas), [(name, _without_dtypes(args)) for name, args in calls]), file)
    for _ in range(5):
        done = subprocess.run(
            [str(program), str(file), *map(str, libraries)],
            env=os.environ | preload(sanitize),
            capture_output=True,
            text=True,
        )
        if NO_PLACE not in done.stderr:
            break
    return done
