# SPDX-License-Identifier: Apache-2.0
"""A data set, in memory or in files, as batches of normalised images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.recipes.errors import InputError
from l0kernels.recipes.pictures import Files, Key

Batch = tuple[Tensor, Tensor]
PARTS = ("train_x", "train_y", "test_x", "test_y")


@dataclass(frozen=True)
class Images:
    """A data set.

    Args:
        name: as it appears in tables.
        train_x: fp32 in [0, 1] or uint8 in 0 to 255, shape [N, C, H, W]; or files of pictures.
        train_y: int64 labels from 0 on, shape [N].
        test_x: as train_x.
        test_y: as train_y.
        fingerprint: SHA-256 of all of it, so that a run is resumed on the data it began with.
        classes: number of labels.
        mean: subtracted from each channel, in [0, 1]; none: nothing is.
        std: divides what is left.
        crops: pixels by which training images are padded with black, to be cropped anywhere and
            mirrored or not; 0: they stay as they are.
        part_of: training images of the data set that these are a part of; 0: they are all.
    """

    name: str
    train_x: Tensor | Files
    train_y: Tensor
    test_x: Tensor | Files
    test_y: Tensor
    fingerprint: str
    classes: int = 10
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    crops: int = 0
    part_of: int = 0

    @property
    def whole(self) -> int:
        """Training images of the whole data set, by which penalties are divided."""
        return self.part_of or len(self.train_y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, (C, H, W)."""
        return tuple(self.train_x.shape[1:])

    def train_batch(self, part: Tensor, key: Key) -> Batch:
        """Images to train with, normalised, and their labels.

        Args:
            part: which, int64 [batch].
            key: what crops depend on, beside the images.

        Returns:
            fp32 [batch, C, H, W] and int64 [batch].
        """
        if isinstance(self.train_x, Files):
            return self._normalised(self.train_x.crops(part, key)), self.train_y[part]
        x = self.train_x[part]
        return self._normalised(shifted(x, self.crops, key) if self.crops else x), self.train_y[
            part
        ]

    def test_batches(self, size: int) -> Iterator[Batch]:
        """The test set in parts, as `train_batch`, without crops.

        Args:
            size: images in a part.
        """
        for part in torch.arange(len(self.test_y)).split(size):
            whole = self.test_x
            x = whole.centres(part) if isinstance(whole, Files) else whole[part]
            yield self._normalised(x), self.test_y[part]

    def subset(self, train: int, test: int | None = None) -> Images:
        """The same data set with fewer images, chosen once and for all.

        Args:
            train: how many training images.
            test: how many test images; None for all.

        Raises:
            InputError: there are not so many.
        """
        kept = []
        for what, x, y, count in (
            ("training", self.train_x, self.train_y, train),
            ("test", self.test_x, self.test_y, test),
        ):
            if count is None:
                kept += [x, y]
                continue
            if not 1 <= count <= len(y):
                raise InputError(f"--subset: expected 1 to {len(y):,} {what} images, got {count}")
            part = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:count]
            kept += [x[part], y[part]]
        digest = hashlib.sha256(f"{self.fingerprint} {train} {test}".encode())
        return replace(
            self,
            name=f"part of {self.name}",
            part_of=self.whole,
            fingerprint=digest.hexdigest(),
            **dict(zip(PARTS, kept, strict=True)),
        )

    def _normalised(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float().div_(255)
        if not self.mean:
            return x
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean).div_(std)


def shifted(x: Tensor, most: int, key: Key) -> Tensor:
    """Images moved by up to ``most`` pixels, black where they came from, every other one mirrored.

    Args:
        x: [N, C, H, W].
        most: pixels in each direction.
        key: of the random numbers.
    """
    count, _, height, width = x.shape
    random = np.random.default_rng(np.random.SeedSequence(key))
    top, left = torch.from_numpy(random.integers(0, 2 * most + 1, (2, count)))
    mirrored = torch.from_numpy(random.random(count) < 0.5)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(x, (most,) * 4).permute(0, 2, 3, 1)
    images = torch.arange(count)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the values of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values in [0, 1].

    Args:
        x: uint8 [N, C, H, W].
    """
    means, stds = [], []
    values = np.arange(256) / 255
    for channel in x.unbind(1):
        counts = sum(
            np.bincount(part.numpy().ravel(), minlength=256) for part in channel.split(1000)
        )
        share = counts / channel.numel()
        means.append(float(share @ values))
        stds.append(float(share @ (values - means[-1]) ** 2) ** 0.5)
    return means, stds
