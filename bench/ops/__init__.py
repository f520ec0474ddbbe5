# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the operators one by one: `python -m l0kernels.bench.ops.<operator>`."""

import sys

from l0kernels import cli


def main(name: str) -> None:
    """Runs `l0kernels bench ops` for one operator, with the options of this program."""
    raise SystemExit(cli.start(["bench", "ops", "--only", name, *sys.argv[1:]]))
