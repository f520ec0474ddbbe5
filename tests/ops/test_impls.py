# SPDX-License-Identifier: Apache-2.0
"""Choosing what runs the operators."""

import os
import subprocess
import sys

import pytest
import torch

import l0kernels as l0
from l0kernels import _config, _ext, _registry
from l0kernels.functional import pack_weight
from l0kernels.ops.pack_weight import op


@pytest.fixture
def without_cpp(monkeypatch):
    monkeypatch.setattr(_ext, "cpp_available", lambda: False)
    monkeypatch.setattr(_ext, "why_not", lambda: "not built: for this test")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_blocks_nest():
    outer = _config.current_impl()
    with l0.use_impl("reference"):
        with l0.use_impl("auto"):
            assert _config.current_impl() == "auto"
        assert _config.current_impl() == "reference"
    assert _config.current_impl() == outer


def test_errors_end_the_block():
    outer = _config.current_impl()
    with pytest.raises(KeyError), l0.use_impl("reference"):
        raise KeyError
    assert _config.current_impl() == outer


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="auto, reference, cpp, triton, cuda; got 'fast'"):
        l0.use_impl("fast")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_that_do_not_exist_are_refused(name):
    with pytest.raises(RuntimeError, match=f"'{name}' was asked for but cannot run: this version"):
        l0.use_impl(name)


def test_cpp_is_refused_where_it_is_not_built(without_cpp):
    with pytest.raises(RuntimeError, match="'cpp' was asked for .* not built: for this test"):
        l0.use_impl("cpp")


def test_operators_refuse_what_the_environment_cannot_have(without_cpp, monkeypatch):
    monkeypatch.setattr(_config, "_impl", "cpp")
    with pytest.raises(RuntimeError, match="not built: for this test"):
        pack_weight(torch.ones(3, 2))


def test_reference_is_seen_by_autograd():
    weight = torch.ones(3, 2, requires_grad=True)
    with l0.use_impl("reference"):
        reference = pack_weight(weight, rows=torch.tensor([0, 2]))
    automatic = pack_weight(weight, rows=torch.tensor([0, 2]))
    assert type(reference.grad_fn).__name__ != "_PackWeightBackward"
    assert type(automatic.grad_fn).__name__ == "_PackWeightBackward"


def test_environment_chooses():
    code = "import l0kernels; from l0kernels import _config; print(_config.current_impl())"
    assert run_python(code, L0K_IMPL="reference").stdout == "reference\n"
    assert run_python(code, L0K_IMPL="").stdout == "auto\n"
    wrong = run_python(code, L0K_IMPL="fast")
    assert (
        "L0K_IMPL: expected one of auto, reference, cpp, triton, cuda; got 'fast'" in wrong.stderr
    )
    assert wrong.returncode != 0


def test_table_says_what_runs_each_operator():
    assert set(_registry.OPS) == {"sample_gates", "pack_weight"}
    for table in _registry.OPS.values():
        assert set(table) == set(_config.IMPLS) - {"auto"}
        assert table["reference"] == (True, "")
        assert table["cpp"] == (_ext.cpp_available(), _ext.why_not())
        assert all(available != bool(reason) for available, reason in table.values())


def test_one_owner_on_each_device():
    name = op._FORWARD.name()
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
