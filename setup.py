# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ parts; everything that is not about compiling is in pyproject.toml.

L0K_BUILD=auto|none|cpu|cuda chooses what is built: `auto` takes what it finds and prints why,
an explicit request that cannot be met fails, `cpu` builds the C++ ops, `cuda` these and the CUDA
ops, `none` builds no library at all. No GPU is needed to build for one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
TARGET_VERSION = "0x020b000000000000"  # oldest libtorch the stable-ABI library loads in: 2.11
OLDEST_TORCH = (2, 11)
CHOICES = ("auto", "none", "cpu", "cuda")
# Gate decisions must be the same on every machine, so the compiler may not contract a*b+c where
# the target happens to have a fused instruction.
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
# Square roots need not set errno: loops with one become vector instructions.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", *HOST_FLAGS]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-Xcompiler={','.join(HOST_FLAGS)}"]
OLDEST_NVCC = (12, 1)  # kernels have more than 4 KiB of parameters
# Machine code for these, and the newest one's PTX for GPUs that come later.
ARCHITECTURES = ("80", "90a", "100")


def choice() -> str:
    name = os.environ.get("L0K_BUILD", "auto")
    if name not in CHOICES:
        raise SetupError(f"L0K_BUILD: expected one of {', '.join(CHOICES)}, got {name!r}")
    return name


def compiler() -> list[str]:
    """The C++ compiler command, empty if there is none."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else []


def why_no_compiler() -> str:
    """An empty string if a C++17 program compiles and links, else what is wrong."""
    if not compiler():
        return "no C++ compiler found (looked for $CXX, c++, g++, clang++)"
    command = [*compiler(), "-std=c++17", "-x", "c++", "-", "-o", os.devnull]
    program = "#include <vector>\nint main() { return (int)std::vector<int>().size(); }\n"
    try:
        subprocess.run(command, input=program, text=True, capture_output=True, check=True)
    except OSError as error:
        return f"the C++ compiler does not start: {error}"
    except subprocess.CalledProcessError as error:
        return f"the C++ compiler fails on a small program: {error.stderr.strip()}"
    return ""


def torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def torch_root() -> Path:
    # Found without importing it: that takes seconds, and only its headers and libraries matter.
    spec = util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def why_not_cpu() -> str:
    """An empty string if the C++ CPU ops can be built here, else the reason why not."""
    if sys.platform != "linux":
        return f"the C++ ops are built on Linux only, not on {sys.platform}"
    numbers = re.match(r"(\d+)\.(\d+)", torch_version())
    if numbers is None:
        return "torch is not installed where the build runs"
    if tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        return f"expected torch >= 2.11 where the build runs, got {torch_version()}"
    return why_no_compiler()


def nvcc() -> str:
    """Path of the CUDA compiler, "" if there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    places += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), "")


@cache
def nvcc_version() -> str:
    """As the compiler states it: "release 13.0, V13.0.88"; "" if it does not run."""
    try:
        done = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = re.search(r"release \d.*", done.stdout)
    return found[0] if found else ""


def why_not_cuda() -> str:
    """An empty string if the CUDA ops can be built where the C++ ops can, else why not."""
    if not nvcc():
        return "no nvcc found (looked in $CUDA_HOME/bin, $PATH, /usr/local/cuda/bin)"
    numbers = re.match(r"release (\d+)\.(\d+)", nvcc_version())
    if numbers is None:
        return f"{nvcc()} --version fails or does not state a release"
    if tuple(map(int, numbers.groups())) < OLDEST_NVCC:
        return f"expected nvcc >= 12.1, got {nvcc_version()} ({nvcc()})"
    return ""


@cache
def architectures() -> list[str]:
    """Those of ARCHITECTURES that this nvcc knows."""
    done = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(done.stdout.split())
    return [name for name in ARCHITECTURES if f"compute_{name.rstrip('a')}" in known]


@dataclass(frozen=True)
class Plan:
    """Why each library is not built; an empty string: it is."""

    cpp: str
    cuda: str


