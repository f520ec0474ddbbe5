# SPDX-License-Identifier: Apache-2.0
"""What L0K_BUILD builds, what it refuses, and what ends up in the archives."""

import ctypes
import importlib.util
import json
import shutil
import subprocess
import tarfile

import pytest
import torch
from kernels import sass

from l0kernels import _ext, _registry

SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"

TRAIN_WITHOUT_LIBRARY = """
import importlib.util, torch, l0kernels
from l0kernels import _ext, _registry
from l0kernels.functional import pack_weight
assert importlib.util.find_spec("l0kernels.bench") is not None
weight = torch.randn(4, 3, requires_grad=True)
for _ in range(2):
    rows = torch.tensor([0, 3])
    packed = pack_weight(weight, rows=rows, row_map=torch.full((2, 4), 1), z=torch.ones(2))
    packed.sum().backward()
assert torch.equal(weight.grad, torch.tensor([2.0, 0, 0, 2]).outer(torch.ones(3)))
print(l0kernels.__file__)
print(_ext.why_not())
"""


@pytest.fixture
def build(python, source_tree, tmp_path):
    """Runs `setup.py build` on a copy of the sources; its result and the built package's folder."""

    def run(**environment):
        target = tmp_path / "built"
        done = python(
            "setup.py", "build", "--build-lib", str(target), cwd=source_tree, **environment
        )
        return done, target / "l0kernels"

    return run


@pytest.fixture
def setup_script(root):
    """setup.py as a module, nothing run."""
    spec = importlib.util.spec_from_file_location("l0kernels_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(tmp_path):
    """Makes a CUDA_HOME whose nvcc is this shell script."""

    def make(script):
        program = tmp_path / "cuda" / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return str(tmp_path / "cuda")

    return make


@pytest.fixture
def need_nvcc(setup_script):
    if setup_script.why_not_cuda():
        pytest.skip(setup_script.why_not_cuda())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"L0K_BUILD": "gpu"}, "expected one of auto, none, cpu, cuda, got 'gpu'"),
        ({"L0K_BUILD": "cpu", "CXX": "no-such-compiler"}, "compiler does not start"),
        ({"L0K_BUILD": "cpu", "CXX": "false"}, "compiler fails on a small program"),
    ],
)
def test_explicit_request_that_cannot_be_met_fails(build, environment, message):
    done, package = build(**environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert not package.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "nvcc --version fails"),
        ("echo nonsense", "does not state a release"),
        ("echo Cuda, release 11.8, V11.8.89", "nvcc >= 12.1, got release 11.8, V11.8.89"),
    ],
)
def test_cuda_fails_with_an_unfit_compiler(build, cuda_home, script, message):
    done, package = build(L0K_BUILD="cuda", CUDA_HOME=cuda_home(script))
    assert done.returncode != 0
    assert "L0K_BUILD=cuda: " in done.stderr and message in done.stderr
    assert not package.exists()


