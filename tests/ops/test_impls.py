# SPDX-License-Identifier: Apache-2.0
"""Choosing what runs the operators."""

import ast
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from harness import ops as raw

import l0kernels as l0
from l0kernels import _config, _ext, _registry, _triton, ops
from l0kernels.functional import pack_weight
from l0kernels.ops.pack_weight import op

OPS_FOLDER = Path(ops.__file__).parent


@pytest.fixture
def unbuilt(monkeypatch):
    monkeypatch.setattr(_ext, "load", lambda name: f"{name} not built: for this test")


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(_ext, "load", lambda name: "")


@pytest.fixture
def triton_calls(monkeypatch):
    """Lets Triton run, its kernels being the PyTorch operations; the raw operators it has run."""
    calls = []

    def function(op, name):
        ((_, python),) = [
            (handle, python)
            for _, handle, _, python in raw.raw_ops(op)
            if raw.raw_name(handle) == name
        ]
        return torch.no_grad()(lambda *args: calls.append(name) or python(*args))

    monkeypatch.setattr(_registry, "_triton_function", function)
    monkeypatch.setattr(_registry, "why_no_triton", lambda op: "")
    monkeypatch.setattr(_triton, "why_not", lambda: "")
    monkeypatch.setattr(_triton, "interpreted", lambda: True)
    return calls


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


@pytest.mark.parametrize(
    ("installed", "interpreted", "gpu", "reason"),
    [
        (False, True, True, "Triton is not installed"),
        (True, False, False, "torch finds no CUDA device, and TRITON_INTERPRET=1 is not set"),
        (True, True, False, "$"),
        (True, False, True, "$"),
    ],
)
def test_reason_why_triton_cannot_run(monkeypatch, installed, interpreted, gpu, reason):
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert re.match(reason, _triton.why_not.__wrapped__())


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_triton, "why_not", lambda: "no such thing")
    with pytest.raises(RuntimeError, match="'triton' was asked for but cannot run: no such thing"):
        l0.use_impl("triton")


def test_triton_refuses_cpu_tensors_unless_interpreted(triton_calls, monkeypatch):
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="only where TRITON_INTERPRET=1"), l0.use_impl("triton"):
        pack_weight(torch.ones(3, 2))
    assert triton_calls == []


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
def test_nothing_stands_in_for_an_explicit_request(built, monkeypatch, library, key, asked):
    monkeypatch.setattr(_registry, "why_no_triton", lambda op: "for this test")
    run = _registry._stand_in("op", "neg", library, torch.neg)
    assert run(torch.ones(())) == -1
    monkeypatch.setattr(_config, "_impl", asked)
    with pytest.raises(RuntimeError, match=f"'{asked}' .* cannot run: it has no neg for {key}"):
        run(torch.ones(()))


@pytest.mark.parametrize(("asked", "other"), [("cpp", "cuda"), ("cuda", "cpu")])
def test_libraries_are_not_asked_for_tensors_of_another_device(built, monkeypatch, asked, other):
    monkeypatch.setattr(_ext, "why_no_gpu", lambda: "")
    on_cpu, on_gpu = (
        cast(torch.Tensor, SimpleNamespace(device=torch.device(name))) for name in ("cpu", "cuda")
    )
    right, wrong = (on_cpu, on_gpu) if asked == "cpp" else (on_gpu, on_cpu)
    with l0.use_impl(asked):
        assert not _config.reference_asked(right)
        with pytest.raises(RuntimeError, match=f"'{asked}' was asked for .* tensors; got {other}"):
            _config.reference_asked(wrong)


def test_triton_stands_in_for_the_cuda_library(triton_calls, unbuilt, caplog):
    _ext.note_triton.cache_clear()
    weight = torch.ones(3, 2)
    arguments = (weight, None, None, None, None, None, torch.float32)
    with caplog.at_level(logging.INFO, logger="l0kernels"):
        for library in ("cuda", "cuda"):
            run = _registry._stand_in("pack_weight", "pack_weight", library, op._forward_python)
            assert torch.equal(run(*arguments), weight)
    assert triton_calls == ["pack_weight"] * 2
    assert caplog.messages == [
        "the CUDA ops are missing (cuda not built: for this test); Triton kernels run instead"
    ]
    _ext.note_triton.cache_clear()


