# SPDX-License-Identifier: Apache-2.0
"""The operator library `l0kernels` and the table of what runs each operator."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from l0kernels import _ext

NAMESPACE = "l0kernels"
LIB = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, dict[str, tuple[bool, str]]] = {}
"""What can run each public operator: {op: {implementation: (available, why not)}}."""


def add_op(name: str) -> None:
    """Enters a public operator in `OPS`, so that `info` lists what can run it."""
    cpp = _ext.cpp_available()
    OPS[name] = {
        "reference": (True, ""),
        "cpp": (cpp, "" if cpp else _ext.why_not()),
        "triton": (False, "this version has no Triton kernels"),
        "cuda": (False, "this version has no CUDA kernels"),
    }


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
    run = _python_kernel(python)
    for key in ("CPU", "CUDA"):
        # A second registration would silently replace the compiled kernel.
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            LIB.impl(name, run, key)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _python_kernel(function: Callable) -> Callable:
    """Wraps an implementation so that autograd cannot see through the raw operator."""

    @wraps(function)
    def run(*args, **kwargs):
        _ext.note_missing()
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
