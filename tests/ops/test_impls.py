# SPDX-License-Identifier: Apache-2.0
"""Choosing what runs the operators."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import l0kernels as l0
from l0kernels import _config, _ext, _registry, ops
from l0kernels.functional import pack_weight
from l0kernels.ops.pack_weight import op


@pytest.fixture
def unbuilt(monkeypatch):
    monkeypatch.setattr(_ext, "load", lambda name: f"{name} not built: for this test")


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(_ext, "load", lambda name: "")


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


def test_kernels_that_do_not_exist_are_refused():
    with pytest.raises(
        RuntimeError, match="'triton' was asked for but cannot run: this version has no Triton"
    ):
        l0.use_impl("triton")


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_libraries_that_are_not_built_are_refused(unbuilt, name):
    with pytest.raises(RuntimeError, match=f"'{name}' was asked for .* {name} not built: for this"):
        l0.use_impl(name)


def test_cuda_is_refused_without_a_gpu(built, monkeypatch):
    monkeypatch.setattr(_ext, "why_no_gpu", lambda: "torch finds no CUDA device")
    with pytest.raises(RuntimeError, match="'cuda' was asked for .* finds no CUDA device"):
        l0.use_impl("cuda")


def test_cuda_is_taken_where_it_can_run(built, monkeypatch):
    monkeypatch.setattr(_ext, "why_no_gpu", lambda: "")
    with l0.use_impl("cuda"):
        assert _config.current_impl() == "cuda"


@pytest.mark.parametrize(
    ("cuda", "available", "capability", "reason"),
    [
        (None, False, None, "torch .* is built without CUDA"),
        ("13.0", False, None, "torch finds no CUDA device"),
        ("13.0", True, (7, 5), "expected a GPU of compute capability 8.0 or newer; got 7.5"),
        ("13.0", True, (8, 0), "$"),
        ("13.0", True, (9, 0), "$"),
        ("13.0", True, (12, 0), "$"),
    ],
)
def test_reason_why_no_gpu_can_run(monkeypatch, cuda, available, capability, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert re.match(reason, _ext.why_no_gpu.__wrapped__())


def test_operators_refuse_what_the_environment_cannot_have(unbuilt, monkeypatch):
    monkeypatch.setattr(_config, "_impl", "cpp")
    with pytest.raises(RuntimeError, match="not built: for this test"):
        pack_weight(torch.ones(3, 2))


@pytest.mark.parametrize(("library", "key"), [("cpp", "CPU"), ("cuda", "CUDA")])
@pytest.mark.parametrize("asked", ["cpp", "cuda", "triton"])
def test_pytorch_never_stands_in_for_an_explicit_request(built, monkeypatch, library, key, asked):
    run = _registry._python_kernel(torch.neg, "neg", library)
    assert run(torch.ones(())) == -1
    monkeypatch.setattr(_config, "_impl", asked)
    with pytest.raises(RuntimeError, match=f"'{asked}' .* cannot run: it has no neg for {key}"):
        run(torch.ones(()))


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
    folder = Path(ops.__file__).parent
    assert set(_registry.OPS) == {path.parent.name for path in folder.glob("*/op.py")}
    for name, raws in _registry.OPS.items():
        assert name in raws
        table = _registry.what_runs(name)
        assert list(table) == [impl for impl in _config.IMPLS if impl != "auto"]
        assert table["reference"] == (True, "")
        for library in ("cpp", "cuda"):
            compiled = all(library in found for found in raws.values())
            assert table[library][0] is (compiled and not _config.why_unavailable(library))
        assert all(available != bool(reason) for available, reason in table.values())


def test_table_names_the_kernels_that_are_not_written(built, monkeypatch):
    raws = {"a": frozenset({"cpp"}), "a_backward": frozenset()}
    monkeypatch.setitem(_registry.OPS, "a", raws)
    table = _registry.what_runs("a")
    assert table["cpp"] == (False, "not written in this version: a_backward")
    assert table["cuda"] == (False, "not written in this version: a, a_backward")


def test_one_owner_on_each_device():
    name = op._FORWARD.name()
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


COMPILED_FIRST = """
import torch
from l0kernels import _registry
compiled = torch.library.Library("l0kernels", "IMPL")
compiled.impl("probe", torch.neg, {key!r})
_registry.add_op("probe")
_registry.define("probe(Tensor x) -> Tensor", fake=torch.empty_like, python=torch.sin)
print(sorted(_registry.OPS["probe"]["probe"]))
dump = torch._C._dispatch_dump("l0kernels::probe")
ours = [line.split(":")[0] for line in dump.splitlines() if "_registry.py" in line]
print([key for key in ours if key in ("CPU", "CUDA")])
"""


@pytest.mark.parametrize(
    ("key", "seen"), [("CPU", "['cpp']\n['CUDA']\n"), ("CUDA", "['cuda']\n['CPU']\n")]
)
def test_compiled_kernels_are_not_overridden(key, seen):
    done = run_python(COMPILED_FIRST.format(key=key))
    assert done.stdout == seen, done.stderr
