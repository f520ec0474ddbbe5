# SPDX-License-Identifier: Apache-2.0
"""Counts instructions in the machine code of NVIDIA GPUs."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

# What a kernel's speed and correctness hang on: {name in the table: opcodes}.
KEY = {
    "HMMA": r"HMMA\b",  # tensor cores, a warp at a time
    "HGMMA": r"HGMMA\b",  # four warps (Hopper)
    "UTCMMA": r"UTC[A-Z]*MMA\b",  # one thread for the block (Blackwell)
    "FFMA": r"FFMA",
    "DFMA": r"DFMA\b",
    "LDG": r"LDG\b(?!.*\.128)",
    "LDG.128": r"LDG\b.*\.128",
    "STG": r"STG\b(?!.*\.128)",
    "STG.128": r"STG\b.*\.128",
    "LDGSTS": r"LDGSTS\b",  # global to shared memory, not waited for
    "UTMALDG": r"UTMALDG\b",  # the same by the tensor memory accelerator
    "UTMASTG": r"UTMASTG\b",
    "LDSM": r"LDSM\b",
    "BAR": r"BAR\b",
    "SHFL": r"SHFL\b",
    "LDL": r"LDL\b",  # local memory: spills and arrays that are indexed at run time
    "STL": r"STL\b",
    "ATOM": r"(?:ATOM|ATOMG|ATOMS|RED|REDG)\b",
}
_KEY = {name: re.compile(pattern) for name, pattern in KEY.items()}
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)")


def cuobjdump() -> str | None:
    """The program's path: Triton brings one, which CUDA toolkits without tools do not."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if shipped.exists():
            return str(shipped)
    return shutil.which("cuobjdump")


def disassemble(cubin: Path, *options: str) -> str:
    """The machine code of a cubin as text, and what further options of cuobjdump give."""
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("cuobjdump not found: triton has it (pip install triton)")
    command = [program, "-sass", *options, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count(text: str) -> dict[str, dict[str, int]]:
    """{mangled function: {instruction of `KEY`: how often it stands there}}, without zeros."""
    counts: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            counts[function[1]] = dict.fromkeys(_KEY, 0)
        elif counts and (instruction := _INSTRUCTION.match(line)):
            found = counts[next(reversed(counts))]
            for name, pattern in _KEY.items():
                found[name] += bool(pattern.match(instruction[1]))
    return {
        function: {name: number for name, number in found.items() if number}
        for function, found in counts.items()
    }
