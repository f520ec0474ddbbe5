# SPDX-License-Identifier: Apache-2.0
"""What the host chooses before it launches the Triton kernels of the gated layers."""

from math import prod

import pytest
import torch

from l0kernels.bench.tune import candidates
from l0kernels.ops.gated_linear import triton as kernels
from l0kernels.ops.gated_linear.tiles import HEURISTICS
from l0kernels.ops.gated_linear.triton import Geometry, Window

TILES = [(place, t) for place in HEURISTICS for t in candidates(place, "thorough")]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(kernels, "has_tma", lambda device: True)


def pixels(width=16, dtype=torch.bfloat16):
    return torch.zeros(6, width, dtype=dtype)


GEOMETRY = Geometry(6, (1, 1), (1, 1), Window())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("rows", "geometry", "taken"),
    [
        (pixels(), GEOMETRY, True),
        (pixels(dtype=torch.float16), GEOMETRY, True),
        (pixels(32)[:, 8:24], GEOMETRY, True),
        (pixels(dtype=torch.float32), GEOMETRY, False),
        (pixels(12), GEOMETRY, False),  # rows of 24 bytes
        (pixels(32)[:, 4:20], GEOMETRY, False),  # starts at byte 8
        (pixels()[:1].expand(6, 16), GEOMETRY, False),  # one row six times
        (pixels(), GEOMETRY._replace(window=Window(stride=(2, 1))), False),
    ],
)
def test_descriptors_take_aligned_rows_of_short_numbers(rows, geometry, taken):
    assert kernels.use_tma(geometry, rows, pixels(dtype=rows.dtype)) is taken


def test_descriptors_need_the_hardware():
    assert not kernels.use_tma(GEOMETRY, pixels(), pixels())


@pytest.mark.parametrize(
    ("images", "size", "patch"),
    [
        (512, (1, 1), (128, 1, 1)),
        (2, (8, 8), (2, 8, 8)),
        (1, (1, 500), (1, 1, 128)),
        (3, (9, 8), (1, 16, 8)),
        (64, (2, 3), (64, 2, 1)),
    ],
)
def test_patches_cover_tightly(images, size, patch):
    assert kernels.best_patch(128, images, *size) == patch and prod(patch) == 128


def test_tiles_suit_the_kernels():
    # Tensor cores take 16 numbers each way; packed weights are padded for whole tiles.
    sizes = {size for _, tiles in TILES for size in (tiles.rows, tiles.columns, tiles.depth)}
    assert sizes == {16, 32, 64, 128}
    assert all(kernels.PADDING.value % size == 0 for size in sizes)


def test_too_many_rows_are_refused():
    rows = torch.zeros(1, 1).expand(1 << 31, 1)
    with pytest.raises(ValueError, match="at most 2147418112 rows or pixels; got 2147483648"):
        kernels.as_rows(rows)
