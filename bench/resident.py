# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a process, read from Linux's /proc, and work in a process of its own."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT_MALLOC = {
    "MALLOC_MMAP_MAX_": str(1 << 16),  # glibc's default
    "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 18),
}


def elsewhere(module: str, arguments: Sequence[str]) -> Any:
    """Run a module in a new process whose resident memory follows what is in use.

    Freed blocks of 256 KiB and more go back to the system at once there (glibc keeps larger ones
    by and by), so that what is measured cannot reuse unseen what something else has left behind.
    It costs time; nothing is timed in that process.

    Args:
        module: that prints JSON in its last line.
        arguments: of the command line.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **PROMPT_MALLOC}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{module.rpartition('.')[2]} {arguments[0]}: {told[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can: glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident(field_name: str) -> int | None:
    """Return a figure of /proc/self/status in bytes, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field_name}:")]
    return int(found[0]) * 1024 if found else None


def reset_peak() -> None:
    """Let the peak of resident memory start from now, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak so far counts
