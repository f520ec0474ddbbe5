# SPDX-License-Identifier: Apache-2.0
"""Errors of the recipes."""

import importlib
from types import ModuleType


class InputError(ValueError):
    """Input that cannot be used: a file, a folder or an option; the message is one line."""


def optional(module: str, needed_for: str) -> ModuleType:
    """Import a package of the ``train`` extra.

    Args:
        module: dotted name.
        needed_for: what it is for, as it reads in the error.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        raise InputError(
            f"{needed_for}: expected the package {missing!r}, which is not installed; "
            f"pip install 'l0kernels[train]'"
        ) from error
