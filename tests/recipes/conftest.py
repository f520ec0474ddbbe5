# SPDX-License-Identifier: Apache-2.0
"""A tiny data set in IDX files, and short plans on it."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l0kernels.recipes import data, published
from l0kernels.recipes.loop import Plan

TRAIN, TEST = 70, 30


def idx_bytes(values: np.ndarray) -> bytes:
    """The content of an IDX file of unsigned bytes."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_images(folder: Path, packed: bool = False) -> None:
    """The four files of a data set whose classes are bright squares at different places."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            top, left = 4 + 10 * (label // 5), 1 + 5 * (label % 5)
            image[top : top + 8, left : left + 5] += 150
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(values)
            if packed:
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder with a tiny data set."""
    folder = tmp_path / "squares"
    write_images(folder)
    return folder


@pytest.fixture
def make_plan(idx_folder: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Makes a plan of 3 steps per epoch; keywords replace its fields or its settings."""

    def make(name: str = "lenet5-hc", out: str = "run", **changes: Any) -> Plan:
        recipe = published.find(name)
        settings = replace(
            recipe.settings("digits"),
            batch=30,
            epochs=changes.pop("epochs", 2),
            **changes.pop("settings", {}),
        )
        plan = Plan(
            recipe=recipe,
            settings=settings,
            images=data.load(idx_folder),
            seed=0,
            compare=True,
            reference_layout="channels_last",
            save_every=1,
            folder=tmp_path / out,
        )
        return replace(plan, **changes)

    return make
