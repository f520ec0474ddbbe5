# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench run`: whole training runs, packed and masked interleaved by epoch.

How much of the work that closed gates save becomes time is eta_run = (T_masked / T_ours) x mean
fraction of work left open, 1 where time follows work. Work is the floating-point operations of
forward, dgrad and wgrad of all convolutions and linear layers, ungated ones included.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from l0kernels.recipes import cli as train
from l0kernels.recipes import plot, summary
from l0kernels.recipes.arm import PACKED, Arm, drawn_weights
from l0kernels.recipes.loop import Plan, Run
from l0kernels.training import gates_of

from .figures import markdown, write_texts
from .timing import environment, require_passive_wait


@dataclass(frozen=True)
class Outcome:
    """What one seed gave.

    Args:
        seed: of the run.
        ours_seconds, masked_seconds: all training steps.
        work_left: mean over the steps.
        losses: largest relative difference of the losses of an epoch.
        accuracy: of ours and of masked after the last epoch, in percent.
    """

    seed: int
    ours_seconds: float
    masked_seconds: float
    work_left: float
    losses: float
    accuracy: tuple[float, float]

    @property
    def speedup(self) -> float:
        return self.masked_seconds / self.ours_seconds

    @property
    def eta(self) -> float:
        return self.speedup * self.work_left


def operations_per_weight(net: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Return how often a step multiplies by each weight of a layer, per example.

    At every output position once in forward, once for the gradient of the weight, and once for
    that of the input where that is wanted, which is not in the layers that read the data.

    Args:
        net: the plain network.
        shape: of an image.
    """
    found: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            passes = 2 + int(args[0].requires_grad)
            found[name] = passes * y[0].numel() // y.shape[1]

        return count

    handles = [
        layer.register_forward_hook(hook(name))
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    net(torch.zeros(2, *shape))
    for handle in handles:
        handle.remove()
    return found


class WorkLeft:
    """Adds up, after every step of ours, the fraction of work that its draw left.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: Plan):
        net = plan.recipe.make()
        self.cost = operations_per_weight(net, plan.recipe.shape)
        self.full = drawn_weights(net, self.cost)
        self.fractions: list[float] = []
        self.step = 0

    def note(self, arm: Arm) -> None:
        """Take the draw of an arm, if it is a new one: the masked arm's steps draw the same."""
        step = int(gates_of(arm.net).step)
        if step != self.step:
            self.step = step
            self.fractions.append(drawn_weights(arm.net, self.cost) / self.full)


def train_one(plan: Plan, bar: Any) -> tuple[Outcome, summary.Result]:
    """Train one seed, both arms."""
    current, work = Run(plan), WorkLeft(plan)

    def on_step() -> None:
        work.note(current.arms[0])
        bar.update()

    current.on_step = on_step
    current.start()
    assert current.arms[0].name == PACKED
    current.train()
    result = summary.Result(plan, current.history, current.layout)
    expected = plan.epochs * plan.steps
    if len(work.fractions) != expected:
        raise RuntimeError(f"expected {expected} draws, got {len(work.fractions)}")
    ours, masked = (summary.arm_summary(result, arm) for arm in ("packed", "masked"))
    outcome = Outcome(
        plan.seed,
        ours["seconds"],
        masked["seconds"],
        sum(work.fractions) / expected,
        summary.comparison(result)["loss_difference"],
        (ours["accuracy"], masked["accuracy"]),
    )
    return outcome, result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: those of `l0kernels train`."""
    train.add_arguments(parser)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


def run(args: argparse.Namespace) -> int:
    """Train every seed and print the table or JSON.

    Raises:
        ValueError: an option cannot be used.
        RuntimeError: the wait policy is not passive.
    """
    if args.resume or args.list:
        raise ValueError("expected a run from the start, got --resume or --list")
    require_passive_wait()
    args.compare = True
    plans = train.plans(args)
    if len(plans[0].phases) > 1:
        raise ValueError(f"expected a recipe of one phase, got {plans[0].recipe.name}")
    plot.need()
    device = plans[0].device
    before = environment(device)
    total = sum(2 * plan.epochs * plan.steps for plan in plans)
    with tqdm(total=total, desc=plans[0].recipe.name, unit="step", disable=None) as bar:
        found = [train_one(plan, bar) for plan in plans]
    where = {**before, "load_average_after": environment(device)["load_average"]}
    outcomes, results = [one for one, _ in found], [result for _, result in found]
    numbers = {"command": command(args), **to_dict(outcomes, results, where)}
    out = plans[0].folder.parent
    texts = {"run.md": f"`{command(args)}`\n\n{table(outcomes, results, where)}\n"}
    texts["run.json"] = json.dumps(numbers, indent=1) + "\n"
    written = write_texts(out, texts)
    plot.draw(results, out / "curves.png")
    print(json.dumps(numbers, indent=1) if args.json else texts["run.md"])
    print("\n".join(map(str, [*written, Path(out, "curves.png")])), file=sys.stderr)
    return 0


def command(args: argparse.Namespace, program: str = "l0kernels bench run") -> str:
    """Return the command line that repeats a run; where the data lie is no part of it."""
    given = {"data": "DIR"} if args.data else {}
    names = "settings subset epochs batch lr gate_lr lam initial seed seeds threads"
    given.update({name: getattr(args, name) for name in names.split()})
    if args.device != "cpu":
        given["device"] = args.device
    options = [f"--{name.replace('_', '-')} {v}" for name, v in given.items() if v is not None]
    return " ".join([program, args.recipe, *options])


def to_dict(
    outcomes: list[Outcome], results: list[summary.Result], where: dict[str, Any]
) -> dict[str, Any]:
    """Return plain data for JSON."""
    rows = [{**asdict(one), "speedup": one.speedup, "eta_run": one.eta} for one in outcomes]
    return {"environment": where, "rows": rows, "training": summary.to_dict(results)}


def table(outcomes: list[Outcome], results: list[summary.Result], where: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, and those of training below it."""
    head = ("seed", "masked [s]", "ours [s]", "speed-up", "work left", "eta_run", "losses", "[%]")
    rows = [
        (
            str(one.seed),
            f"{one.masked_seconds:.1f}",
            f"{one.ours_seconds:.1f}",
            f"{one.speedup:.3f}",
            f"{one.work_left:.3f}",
            f"{one.eta:.3f}",
            f"{100 * one.losses:.2f} %",
            " / ".join(f"{value:.2f}" for value in one.accuracy),
        )
        for one in outcomes
    ]
    told = (
        "eta_run = speed-up x mean fraction of work left open; work: floating-point operations of "
        "forward, dgrad and wgrad of all convolutions and linear layers. Losses: largest relative "
        "difference of an epoch's loss. Accuracy of ours / masked. Both arms take turns by epoch, "
        "with the same draws and batches. Median eta_run of the seeds: "
        f"{median(one.eta for one in outcomes):.3f}. {where['cpu']}, {where['threads']} threads, "
        f"commit {where['git']}, OMP_WAIT_POLICY={where['OMP_WAIT_POLICY']}, load average "
        f"{where['load_average']} before, {where['load_average_after']} after."
    )
    return f"{markdown(head, rows, 1)}\n\n{told}\n\n{summary.markdown(results)}"
