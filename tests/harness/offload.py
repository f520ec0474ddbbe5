# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU, for tests whose tensors are on the CPU.

Arguments are moved with their storages, so that strides, offsets and what aliases what stay;
results and arguments that an operator writes to come back the same way.
"""

import importlib
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from harness import ops
from l0kernels import _ext, _triton

IMPLS = ("cuda", "triton") if torch.cuda.is_available() else ()
"""The implementations that run on the GPU of this machine, none where there is no GPU."""

_LIBRARIES: dict[str, torch.library.Library] = {}


def why_not(impl: str) -> str:
    """Why an implementation cannot run on the GPU; an empty string if it can."""
    return _ext.load("cuda") or _ext.why_no_gpu() if impl == "cuda" else _triton.why_not()


def has_source(impl: str, stem: str) -> bool:
    """Whether an operator has kernels of this implementation."""
    if impl == "cuda":
        return ops.has_source(stem)
    return (ops.ROOT / "l0kernels" / "ops" / stem / "triton.py").exists()


class Moved:
    """Copies of tensors on another device; tensors that share a storage share its copy."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.storages: dict[int, Any] = {}
        self.kept: list[Tensor] = []

    def __call__(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self(item) for item in argument]
        if not isinstance(argument, Tensor):
            return argument
        storage = argument.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.kept.append(argument)  # its address is not given to another
            copied = torch.empty(0, dtype=torch.uint8, device=self.device)
            whole = torch.empty(0, dtype=torch.uint8, device=argument.device).set_(storage)
            self.storages[key] = copied.set_(whole.to(self.device, copy=True)).untyped_storage()
        there = torch.empty(0, dtype=argument.dtype, device=self.device)
        place = (argument.storage_offset(), argument.shape, argument.stride())
        return there.set_(self.storages[key], *place)


def offloaded(handle: OpOverload, kernel: Callable) -> Callable:
    """The operator for CPU tensors, run by a kernel that takes tensors of the GPU."""
    written = [
        number
        for number, argument in enumerate(handle._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def run(*args):
        move = Moved("cuda")
        there = [move(argument) for argument in args]
        results = Moved("cpu")(kernel(*there))
        for number in written:
            if args[number] is not None:
                args[number].copy_(there[number])
        several = len(handle._schema.returns) > 1
        return tuple(results) if several else results

    return run


def patches(impl: str, stem: str) -> Iterator[tuple[ModuleType, str, Callable]]:
    """What to set where so that an operator runs on the GPU: module, name, handle."""
    for name, handle, fake, _ in ops.raw_ops(stem):
        yield ops.module_of(stem), name, _registered(impl, stem, handle, fake)


def patches_of(impl: str, stems: Collection[str]) -> Iterator[tuple[ModuleType, str, Callable]]:
    """`patches` of several operators, without those that this implementation has no kernels of."""
    for stem in stems:
        if has_source(impl, stem):
            yield from patches(impl, stem)


def _registered(impl: str, stem: str, handle: OpOverload, fake: Callable) -> OpOverload:
    namespace, name = f"l0kernels_on_{impl}", ops.raw_name(handle)
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "DEF")
    space = getattr(torch.ops, namespace)
    if not hasattr(space, name):
        library = _LIBRARIES[namespace]
        library.define(str(handle._schema).removeprefix("l0kernels::"))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        kernel: Callable = handle
        if impl == "triton":
            kernel = getattr(importlib.import_module(f"l0kernels.ops.{stem}.triton"), name)
        library.impl(name, torch.no_grad()(offloaded(handle, kernel)), "CPU")
        # Operators that stand in for others call them with tensors that are there already.
        library.impl(name, torch.no_grad()(kernel), "CUDA")
    return getattr(space, name).default
