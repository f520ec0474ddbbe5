# SPDX-License-Identifier: Apache-2.0
"""Reader of a folder that has a folder of pictures for each class, as ImageNet has."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from l0kernels.recipes.errors import InputError
from l0kernels.recipes.images import Images
from l0kernels.recipes.pictures import Files

PARTS = ("train", "val")
ENDINGS = (".jpg", ".jpeg", ".png")
# Of ImageNet's training images, as commonly used.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_folder(folder: Path, side: int) -> Images:
    """Pictures in ``train/<class>/`` and ``val/<class>/``; classes are numbered by name.

    They stay in their files. To train, random parts (8 to 100 % of the area, width to height from
    3/4 to 4/3, mirrored or not) are stretched to a square; to test, the middle 7/8 are.

    Args:
        folder: has the folders ``train`` and ``val``.
        side: pixels of a square.

    Raises:
        InputError: a folder is missing or has no pictures, or the two have other classes.
    """
    classes = {part: _classes(folder / part) for part in PARTS}
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise InputError(
            f"{folder}: expected the same classes in train and val, got {odd[:3]} in one"
        )
    pairs, digest = [], hashlib.sha256()
    for part in PARTS:
        paths, labels = [], []
        for label, name in enumerate(classes[part]):
            inside = sorted((folder / part / name).iterdir())
            own = [path for path in inside if path.suffix.lower() in ENDINGS]
            paths += own
            labels += [label] * len(own)
        if not paths:
            raise InputError(f"{folder / part}: expected pictures ({', '.join(ENDINGS)}), got none")
        for path in paths:
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        pairs.append((Files(paths, side), torch.tensor(labels)))
    (train_x, train_y), (test_x, test_y) = pairs
    return Images(
        folder.resolve().name,
        train_x,
        train_y,
        test_x,
        test_y,
        digest.hexdigest(),
        classes=len(classes["train"]),
        mean=MEAN,
        std=STD,
    )


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with one folder of pictures for each class")
    return sorted(path.name for path in folder.iterdir() if path.is_dir())
