# SPDX-License-Identifier: Apache-2.0
"""Times of all operators for `pytest bench/ --benchmark-only` and `--benchmark-compare-fail`."""

import os
from collections.abc import Callable
from functools import cache

# Before torch is imported: spinning threads make timings flip from run to run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

from l0kernels.bench import operators  # noqa: E402 # pyright: ignore[reportMissingImports]

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

SHAPES = {
    "sample_gates": "wrn-28-10",
    "dep_chain": "vgg16",
    "pack_weight": "160x160x3x3:both",
    "masked_weight": "160x160x3x3",
    "gate_apply": "128x300",
    "packed_norm": "32x320x16x16:channels_last:train",
    "gated_linear": "800x500x128",
    "gated_conv2d": "160x160x3x32x4",
}
CASES = [
    pytest.param(name, part, keep, id=f"{name}-{part}-open {keep:g}")
    for name in SHAPES
    for keep in (1.0, 0.5, 0.1)
    for part in operators.PARTS
]


@cache
def steps_of(name: str, keep: float) -> dict[str, Callable[[], object]]:
    """Returns both passes of ours, after a check against the reference."""
    op = operators.operator(name)
    impls, reasons = operators.implementations(op, operators.Setting())
    if not impls:
        pytest.skip("; ".join(reasons))
    torch.manual_seed(0)
    problem = op.make(SHAPES[name], keep, torch.float32, torch.device("cpu"))
    arms = operators.arms_of(problem, impls)
    operators.checked(problem, arms, impls, torch.float32)
    return arms[impls[0]].steps()


@pytest.mark.parametrize(("name", "part", "keep"), CASES)
def test_operator(benchmark, name: str, part: str, keep: float):
    benchmark.group = f"{name} {part}"
    benchmark(steps_of(name, keep)[part])
