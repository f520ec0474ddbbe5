# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of this folder in processes whose Triton kernels are interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_*.py") if path != Path(__file__))


@pytest.mark.parametrize("file", FILES)
def test_in_interpreter(file):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    print(done.stdout[-20000:], done.stderr[-2000:])
    assert done.returncode == 0
