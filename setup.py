# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ parts; everything that is not about compiling is in pyproject.toml.

L0K_BUILD=auto|none|cpu|cuda chooses what is built: `auto` takes what it finds and prints why,
an explicit request that cannot be met fails, `none` builds no library at all.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
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
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]


def choice() -> str:
    name = os.environ.get("L0K_BUILD", "auto")
    if name not in CHOICES:
        raise SetupError(f"L0K_BUILD: expected one of {', '.join(CHOICES)}, got {name!r}")
    if name == "cuda":
        raise SetupError("L0K_BUILD=cuda: there are no CUDA kernels in this version; use cpu")
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


def plan() -> tuple[str, str]:
    """What is built ("cpu" or "none") and the reason why nothing is."""
    name = choice()
    if name == "none":
        return "none", "L0K_BUILD=none"
    reason = why_not_cpu()
    if reason and name == "cpu":
        raise SetupError(f"L0K_BUILD=cpu: {reason}")
    return ("none", reason) if reason else ("cpu", "")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def cpu_ops() -> Extension:
    torch = torch_root()
    return Extension(
        "l0kernels._C",
        sources("csrc/cpu/*.cpp"),
        depends=sources("csrc/**/*.h"),
        include_dirs=[str(torch / "include")],
        extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"],
        # Debian and Ubuntu link --as-needed, which would drop libtorch and leave its symbols null.
        extra_link_args=[f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"],
        optional=choice() == "auto",
    )


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
    """Rules for one library; every path in it is absolute."""
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in ext.include_dirs)]
    compile_flags = shlex.join([*ext.extra_compile_args, *includes]).replace("$", "$$")
    extra = os.environ.get("CXXFLAGS", "").replace("$", "$$")
    link_flags = shlex.join(ext.extra_link_args).replace("$", "$$")
    lines = [
        f"cxx = {shlex.join(compiler()).replace('$', '$$')}",
        "rule compile",
        f"  command = $cxx -MMD -MF $out.d {compile_flags} {extra} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {link_flags}",
    ]
    outputs = []
    for source in ext.sources:
        outputs.append(escape(objects / source) + ".o")
        lines.append(f"build {outputs[-1]}: compile {escape(ROOT / source)}")
    lines.append(f"build {escape(library)}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


def libraries(package: Path) -> list[Path]:
    """Where _C and _math lie in the built package."""
    return [package / "_C.so", package / f"_math{sysconfig.get_config_var('EXT_SUFFIX')}"]


def forget(package: Path) -> None:
    for library in libraries(package):
        library.unlink(missing_ok=True)


class BuildLibraries(build_ext):
    """Compiles with ninja, MAX_JOBS files at a time."""

    def get_ext_filename(self, fullname: str) -> str:
        # _C has no Python binding, so its file name carries no Python tag.
        if fullname.rpartition(".")[2] == "_C":
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        # Nothing from an earlier build may stand in for a library that fails to build now.
        in_place = self.inplace or self.editable_mode
        forget(ROOT / "l0kernels" if in_place else Path(self.build_lib) / "l0kernels")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve() / ext.name
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
        if PLAN == "none":
            forget(package)
        cpp, scalar = (library.exists() for library in libraries(package))
        reason = REASON if cpp or REASON else "the C++ build failed, its output says why"
        print(f"l0kernels: C++ ops {'built' if cpp else f'not built: {reason}'}")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(
            json.dumps(build_record(cpp, scalar, reason), indent=1) + "\n", encoding="utf-8"
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


def build_record(cpp: bool, scalar: bool, reason: str) -> dict[str, object]:
    return {
        "L0K_BUILD": choice(),
        "cpp": cpp,
        "math": scalar,
        "reason": reason,
        "torch": torch_version() or None,
        "target_version": TARGET_VERSION,
        "compiler": first_line([*compiler(), "--version"]) if cpp else None,
        "flags": " ".join([*FLAGS, os.environ.get("CXXFLAGS", "")]).strip() if cpp else None,
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


PLAN, REASON = plan()
build.sub_commands = [*build.sub_commands, ("build_info", None)]
setup(
    packages=list(packages()),
    package_dir=packages(),
    ext_modules=[cpu_ops(), scalar_math()] if PLAN == "cpu" else [],
    cmdclass={"build_ext": BuildLibraries, "build_info": WriteBuildInfo},
)