@cache
def plan() -> Plan:
    name = choice()
    if name == "none":
        return Plan(cpp="L0K_BUILD=none", cuda="L0K_BUILD=none")
    cpp = why_not_cpu()
    cuda = "L0K_BUILD=cpu" if name == "cpu" else cpp or why_not_cuda()
    missing = {"auto": "", "cpu": cpp, "cuda": cuda}[name]
    if missing:
        raise SetupError(f"L0K_BUILD={name}: {missing}")
    return Plan(cpp=cpp, cuda=cuda)


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def ops_library(name: str, pattern: str, flags: list[str], link_flags: list[str]) -> Extension:
    """A library without Python binding whose only interface is libtorch's stable ABI."""
    torch = torch_root()
    return Extension(
        name,
        sources(pattern),
        depends=[*sources("csrc/**/*.h"), *sources("csrc/**/*.cuh")],
        include_dirs=[str(torch / "include")],
        extra_compile_args=flags,
        extra_link_args=[f"-L{torch / 'lib'}", *link_flags, "-ltorch_cpu", "-ltorch"],
        optional=choice() == "auto",
    )


def cpu_ops() -> Extension:
    # Debian and Ubuntu link --as-needed, which would drop libtorch and leave its symbols null.
    flags = [*FLAGS, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    return ops_library("l0kernels._C", "csrc/cpu/*.cpp", flags, ["-Wl,--no-as-needed"])


def nvcc_flags() -> list[str]:
    # The host part is compiled by what compiles the rest, unless that is a wrapper with arguments.
    host = [f"-ccbin={compiler()[0]}"] if len(compiler()) == 1 else []
    return [*NVCC_FLAGS, *host, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]


def gpu_flags(names: list[str]) -> list[str]:
    """Machine code for these architectures and PTX of the newest."""
    newest = names[-1].rstrip("a")
    code = [(name, f"sm_{name}") for name in names] + [(newest, f"compute_{newest}")]
    return [f"-gencode=arch=compute_{name},code={target}" for name, target in code]


def cuda_ops() -> Extension:
    # The CUDA runtime is linked in and hidden, so the library needs no CUDA to load and never
    # mixes with the runtime that torch brings.
    link = ["-cudart=static", "-Xlinker=--exclude-libs,ALL", "-Xlinker=--no-as-needed"]
    pattern = "csrc/cuda/*.cu"
    # Where there are more cores than files, the architectures of one are compiled side by side.
    threads = f"--threads={max(1, (os.cpu_count() or 1) // len(sources(pattern)))}"
    flags = [*nvcc_flags(), *gpu_flags(architectures()), threads]
    return ops_library("l0kernels._C_cuda", pattern, flags, link)


def scalar_math() -> Extension:
    pybind11 = util.find_spec("pybind11")
    include = [] if pybind11 is None else [str(Path(str(pybind11.origin)).parent / "include")]
    return Extension(
        "l0kernels._math",
        ["csrc/math.cpp"],
        include_dirs=[*include, sysconfig.get_paths()["include"]],
        extra_compile_args=FLAGS,
        optional=True,
    )


def ninja() -> str:
    """Path of the ninja program: the one of the Python package need not be on PATH."""
    if util.find_spec("ninja"):
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("ninja not found: install it, or build with pip's build isolation")
    return found


def escape(path: str | Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def ninja_file(ext: Extension, objects: Path, library: Path) -> str:
    """Rules for one library, all of its sources in one language; every path is absolute."""
    cuda = ext.sources[0].endswith(".cu")
    driver = [nvcc()] if cuda else compiler()
    extra = "" if cuda else os.environ.get("CXXFLAGS", "")  # nvcc reads NVCC_APPEND_FLAGS itself
    includes = [f"-I{ROOT / 'csrc'}"]
    for path in ext.include_dirs:
        includes += ["-isystem", path]
    compile_flags = f"{shlex.join([*ext.extra_compile_args, *includes])} {extra}"
    link_flags = shlex.join(ext.extra_link_args)
    lines = [
        f"driver = {shlex.join(driver).replace('$', '$$')}",
        "rule compile",
        f"  command = $driver -MD -MF $out.d {compile_flags.replace('$', '$$')} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $driver -shared $in -o $out {link_flags.replace('$', '$$')}",
    ]
    outputs = []
    for source in ext.sources:
        outputs.append(escape(objects / source) + ".o")
        lines.append(f"build {outputs[-1]}: compile {escape(ROOT / source)}")
    lines.append(f"build {escape(library)}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


def libraries(package: Path) -> list[Path]:
    """Where _C, _C_cuda and _math lie in the built package."""
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    return [package / "_C.so", package / "_C_cuda.so", package / f"_math{tag}"]


def forget(package: Path) -> None:
    for library in libraries(package):
        library.unlink(missing_ok=True)


class BuildLibraries(build_ext):
    """Compiles with ninja, MAX_JOBS files at a time."""

    def get_ext_filename(self, fullname: str) -> str:
        # The operators have no Python binding, so their file names carry no Python tag.
        if fullname.rpartition(".")[2] in ("_C", "_C_cuda"):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        # Nothing from an earlier build may stand in for a library that fails to build now.
        in_place = self.inplace or self.editable_mode
        forget(ROOT / "l0kernels" if in_place else Path(self.build_lib) / "l0kernels")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable build gets a new temporary folder each time; ours stays, so that the next one
        # compiles only what has changed.
        folder = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        objects = folder.resolve() / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        rules = objects / "build.ninja"
        rules.write_text(ninja_file(ext, objects, library), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [ninja(), "-C", str(objects), *jobs]
        if subprocess.run(command).returncode:
            raise CompileError(f"{ext.name}: the build failed, see the compiler's message above")


class WriteBuildInfo(Command):
    """Records what was built, and why not, for `l0kernels info` and the loader."""

    description = "write l0kernels/_build_info.json"
    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "l0kernels"
        if choice() == "none":
            forget(package)
        record = build_record(package)
        for key, title in (("", "C++"), ("cuda_", "CUDA")):
            reason = record[f"{key}reason"]
            print(f"l0kernels: {title} ops {f'not built: {reason}' if reason else 'built'}")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "l0kernels" / "_build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def first_line(command: list[str]) -> str | None:
    """First line of a program's output, None if it does not run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0]


def build_record(package: Path) -> dict[str, object]:
    """What was built, with what, and why the rest was not."""
    cpp, cuda, scalar = (library.exists() for library in libraries(package))
    failed = "the {} build failed, its output says why"
    names = architectures() if cuda else []
    return {
        "L0K_BUILD": choice(),
        "cpp": cpp,
        "math": scalar,
        "reason": "" if cpp else plan().cpp or failed.format("C++"),
        "torch": torch_version() or None,
        "target_version": TARGET_VERSION,
        "compiler": first_line([*compiler(), "--version"]) if cpp else None,
        "flags": " ".join([*FLAGS, os.environ.get("CXXFLAGS", "")]).strip() if cpp else None,
        "cuda": cuda,
        "cuda_reason": "" if cuda else plan().cuda or failed.format("CUDA"),
        "nvcc": nvcc_version() if cuda else None,
        "architectures": [*(f"sm_{name}" for name in names), *(f"PTX {n}" for n in names[-1:])],
        "cuda_flags": " ".join(nvcc_flags()) if cuda else None,
        "python": sys.version.partition(" ")[0],
        "git": first_line(["git", "rev-parse", "--short", "HEAD"]),
    }


def packages() -> dict[str, str]:
    """Package name -> folder; bench/ ships as l0kernels.bench."""
    found = {"l0kernels": "l0kernels"}
    for name, folder in (("l0kernels", "l0kernels"), ("l0kernels.bench", "bench")):
        if (ROOT / folder / "__init__.py").exists():
            found[name] = folder
        for sub in find_packages(str(ROOT / folder)):
            found[f"{name}.{sub}"] = f"{folder}/{sub.replace('.', '/')}"
    return found


def main() -> None:
    extensions = [] if plan().cpp else [cpu_ops(), scalar_math()]
    if not plan().cuda:
        extensions.append(cuda_ops())
    build.sub_commands = [*build.sub_commands, ("build_info", None)]
    setup(
        packages=list(packages()),
        package_dir=packages(),
        ext_modules=extensions,
        cmdclass={"build_ext": BuildLibraries, "build_info": WriteBuildInfo},
    )


# `make kernels` imports this file for its flags.
if __name__ == "__main__":
    main()
