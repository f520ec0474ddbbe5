# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench`: arguments and output of the benchmarks."""

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from . import (
    capacity,
    cost,
    memory,
    models,
    networks,
    operators,
    predict,
    step,
    trained,
    trajectories,
    two_passes,
    where,
)
from . import run as whole_runs
from .arms import ALL_VARIANTS, VARIANTS
from .base import measure_base
from .figures import Sheet, change_table, compare, slower
from .timing import keep_what_onednn_prepares

TOO_SLOW = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    kinds = parser.add_subparsers(dest="bench", metavar="benchmark", required=True)
    add_ops(kinds)
    add_step(kinds)
    add_arm(kinds)
    add_memory(kinds)
    add_where(kinds)
    add_predict(kinds)
    add_cost(kinds)
    add_capacity(kinds)
    runs = kinds.add_parser("run", help="whole training runs, ours beside masked: eta_run")
    whole_runs.add_arguments(runs)
    runs.set_defaults(measure=whole_runs.run)
    record = kinds.add_parser("record", help="a training run whose gates are kept in a file")
    trajectories.add_arguments(record)
    record.set_defaults(measure=trajectories.run)
    add_networks(kinds)


def add_ops(kinds: Any) -> None:
    default = operators.Setting()
    ops = kinds.add_parser("ops", help="operators one by one, ours against PyTorch")
    ops.add_argument(
        "--only", type=words, default=(), help=f"of {','.join(operators.NAMES)} (default: all)"
    )
    ops.add_argument(
        "--shapes", type=words, default=(), help="of one operator (default: a list for each)"
    )
    ops.add_argument(
        "--dtypes",
        type=words,
        default=default.dtypes,
        help=f"of {','.join(operators.DTYPES)} (default: f32)",
    )
    ops.add_argument(
        "--impls", type=words, default=(), help="of cpp, cuda, triton (default: all that can run)"
    )
    ops.add_argument("--batch", type=int, help="examples of each shape (default: as in the shape)")
    add_shared(ops, default)
    ops.set_defaults(measure=run_ops)


def add_step(kinds: Any) -> None:
    default = step.Setting()
    steps = kinds.add_parser("step", help="whole training steps of a network, all variants in turn")
    add_model(steps, default)
    steps.add_argument(
        "--variants",
        type=words,
        default=default.variants,
        help=f"of {','.join(ALL_VARIANTS)} (default: {','.join(VARIANTS)})",
    )
    steps.add_argument("--amp", choices=step.AMP, default=default.amp, help="default: %(default)s")
    steps.add_argument(
        "--optimizer",
        choices=step.OPTIMIZERS,
        default=default.optimizer,
        help="of ours: torch's SGD as the others, or l0.optim.SGD (default: %(default)s)",
    )
    steps.add_argument(
        "--mode",
        choices=step.MODES,
        default=default.mode,
        help="graph: replay steps from CUDA graphs; a dry run on a CPU (default: %(default)s)",
    )
    steps.add_argument(
        "--place",
        choices=step.PLACES,
        default=default.place,
        help="of the gates, as in l0kernels.convert (default: %(default)s)",
    )
    steps.add_argument(
        "--trained",
        metavar="DIR",
        help="of a run of l0kernels train: its network and gates at its end",
    )
    steps.add_argument("--plot", type=Path, metavar="PNG", help="draw the figure into this file")
    add_shared(steps, default)
    steps.set_defaults(measure=run_step)


