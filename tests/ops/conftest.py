# SPDX-License-Identifier: Apache-2.0
"""Runs a test once for each implementation of the operators."""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

import l0kernels as l0
from harness import build, ops
from l0kernels import _ext


@pytest.fixture(scope="session")
def need_cpp() -> None:
    if not _ext.cpp_available():
        pytest.skip(f"the C++ ops are not there: {_ext.why_not()}")


@pytest.fixture(scope="session")
def need_harness() -> None:
    """Without nvcc there may be no CUDA headers; with it everything must compile."""
    if build.why_not():
        pytest.skip(f"CUDA sources cannot run on this CPU: {build.why_not()}")


def use_harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = request.path.stem.removeprefix("test_")
    if stem in ops.stems() and not ops.source(stem).exists():
        pytest.skip(f"{stem} has no CUDA source")
    for module, functions in ops.handles().items():
        for handle, function in functions.items():
            monkeypatch.setattr(ops.module_of(module), handle, function)
    # Another order of threads for each test, the same one each time.
    seed = int(os.environ.get("L0K_SCHEDULE_SEED", "0"))
    ops.set_schedule(seed if seed < 0 else seed + zlib.crc32(request.node.name.encode()))


def use_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for stem in ops.stems():
        for handle, _, _, function in ops.raw_ops(stem):
            monkeypatch.setattr(ops.module_of(stem), handle, torch.no_grad()(function))


def select_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "harness":
        request.getfixturevalue("need_harness")
        use_harness(request, monkeypatch)
        yield request.param
        return
    if request.param == "python":
        use_python(monkeypatch)
        yield request.param
        return
    if request.param == "cpp":
        request.getfixturevalue("need_cpp")
    with l0.use_impl(request.param):
        yield request.param


@pytest.fixture(params=["reference", "python", "cpp", "harness"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference, the PyTorch stand-in for missing libraries, and the kernels: C++ and, run on
    the CPU, CUDA."""
    yield from select_impl(request, monkeypatch)


@pytest.fixture(params=["python", "cpp", "harness"])
def op_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What runs behind the registered operators, whose backward pass is our own."""
    yield from select_impl(request, monkeypatch)
