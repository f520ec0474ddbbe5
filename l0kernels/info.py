# SPDX-License-Identifier: Apache-2.0
"""`l0kernels info`: what a bug report needs to say about an installation."""

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from l0kernels import _ext, _registry
from l0kernels import functional as _functional  # noqa: F401 - fills the registry's table
from l0kernels._version import __version__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's model, with family and model number where the name says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def info() -> dict[str, Any]:
    """Versions, machine, build and what can run each operator.

    Returns:
        A dict that `json` can write: `versions` {name: str or None}, `system`, `build` (what was
        recorded when the package was built, with `loaded` and `why_not` of the C++ ops,
        `cuda_loaded` and `cuda_why_not` of the CUDA ops), and `ops`
        {operator: {implementation: {available: bool, reason: str}}}.
    """
    return {
        "versions": {
            "l0kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "system": {
            "os": platform.platform(),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
            "L0K_IMPL": os.environ.get("L0K_IMPL"),
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
        "build": {
            **_ext.build_info(),
            "loaded": _ext.cpp_available(),
            "why_not": _ext.why_not(),
            "cuda_loaded": not _ext.load("cuda"),
            "cuda_why_not": _ext.load("cuda"),
        },
        "ops": {
            op: {
                impl: {"available": available, "reason": reason}
                for impl, (available, reason) in _registry.what_runs(op).items()
            }
            for op in sorted(_registry.OPS)
        },
    }


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    width = max(map(len, rows))
    return [title, *(f"  {key:<{width}}  {_shown(value)}" for key, value in rows.items())]


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "-" if value is None or not text else text


def _text(facts: dict[str, Any]) -> str:
    lines: list[str] = []
    for title in ("versions", "system", "build"):
        lines += _table(title, facts[title])
    for op, impls in facts["ops"].items():
        states = {
            impl: "yes" if state["available"] else f"no: {state['reason']}"
            for impl, state in impls.items()
        }
        lines += _table(f"op {op}", states)
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `l0kernels info`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the facts; returns the exit code."""
    facts = info()
    print(json.dumps(facts, indent=1) if args.json else _text(facts))
    return 0
