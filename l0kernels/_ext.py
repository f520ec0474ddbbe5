# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled CPU ops and knows why they are missing when they are.

The library has no Python binding: loading it only adds implementations to `torch.ops.l0kernels`.
"""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = _PACKAGE / "_C.so"
_BUILD_INFO = _PACKAGE / "_build_info.json"


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build recorded: versions, compiler, flags; empty if nothing was built."""
    try:
        return json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


@functools.cache
def load() -> str:
    """Load the C++ CPU ops once; never raises.

    Returns:
        An empty string when they are loaded, else the reason why they are not.
    """
    info = build_info()
    if not _LIBRARY.exists():
        return f"not built: {info.get('reason') or 'the package was never installed'}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        built_for = info.get("torch", "an unknown version")
        return f"built for torch {built_for}, found {torch.__version__}: {error}"
    return ""


def cpp_available() -> bool:
    """Whether the C++ CPU ops are loaded."""
    return not load()


def why_not() -> str:
    """Why the C++ CPU ops are missing; an empty string when they are loaded."""
    return load()


@functools.cache
def note_missing() -> None:
    """Say once per process that PyTorch ops stand in for the C++ ones, and why."""
    if why_not():
        warnings.warn(
            f"the C++ CPU ops are missing ({why_not()}); slower PyTorch ops run instead. "
            "Installing again with L0K_BUILD=cpu builds them or says what that needs",
            stacklevel=2,
        )
