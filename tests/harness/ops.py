# SPDX-License-Identifier: Apache-2.0
"""The raw operators of every CUDA source, on CPU tensors, as `torch.ops.l0kernels_harness`."""

import atexit
import ctypes
import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch._ops import OpOverload

import l0kernels.ops
from harness.build import ROOT, BuildError, build
from harness.calls import Recorder

NAMESPACE = "l0kernels_harness"
SANITIZE = os.environ.get("L0K_HARNESS_SANITIZE") or None
"""What the libraries are compiled with, see `build`; the process must have it preloaded."""

_RECORD = os.environ.get("L0K_HARNESS_RECORD")  # the file where calls go
_RECORDER = Recorder()
if _RECORD:
    atexit.register(_RECORDER.save, _RECORD)

_LOADED: dict[str, ctypes.CDLL] = {}
_schedule = int(os.environ.get("L0K_SCHEDULE_SEED", "0"))
_LIB = torch.library.Library(NAMESPACE, "DEF")


def stems() -> list[str]:
    """The names of all operators, each of which has a module, and maybe a CUDA source."""
    return [module.name for module in pkgutil.iter_modules(l0kernels.ops.__path__)]


def source(stem: str) -> Path:
    return ROOT / "csrc" / "cuda" / f"{stem}_cuda.cu"


def has_source(stem: str) -> bool:
    return source(stem).exists()


def module_of(stem: str) -> ModuleType:
    return importlib.import_module(f"l0kernels.ops.{stem}.op")


@functools.cache
def raw_ops(stem: str) -> list[tuple[str, OpOverload, Callable, Callable]]:
    """Of each raw operator: the module's name for its handle, the handle, its fake, its stand-in.

    By the modules' convention: _FORWARD, _forward_fake, _forward_python.
    """
    module = module_of(stem)
    return [
        (
            name,
            value,
            getattr(module, f"{name.lower()}_fake"),
            getattr(module, f"{name.lower()}_python"),
        )
        for name, value in vars(module).items()
        if isinstance(value, OpOverload)
    ]


@functools.cache
def load(stem: str) -> ctypes.CDLL:
    """Builds and loads the library of one operator.

    Raises:
        BuildError: its source does not compile.
    """
    path = library(stem)
    for schema in schemas(stem):
        _LIB.define(schema)
    for _, handle, fake, _ in raw_ops(stem):
        torch.library.register_fake(f"{NAMESPACE}::{raw_name(handle)}", fake, lib=_LIB)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.l0k_launches.restype = ctypes.c_int64
    loaded.l0k_schedule.argtypes = [ctypes.c_int64]
    loaded.l0k_schedule(_schedule)
    _LOADED[stem] = loaded
    return loaded


def schemas(stem: str) -> list[str]:
    """Of the raw operators, without a namespace."""
    return [str(handle._schema).removeprefix("l0kernels::") for _, handle, _, _ in raw_ops(stem)]


def library(stem: str, sanitize: str | None = SANITIZE) -> Path:
    """Builds the library of one operator.

    Raises:
        BuildError: its source does not compile.
    """
    built = _attempt(stem, sanitize)
    if isinstance(built, BuildError):
        raise built
    return built


@functools.cache
def _attempt(stem: str, sanitize: str | None) -> Path | BuildError:
    # What does not compile is not tried again.
    out = ROOT / f"build/harness/{sanitize or 'plain'}/{stem}.so"
    try:
        return build([source(stem)], out, sanitize)
    except BuildError as error:
        return error


def build_libraries(wanted: Collection[str], sanitize: str | None = SANITIZE) -> None:
    """Builds several at once; errors wait until the library is loaded."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda stem: _attempt(stem, sanitize), wanted))


def raw_name(handle: OpOverload) -> str:
    return handle._schema.name.split("::")[1]


def patches(loaded: Collection[str]) -> Iterator[tuple[ModuleType, str, Callable]]:
    """What to set where so that the operators run their CUDA sources: module, name, handle.

    Handles of operators in `loaded` are PyTorch's own; others load the library when called.
    """
    for stem in filter(has_source, stems()):
        if stem in loaded:
            load(stem)
        for name, handle, *_ in raw_ops(stem):
            yield module_of(stem), name, _own(handle) if stem in loaded else _late(stem, handle)


def _own(handle: OpOverload) -> Callable:
    name = raw_name(handle)
    function = getattr(getattr(torch.ops, NAMESPACE), name).default
    return _RECORDER.around(name, function) if _RECORD else function


def _late(stem: str, handle: OpOverload) -> Callable:
    def call(*args):
        load(stem)
        return _own(handle)(*args)

    return call


def set_schedule(seed: int) -> None:
    """Restarts the random order of threads and blocks; negative: in order."""
    global _schedule
    _schedule = seed
    for library in _LOADED.values():
        library.l0k_schedule(seed)


def launches(reset: bool = False) -> dict[str, int]:
    """The kernels each operator has launched since the last reset."""
    return {stem: library.l0k_launches(reset) for stem, library in _LOADED.items()}