def test_pytorch_stands_in_where_triton_cannot_run(triton_calls, unbuilt, monkeypatch):
    monkeypatch.setattr(_registry, "why_no_triton", lambda op: "for this test")
    _ext.note_missing.cache_clear()
    run = _registry._stand_in("neg", "neg", "cuda", torch.neg)
    with pytest.warns(UserWarning, match=r"CUDA ops are missing .* slower PyTorch ops") as warned:
        assert run(torch.ones(())) == run(torch.ones(())) == -1
    assert len(warned) == 1 and triton_calls == []
    _ext.note_missing.cache_clear()


def test_triton_never_stands_in_on_a_cpu(triton_calls, built):
    run = _registry._stand_in("pack_weight", "neg", "cpp", torch.neg)
    assert run(torch.ones(())) == -1
    assert triton_calls == []


def gated_sum(weight, z):
    packed = pack_weight(weight, z, rows=torch.tensor([0, 2]), row_map=torch.zeros(2, 3).long())
    return (packed**2).sum()


def test_the_choice_is_made_when_an_operator_runs(triton_calls):
    weight, z = torch.ones(3, 2, requires_grad=True), torch.ones(1)
    with l0.use_impl("triton"):
        loss = gated_sum(weight, z)
        loss.backward()
    assert triton_calls == ["pack_weight", "pack_weight_backward"]
    gated_sum(weight, z).backward()
    assert len(triton_calls) == 2


def test_graphs_are_compiled_for_the_choice(triton_calls):
    weight, z = torch.randn(3, 2, requires_grad=True), torch.ones(1)
    compiled = torch.compile(gated_sum, fullgraph=True, backend="aot_eager")
    for name in ("auto", "triton", "auto"):
        triton_calls.clear()
        with l0.use_impl(name):
            (grad,) = torch.autograd.grad(compiled(weight, z), weight)
        (expected,) = torch.autograd.grad(gated_sum(weight, z), weight)
        torch.testing.assert_close(grad, expected)
        ran = ["pack_weight", "pack_weight_backward"] if name == "triton" else []
        assert triton_calls == ran


@pytest.mark.parametrize("stem", sorted(_registry.OPS))
def test_raw_operators_are_called_through_the_choice(stem):
    tree = ast.parse((OPS_FOLDER / stem / "op.py").read_text())
    handles = {name for name, *_ in raw.raw_ops("pack_weight")} | {
        name for name, *_ in raw.raw_ops(stem)
    }
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [text for text in called if text.split(".")[-1] in handles]
    assert [text for text in called if text.startswith("_registry.chosen(")]


@pytest.mark.parametrize("stem", sorted(_registry.OPS))
def test_triton_functions_have_the_signatures_of_their_operators(stem):
    path = OPS_FOLDER / stem / "triton.py"
    if not path.exists():
        assert not _registry.what_runs(stem)["triton"][0]
        return
    functions = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for _, handle, *_ in raw.raw_ops(stem):
        name = raw.raw_name(handle)
        assert functions[name] == [argument.name for argument in handle._schema.arguments]


WITHOUT_CUDA_LIBRARY = """
import sys, torch
load = torch.ops.load_library
def refuse(path):
    if "cuda" in str(path):
        raise OSError("for this test")
    load(path)
torch.ops.load_library = refuse
from l0kernels.functional import pack_weight
weight, rows = torch.arange(6.0, device="cuda").reshape(3, 2), torch.tensor([0, 2], device="cuda")
assert torch.equal(pack_weight(weight, rows=rows), weight[rows])
print("l0kernels.ops.pack_weight.triton" in sys.modules)
"""


def need_gpu_for(*names):
    for name in names:
        if _config.why_unavailable(name):
            pytest.skip(f"{name} kernels cannot run here: {_config.why_unavailable(name)}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_gpu_without_the_library_runs_triton(name):
    need_gpu_for("triton")
    done = run_python(WITHOUT_CUDA_LIBRARY, L0K_IMPL=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n" and "missing" not in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "cuda", "triton"])
def test_a_gpu_runs_what_is_asked_for(monkeypatch, name):
    need_gpu_for("cuda", "triton")
    calls, function = [], _registry._triton_function
    monkeypatch.setattr(
        _registry, "_triton_function", lambda *which: calls.append(which) or function(*which)
    )
    weight, rows = torch.randn(3, 2, device="cuda"), torch.tensor([0, 2], device="cuda")
    with l0.use_impl(name):
        assert torch.equal(pack_weight(weight, rows=rows), weight[rows])
    assert calls == ([("pack_weight", "pack_weight")] if name == "triton" else [])


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
    assert set(_registry.OPS) == {path.parent.name for path in OPS_FOLDER.glob("*/op.py")}
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
