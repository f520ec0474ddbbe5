# SPDX-License-Identifier: Apache-2.0
"""What L0K_BUILD builds, what it refuses, and what ends up in the archives."""

import json
import shutil
import subprocess
import tarfile

import pytest

from l0kernels import _ext

SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"

TRAIN_WITHOUT_LIBRARY = """
import importlib.util, torch, l0kernels
from l0kernels import _ext
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


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"L0K_BUILD": "cuda"}, "no CUDA kernels in this version"),
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


def test_auto_without_a_compiler_builds_without_library_and_says_why(build):
    done, package = build(L0K_BUILD="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "C++ ops not built: the C++ compiler does not start" in done.stdout
    assert not list(package.glob("*.so"))
    record = json.loads((package / "_build_info.json").read_text())
    assert record["cpp"] is False and "no-such-compiler" in record["reason"]


@pytest.mark.parametrize(("choice", "succeeds"), [("auto", True), ("cpu", False)])
def test_sources_that_do_not_compile(build, source_tree, tmp_path, choice, succeeds):
    stale = tmp_path / "built" / "l0kernels" / "_C.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"left by an earlier build")
    for source in source_tree.glob("csrc/**/*.cpp"):
        source.write_text("this is not C++\n")
    done, package = build(L0K_BUILD=choice)
    assert (done.returncode == 0) is succeeds, done.stderr
    assert "this is not C++" in done.stdout + done.stderr
    assert not list(package.glob("*.so"))
    if succeeds:
        assert json.loads((package / "_build_info.json").read_text())["reason"]


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
    (source_tree / "l0kernels" / "_C.so").write_bytes(b"left by a build")
    done = python("-c", SDIST, str(tmp_path), cwd=source_tree, L0K_BUILD="none")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    patterns = [
        "csrc/**/*.cpp",
        "csrc/**/*.h",
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


def test_library_is_loaded_unless_it_was_not_wanted():
    info = _ext.build_info()
    assert _ext.cpp_available() is info["cpp"], _ext.why_not()
    assert info["cpp"] is (info["L0K_BUILD"] != "none"), info["reason"]


def test_library_uses_the_stable_abi_only():
    if not _ext.cpp_available():
        pytest.skip(f"C++ ops {_ext.why_not()}")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "--dynamic", "--undefined-only", str(_ext._LIBRARY)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any(name.startswith("aoti_torch_") or name.startswith("torch_") for name in symbols)
    unstable = ("Py", "_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
    assert [name for name in symbols if name.startswith(unstable)] == []
