# SPDX-License-Identifier: Apache-2.0
"""``l0kernels train``."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from l0kernels._files import write_whole
from l0kernels.recipes import plot, published, summary
from l0kernels.recipes.arm import LAYOUTS, MASKED, PACKED
from l0kernels.recipes.checkpoint import load as load_checkpoint
from l0kernels.recipes.data import load
from l0kernels.recipes.errors import InputError
from l0kernels.recipes.images import Images
from l0kernels.recipes.loop import Plan, Run
from l0kernels.recipes.recipe import Recipe, Settings
from l0kernels.report import report

INTERRUPTED = 130
LINES_WITHOUT_BAR = 10
FILTERS = "filters.png"
# Weights of a network that is drawn.
MOST_DRAWN = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser: of the command ``train``.
    """
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help=", ".join(published.RECIPES))
    add("--list", action="store_true", help="print the recipes, their settings and sources")
    add("--data", metavar="DIR", help="folder with IDX, CIFAR or picture files (default: digits)")
    add(
        "--subset",
        metavar="N[,M]",
        help="N training images and M test images only, always the same (default: all)",
    )
    add("--settings", metavar="NAME", help="named settings, see --list (default: by the data)")
    add("--epochs", type=int, metavar="N", help="of each round; the schedule is stretched")
    add("--batch", type=int, metavar="N")
    add("--lr", type=float, metavar="X", help="learning rate of the weights")
    add("--gate-lr", type=float, metavar="X", help="learning rate of the gates")
    add("--lam", metavar="X[,X...]", help="penalty: one number, or one per group of gates")
    add(
        "--initial",
        metavar="X[,X...]",
        help="value that scores start with; several: a run for each (--initial=-.1,0,.1)",
    )
    add("--rounds", type=int, metavar="N", help="rounds of a search for tickets")
    add("--rewind", type=int, metavar="N", help="epochs of round 1 that tickets are rewound to")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, metavar="S", help="default 0")
    seeds.add_argument("--seeds", metavar="S,S,...", help="several runs, one after another")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--compare", action="store_true", help="train the masked reference beside it")
    add(
        "--reference-layout",
        choices=[*LAYOUTS, "auto"],
        default="auto",
        help="memory format of the masked reference (auto: the faster one, measured)",
    )
    add("--out", metavar="DIR", help="default: runs/RECIPE-DATA")
    add("--resume", action="store_true", help="continue from the checkpoints in --out")
    add("--save-every", type=int, metavar="N", default=1, help="epochs between checkpoints")
    add("--progress", action="store_true", help="progress bar even where there is no terminal")
    add("--json", action="store_true", help="print the results as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Train as asked.

    Args:
        args: parsed options.

    Returns:
        The exit code.

    Raises:
        InputError: an option, a file or a folder cannot be used.
    """
    if args.list:
        print(published.describe())
        return 0
    chosen = plans(args)
    plot.need()
    if args.resume and not any(plan.checkpoint.exists() for plan in chosen):
        raise InputError(f"--resume: expected {chosen[0].checkpoint}, got no such file")
    results: list[summary.Result] = []
    with deferred_interrupt() as check:
        for plan in chosen:
            current = Run(plan)
            try:
                _train(current, args, check)
            except KeyboardInterrupt:
                print(_interrupted(current), file=sys.stderr)
                return INTERRUPTED
            _draw_filters(current)
            results.append(summary.Result(plan, current.history, current.layout))
    _finish(results, chosen[0].folder.parent, args.json)
    return 0


def plans(args: argparse.Namespace) -> list[Plan]:
    """Return what to train, a plan for each seed; the folder of the results is made.

    Raises:
        InputError: an option, a file or a folder cannot be used.
    """
    if args.recipe is None:
        raise InputError(f"expected a recipe, one of {', '.join(published.RECIPES)}, or --list")
    recipe = published.find(args.recipe)
    seeds = _seeds(args)
    if args.save_every < 1:
        raise InputError(f"--save-every: expected a positive integer, got {args.save_every}")
    settings = _settings(args, recipe, recipe.settings(_settings_name(args, recipe)))
    variants = _variants(args, settings)
    device = _device(args.device)
    images = load(Path(args.data) if args.data else None, recipe.shape)
    if args.subset is not None:
        images = images.subset(*_subset(args.subset))
    out = _out(args, recipe, images)
    return [
        Plan(
            recipe=recipe,
            settings=variant,
            images=images,
            seed=seed,
            compare=args.compare,
            reference_layout=None if args.reference_layout == "auto" else args.reference_layout,
            save_every=args.save_every,
            folder=out / "-".join(filter(None, (f"seed-{seed}", name.replace(" ", "-")))),
            variant=name,
            device=device,
        )
        for name, variant in variants.items()
        for seed in seeds
    ]


def _settings_name(args: argparse.Namespace, recipe: Recipe) -> str:
    if args.settings:
        return args.settings
    return recipe.default if args.data or "digits" not in recipe.named else "digits"


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {text!r}")
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise InputError(f"--device: expected one of {found} {device.type} devices, got {text!r}")
    return device


def _subset(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) not in (1, 2):
        raise InputError(f"--subset: expected one or two numbers like 1000,500, got {text!r}")
    return counts


def _variants(args: argparse.Namespace, settings: Settings) -> dict[str, Settings]:
    """Settings by name: one without a name, or one for each of several initial values."""
    if args.initial is None:
        return {"": settings}
    if settings.initial is None:
        raise InputError("--initial: expected a recipe whose gates start with a value, got another")
    values = _numbers("--initial", args.initial)
    found = {f"initial {value:g}": replace(settings, initial=value) for value in values}
    for variant in found.values():
        variant.check()
    return found


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(
            f"{option}: expected numbers like .1 or 10,.5,.1,10, got {text!r}"
        ) from error


def _seeds(args: argparse.Namespace) -> list[int]:
    words = [str(args.seed or 0)] if args.seeds is None else args.seeds.split(",")
    try:
        seeds = [int(word) for word in words]
    except ValueError as error:
        raise InputError(f"--seeds: expected integers like 0,1,2, got {args.seeds!r}") from error
    if any(not 0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"--seed: expected different integers in [0, 2**63), got {seeds}")
    return seeds


def _settings(args: argparse.Namespace, recipe: Recipe, start: Settings) -> Settings:
    given = {
        key: getattr(args, key)
        for key in ("batch", "lr", "gate_lr", "rounds", "rewind")
        if getattr(args, key) is not None
    }
    for key in ("rounds", "rewind"):
        if key in given and not start.rounds:
            raise InputError(f"--{key}: expected a recipe with rounds, got {recipe.name}")
    if given.get("rounds", 1) < 1:
        raise InputError(f"--rounds: expected a positive integer, got {args.rounds}")
    if args.epochs is not None:
        given.update(start.at_length(args.epochs))
    if args.lam is not None:
        given["lam"] = _lam(args.lam, recipe)
    settings = replace(start, **given)
    settings.check()
    return settings


def _lam(text: str, recipe: Recipe) -> tuple[float, ...]:
    values = _numbers("--lam", text)
    count = max(1, len(recipe.groups))
    if len(values) not in (1, count):
        raise InputError(
            f"--lam: expected 1 number or {count} (for {', '.join(recipe.groups) or 'all gates'}), "
            f"got {len(values)}"
        )
    return values * count if len(values) == 1 else values


def _out(args: argparse.Namespace, recipe: Recipe, images: Images) -> Path:
    out = Path(args.out) if args.out else Path("runs") / f"{recipe.name}-{_slug(images.name)}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out: expected a folder that can be made, got {out}: {error.strerror}"
        ) from error
    return out


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Makes the first Ctrl-C wait for the check between two steps; a second one acts at once.

    Python code called from within PyTorch, such as the file that a checkpoint is written to, must
    not raise: the interrupt would come out as an unrelated error.

    Yields:
        The check, which raises KeyboardInterrupt if Ctrl-C was pressed.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _train(current: Run, args: argparse.Namespace, check: Callable[[], None]) -> None:
    plan = current.plan
    if args.resume and plan.checkpoint.exists():
        current.resume()
    else:
        current.start()
    arms = len(current.arms)
    left = plan.epochs - current.epoch
    show = args.progress or sys.stderr.isatty()
    title = f"{plan.recipe.name} seed {plan.label}"
    total = left * plan.steps * arms
    with tqdm(total=total, desc=title, unit="step", disable=not show, dynamic_ncols=True) as bar:

        def on_step() -> None:
            bar.update()
            check()

        def on_epoch() -> None:
            line = _line(current)
            bar.set_postfix_str(line, refresh=False)
            if not show and _worth_a_line(current):
                print(f"{title}: {line}", file=sys.stderr, flush=True)

        current.on_step, current.on_epoch = on_step, on_epoch
        current.train()


def _worth_a_line(current: Run) -> bool:
    every = max(1, current.plan.epochs // LINES_WITHOUT_BAR)
    return current.epoch % every == 0 or current.epoch == current.plan.epochs


def _line(current: Run) -> str:
    record = current.history[-1]
    packed = record["arms"][PACKED]
    left = packed["weights_realised"] / packed["weights_total"]
    text = (
        f"epoch {current.epoch}/{current.plan.epochs} loss {packed['loss']:.3f} "
        f"accuracy {packed['accuracy']:.2f} open {left:.1%} {packed['step_ms']:.1f} ms"
    )
    if MASKED in record["arms"]:
        text += f" (masked {record['arms'][MASKED]['step_ms']:.1f})"
    return text


def _interrupted(current: Run) -> str:
    where = f"interrupted in epoch {current.epoch + 1} of {current.plan.epochs}"
    path = current.plan.checkpoint
    if not path.exists():
        return f"{where}; nothing is saved yet, so the same command begins anew"
    return (
        f"{where}; {path} holds epoch {load_checkpoint(path)['epoch']}; "
        f"repeat the command with --resume to continue"
    )


def _draw_filters(current: Run) -> None:
    """Draw the weights of a network that is small enough to be looked at."""
    described = report(current.arms[0].tested)
    if described.weights["total"] <= MOST_DRAWN:
        described.plot_filters(current.plan.folder / FILTERS)


def _finish(results: list[summary.Result], out: Path, as_json: bool) -> None:
    numbers = json.dumps(summary.to_dict(results), indent=2)
    table = summary.markdown(results)
    write_whole(out / "summary.json", lambda file: file.write(numbers.encode() + b"\n"))
    write_whole(out / "table.md", lambda file: file.write(table.encode() + b"\n"))
    plot.draw(results, out / "curves.png")
    print(numbers if as_json else table)
    kept = "table.md, summary.json, curves.png, seed-*/checkpoint.pt, seed-*/epochs.jsonl"
    if all((result.plan.folder / FILTERS).exists() for result in results):
        kept += f", seed-*/{FILTERS}"
    print(f"written to {out}: {kept}", file=sys.stderr)
