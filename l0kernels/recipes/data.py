# SPDX-License-Identifier: Apache-2.0
"""Readers of data sets, by the shape of image that a recipe takes."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.recipes.cifar import COLOUR, load_cifar
from l0kernels.recipes.errors import InputError, optional
from l0kernels.recipes.folder import load_folder
from l0kernels.recipes.images import Images, digest

SIDE = 28
CLASSES = 10
FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
UINT8 = 8
DIGITS_TEST = 450
DIGITS_SPLIT_SEED = 1797
CHUNK = 1 << 20


def load(folder: Path | None, shape: tuple[int, ...] = (1, SIDE, SIDE)) -> Images:
    """Images of the shape that a recipe takes.

    28x28 grey: the IDX files of a folder (itself or its ``mnist`` folder), or without one the
    embedded digits. 32x32 in colour: CIFAR, see `cifar.load_cifar`. Larger: a folder of pictures
    for each class, see `folder.load_folder`.

    Args:
        folder: where the data are.
        shape: of an image.

    Raises:
        InputError: the folder or a file is missing, truncated or not what it says it is.
    """
    if shape == (1, SIDE, SIDE):
        return load_digits() if folder is None else load_idx(folder)
    if folder is None:
        raise InputError(f"--data: expected a folder with images of {_size(shape)}, got none")
    return load_cifar(folder) if shape == COLOUR else load_folder(folder, shape[-1])


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[2]} in {'colour' if shape[0] == 3 else 'grey'}"


def load_digits() -> Images:
    """scikit-learn's embedded digits: 1,797 images of 8x8, resized to 28x28 (bilinear).

    1,347 train and 450 test, by one permutation that does not depend on any seed of a run.

    Raises:
        InputError: scikit-learn is not installed.
    """
    datasets = optional("sklearn.datasets", "the embedded digits")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(DIGITS_SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return _images("digits", images[train], labels[train], images[test], labels[test])


def load_idx(folder: Path) -> Images:
    """MNIST-style IDX files (train-images-idx3-ubyte and so on, plain or .gz).

    Args:
        folder: holds the four files, or a folder ``mnist`` that does.

    Raises:
        InputError: the folder or a file is missing, truncated or not what it says it is.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder with IDX files, got none there")
    home = folder if _find(folder, FILES["train images"]) else folder / "mnist"
    parts: list[Tensor] = []
    for part in ("train", "test"):
        images_at = _path(folder, home, FILES[f"{part} images"])
        labels_at = _path(folder, home, FILES[f"{part} labels"])
        images, labels = read_idx(images_at, 3), read_idx(labels_at, 1)
        _check_pair(images_at, images, labels_at, labels)
        parts.append(torch.from_numpy(images).unsqueeze(1).float().div_(255))
        parts.append(torch.from_numpy(labels).long())
    name = home.resolve().name
    return _images(name, *parts)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzip (by the name's ending ``.gz``).

    Args:
        path: the file.
        dims: number of dimensions it must have.

    Returns:
        uint8 array of the shape in the header.

    Raises:
        InputError: wrong magic number, type, dimensions or length, or damaged gzip data.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(path, file, dims)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: expected whole gzip data, got damaged data: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from error


def _parse(path: Path, file: BinaryIO | gzip.GzipFile, dims: int) -> np.ndarray:
    size = 4 + 4 * dims
    header = file.read(size)
    magic = bytes((0, 0, UINT8, dims))
    if header[:4] != magic:
        raise InputError(
            f"{path}: expected IDX magic {magic.hex()} (unsigned bytes, {dims} dimensions), "
            f"got {header[:4].hex() or 'an empty file'}"
        )
    if len(header) < size:
        raise InputError(f"{path}: expected a header of {size} bytes, got {len(header)}")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", dims, 4))
    expected = 1
    for n in shape:
        expected *= n
    values = _read_at_most(file, expected + 1)
    if len(values) != expected:
        got = "more" if len(values) > expected else f"{len(values):,}"
        raise InputError(
            f"{path}: expected {expected:,} bytes after the header for its shape {shape}, got {got}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_at_most(file: BinaryIO | gzip.GzipFile, limit: int) -> bytearray:
    # In chunks: a header that lies about its size must not make us ask for that much memory.
    values = bytearray()
    while len(values) < limit:
        chunk = file.read(min(CHUNK, limit - len(values)))
        if not chunk:
            break
        values += chunk
    return values


def _check_pair(images_at: Path, images: np.ndarray, labels_at: Path, labels: np.ndarray) -> None:
    if images.shape[1:] != (SIDE, SIDE):
        height, width = images.shape[1:]
        raise InputError(f"{images_at}: expected images of {SIDE}x{SIDE}, got {height}x{width}")
    if not len(images):
        raise InputError(f"{images_at}: expected at least one image, got none")
    if len(labels) != len(images):
        raise InputError(
            f"{labels_at}: expected {len(images):,} labels, one per image of {images_at.name}, "
            f"got {len(labels):,}"
        )
    if labels.max() >= CLASSES:
        raise InputError(
            f"{labels_at}: expected labels 0 to {CLASSES - 1}, got {labels.max()} "
            f"at position {labels.argmax():,}"
        )


def _find(folder: Path, name: str) -> Path | None:
    candidates = [folder / name, folder / f"{name}.gz"]
    return next((path for path in candidates if path.is_file()), None)


def _path(asked: Path, home: Path, name: str) -> Path:
    path = _find(home, name)
    if path is None:
        raise InputError(f"{asked}: expected {name} or {name}.gz in it or in its folder mnist")
    return path


def _images(name: str, *tensors: Tensor) -> Images:
    train_x, train_y, test_x, test_y = tensors
    return Images(name, train_x, train_y, test_x, test_y, digest(*tensors))
