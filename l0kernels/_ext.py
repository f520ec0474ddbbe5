# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled ops and knows why they are missing when they are.

The libraries have no Python binding: loading one only adds implementations to
`torch.ops.l0kernels`. The CUDA ops load without a GPU too, and touch none when they do.
"""

import functools
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_BUILD_INFO = _PACKAGE / "_build_info.json"
_OLDEST_GPU = (8, 0)
_LOG = logging.getLogger("l0kernels")


@dataclass(frozen=True)
class Library:
    """One compiled library.

    Args:
        title: what it holds.
        file: where the build puts it.
        reason: the field of the build's record that says why it was not built.
        choice: the value of L0K_BUILD that builds it.
    """

    title: str
    file: Path
    reason: str
    choice: str


LIBRARIES = {
    "cpp": Library("C++ CPU ops", _PACKAGE / "_C.so", "reason", "cpu"),
    "cuda": Library("CUDA ops", _PACKAGE / "_C_cuda.so", "cuda_reason", "cuda"),
}


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build recorded: versions, compilers, flags; empty if nothing was built."""
    try:
        return json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


@functools.cache
def load(name: str) -> str:
    """Loads "cpp" or "cuda" once; never raises.

    Returns:
        An empty string when its ops are registered, else the reason why they are not.
    """
    info, library = build_info(), LIBRARIES[name]
    if not library.file.exists():
        return f"not built: {info.get(library.reason) or 'the package was never installed'}"
    try:
        torch.ops.load_library(str(library.file))
    except OSError as error:
        built_for = info.get("torch", "an unknown version")
        return f"built for torch {built_for}, found {torch.__version__}: {error}"
    return ""


def cpp_available() -> bool:
    """Whether the C++ CPU ops are loaded."""
    return not load("cpp")


def why_not() -> str:
    """Why the C++ CPU ops are missing; an empty string when they are loaded."""
    return load("cpp")


@functools.cache
def why_no_gpu() -> str:
    """Why CUDA kernels cannot run here, if they are built; an empty string if they can.

    It asks the driver, so nothing calls it before a GPU is wanted or `info` is.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return why_no_device()


def why_no_device() -> str:
    """Why no kernel of NVIDIA's or AMD's can run here; an empty string if one can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < _OLDEST_GPU:
        return "expected a GPU of compute capability 8.0 or newer; got {}.{}".format(*found)
    return ""


@functools.cache
def note_triton() -> None:
    """Logs once per process that Triton stands in for the CUDA ops, and why."""
    _LOG.info("the CUDA ops are missing (%s); Triton kernels run instead", load("cuda"))


@functools.cache
def note_missing(name: str) -> None:
    """Says once per process that PyTorch ops stand in for the compiled ones, and why."""
    reason, library = load(name), LIBRARIES[name]
    if reason:
        warnings.warn(
            f"the {library.title} are missing ({reason}); slower PyTorch ops run instead. "
            f"Installing again with L0K_BUILD={library.choice} builds them or says what that needs",
            stacklevel=2,
        )
