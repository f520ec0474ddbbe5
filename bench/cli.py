# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench`: arguments and output of the benchmarks."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import models, networks
from .arms import VARIANTS
from .step import AMP, Setting, measure, table, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    kinds = parser.add_subparsers(dest="bench", metavar="benchmark", required=True)
    add_step(kinds)
    add_networks(kinds)


def add_step(kinds: Any) -> None:
    default = Setting()
    step = kinds.add_parser("step", help="whole training steps of a network, all variants in turn")
    step.add_argument(
        "--model",
        default=default.model,
        help=f"{', '.join(models.NAMES)} or any wrn-DEPTH-FACTOR (default: %(default)s)",
    )
    step.add_argument("--batch", type=int, default=default.batch, help="default: %(default)s")
    step.add_argument(
        "--keep",
        type=fractions,
        default=default.keep,
        help="open fractions, comma-separated (default: 1,.5,.25,.1)",
    )
    step.add_argument("--rounds", type=int, default=default.rounds, help="default: %(default)s")
    step.add_argument(
        "--warmup", type=int, default=default.warmup, help="untimed rounds (default: %(default)s)"
    )
    step.add_argument(
        "--variants", type=words, default=default.variants, help=f"of {','.join(VARIANTS)}"
    )
    step.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    step.add_argument("--device", default=default.device, help="cpu or cuda (default: cpu)")
    step.add_argument("--amp", choices=AMP, default=default.amp, help="default: %(default)s")
    step.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    step.add_argument("--json", action="store_true", help="print JSON instead of the table")
    step.add_argument("--out", type=Path, help="folder for step.md, step.json, step.csv, step.png")
    step.add_argument("--plot", type=Path, metavar="PNG", help="draw the figure into this file")
    step.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    step.set_defaults(measure=run_step)


def add_networks(kinds: Any) -> None:
    default = networks.Setting()
    zoo = kinds.add_parser("networks", help="many networks: conversion, exactness, steps")
    zoo.add_argument("--only", type=words, default=(), help="names, comma-separated (default: all)")
    zoo.add_argument(
        "--draws", type=int, help=f"gate draws compared in fp64 (default: {default.draws})"
    )
    zoo.add_argument(
        "--inputs", type=int, help=f"output positions compared in fp32 (default: {default.inputs})"
    )
    zoo.add_argument("--rounds", type=int, help=f"timed rounds (default: {default.rounds})")
    zoo.add_argument("--warmup", type=int, help=f"untimed rounds (default: {default.warmup})")
    zoo.add_argument(
        "--quick", action="store_true", help="small networks, few draws: does everything run?"
    )
    zoo.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    zoo.add_argument("--json", action="store_true", help="print JSON instead of the table")
    zoo.add_argument("--out", type=Path, help="folder for networks.md, .json and .csv")
    zoo.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    zoo.set_defaults(measure=run_networks)


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def fractions(text: str) -> tuple[float, ...]:
    """Read a comma-separated list of numbers."""
    try:
        return tuple(float(part) for part in words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,.5,.1, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark and print its table or JSON."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"expected --threads >= 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    return args.measure(args)


def run_step(args: argparse.Namespace) -> int:
    names = ("model", "batch", "keep", "rounds", "warmup", "variants", "device", "seed", "amp")
    report = measure(Setting(**{name: getattr(args, name) for name in names}))
    print(json.dumps(report.to_dict(), indent=1) if args.json else table(report))
    if args.out is not None:
        written = write(report, args.out)
        print("\n".join(str(path) for path in written), file=sys.stderr)
    if args.plot is not None:
        from .plot import plot

        print(plot(report, args.plot), file=sys.stderr)
    return 0


def run_networks(args: argparse.Namespace) -> int:
    """Print the table of networks; the exit code tells whether one failed."""
    names = ("only", "draws", "inputs", "rounds", "warmup")
    given = {n: v for n in names if (v := getattr(args, n)) is not None}
    setting = replace(networks.QUICK if args.quick else networks.Setting(), **given)
    written: list[Path] = []

    def keep(report: networks.Report) -> None:
        """A run of an hour that is cut off leaves what it has measured."""
        if args.out is not None:
            written[:] = networks.write(report, args.out)

    report = networks.measure(setting, keep)
    print(json.dumps(report.to_dict(), indent=1) if args.json else networks.table(report))
    if written:
        print("\n".join(str(path) for path in written), file=sys.stderr)
    if report.failed:
        print(f"failed: {', '.join(report.failed)}", file=sys.stderr)
    return int(bool(report.failed))
