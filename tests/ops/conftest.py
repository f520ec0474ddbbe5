# SPDX-License-Identifier: Apache-2.0
"""Runs a test once for each implementation of the operators."""

from collections.abc import Iterator

import pytest
import torch

import l0kernels as l0
from l0kernels import _ext
from l0kernels.ops.pack_weight import op as pack_weight_op
from l0kernels.ops.sample_gates import op as sample_gates_op

PYTHON = {
    sample_gates_op: {
        "_FORWARD": sample_gates_op._forward_python,
        "_BACKWARD": sample_gates_op._backward_python,
        "_LISTS": sample_gates_op._lists_python,
    },
    pack_weight_op: {
        "_FORWARD": pack_weight_op._forward_python,
        "_BACKWARD": pack_weight_op._backward_python,
    },
}


@pytest.fixture(scope="session")
def need_cpp() -> None:
    if not _ext.cpp_available():
        pytest.skip(f"the C++ ops are not there: {_ext.why_not()}")


def select_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "python":
        for module, functions in PYTHON.items():
            for handle, function in functions.items():
                monkeypatch.setattr(module, handle, torch.no_grad()(function))
        yield request.param
        return
    if request.param == "cpp":
        request.getfixturevalue("need_cpp")
    with l0.use_impl(request.param):
        yield request.param


@pytest.fixture(params=["reference", "python", "cpp"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reference, the PyTorch stand-in for missing libraries, and the C++ kernels."""
    yield from select_impl(request, monkeypatch)


@pytest.fixture(params=["python", "cpp"])
def op_impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What runs behind the registered operators, whose backward pass is our own."""
    yield from select_impl(request, monkeypatch)
