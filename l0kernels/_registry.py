# SPDX-License-Identifier: Apache-2.0
"""The operator library `l0kernels` and the table of what runs each operator."""

import importlib
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from l0kernels import _config, _ext, _triton

NAMESPACE = "l0kernels"
LIB = torch.library.Library(NAMESPACE, "DEF")
# The dispatcher has one kernel per operator and device, which is the compiled one: Triton's are
# operators of their own.
TRITON_NAMESPACE = "l0kernels_triton"
_TRITON_LIB = torch.library.Library(TRITON_NAMESPACE, "DEF")
_TRITON_HANDLES: dict[OpOverload, OpOverload] = {}
_OPS_FOLDER = Path(__file__).resolve().parent / "ops"
_COMPILED = {"cpp": "CPU", "cuda": "CUDA"}  # what a library serves, as the dispatcher names it
OPS: dict[str, dict[str, frozenset[str]]] = {}
"""Each public operator's raw operators: {op: {raw operator: libraries that implement it}}."""


def add_op(name: str) -> None:
    """Enters a public operator in `OPS`; the raw operators defined from now on are its own."""
    OPS[name] = {}


def what_runs(name: str) -> dict[str, tuple[bool, str]]:
    """What can run a public operator here: {implementation: (available, why not)}."""
    reasons = {"reference": ""}
    for library in _COMPILED:
        lacking = sorted(raw for raw, found in OPS[name].items() if library not in found)
        reason = _ext.load(library)
        if not reason and lacking:
            reason = f"not written in this version: {', '.join(lacking)}"
        reasons[library] = reason or _config.why_unavailable(library)
    reasons["triton"] = why_no_triton(name)
    return {impl: (not reasons[impl], reasons[impl]) for impl in _config.IMPLS if impl in reasons}


@cache
def why_no_triton(name: str) -> str:
    """Why Triton cannot run a public operator here; an empty string if it can."""
    if not (_OPS_FOLDER / name / "triton.py").exists():
        return "not written in this version"
    return _config.why_unavailable("triton")


def chosen(handle: OpOverload) -> OpOverload:
    """What to call for a raw operator: Triton's if it is asked for, else the given one.

    Among all others the dispatcher chooses, by device and by what is built.
    """
    return _TRITON_HANDLES[handle] if _config.current_impl() == "triton" else handle


def define(schema: str, *, fake: Callable, python: Callable) -> Any:
    """Defines one raw operator and returns its handle, to be called through `chosen`.

    Args:
        schema: the operator's name and signature, without the namespace.
        fake: gives outputs of the right shape, dtype and strides without computing.
        python: the implementation in PyTorch operations, for every device the compiled libraries
            do not serve. The function of the same name in the operator's `triton` module, where
            there is one, goes before it on GPUs.
    """
    op = next(reversed(OPS))
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    LIB.define(schema)
    torch.library.register_fake(qualified, fake, lib=LIB)
    compiled = set()
    for library, key in _COMPILED.items():
        _ext.load(library)
        # A second registration would silently replace the compiled kernel.
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            compiled.add(library)
        else:
            LIB.impl(name, _stand_in(op, name, library, python), key)
    OPS[op][name] = frozenset(compiled)
    handle = getattr(getattr(torch.ops, NAMESPACE), name).default
    _TRITON_HANDLES[handle] = _define_triton(schema, op, name, fake)
    return handle


def _define_triton(schema: str, op: str, name: str, fake: Callable) -> OpOverload:
    _TRITON_LIB.define(schema)
    torch.library.register_fake(f"{TRITON_NAMESPACE}::{name}", fake, lib=_TRITON_LIB)
    for key in _COMPILED.values():
        _TRITON_LIB.impl(name, _triton_kernel(op, name, key), key)
    return getattr(getattr(torch.ops, TRITON_NAMESPACE), name).default


def _triton_kernel(op: str, name: str, key: str) -> Callable:
    def run(*args):
        reason = why_no_triton(op)
        if not reason and key == "CPU" and not _triton.interpreted():
            reason = "it takes CPU tensors only where TRITON_INTERPRET=1 is set"
        if reason:
            raise _config.refuse("triton", reason)
        return _triton_function(op, name)(*args)

    return run


@cache
def _triton_function(op: str, name: str) -> Callable:
    """Imports Triton, which takes a while, when a kernel is wanted."""
    module = importlib.import_module(f"l0kernels.ops.{op}.triton")
    return torch.no_grad()(getattr(module, name))


def _stand_in(op: str, name: str, library: str, function: Callable) -> Callable:
    """Stands in for a library; autograd cannot see through it."""

    @wraps(function)
    def run(*args, **kwargs):
        asked = _config.current_impl()
        if asked not in ("auto", "reference"):
            raise _config.refuse(asked, f"it has no {name} for {_COMPILED[library]} tensors")
        if library == "cuda" and not why_no_triton(op):
            _ext.note_triton()
            return _triton_function(op, name)(*args, **kwargs)
        _ext.note_missing(library)
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def once_differentiable(backward: Callable) -> Callable:
    """PyTorch's decorator of the same name, without its cost where no graph is made."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx, *grads):
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
