# SPDX-License-Identifier: Apache-2.0
"""Runs a test once for each implementation of the operators."""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from harness import build, offload, ops

import l0kernels as l0
from l0kernels import _ext

# What is compiled for a CPU takes no GPU tensors; there the stand-in is the reference.
NOT_ON_GPU = [("cuda", name) for name in ("cpp", "harness", "python")]
ON_GPU = [pytest.param(f"{name} on a GPU", marks=pytest.mark.gpu) for name in offload.IMPLS]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of what there cannot be are none, not skipped ones."""
    pairs = [(item, runs(item)) for item in items]
    config.hook.pytest_deselected(items=[item for item, found in pairs if not found])
    items[:] = [item for item, found in pairs if found]


def runs(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    impl = str(params.get("impl", params.get("op_impl", ""))).removesuffix(" on a GPU")
    return (params.get("device"), impl) not in NOT_ON_GPU and has_kernels(impl, stem_of(item))


def has_kernels(impl: str, stem: str) -> bool:
    """Whether an operator has kernels of an implementation: not all have some for GPUs."""
    name = "cuda" if impl == "harness" else impl
    if name not in ("cuda", "triton") or stem not in ops.stems():
        return True
    return offload.has_source(name, stem)


@pytest.fixture(scope="session")
def need_cpp() -> None:
    if not _ext.cpp_available():
        pytest.skip(f"the C++ ops are not there: {_ext.why_not()}")


def stem_of(item: pytest.Item) -> str:
    """The operator that a test's file is about."""
    return item.path.stem.removeprefix("test_")


@pytest.fixture(scope="session")
def need_harness(request: pytest.FixtureRequest) -> None:
    """Without nvcc there may be no CUDA headers; with it everything must compile."""
    if build.why_not():
        pytest.skip(f"CUDA sources cannot run on this CPU: {build.why_not()}")
    tested = {stem_of(item) for item in request.session.items}
    ops.build_libraries([stem for stem in ops.stems() if stem in tested and ops.has_source(stem)])


def use_harness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for patch in ops.patches(loaded=[stem_of(request.node)]):
        monkeypatch.setattr(*patch)
    # Another order of threads for each test, the same one each time.
    seed = int(os.environ.get("L0K_SCHEDULE_SEED", "0"))
    ops.set_schedule(seed if seed < 0 else seed + zlib.crc32(request.node.name.encode()))


def use_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := offload.why_not(name):
        pytest.skip(f"{name} kernels cannot run on this GPU: {reason}")
    for patch in offload.patches_of(name, ops.stems()):
        monkeypatch.setattr(*patch)


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
    if request.param.endswith(" on a GPU"):
        use_gpu(request.param.removesuffix(" on a GPU"), monkeypatch)
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


@pytest.fixture(params=["reference", "python", "cpp", "harness", *ON_GPU])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference, the PyTorch stand-in for missing libraries, and the kernels: C++, CUDA
    run on the CPU, and those of the GPU if there is one."""
    yield from select_impl(request, monkeypatch)


@pytest.fixture(params=["python", "cpp", "harness", *ON_GPU])
def op_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What runs behind the registered operators, whose backward pass is our own."""
    yield from select_impl(request, monkeypatch)
