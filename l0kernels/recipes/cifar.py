# SPDX-License-Identifier: Apache-2.0
"""Readers of CIFAR-10 and CIFAR-100: the official binary files, and JPEG files in ``.npz``."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0kernels.recipes.errors import InputError
from l0kernels.recipes.images import Images, digest, moments
from l0kernels.recipes.pictures import WORKERS, open_picture, to_tensor

COLOUR = (3, 32, 32)
PIXELS = 3 * 32 * 32
CROPS = 4
Pairs = tuple[Tensor, Tensor]


def load_cifar(folder: Path) -> Images:
    """CIFAR images, normalised by the mean and deviation of the training images' channels.

    Training images are moved by up to 4 pixels and mirrored or not. Read are the official binary
    files of CIFAR-10 (``data_batch_1.bin`` and so on) and CIFAR-100 (``train.bin``, fine labels),
    and ``train.npz`` with JPEG files, see `read_npz`.

    Args:
        folder: holds the files, or a folder ``cifar-10-batches-bin``, ``cifar-100-binary`` or
            ``cifar10-jpeg`` that does.

    Raises:
        InputError: nothing is there, or more than one; a file is missing or not what it should be.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with CIFAR files, got none there")
    found = [
        (home, kind)
        for kind, (first, inside, _, _) in KINDS.items()
        for home in (folder, folder / inside)
        if (home / first).is_file()
    ]
    if len(found) != 1:
        expected = ", ".join(first for first, *_ in KINDS.values())
        got = " and ".join(str(home) for home, _ in found) or "none"
        raise InputError(f"{folder}: expected one of {expected} in it, got {got}")
    ((home, kind),) = found
    _, _, classes, read = KINDS[kind]
    train, test = read(home)
    _check_labels(home, classes, train[1], test[1])
    mean, std = moments(train[0])
    parts = *train, *test
    more: dict[str, Any] = {"classes": classes, "mean": mean, "std": std, "crops": CROPS}
    return Images(kind, *parts, digest(*parts), **more)


def _read_cifar10(home: Path) -> tuple[Pairs, Pairs]:
    batches = [read_records(home / f"data_batch_{n}.bin", 1) for n in range(1, 6)]
    images, labels = zip(*batches, strict=True)
    return (torch.cat(images), torch.cat(labels)), read_records(home / "test_batch.bin", 1)


def _read_cifar100(home: Path) -> tuple[Pairs, Pairs]:
    return read_records(home / "train.bin", 2), read_records(home / "test.bin", 2)


def _read_jpeg(home: Path) -> tuple[Pairs, Pairs]:
    return read_npz(home / "train.npz"), read_npz(home / "test.npz")


# First file, folder, classes, reader.
KINDS: dict[str, tuple[str, str, int, Callable[[Path], tuple[Pairs, Pairs]]]] = {
    "CIFAR-10": ("data_batch_1.bin", "cifar-10-batches-bin", 10, _read_cifar10),
    "CIFAR-100": ("train.bin", "cifar-100-binary", 100, _read_cifar100),
    "CIFAR-10 (JPEG)": ("train.npz", "cifar10-jpeg", 10, _read_jpeg),
}


def read_records(path: Path, labels: int) -> Pairs:
    """Read one official binary file: records of labels and 3,072 pixels, red, green, blue.

    Args:
        path: the file.
        labels: bytes of labels in a record, of which the last counts.

    Returns:
        uint8 [N, 3, 32, 32] and int64 [N].

    Raises:
        InputError: it is missing, or its size is no multiple of a record's.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from error
    size = labels + PIXELS
    if not content or len(content) % size:
        raise InputError(
            f"{path}: expected records of {size:,} bytes, got {len(content):,} bytes in all"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
    images = records[:, labels:].reshape(-1, *COLOUR)
    return images, records[:, labels - 1].long()


def read_npz(path: Path) -> Pairs:
    """Read JPEG files that lie one after another in ``jpeg``, with ``offset`` and ``label``.

    Args:
        path: ``.npz`` of ``jpeg`` (uint8), ``offset`` (int64 [N + 1]: image i is
            ``jpeg[offset[i]:offset[i + 1]]``) and ``label`` (uint8 [N]).

    Returns:
        uint8 [N, 3, 32, 32] and int64 [N].

    Raises:
        InputError: it is missing or damaged, or an image is no picture of 32x32.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            jpeg, offset, label = (arrays[name] for name in ("jpeg", "offset", "label"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: expected arrays jpeg, offset, label, got: {reason}") from error
    fits = offset.ndim == jpeg.ndim == label.ndim == 1 and len(offset) == len(label) + 1
    if not fits or not len(label) or offset[-1] > len(jpeg) or (np.diff(offset) <= 0).any():
        raise InputError(f"{path}: expected offsets of {len(label):,} images in jpeg, got others")

    def read(number: int) -> Any:
        content = jpeg[offset[number] : offset[number + 1]].tobytes()
        picture = open_picture(content, f"{path}, image {number}")
        if picture.size != COLOUR[1:]:
            got = "x".join(map(str, picture.size))
            raise InputError(f"{path}, image {number}: expected 32x32 pixels, got {got}")
        return picture

    with ThreadPoolExecutor(WORKERS) as pool:
        images = to_tensor(list(pool.map(read, range(len(label)))))
    return images.contiguous(), torch.from_numpy(label.astype(np.int64))


def _check_labels(home: Path, classes: int, *labels: Tensor) -> None:
    highest = max(int(part.max()) for part in labels)
    if highest >= classes:
        raise InputError(f"{home}: expected labels 0 to {classes - 1}, got {highest}")
