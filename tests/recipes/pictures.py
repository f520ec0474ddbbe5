# SPDX-License-Identifier: Apache-2.0
"""Tiny data sets of colour images in the formats that recipes read."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN, TEST = 40, 10


def colour_images(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose classes have stripes of their own: uint8 [N, 3, 32, 32] and [N]."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = random.integers(0, 60, (count, 3, 32, 32))
    for image, label in zip(images, labels, strict=True):
        image[label % 3, label // 3 :: 5] += 150
    return images.astype(np.uint8), labels.astype(np.uint8)


def _records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    columns = [part[:, None] for part in labels]
    return np.concatenate([*columns, images.reshape(len(images), -1)], 1).astype(np.uint8).tobytes()


def write_cifar10(folder: Path) -> None:
    """The six binary files of CIFAR-10."""
    folder.mkdir(parents=True)
    images, labels = colour_images(TRAIN, 10)
    for n in range(5):
        part = slice(n * TRAIN // 5, (n + 1) * TRAIN // 5)
        (folder / f"data_batch_{n + 1}.bin").write_bytes(_records(images[part], labels[part]))
    images, labels = colour_images(TEST, 10, seed=1)
    (folder / "test_batch.bin").write_bytes(_records(images, labels))


def write_cifar100(folder: Path) -> None:
    """The two binary files of CIFAR-100: coarse and fine labels."""
    folder.mkdir(parents=True)
    for name, count in (("train", TRAIN), ("test", TEST)):
        images, labels = colour_images(count, 100)
        (folder / f"{name}.bin").write_bytes(_records(images, labels // 5, labels))


def jpeg(image: np.ndarray) -> bytes:
    """An image [3, H, W] as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_npz(folder: Path) -> None:
    """Two files of JPEG images, one after another."""
    folder.mkdir(parents=True)
    for name, count in (("train", TRAIN), ("test", TEST)):
        images, labels = colour_images(count, 10)
        files = [jpeg(image) for image in images]
        offsets = np.cumsum([0, *map(len, files)])
        content = np.frombuffer(b"".join(files), np.uint8)
        np.savez(folder / f"{name}.npz", jpeg=content, offset=offsets, label=labels)


def write_folder(folder: Path) -> None:
    """Pictures of several sizes in a folder for each of four classes."""
    for part, count in (("train", TRAIN), ("val", TEST)):
        images, labels = colour_images(count, 4)
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            home = folder / part / f"class{label}"
            home.mkdir(parents=True, exist_ok=True)
            wide = np.repeat(image, 2 + n % 2, axis=2)
            (home / f"{n}.jpg").write_bytes(jpeg(wide))
