# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA sources for every architecture, as the build does, and reads what they need."""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from kernels import sass
from kernels.table import Row, Skipped

ROOT = Path(__file__).resolve().parents[2]
_FUNCTION = re.compile(r"Compiling entry function '(\S+)'|Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_DYNAMIC = "l0k_dynamic_shared"  # what csrc/cuda/common.cuh names it
_THREADS = re.compile(r"\.maxntid\s+(\d+)(?:,\s*(\d+),\s*(\d+))?")


@dataclass
class Resources:
    """What ptxas says about one function; spilled and shared in bytes."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0


def build_script() -> ModuleType:
    """setup.py, which knows the compiler and its flags."""
    spec = importlib.util.spec_from_file_location("l0kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_ptxas(text: str) -> dict[str, Resources]:
    """{mangled function: resources} from what `ptxas -v` prints."""
    found: dict[str, Resources] = {}
    current = Resources()
    for line in text.splitlines():
        if named := _FUNCTION.search(line):
            current = found.setdefault(named[1] or named[2], Resources())
        if spills := _SPILLS.search(line):
            current.spilled += int(spills[1]) + int(spills[2])
        if registers := _REGISTERS.search(line):
            current.registers = int(registers[1])
        if shared := _SHARED.search(line):
            current.shared = int(shared[1])
    return found


@dataclass
class Entry:
    """What PTX says about one kernel.

    Args:
        threads: of a block by its launch bounds, None without them.
        dynamic: whether it has shared memory whose size is up to the launch.
    """

    threads: int | None
    dynamic: bool


def parse_ptx(text: str) -> dict[str, Entry]:
    """{mangled kernel: what is known of it}."""
    found: dict[str, Entry] = {}
    for part in text.split(".entry")[1:]:
        head, _, body = part.partition("{")
        sizes = _THREADS.search(head)
        threads = None
        if sizes:
            threads = int(sizes[1]) * int(sizes[2] or 1) * int(sizes[3] or 1)
        found[head.partition("(")[0].strip()] = Entry(threads, _DYNAMIC in body)
    return found


def readable(names: Iterable[str]) -> dict[str, str]:
    """{mangled kernel: its name and template arguments}."""
    mangled = list(names)
    if shutil.which("c++filt") is None:
        return {name: name for name in mangled}
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return dict(zip(mangled, map(shorten, done.stdout.splitlines()), strict=True))


def shorten(name: str) -> str:
    """Drops the return type, our namespaces and casts of numbers."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\bl0k::", "", name)
    name = re.sub(r"\((?:int|unsigned int|long|bool)\)", "", name)
    return name.removeprefix("void ")


def compile_source(build: ModuleType, root: Path, source: Path, name: str) -> list[Row]:
    """The kernels of one source on one of the build's architectures."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [build.nvcc(), *build.nvcc_flags(), f"-I{root / 'csrc'}"]
        command += ["-isystem", str(build.torch_root() / "include")]
        command += [f"-gencode=arch=compute_{name},code=sm_{name}", "-cubin", "-Xptxas=-v"]
        command += ["--keep", f"--keep-dir={folder}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{name}:\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        entries = parse_ptx(ptx.read_text(encoding="utf-8"))
        counts = sass.count(sass.disassemble(cubin))
    resources = parse_ptxas(done.stdout + done.stderr)
    names = readable(resources)
    found = []
    for function, needs in resources.items():
        # Without an entry it is a function that was not inlined; its spills count all the same.
        entry = entries.get(function)
        config = "" if entry else "not inlined"
        problems: tuple[str, ...] = ()
        if entry and entry.dynamic:
            config = "and dynamic shared memory"
        if entry and entry.threads is None:
            problems = ("has no launch bounds",)
        found.append(
            Row(
                backend="cuda",
                source=source.relative_to(root).as_posix(),
                kernel=names[function],
                config=config,
                arch=f"sm_{name}",
                threads=entry and entry.threads or 1024,
                registers=needs.registers,
                spilled=needs.spilled,
                shared=needs.shared,
                instructions=counts.get(function, {}),
                problems=problems,
            )
        )
    return found


def rows(root: Path = ROOT) -> list[Row]:
    """Every kernel of `root`/csrc/cuda on every architecture.

    Raises:
        Skipped: there is no nvcc.
        RuntimeError: a source does not compile, or there is none.
    """
    build = build_script()
    if not build.nvcc():
        raise Skipped("no nvcc: skipped")
    if reason := build.why_not_cuda():
        raise RuntimeError(reason)
    sources = sorted((root / "csrc" / "cuda").glob("*.cu"))
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(compile_source, build, root, source, name)
            for source in sources
            for name in build.ARCHITECTURES
        ]
        found = [row for job in jobs for row in job.result()]
    if not found:
        raise RuntimeError("nvcc is here, but csrc/cuda has no kernel")
    return found
