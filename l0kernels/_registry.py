# SPDX-License-Identifier: Apache-2.0
"""The operator library `l0kernels` and the table of what runs each operator."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from l0kernels import _config, _ext

NAMESPACE = "l0kernels"
LIB = torch.library.Library(NAMESPACE, "DEF")
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
    reasons["triton"] = _config.why_unavailable("triton")
    return {impl: (not reasons[impl], reasons[impl]) for impl in _config.IMPLS if impl in reasons}


def define(schema: str, *, fake: Callable, python: Callable) -> Any:
    """Defines one raw operator and returns its handle.

    Args:
        schema: the operator's name and signature, without the namespace.
        fake: gives outputs of the right shape, dtype and strides without computing.
        python: the implementation in PyTorch operations, for every device the compiled libraries
            do not serve.
    """
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
            LIB.impl(name, _python_kernel(python, name, library), key)
    OPS[next(reversed(OPS))][name] = frozenset(compiled)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _python_kernel(function: Callable, name: str, library: str) -> Callable:
    """Stands in for a library; autograd cannot see through it."""

    @wraps(function)
    def run(*args, **kwargs):
        asked = _config.current_impl()
        if asked not in ("auto", "reference"):
            raise RuntimeError(
                f"implementation {asked!r} was asked for but cannot run: it has no {name} for "
                f"{_COMPILED[library]} tensors"
            )
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
