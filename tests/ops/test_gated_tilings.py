# SPDX-License-Identifier: Apache-2.0
"""The larger tiles of gated layers, which the CUDA sources take where there are many rows."""

from collections.abc import Iterator

import pytest
import torch
from ops.conftest import select_impl
from ops.gated import GatedContract, check

from l0kernels.ops.gated_conv2d import op as gated_conv2d
from l0kernels.ops.gated_linear import op as gated_linear


@pytest.fixture(params=["harness"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from select_impl(request, monkeypatch)


class Linear(GatedContract):
    OP = gated_linear


class Conv2d(GatedContract):
    OP = gated_conv2d


ROWS = 66 * 128 + 1  # two tiles of 128 columns each: more tiles than an H200 has multiprocessors
CASES = {
    "linear": (Linear, ((140, 136), (ROWS,), None), {}),
    "linear, inputs not packed": (Linear, ((140, 136), (ROWS,), None), {"packs": (False, True)}),
    "1x1": (Conv2d, ((136, 130, 1, 1), (1, 65, 131), (1, 0, 1)), {}),
    "2x2, stride 2": (Conv2d, ((130, 132, 2, 2), (2, 131, 130), (2, 1, 1)), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=str)
def test_larger_tiles(impl, name, weight):
    contract, shape, options = CASES[name]
    layer = contract()
    dtypes = (torch.bfloat16, weight)
    problem = layer.problem(shape, 0.2, dtypes, activation="relu", **options)
    check(impl, problem, layer.upstream(problem))
