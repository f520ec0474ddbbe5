# SPDX-License-Identifier: Apache-2.0
"""Sizes of the blocks in which the Triton kernels of gated layers compute.

They depend on what the host knows of a problem, its place below, and on nothing that is measured
while a network trains: `l0kernels tune` writes a table of what was faster on a GPU, and without one
for the GPU at hand the sizes below hold.
"""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

VERSION = 1
"""Of tables: what the kernels make of sizes has changed where it has."""
FOLDER = Path(__file__).resolve().parents[2] / "tuned"

Place = tuple[str, str]
"""The kernel, "layer" (y and dx) or "weight" (its gradient), and the kind of problem."""


class Tiles(NamedTuple):
    """Rows, columns and depth of what a program computes at once, warps, pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


HEURISTICS: dict[Place, Tiles] = {
    ("layer", "float32"): Tiles(64, 64, 16, 8, 2),
    ("layer", "in place"): Tiles(64, 32, 32, 4, 2),
    ("layer", "uneven"): Tiles(64, 64, 32, 8, 2),
    ("layer", "narrow"): Tiles(128, 64, 64, 8, 3),
    ("layer", "wide"): Tiles(128, 128, 64, 8, 3),
    ("weight", "float32"): Tiles(64, 64, 16, 8, 2),
    ("weight", "uneven"): Tiles(64, 64, 32, 4, 2),
    ("weight", "narrow"): Tiles(64, 64, 64, 4, 3),
    ("weight", "wide"): Tiles(128, 128, 64, 8, 3),
}
_tried: dict[Place, Tiles] = {}


def tiles_at(place: Place, device: torch.device) -> Tiles:
    """The sizes for a kind of problem on a device."""
    if place in _tried:
        return _tried[place]
    return table_of(name_of(device)).get(place, HEURISTICS[place])


@contextmanager
def trying(place: Place, tiles: Tiles) -> Iterator[None]:
    """Has kernels take these sizes, whatever a table says."""
    _tried[place] = tiles
    try:
        yield
    finally:
        del _tried[place]


@cache
def name_of(device: torch.device) -> str:
    """What tables call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_of(name: str, folder: Path) -> Path:
    """The table of a device."""
    return folder / f"{'-'.join(re.findall('[a-z0-9.]+', name.lower()))}.json"


@cache
def table_of(name: str) -> dict[Place, Tiles]:
    """The table of a device that comes with the package; empty where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = file_of(name, FOLDER)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            warnings.warn(
                f"{path}: expected version {VERSION}, got {content['version']}; it is not used. "
                "Run l0kernels tune.",
                stacklevel=2,
            )
            return {}
        table = {(kernel, kind): Tiles(*sizes) for kernel, kind, *sizes in content["tiles"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a table of l0kernels tune, got {error!r}") from error
    unknown = [place for place in table if place not in HEURISTICS]
    if unknown:
        raise ValueError(f"{path}: expected places of {list(HEURISTICS)}, got {unknown}")
    return table
