# SPDX-License-Identifier: Apache-2.0
"""The command line: `l0kernels info`, `train`, `bench` and `tune`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from l0kernels._version import __version__

# Each module gives add_arguments(parser) and run(args) -> exit code, and is imported only when its
# command is asked for: `info` must work where plotting or data packages are missing.
COMMANDS = {
    "info": ("l0kernels.info", "print versions, build, and what can run each operator"),
    "train": ("l0kernels.recipes.cli", "train a network with L0 gates by a published recipe"),
    "bench": ("l0kernels.bench.cli", "time training steps and operators against PyTorch"),
    "tune": ("l0kernels.bench.tune", "find the fastest block sizes of Triton kernels on a GPU"),
}
# What commands are timed with, unless the environment says otherwise. Threads that spin while they
# wait make step times flip from run to run. Memory that glibc gives back to the system is cleared
# anew in each step, which takes up to several times longer on a virtual machine on some days.
WAITS = {"OMP_WAIT_POLICY": "passive"}
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
TIMED = {"train": WAITS, "bench": WAITS | KEEPS_MEMORY, "tune": WAITS}
BAD_INPUT = 2


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="l0kernels", description="Training with L0 gates that costs what the open gates cost."
    )
    parser.add_argument("--version", action="version", version=f"l0kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        if name in words:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _settle_environment(words: Sequence[str]) -> None:
    """Starts the program anew where a timed command lacks what it is timed with.

    OpenMP reads its variable when torch is imported, which the package does before this line can
    run, and glibc reads its own when the program starts.
    """
    wanted = next((TIMED[word] for word in words if word in TIMED), {})
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def start(words: Sequence[str]) -> int:
    """Runs one command as the whole program, which starts anew where it must; see `main`."""
    _settle_environment(words)
    return main(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: the arguments after the program's name; None reads them from `sys.argv`.

    Returns:
        The exit code: 2 for bad input, told in one line.
    """
    if words is None:
        return start(sys.argv[1:])
    debug = "--debug" in words
    try:
        args = _parser(words).parse_args(words)
        return args.run(args)
    except KeyboardInterrupt:
        print("l0kernels: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"l0kernels: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    raise SystemExit(main())