def test_cuda_needs_what_the_cpu_part_needs(build):
    done, _ = build(L0K_BUILD="cuda", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "L0K_BUILD=cuda: the C++ compiler does not start" in done.stderr


def test_order_in_which_nvcc_is_looked_for(setup_script, monkeypatch):
    present = ["/usr/local/cuda/bin/nvcc", "nvcc", "/home-of-cuda/bin/nvcc"]
    which = shutil.which

    def find(name):
        return which(name) if "nvcc" not in name else name if name in present else None

    monkeypatch.setattr(shutil, "which", find)
    monkeypatch.setenv("CUDA_HOME", "/home-of-cuda")
    while present:
        assert setup_script.nvcc() == present.pop()
    assert setup_script.nvcc() == ""
    assert "no nvcc found" in setup_script.why_not_cuda()
    monkeypatch.setenv("L0K_BUILD", "auto")
    assert "no nvcc found" in setup_script.plan().cuda


def test_auto_without_a_compiler_builds_without_library_and_says_why(build):
    done, package = build(L0K_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    for title in ("C++", "CUDA"):
        assert f"{title} ops not built: the C++ compiler does not start" in done.stdout
    assert not list(package.glob("*.so"))
    record = json.loads((package / "_build_info.json").read_text())
    assert record["cpp"] is record["cuda"] is False
    assert "no-such-compiler" in record["reason"] and "no-such-compiler" in record["cuda_reason"]


@pytest.mark.parametrize(("choice", "succeeds"), [("auto", True), ("cpu", False)])
def test_sources_that_do_not_compile(build, source_tree, tmp_path, choice, succeeds):
    stale = tmp_path / "built" / "l0kernels"
    stale.mkdir(parents=True)
    for name in ("_C.so", "_C_cuda.so"):
        (stale / name).write_bytes(b"left by an earlier build")
    for source in [*source_tree.glob("csrc/**/*.cpp"), *source_tree.glob("csrc/cuda/*.cu")]:
        source.write_text("this is not C++\n")
    done, package = build(L0K_BUILD=choice)
    assert (done.returncode == 0) is succeeds, done.stderr
    assert "this is not C++" in done.stdout + done.stderr
    assert not list(package.glob("*.so"))
    if succeeds:
        record = json.loads((package / "_build_info.json").read_text())
        assert record["reason"] and record["cuda_reason"]


def replace_sources(tree, cuda):
    """Empty C++ sources and one CUDA source."""
    for source in [*tree.glob("csrc/**/*.cpp"), *tree.glob("csrc/cuda/*.cu")]:
        source.unlink()
    for place, text in (("cpu/empty.cpp", ""), ("math.cpp", ""), ("cuda/tiny.cu", cuda)):
        (tree / "csrc" / place).write_text(text)


@pytest.mark.parametrize(("choice", "succeeds"), [("auto", True), ("cuda", False)])
def test_cuda_sources_that_do_not_compile(need_nvcc, build, source_tree, choice, succeeds):
    replace_sources(source_tree, cuda="this is not CUDA\n")
    done, package = build(L0K_BUILD=choice)
    assert (done.returncode == 0) is succeeds, done.stderr
    assert "this is not CUDA" in done.stdout + done.stderr
    assert not (package / "_C_cuda.so").exists()
    if succeeds:
        assert (package / "_C.so").exists()
        assert "CUDA ops not built: the CUDA build failed" in done.stdout
        assert "C++ ops built" in done.stdout


def test_cuda_is_built_where_it_is_found_and_removed_where_it_is_not_wanted(
    need_nvcc, build, source_tree, setup_script
):
    replace_sources(
        source_tree,
        cuda="__global__ void twice(float* x) { *x *= 2; }\n"
        'extern "C" __attribute__((visibility("default"))) int launch() {\n'
        "  twice<<<1, 1>>>(nullptr);\n  return cudaGetLastError();\n}\n",
    )
    done, package = build(L0K_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "CUDA ops built" in done.stdout
    record = json.loads((package / "_build_info.json").read_text())
    assert record["cuda"] is True and record["cuda_reason"] == ""
    assert record["nvcc"] == setup_script.nvcc_version()
    assert {"sm_80", "sm_90a"} < set(record["architectures"])
    library = ctypes.CDLL(str(package / "_C_cuda.so"))
    assert (library.launch() == 0) is torch.cuda.is_available()  # an error code, not a crash
    done, package = build(L0K_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert not (package / "_C_cuda.so").exists()
    record = json.loads((package / "_build_info.json").read_text())
    assert record["cuda"] is False and record["cuda_reason"] == "L0K_BUILD=cpu"
    assert record["nvcc"] is None and record["architectures"] == []


def test_install_without_library_works_and_says_so_once(python, source_tree, tmp_path):
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(site)]
    done = python(*install, str(source_tree), L0K_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert not list(site.glob("**/*.so"))
    done = python("-c", TRAIN_WITHOUT_LIBRARY, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    where, why = done.stdout.splitlines()
    assert where.startswith(str(site))
    assert why == "not built: L0K_BUILD=none"
    assert done.stderr.count("C++ CPU ops") == 1


def test_sdist_holds_everything_a_build_needs_and_nothing_built(python, source_tree, tmp_path):
    for name in ("_C.so", "_C_cuda.so"):
        (source_tree / "l0kernels" / name).write_bytes(b"left by a build")
    done = python("-c", SDIST, str(tmp_path), cwd=source_tree, L0K_BUILD="none")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    patterns = [
        "csrc/**/*.cpp",
        "csrc/**/*.h",
        "csrc/**/*.cu",
        "csrc/**/*.cuh",
        "tests/harness/*",
        "bench/**/*.py",
        "l0kernels/**/*.py",
        "tests/**/*.py",
    ]
    needed = {
        path.relative_to(source_tree).as_posix()
        for pattern in patterns
        for path in source_tree.glob(pattern)
    }
    needed |= {"l0kernels/py.typed", "LICENSE", "setup.py", "constraints.txt", "Makefile"}
    assert needed - names == set()
    assert [name for name in names if name.endswith((".so", "_build_info.json"))] == []


def test_libraries_are_loaded_unless_they_were_not_wanted():
    info = _ext.build_info()
    assert _ext.cpp_available() is info["cpp"], _ext.why_not()
    assert info["cpp"] is (info["L0K_BUILD"] != "none"), info["reason"]
    assert bool(_ext.load("cuda")) is not info["cuda"], _ext.load("cuda")
    if info["L0K_BUILD"] in ("none", "cpu", "cuda"):
        assert info["cuda"] is (info["L0K_BUILD"] == "cuda"), info["cuda_reason"]


@pytest.fixture(params=["cpp", "cuda"])
def library(request):
    """The file of each library that is there."""
    if _ext.load(request.param):
        pytest.skip(f"{_ext.LIBRARIES[request.param].title} {_ext.load(request.param)}")
    return _ext.LIBRARIES[request.param].file


def symbols(library, which):
    """(kind, name) of the library's dynamic symbols."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "--dynamic", f"--{which}-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {tuple(line.split()[-2:]) for line in lines}


def test_library_uses_the_stable_abi_only(library):
    names = [name for _, name in symbols(library, "undefined")]
    assert any(name.startswith("aoti_torch_") or name.startswith("torch_") for name in names)
    unstable = ("Py", "_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert [name for name in names if name.startswith(unstable)] == []


@pytest.fixture
def cuda_library():
    if _ext.load("cuda"):
        pytest.skip(f"CUDA ops {_ext.load('cuda')}")
    return _ext.LIBRARIES["cuda"].file


def test_cuda_library_needs_no_cuda_to_load(cuda_library):
    undefined = symbols(cuda_library, "undefined")
    assert ("w", "aoti_torch_get_current_cuda_stream") in undefined
    assert [name for _, name in undefined if name.startswith(("cuda", "__cuda", "cu"))] == []
    # Its runtime must not stand in for the one that torch has, nor the other way round.
    defined = symbols(cuda_library, "defined")
    assert [name for _, name in defined if name.startswith(("cuda", "__cuda"))] == []
    text = cuda_library.read_bytes()
    assert b"libcudart.so" not in text
    # Without it, the stream of a torch with CUDA would not be found.
    assert b"libtorch.so" in text


def test_cuda_library_has_code_for_every_architecture(cuda_library, setup_script):
    if sass.cuobjdump() is None:
        pytest.skip("cuobjdump not found: triton has it")
    listed = {
        kind: subprocess.run(
            [sass.cuobjdump(), f"--list-{kind}", str(cuda_library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for kind in ("elf", "ptx")
    }
    sources = len(list(setup_script.sources("csrc/cuda/*.cu")))
    for name in setup_script.architectures():
        assert len([line for line in listed["elf"] if f".sm_{name}.cubin" in line]) == sources
    newest = setup_script.architectures()[-1].rstrip("a")
    assert len([line for line in listed["ptx"] if f".sm_{newest}.ptx" in line]) == sources


def test_cuda_kernels_are_not_overridden(cuda_library):
    for raws in _registry.OPS.values():
        for raw, compiled in raws.items():
            dump = torch._C._dispatch_dump(f"l0kernels::{raw}")
            (line,) = [line for line in dump.splitlines() if line.startswith("CUDA:")]
            assert ("_registry.py" not in line) is ("cuda" in compiled), line
