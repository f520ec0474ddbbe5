# SPDX-License-Identifier: Apache-2.0
"""Rules that every source file keeps."""

import re

import pytest

SOURCES = ["*.py", "l0kernels/**/*.py", "bench/**/*.py", "tests/**/*.py"]
ENDINGS = ("cpp", "h", "cu", "cuh")
NATIVE = [f"{folder}/**/*.{ending}" for folder in ("csrc", "tests") for ending in ENDINGS]
TEXT = [*SOURCES, *NATIVE, "*.md", "csrc/*.md", "*.toml", "*.txt", ".ci/run"]
THIS_FILE = "test_sources.py"

FORBIDDEN = {
    "an absolute path of one machine": r"""(?<![\w.<>-])/(?:home|root|work|tmp|Users)/\w""",
    "data outside the repository": r"\.\./shared",
    "a note to self": r"\b(?:TODO|FIXME|XXX|HACK)\b",
    "a pickle format": r"allow_pickle=True|weights_only=False|\bpickle\.load\(",
    "arithmetic that differs between machines": r"-ffast-math|-march=native|use_fast_math",
}


def files(root, patterns):
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def test_every_source_names_its_license(root):
    missing = []
    for patterns, mark in ((SOURCES, "# "), (NATIVE, "// "), (["Makefile"], "# ")):
        found = files(root, patterns)
        assert found
        first = f"{mark}SPDX-License-Identifier: Apache-2.0\n"
        missing += [path for path in found if not path.read_text().startswith(first)]
    assert missing == []


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_source_contains(root, name):
    found = [
        f"{path.relative_to(root)}:{number}: {line}"
        for path in files(root, TEXT)
        if path.name != THIS_FILE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN[name], line)
    ]
    assert found == []


def test_makefile_names_the_data_folder_once(root):
    lines = (root / "Makefile").read_text().splitlines()
    assert [line for line in lines if ".." in line] == ["L0K_DATA ?= ../shared/data"]


def test_version_is_stated_once(root):
    pattern = re.compile(r"version.*\d+\.\d+\.\d+", re.IGNORECASE)
    stated = [
        path.relative_to(root).as_posix()
        for path in files(root, ["*.toml", "setup.py", "l0kernels/**/*.py", "bench/**/*.py"])
        if any(pattern.search(line) for line in path.read_text().splitlines())
    ]
    assert stated == ["l0kernels/_version.py"]
