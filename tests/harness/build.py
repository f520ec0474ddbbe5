# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources with a host compiler."""

import fcntl
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME = HERE / "cuda_on_cpu.cpp"
TARGET_VERSION = "0x020b000000000000"  # as setup.py: the API of libtorch 2.11

FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
KERNEL_FLAGS = [
    "-ffp-contract=off",  # as nvcc --fmad=false: gate decisions are the same everywhere
    "-fno-strict-aliasing",  # nvcc does not assume it either
    "-Wno-unknown-pragmas",
    "-Wno-class-memaccess",  # 16-bit types may be copied as bytes
    "-DL0K_HARNESS",
    f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
]
DEBUG = ["-O1", "-g1", "-fno-omit-frame-pointer"]
# What faults anyway costs half the time of compilation.
FAULTS = "null,vptr,object-size,nonnull-attribute,returns-nonnull-attribute,pointer-overflow"
SANITIZERS = {
    None: ["-O1"],
    "address": [*DEBUG, "-fsanitize=address,undefined", f"-fno-sanitize={FAULTS}"],
    "thread": [*DEBUG, "-fsanitize=thread"],
}
# The fibers switch stacks behind the sanitizers' backs and tell them so themselves.
RUNTIME_FLAGS = {None: [], "address": ["-DL0K_ASAN"], "thread": ["-DL0K_TSAN"]}
LINK_FLAGS = {
    None: [],
    "address": ["-fsanitize=address,undefined"],
    "thread": ["-fsanitize=thread"],
}


class BuildError(RuntimeError):
    """The compiler does not accept a source."""


def preload(sanitize: str) -> dict[str, str]:
    """The environment of a process that loads libraries with this sanitizer."""
    names = {"address": ["libasan.so", "libstdc++.so"], "thread": ["libtsan.so"]}[sanitize]
    # A sanitizer must come first; it looks for the C++ library before that is there.
    found = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in names
    ]
    return {
        "LD_PRELOAD": " ".join(process.stdout.strip() for process in found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def compiler() -> str:
    """Path of g++, which has the sanitizers' libraries; empty if there is none."""
    return shutil.which("g++") or ""


@functools.cache
def cuda_include() -> Path | None:
    """The folder of NVIDIA's headers, None if there is none."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _home_of(nvcc)]
    for home in filter(None, [*candidates, "/usr/local/cuda"]):
        if (Path(home) / "include" / "cuda_bf16.h").is_file():
            return Path(home) / "include"
    return None


def _home_of(nvcc: str | None) -> str | None:
    """Where an nvcc belongs, by its own words: it may be a script or a link."""
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    words = subprocess.run(command, capture_output=True, text=True).stderr
    here = re.search(r"^#\$ _HERE_=(.*)$", words, re.MULTILINE)
    return str(Path(here[1]).parent) if here else None


def why_not() -> str:
    """An empty string where CUDA sources can run on the CPU, else what is missing."""
    if sys.platform != "linux":
        return f"expected Linux; got {sys.platform}"
    if not compiler():
        return "g++ is not on PATH"
    if cuda_include() is None:
        return "found no CUDA headers: nvcc is not on PATH and CUDA_HOME is not set"
    return ""


def torch_root() -> Path:
    # Found without importing it, which takes seconds.
    spec = util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    sanitize: str | None = None,
    shared: bool = True,
) -> Path:
    """Compiles sources into a library or, not `shared`, a program.

    Compiles again only what has changed; several processes may call it at once.

    Args:
        sources: .cu files, which are compiled as C++ and bring the fiber runtime along, and
            .cpp files, which are not instrumented.
        out: the file to make; object files go to a folder beside it.
        sanitize: None, "address" (with undefined behaviour) or "thread".
        shared: whether it is a library, for `torch.ops.load_library`.

    Raises:
        BuildError: with the compiler's words.
    """
    from ninja import BIN_DIR

    out = Path(out).resolve()
    objects = out.with_name(out.name + ".build")
    objects.mkdir(parents=True, exist_ok=True)
    paths = [Path(source).resolve() for source in sources]
    rules = _rules(paths, out, objects, sanitize, shared)
    with _locked(objects / "lock"):
        file = objects / "build.ninja"
        if not file.exists() or file.read_text() != rules:
            file.write_text(rules)
        command = [str(Path(BIN_DIR) / "ninja"), "-C", str(objects), *_jobs()]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(done.stdout + done.stderr)
    return out


def _jobs() -> list[str]:
    jobs = os.environ.get("MAX_JOBS")
    return ["-j", jobs] if jobs else []


@contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rules(
    sources: list[Path], out: Path, objects: Path, sanitize: str | None, shared: bool
) -> str:
    torch = torch_root()
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    for path in (torch / "include", torch / "include/torch/csrc/api/include", cuda_include()):
        includes += ["-isystem", str(path)]
    libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-Wl,--no-as-needed"]
    libraries += ["-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    link = [*LINK_FLAGS[sanitize], *(["-shared"] if shared else []), *libraries]
    lines = [
        f"rule compile\n  command = {compiler()} -MMD -MF $out.d -x c++ {_words(FLAGS)} "
        f"{_words(includes)} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler()} $in -o $out {_words(link)}",
    ]
    kernels = [source for source in sources if source.suffix == ".cu"]
    flags = dict.fromkeys(sources, ["-O1"])
    flags |= dict.fromkeys(kernels, [*KERNEL_FLAGS, *SANITIZERS[sanitize]])
    if kernels:
        flags[RUNTIME] = ["-O2", *RUNTIME_FLAGS[sanitize]]
    made = []
    for number, (source, own) in enumerate(flags.items()):
        made.append(_path(objects / f"{number}-{source.stem}.o"))
        lines.append(f"build {made[-1]}: compile {_path(source)}\n  flags = {_words(own)}")
    lines.append(f"build {_path(out)}: link {' '.join(made)}")
    return "\n".join(lines) + "\n"


def _words(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))