def add_model(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--model",
        default=default.model,
        help=f"{', '.join(models.NAMES)} any wrn-DEPTH-FACTOR or mlp-block-N-4N "
        "(default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=default.batch, help="default: %(default)s")


def add_arm(kinds: Any) -> None:
    default = two_passes.Setting()
    parser = kinds.add_parser("arm", help="steps of ARM beside those of AR, which has one pass")
    add_model(parser, default)
    parser.add_argument(
        "--gates",
        type=words,
        default=default.gates,
        help=f"of {','.join(two_passes.GATES)} (default: all)",
    )
    add_timing(parser, default)
    parser.set_defaults(measure=run_arm)


def add_memory(kinds: Any) -> None:
    default = memory.Setting()
    parser = kinds.add_parser("memory", help="peak memory of a step, each variant in a process")
    parser.add_argument(
        "--keep",
        type=fractions,
        default=default.keep,
        help="open fractions, comma-separated (default: .5)",
    )
    add_one_network(parser, default, "memory.md, .json, .csv and .png")
    parser.set_defaults(measure=run_memory)


def add_where(kinds: Any) -> None:
    default = where.Setting()
    parser = kinds.add_parser("where", help="where the time of a step goes, by kind of work")
    parser.add_argument(
        "--keep", type=float, default=default.keep, help="open fraction (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=default.steps, help="profiled (default: %(default)s)"
    )
    add_one_network(parser, default, "where.md, .json and .png")
    parser.set_defaults(measure=run_where)


def add_predict(kinds: Any) -> None:
    default = predict.Setting()
    parser = kinds.add_parser("predict", help="predicted speed-up of networks beside the measured")
    parser.add_argument(
        "--models", type=words, default=(), help=f"of {','.join(models.NAMES)} (default: all)"
    )
    parser.add_argument(
        "--keep", type=float, default=default.keep, help="open fraction (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="folder for predict.md and .json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(measure=run_predict)


def add_cost(kinds: Any) -> None:
    default = cost.Setting()
    parser = kinds.add_parser("cost", help="GPU steps as a model predicts them, no GPU needed")
    parser.add_argument(
        "--devices", type=words, default=default.devices, help=f"of {','.join(cost.DEVICES)}"
    )
    add_model(parser, default)
    parser.add_argument(
        "--keep",
        type=fractions,
        default=default.keep,
        help="open fractions, comma-separated (default: 1,.5,.25,.1)",
    )
    parser.add_argument(
        "--variants",
        type=words,
        default=default.variants,
        help=f"of {','.join(cost.TRACED)} (default: {','.join(default.variants)})",
    )
    parser.add_argument("--amp", choices=step.AMP, default=default.amp, help="default: %(default)s")
    parser.add_argument(
        "--launch",
        type=float,
        default=default.launch,
        help="microseconds of the host per launch (default: %(default)g)",
    )
    add_predicted(parser, default.seed, "cost.md and .json")
    parser.set_defaults(measure=run_cost)


def add_capacity(kinds: Any) -> None:
    default = capacity.Setting()
    parser = kinds.add_parser(
        "capacity", help="widths planned ahead: how often draws do not fit, what room costs"
    )
    parser.add_argument(
        "--recorded", type=words, default=(), help="files (default: those in bench/results)"
    )
    parser.add_argument(
        "--every",
        type=whole_numbers,
        default=default.every,
        help="steps between two plans, comma-separated (default: 1,100,500,2000)",
    )
    parser.add_argument(
        "--sigmas",
        type=fractions,
        default=default.sigmas,
        help="above the mean, comma-separated (default: 3,4,5)",
    )
    parser.add_argument(
        "--stride", type=int, default=default.stride, help="of steps (default: %(default)s)"
    )
    add_predicted(parser, default.seed, "capacity.md and .json")
    parser.set_defaults(measure=run_capacity)


def add_predicted(parser: argparse.ArgumentParser, seed: int, files: str) -> None:
    """Declare what benchmarks that time nothing have."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=seed, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help=f"folder for {files}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


def add_one_network(parser: argparse.ArgumentParser, default: Any, files: str) -> None:
    """Declare what benchmarks of single steps on a CPU have: the network, its variants, output."""
    parser.add_argument(
        "--model", default=default.model, help=f"{', '.join(models.NAMES)} (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=default.batch, help="default: %(default)s")
    parser.add_argument(
        "--variants",
        type=words,
        default=default.variants,
        help=f"of {','.join(ALL_VARIANTS)} (default: {','.join(default.variants)})",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help=f"folder for {files}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


def add_shared(parser: argparse.ArgumentParser, default: Any) -> None:
    """Declare what benchmarks at several open fractions have."""
    parser.add_argument(
        "--keep",
        type=fractions,
        default=default.keep,
        help="open fractions, comma-separated (default: 1,.5,.25,.1)",
    )
    add_timing(parser, default)


def add_timing(parser: argparse.ArgumentParser, default: Any) -> None:
    """Declare how often is timed, where, compared with what, and what is written."""
    parser.add_argument("--rounds", type=int, default=default.rounds, help="default: %(default)s")
    parser.add_argument(
        "--runs",
        type=int,
        default=default.runs,
        help="of all rounds; the middle one counts (default: %(default)s)",
    )
    parser.add_argument(
        "--warmup", type=int, default=default.warmup, help="untimed rounds (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="folder for the table, JSON, CSV and plot")
    against = parser.add_mutually_exclusive_group()
    against.add_argument(
        "--compare", type=Path, metavar="OLD.csv", help="show times beside those of an earlier run"
    )
    against.add_argument(
        "--base", metavar="REV", help="build a git revision, run the same there first, compare"
    )
    parser.add_argument(
        "--fail-if-slower",
        type=fraction,
        metavar="10%",
        help="exit code 1 if a time of ours has grown by more; needs --compare or --base",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


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


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of integers."""
    try:
        return tuple(int(part) for part in words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers like 1,100, got {text!r}") from None


def fraction(text: str) -> float:
    """Read a fraction or a percentage that is not negative."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a fraction like 10% or .1, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark and print its table or JSON."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"expected --threads >= 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    keep_what_onednn_prepares()
    return args.measure(args)


def setting_of(kind: Any, args: argparse.Namespace) -> Any:
    """Return the setting of a benchmark from the arguments of the same names."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind)})


def show(args: argparse.Namespace, kind: Any, found: Any) -> None:
    """Print what a benchmark has found, and write its files.

    Args:
        args: parsed options.
        kind: the benchmark's module.
        found: its result.
    """
    print(json.dumps(found.to_dict(), indent=1) if args.json else kind.table(found))
    if args.out is not None:
        tell(kind.write(found, args.out))


def run_ops(args: argparse.Namespace) -> int:
    setting = setting_of(operators.Setting, args)
    operators.check(setting)
    old = old_sheet(args, operators.command(setting), "ops.csv")
    sheet = operators.measure(setting)
    show(args, operators, sheet)
    return max(int(bool(sheet.failed)), judge(args, old, sheet))


def run_step(args: argparse.Namespace) -> int:
    setting = setting_of(step.Setting, args)
    if setting.trained is None:
        step.check(setting)
    elif args.plot is not None:
        raise ValueError("--plot: expected several open fractions, got --trained, which has one")
    else:
        setting = trained.check(setting)
    old = old_sheet(args, step.command(setting), "step.csv")
    report = step.measure(setting) if setting.trained is None else trained.measure_run(setting)
    show(args, step, report)
    if args.plot is not None:
        from .plot import plot_step

        tell([plot_step(report, args.plot)])
    return judge(args, old, report.sheet())


def run_arm(args: argparse.Namespace) -> int:
    setting = setting_of(two_passes.Setting, args)
    two_passes.check(setting)
    old = old_sheet(args, two_passes.command(setting), "arm.csv")
    sheet = two_passes.measure(setting)
    show(args, two_passes, sheet)
    return judge(args, old, sheet)


def run_memory(args: argparse.Namespace) -> int:
    show(args, memory, memory.measure(setting_of(memory.Setting, args)))
    return 0


def run_where(args: argparse.Namespace) -> int:
    show(args, where, where.measure(setting_of(where.Setting, args)))
    return 0


def run_predict(args: argparse.Namespace) -> int:
    show(args, predict, predict.measure(setting_of(predict.Setting, args)))
    return 0


def run_cost(args: argparse.Namespace) -> int:
    show(args, cost, cost.predict(setting_of(cost.Setting, args)))
    return 0


def run_capacity(args: argparse.Namespace) -> int:
    show(args, capacity, capacity.simulate(setting_of(capacity.Setting, args)))
    return 0


def old_sheet(args: argparse.Namespace, command: str, name: str) -> Sheet | None:
    """Return what --compare or --base says to compare with.

    Raises:
        ValueError: there is nothing to compare with, or it is another table.
    """
    if args.compare is not None:
        return Sheet.load(args.compare)
    if args.base is not None:
        return measure_base(args.base, command, name)
    if args.fail_if_slower is not None:
        raise ValueError("expected --compare or --base beside --fail-if-slower, got neither")
    return None


def judge(args: argparse.Namespace, old: Sheet | None, new: Sheet) -> int:
    """Print both times side by side; returns the exit code."""
    if old is None:
        return 0
    changes = compare(old, new)
    print(change_table(changes), file=sys.stderr if args.json else sys.stdout)
    if args.fail_if_slower is None:
        return 0
    found = slower(changes, args.fail_if_slower)
    for change in found:
        where = " ".join(change.new.key)
        print(f"slower: {where}: {change.ratio:.3f} times as long", file=sys.stderr)
    return TOO_SLOW if found else 0


def tell(written: list[Path]) -> None:
    print("\n".join(str(path) for path in written), file=sys.stderr)


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
        tell(written)
    if report.failed:
        print(f"failed: {', '.join(report.failed)}", file=sys.stderr)
    return int(bool(report.failed))
