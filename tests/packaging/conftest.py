# SPDX-License-Identifier: Apache-2.0
"""Fresh processes and a copy of the source tree to build in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so"
)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE))


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a fresh interpreter away from the checkout; keyword arguments change the environment."""

    def run(
        *args: str, cwd: Path = tmp_path, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, **environment}
        env = {name: value for name, value in merged.items() if value is not None}
        return subprocess.run(
            [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
        )

    return run
