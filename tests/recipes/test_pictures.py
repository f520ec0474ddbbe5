# SPDX-License-Identifier: Apache-2.0
"""Readers of colour images, crops, subsets, and files that are not what they say."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l0kernels.recipes import data
from l0kernels.recipes.cifar import read_npz
from l0kernels.recipes.errors import InputError
from l0kernels.recipes.images import moments, shifted

from .pictures import (
    TEST,
    TRAIN,
    colour_images,
    jpeg,
    write_cifar10,
    write_cifar100,
    write_folder,
    write_npz,
)

COLOUR = (3, 32, 32)


def test_cifar10_binary_files_give_what_was_written(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    images = data.load(tmp_path, COLOUR)
    pixels, labels = colour_images(TRAIN, 10)
    assert (images.name, images.classes, images.shape) == ("CIFAR-10", 10, COLOUR)
    assert torch.equal(images.train_x, torch.from_numpy(pixels))
    assert images.train_y.tolist() == labels.tolist()
    assert images.test_y.tolist() == list(range(TEST))
    same = data.load(tmp_path / "cifar-10-batches-bin", COLOUR)
    assert same.fingerprint == images.fingerprint


def test_cifar100_labels_are_the_fine_ones(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "c")
    images = data.load(tmp_path / "c", COLOUR)
    assert (images.name, images.classes) == ("CIFAR-100", 100)
    assert images.train_y.tolist() == list(range(TRAIN))
    assert torch.equal(images.test_x, torch.from_numpy(colour_images(TEST, 100)[0]))


def test_jpeg_files_are_decoded(tmp_path: Path) -> None:
    write_npz(tmp_path / "cifar10-jpeg")
    images = data.load(tmp_path, COLOUR)
    assert images.name == "CIFAR-10 (JPEG)"
    pixels, labels = colour_images(TRAIN, 10)
    for n in (0, 7, TRAIN - 1):
        decoded = np.asarray(Image.open(io.BytesIO(jpeg(pixels[n])))).transpose(2, 0, 1)
        assert torch.equal(images.train_x[n], torch.from_numpy(decoded.copy()))
    assert images.train_y.tolist() == labels.tolist()


def test_batches_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "c")
    images = data.load(tmp_path / "c", COLOUR)
    x = images.train_x.double() / 255
    assert images.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert images.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert moments(images.train_x[:1])[1] != images.std
    batches = [*images.test_batches(4)]
    assert [len(y) for _, y in batches] == [4, 4, 2]
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (images.mean, images.std)
    )
    expected = (images.test_x.double() / 255 - mean) / std
    torch.testing.assert_close(
        torch.cat([x for x, _ in batches]).double(), expected, rtol=0, atol=1e-5
    )


def test_shifted_images_are_windows_of_the_padded_ones() -> None:
    x = torch.from_numpy(colour_images(60, 10)[0])
    moved = shifted(x, 4, (0, 1, 2))
    assert torch.equal(moved, shifted(x, 4, (0, 1, 2)))
    assert not torch.equal(moved, shifted(x, 4, (0, 1, 3)))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    places = set()
    for image, whole in zip(moved, padded, strict=True):
        found = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(
                image.flip(2) if mirrored else image, whole[:, top : top + 32, left : left + 32]
            )
        ]
        assert len(found) == 1
        places.add(found[0])
    tops, lefts, mirrors = (set(values) for values in zip(*places, strict=True))
    assert {min(tops), max(tops), min(lefts), max(lefts)} == {0, 8}
    assert mirrors == {False, True}


def test_folders_are_read_when_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "pictures")
    images = data.load(tmp_path / "pictures", (3, 48, 48))
    assert (images.name, images.classes, images.shape) == ("pictures", 4, (3, 48, 48))
    assert images.train_y.bincount().tolist() == [10] * 4
    part = torch.tensor([3, 39])
    x, y = images.train_batch(part, (0, 1, 0))
    assert (x.shape, y.tolist()) == ((2, 3, 48, 48), [0, 3])
    again, _ = images.train_batch(part.flip(0), (0, 1, 0))
    assert torch.equal(again.flip(0), x)
    other, _ = images.train_batch(part, (0, 2, 0))
    assert not torch.equal(other, x)
    (centre, _), *_ = images.test_batches(3)
    # The middle 7/8 of the shorter side, 28 of 32 rows and columns, stretched to 48.
    path = images.test_x.paths[0]
    picture = Image.open(path).convert("RGB")
    left = (picture.width - 28) / 2
    box = (left, 2, left + 28, 30)
    cut = np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR, box=box))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    expected = (torch.from_numpy(cut.copy()).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(centre[0], expected, rtol=0, atol=1e-6)


def test_subsets_are_chosen_once_and_for_all(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "c")
    images = data.load(tmp_path / "c", COLOUR)
    part = images.subset(12, 5)
    assert (len(part.train_y), len(part.test_y), part.name) == (12, 5, "part of CIFAR-10")
    assert part.fingerprint == images.subset(12, 5).fingerprint != images.fingerprint
    assert part.fingerprint != images.subset(12).fingerprint
    assert (images.whole, part.whole, part.subset(3).whole) == (TRAIN, TRAIN, TRAIN)
    assert len(images.subset(12).test_y) == TEST
    whole = [x.numpy().tobytes() for x in images.train_x]
    places = [whole.index(x.numpy().tobytes()) for x in part.train_x]
    assert len(set(places)) == 12
    assert images.train_y[places].equal(part.train_y)
    write_folder(tmp_path / "pictures")
    fewer = data.load(tmp_path / "pictures", (3, 8, 8)).subset(30)
    assert fewer.train_batch(torch.tensor([29]), (0,))[0].shape == (1, 3, 8, 8)
    for count in (0, TRAIN + 1):
        with pytest.raises(InputError, match=f"--subset: expected 1 to 40 training .* got {count}"):
            images.subset(count)


def _npz(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with np.load(path) as arrays:
            content = dict(arrays)
        change(content)
        np.savez(path, **content)

    return write


def _cut_short(content: dict) -> None:
    content["offset"] = content["offset"][:-1]


def _backwards(content: dict) -> None:
    content["offset"] = content["offset"][::-1].copy()


def _other_size(content: dict) -> None:
    file = np.frombuffer(jpeg(np.zeros((3, 16, 32), np.uint8)), np.uint8)
    content.update(jpeg=file, offset=np.array([0, len(file)]), label=np.zeros(1, np.uint8))


def _no_jpeg(content: dict) -> None:
    content["jpeg"][content["offset"][3] :][:40] = 0


LIES = {
    "label missing": (_npz(lambda c: c.pop("label")), "expected arrays jpeg, offset, label"),
    "offsets": (_npz(_cut_short), "expected offsets of 40 images in jpeg"),
    "backwards": (_npz(_backwards), "expected offsets of 40 images in jpeg"),
    "size": (_npz(_other_size), "image 0: expected 32x32 pixels, got 32x16"),
    "no picture": (_npz(_no_jpeg), "image 3: expected a picture, got: "),
    "no archive": (
        lambda path: path.write_bytes(b"PK\3\4 and more"),
        "expected arrays jpeg, offset",
    ),
    "objects": (
        lambda path: np.savez(path, jpeg=np.array([{}]), offset=np.zeros(2), label=np.zeros(1)),
        "expected arrays jpeg, offset, label, got: Object arrays",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_archives_are_named(tmp_path: Path, lie: str) -> None:
    write_npz(tmp_path / "c")
    change, message = LIES[lie]
    path = tmp_path / "c" / "train.npz"
    change(path)
    with pytest.raises(InputError, match=message) as caught:
        read_npz(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lying_records_and_folders_are_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "c")
    batch = tmp_path / "c" / "data_batch_3.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(
        InputError, match=r"batch_3.bin: expected records of 3,073 bytes, got 24,583"
    ):
        data.load(tmp_path / "c", COLOUR)
    batch.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(InputError, match="expected labels 0 to 9, got 10"):
        data.load(tmp_path / "c", COLOUR)
    batch.unlink()
    with pytest.raises(InputError, match="batch_3.bin: expected a readable file"):
        data.load(tmp_path / "c", COLOUR)
    with pytest.raises(InputError, match="expected one of data_batch_1.bin, train.bin, train.npz"):
        data.load(tmp_path, COLOUR)
    write_cifar100(tmp_path / "c" / "cifar-100-binary")
    with pytest.raises(InputError, match="got .*c and .*cifar-100-binary"):
        data.load(tmp_path / "c", COLOUR)
    with pytest.raises(
        InputError, match="--data: expected a folder with images of 32x32 in colour"
    ):
        data.load(None, COLOUR)
    with pytest.raises(InputError, match="nowhere: expected a folder with CIFAR files"):
        data.load(tmp_path / "nowhere", COLOUR)


def test_lying_picture_folders_are_named(tmp_path: Path) -> None:
    home = tmp_path / "pictures"
    with pytest.raises(InputError, match="train: expected a folder with one folder of pictures"):
        data.load(home, (3, 8, 8))
    write_folder(home)
    broken = home / "train" / "class2" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    images = data.load(home, (3, 8, 8))
    place = images.train_x.paths.index(broken)
    with pytest.raises(InputError, match=r"2.jpg: expected a picture, got: "):
        images.train_batch(torch.tensor([place]), (0,))
    (home / "val" / "more").mkdir()
    with pytest.raises(InputError, match=r"same classes in train and val, got \['more'\] in one"):
        data.load(home, (3, 8, 8))


def test_cifar_jpeg_where_it_is(data_dir: Path) -> None:
    x, y = read_npz(data_dir / "cifar10-jpeg" / "test.npz")
    assert x.shape == (10_000, *COLOUR)
    assert y.bincount().tolist() == [1000] * 10
    mean, std = moments(x)
    assert all(0.4 < m < 0.52 for m in mean)
    assert all(0.2 < s < 0.3 for s in std)
