# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: plain values and tensors, written whole."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from l0kernels._files import write_whole
from l0kernels.recipes.errors import InputError

FORMAT = "l0kernels train"
VERSION = 2
KINDS: dict[str, type] = {
    "recipe": str,
    "seed": int,
    "settings": dict,
    "data": str,
    "epoch": int,
    "arms": dict,
    "history": list,
}


def save(path: Path, content: dict[str, Any]) -> None:
    """Save a checkpoint of plain numbers, strings, lists, dicts and tensors.

    Args:
        path: the file; it is replaced as a whole.
        content: the entries named in ``KINDS``.
    """
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_whole(path, lambda file: torch.save(whole, file))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint; nothing in it is run (``weights_only``).

    Raises:
        InputError: the file is missing, damaged or not a checkpoint of this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a checkpoint, got no such file") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: expected a whole checkpoint, got: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: expected a checkpoint of '{FORMAT}', got something else")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: expected version {VERSION}, got {content.get('version')!r}")
    for key, kind in KINDS.items():
        if not isinstance(content.get(key), kind):
            got = type(content.get(key)).__name__
            raise InputError(f"{path}: expected {key!r} to be a {kind.__name__}, got {got}")
    if len(content["history"]) != content["epoch"]:
        raise InputError(
            f"{path}: expected a history of {content['epoch']} epochs, "
            f"got {len(content['history'])}"
        )
    return content


def same(path: Path, what: str, expected: Any, got: Any) -> None:
    """Check that a checkpoint belongs to the run that asks for it.

    Raises:
        InputError: it does not.
    """
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in expected:
            same(path, f"{what} {key}", expected[key], got.get(key))
    elif expected != got:
        raise InputError(f"{path}: expected {what} {expected!r}, got {got!r} in the checkpoint")
