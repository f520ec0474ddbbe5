# SPDX-License-Identifier: Apache-2.0
"""Readers of data sets, and files that are not what they say."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from l0kernels.recipes import data
from l0kernels.recipes.errors import InputError

from .conftest import TEST, TRAIN, idx_bytes, write_images

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def test_plain_and_gzip_files_give_the_same_values(tmp_path: Path) -> None:
    write_images(tmp_path / "plain")
    write_images(tmp_path / "packed", packed=True)
    plain, packed = data.load(tmp_path / "plain"), data.load(tmp_path / "packed")
    assert plain.fingerprint == packed.fingerprint
    assert plain.train_x.shape == (TRAIN, 1, 28, 28)
    assert plain.test_x.shape == (TEST, 1, 28, 28)
    raw = np.frombuffer((tmp_path / "plain" / IMAGES).read_bytes()[16:], np.uint8)
    assert torch.equal((plain.train_x * 255).round().flatten().byte(), torch.tensor(raw))
    assert plain.train_x.max() <= 1
    assert plain.train_y.tolist() == [i % 10 for i in range(TRAIN)]


def test_a_folder_that_contains_mnist_will_do(tmp_path: Path) -> None:
    write_images(tmp_path / "mnist")
    images = data.load(tmp_path)
    assert images.name == "mnist"
    assert images.fingerprint == data.load(tmp_path / "mnist").fingerprint


def test_digits_are_split_once_and_for_all() -> None:
    first, second = data.load(None), data.load(None)
    assert first.fingerprint == second.fingerprint
    assert (len(first.train_x), len(first.test_x)) == (1347, 450)
    assert first.train_x.min() == 0
    assert first.train_x.max() == 1
    train = {image.numpy().tobytes() for image in first.train_x}
    assert not any(image.numpy().tobytes() in train for image in first.test_x)
    # Every class is in the test set about as often as in the data set.
    assert first.test_y.bincount().min() > 30


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"'sklearn'.*pip install 'l0kernels\[train\]'"):
        data.load(None)


def _images(*shape: int) -> bytes:
    return idx_bytes(np.zeros(shape))


LIES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": (IMAGES, lambda b: b"", "expected IDX magic 00000803 .* got an empty file"),
    "not IDX": (IMAGES, lambda b: b"PK\3\4" + b, "expected IDX magic 00000803 .* got 504b0304"),
    "labels for images": (IMAGES, lambda b: idx_bytes(np.zeros(9)), "magic .* got 00000801"),
    "floats": (IMAGES, lambda b: b"\0\0\r\3" + b[4:], "unsigned bytes, 3 dim.* got 00000d03"),
    "half a header": (IMAGES, lambda b: b[:10], "expected a header of 16 bytes, got 10"),
    "cut": (IMAGES, lambda b: b[:-1], r"expected 54,880 bytes .*\(70, 28, 28\), got 54,879"),
    "too long": (IMAGES, lambda b: b + b"\0", "expected 54,880 bytes .* got more"),
    "lies about the count": (
        IMAGES,
        lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:],
        "expected 3,367,254,359,280 bytes .* got 54,880",
    ),
    "other size": (IMAGES, lambda b: _images(70, 32, 32), "expected images of 28x28, got 32x32"),
    "no images": (IMAGES, lambda b: _images(0, 28, 28), "expected at least one image, got none"),
    "fewer labels": (
        LABELS,
        lambda b: idx_bytes(np.zeros(69)),
        "expected 70 labels, one per image of train-images-idx3-ubyte, got 69",
    ),
    "label 10": (
        LABELS,
        lambda b: b[:-1] + b"\x0a",
        "expected labels 0 to 9, got 10 at position 69",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_files_are_named(idx_folder: Path, lie: str) -> None:
    name, change, message = LIES[lie]
    path = idx_folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        data.load(idx_folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-4],
        lambda packed: b"no gzip at all",
        lambda packed: packed[:200] + bytes(200) + packed[400:],
    ],
    ids=["half", "without its length", "not gzip", "overwritten"],
)
def test_damaged_gzip_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_images(tmp_path, packed=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="expected whole gzip data") as caught:
        data.load(tmp_path)
    assert str(path) in str(caught.value)


def test_wrong_checksum_is_damage(tmp_path: Path) -> None:
    write_images(tmp_path, packed=True)
    path = tmp_path / f"{IMAGES}.gz"
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes())))
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected whole gzip data"):
        data.load(tmp_path)


def test_missing_folder_and_files_are_named(idx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: expected a folder with IDX files"):
        data.load(tmp_path / "nowhere")
    (idx_folder / LABELS).unlink()
    with pytest.raises(InputError, match=f"expected {LABELS} or {LABELS}.gz"):
        data.load(idx_folder)


def test_mnist_where_it_is(data_dir: Path) -> None:
    images = data.load(data_dir)
    assert (len(images.train_x), len(images.test_x)) == (60_000, 10_000)
    assert images.train_y[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.test_y[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.train_x.min() == 0
    assert images.train_x.max() == 1
