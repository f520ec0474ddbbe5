# SPDX-License-Identifier: Apache-2.0
"""Files that readers see whole."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part.

    Args:
        path: the file; it is replaced.
        write: writes the content to the open file it is given.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
