# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs the operators."""

import os
from types import TracebackType

import torch
from torch import Tensor

from l0kernels import _ext, _triton

IMPLS = ("auto", "reference", "cpp", "triton", "cuda")
_SERVES = {"cpp": "cpu", "cuda": "cuda"}  # the tensors that a compiled library takes


def _check_name(name: str, source: str) -> str:
    if name not in IMPLS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLS)}; got {name!r}")
    return name


# A plain module variable, read once from the environment: torch.compile guards on it.
_impl = _check_name(os.environ.get("L0K_IMPL") or "auto", "L0K_IMPL")


def current_impl() -> str:
    """Returns what `use_impl` or `L0K_IMPL` asks for, by default "auto"."""
    return _impl


def why_unavailable(name: str) -> str:
    """Returns why an implementation cannot run here, or "" if it can.

    Asked about "cuda" or "triton" for the first time, it looks for a GPU.
    """
    if name == "cpp":
        return _ext.load("cpp")
    if name == "cuda":
        return _ext.load("cuda") or _ext.why_no_gpu()
    return _triton.why_not() if name == "triton" else ""


def refuse(name: str, reason: str) -> RuntimeError:
    """The error about an implementation that was asked for but cannot run."""
    return RuntimeError(f"implementation {name!r} was asked for but cannot run: {reason}")


def check_available(name: str) -> None:
    """Raises RuntimeError with the reason if an implementation cannot run here."""
    reason = why_unavailable(name)
    if reason:
        raise refuse(name, reason)


def reference_asked(tensor: Tensor) -> bool:
    """Tells an operator whether to run the reference; raises if the one asked for cannot run.

    Args:
        tensor: any argument of the operator; all are on one device.
    """
    if _impl == "auto":
        return False
    if _impl == "reference":
        return True
    if not torch.compiler.is_compiling():  # the looking around here cannot be traced
        check_available(_impl)
    device = tensor.device.type
    if _SERVES.get(_impl, device) != device:
        raise refuse(_impl, f"it takes {_SERVES[_impl]} tensors; got {device}")
    return False


class use_impl:  # noqa: N801 - reads as a function: `with use_impl("reference"):`
    """Runs the operators and gated layers inside a `with` block by one implementation.

    Args:
        name: "auto" (the compiled libraries; for what they lack on a GPU Triton, else PyTorch
            operations), "reference" (dense PyTorch with masks, the same random draws), "cpp"
            (CPU tensors), "cuda" (the compiled library, CUDA tensors) or "triton" (CUDA tensors;
            CPU tensors where TRITON_INTERPRET=1 is set). Process-wide, not per thread. Backward
            passes run by what is asked for when they run.

    Raises:
        ValueError: unknown name.
        RuntimeError: the implementation cannot run here, or, from an operator, not on such
            tensors; the message says why.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name(name, "use_impl")
        check_available(name)
        self._before: list[str] = []

    def __enter__(self) -> None:
        global _impl
        self._before.append(_impl)
        _impl = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _impl
        _impl = self._before.pop()
