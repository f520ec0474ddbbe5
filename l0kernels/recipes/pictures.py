# SPDX-License-Identifier: Apache-2.0
"""Pictures in files, decoded when they are asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l0kernels.recipes.errors import InputError, optional

Key = tuple[int, ...]
# Of random crops: the part of a picture's area, and width over height.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
# The side of a centre crop, of the picture's shorter side.
CENTRE = 224 / 256
WORKERS = 4


def open_picture(source: Path | bytes, name: object) -> Any:
    """A picture in RGB.

    Args:
        source: a file or its content.
        name: as it reads in the error.

    Raises:
        InputError: it is no picture that Pillow reads, or Pillow is not installed.
    """
    image: Any = optional("PIL.Image", "pictures")
    try:
        opened = image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise InputError(
            f"{name}: expected a picture, got: {' '.join(str(error).split())}"
        ) from error


def to_tensor(pictures: Sequence[Any]) -> Tensor:
    """Pictures of one size as uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(
        0, 3, 1, 2
    )


class Files:
    """Pictures in files, cropped and resized to one size when they are read.

    Args:
        paths: of the files.
        side: pixels of a square.
    """

    def __init__(self, paths: Sequence[Path], side: int) -> None:
        self.paths = list(paths)
        self.side = side

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As that of a tensor of all pictures."""
        return len(self.paths), 3, self.side, self.side

    def __getitem__(self, part: Tensor) -> Files:
        """Fewer of them.

        Args:
            part: which, int64 [N].
        """
        return Files([self.paths[i] for i in part.tolist()], self.side)

    def crops(self, part: Tensor, key: Key) -> Tensor:
        """Random parts of pictures, mirrored or not, stretched to the size.

        Args:
            part: which, int64 [N].
            key: of the random numbers, beside the number of the picture.

        Returns:
            uint8 [N, 3, side, side].
        """

        def cut(picture: Any, number: int) -> Any:
            random = np.random.default_rng(np.random.SeedSequence((*key, number)))
            whole = self._resized(picture, _random_box(picture.size, random))
            return whole.transpose(0) if random.random() < 0.5 else whole  # 0: left to right

        return self._read(part, cut)

    def centres(self, part: Tensor) -> Tensor:
        """The middles of pictures, stretched to the size; as `crops`."""

        def cut(picture: Any, number: int) -> Any:
            width, height = picture.size
            side = CENTRE * min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return self._resized(picture, (left, top, left + side, top + side))

        return self._read(part, cut)

    def _resized(self, picture: Any, box: tuple[float, ...]) -> Any:
        bilinear = optional("PIL.Image", "pictures").Resampling.BILINEAR
        return picture.resize((self.side, self.side), bilinear, box=box)

    def _read(self, part: Tensor, cut: Callable[[Any, int], Any]) -> Tensor:
        def read(number: int) -> Any:
            path = self.paths[number]
            return cut(open_picture(path, path), number)

        # Threads: Pillow lets go of Python's lock while it decodes and resizes.
        with ThreadPoolExecutor(WORKERS) as pool:
            return to_tensor(list(pool.map(read, part.tolist())))


def _random_box(size: tuple[int, int], random: np.random.Generator) -> tuple[float, ...]:
    """A part of a picture: left, top, right, bottom; the middle square if none is found."""
    width, height = size
    for _ in range(TRIES):
        area = random.uniform(*AREA) * width * height
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if across <= width and down <= height:
            left, top = random.uniform(0, width - across), random.uniform(0, height - down)
            return left, top, left + across, top + down
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
