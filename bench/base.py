# SPDX-License-Identifier: Apache-2.0
"""The same benchmark at another revision: built from a git worktree, run in its own process."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from l0kernels import _ext

from .figures import Sheet
from .timing import checkout


def measure_base(revision: str, command: str, name: str) -> Sheet:
    """Build a revision of the checkout that this package is in, and run a benchmark there.

    Args:
        revision: as git names it.
        command: of the benchmark, beginning with the program's name.
        name: of the CSV file that it writes.

    Raises:
        RuntimeError: the package is in no checkout, git does not know the revision, or the
            revision cannot be built or lacks the benchmark.
    """
    root = checkout()
    if root is None:
        raise RuntimeError("expected a git checkout for --base, the package is installed elsewhere")
    git = ["git", "-C", str(root), "worktree"]
    with TemporaryDirectory(prefix="l0kernels-base-") as folder:
        tree, site, out = (Path(folder, part) for part in ("tree", "site", "out"))
        run([*git, "add", "--detach", str(tree), revision], f"git knows no {revision!r}")
        try:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            options = ["--no-build-isolation", "--target", str(site), str(tree)]
            run([*pip, *options], f"{revision} cannot be built", {"L0K_BUILD": what_is_built()})
        finally:
            run([*git, "remove", "--force", str(tree)], "git cannot remove its worktree")
        words = [*shlex.split(command)[1:], "--out", str(out)]
        # PYTHONPATH goes before an editable installation, PYTHONSAFEPATH keeps the folder out.
        where = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        run([sys.executable, "-m", "l0kernels.cli", *words], f"{revision} does not run", where)
        return Sheet.load(out / name)


def what_is_built() -> str:
    """Return the L0K_BUILD with which a revision gets the libraries that there are here."""
    for library, choice in (("cuda", "cuda"), ("cpp", "cpu")):
        if not _ext.load(library):
            return choice
    return "none"


def run(command: Sequence[str], wrong: str, environment: dict[str, str] | None = None) -> None:
    """Run a command.

    Raises:
        RuntimeError: it fails; the message ends with the last line that it printed.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{wrong}: {told[-1]}")
