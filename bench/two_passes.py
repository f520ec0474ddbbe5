# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench arm`: what the second pass of ARM costs, over AR, which has one."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import models
from .arms import Arm, Task, best_layout, check_batch, our_arm, require_the_reference
from .figures import Figure, Sheet, markdown, shown, timed, write_texts
from .operators import options_of
from .step import TURN_SECONDS
from .timing import environment, interleave, often, repeated, require_passive_wait

GATES: dict[str, tuple[float, float]] = {"polarised": (0.98, 0.02), "even": (0.5, 0.5)}
"""P(z = 1) of the first, third, fifth ... gate, and of the others."""
ESTIMATORS = ("ar", "arm")
HEAD = ("network and gates", "AR [ms]", "ARM [ms]", "ARM / AR", "error")
SLOPE = 7.0  # k of the gates' sigmoid
CONTENT = (
    "A step is gate draw + penalty + forward + backward + optimizer, as in `l0kernels bench step`; "
    "of ARM also the second draw and the pass without gradients, where a gate differs. polarised: "
    "every other gate is open with probability .98, the others with .02; even: all with .5; "
    "learning leaves them there. ARM / AR: the median of ratios paired round by round, quartiles "
    "in brackets; of several runs the one with the middle median. Error: loss and all gradients "
    "of the estimate against the masked reference, in fp64, after timing."
)


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        model: name as in `models.network`.
        batch: examples per step.
        gates: which of `GATES`.
        rounds: timed rounds of a run.
        runs: of all rounds.
        warmup: untimed rounds before each run.
        device: "cpu", "cuda" or "cuda:N".
        seed: of weights, data and gates.
        threads: of the CPU; None: torch's choice.
    """

    model: str = "lenet5"
    batch: int = 128
    gates: tuple[str, ...] = tuple(GATES)
    rounds: int = 15
    runs: int = 3
    warmup: int = 5
    device: str = "cpu"
    seed: int = 0
    threads: int | None = None


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench arm", *options_of(setting, Setting())])


def check(setting: Setting) -> Task:
    """Return what both estimators do.

    Raises:
        ValueError: unknown network or gates, or numbers out of range.
        RuntimeError: there is no such device.
    """
    if not setting.gates or any(name not in GATES for name in setting.gates):
        raise ValueError(f"expected gates among {', '.join(GATES)}, got {list(setting.gates)}")
    numbers = (setting.batch, setting.rounds, setting.runs)
    if min(numbers) < 1:
        raise ValueError(f"expected batch >= 1, rounds >= 1 and runs >= 1, got {numbers}")
    device = torch.device(setting.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"expected a CUDA device for {setting.device!r}, found none")
    return Task(models.network(setting.model), setting.batch, device, setting.seed)


def measure(setting: Setting) -> Sheet:
    """Time both estimators in turn; nothing is told unless both compute what the masks do.

    Raises:
        ValueError: unknown network or gates, or numbers out of range.
        RuntimeError: the wait policy is not passive, or an estimator computes something else.
    """
    require_passive_wait()
    task = check(setting)
    sheet = Sheet(command(setting), environment(setting.device), [])
    arms = {name: make_estimator(task, name) for name in ESTIMATORS}
    for gates in setting.gates:
        for arm in arms.values():
            open_with(arm.gates, GATES[gates])
        steps = often(arms["ar"].step, task.device, TURN_SECONDS)
        turns = {name: partial(repeated, arm.step, steps) for name, arm in arms.items()}
        label = f"{setting.model} {gates}"
        runs = [
            interleave(turns, setting.rounds, setting.warmup, task.device, label)
            for _ in range(setting.runs)
        ]
        runs = [{name: [ms / steps for ms in run[name]] for name in run} for run in runs]
        shape = f"{setting.model} batch {setting.batch} {gates}"
        mean = sum(GATES[gates]) / 2
        for name, arm in arms.items():
            what = ("arm", "step", name, "f32", shape, mean)
            error = require_the_reference(arm.net, *check_batch(task))
            sheet.figures.append(Figure(*what, **timed(runs, name, "ar"), error=error))
    sheet.environment["load_average_after"] = environment(setting.device)["load_average"]
    return sheet


def make_estimator(task: Task, name: str) -> Arm:
    """Return the network with the gates of one estimator, its data and optimizer."""
    torch.manual_seed(task.seed)
    x, y = (t.to(task.device) for t in task.network.example(task.batch, task.seed))
    net, x = best_layout(task.network.build(), x)
    return our_arm(task, net.to(task.device).train(), x, y, "arm", estimator=name, k=SLOPE)


@torch.no_grad()
def open_with(gates: Iterable[Tensor], probabilities: tuple[float, float]) -> None:
    """Set the parameters of gates, alternately, to probabilities of being open."""
    for phi in gates:
        phi.copy_(torch.logit(phi.new_tensor(probabilities)).repeat(len(phi))[: len(phi)] / SLOPE)


def rows(sheet: Sheet) -> list[tuple[str, ...]]:
    """Return a row, see `HEAD`, for each kind of gates."""
    one = sheet.find("ar")
    return [
        (
            figure.shape,
            shown(one[figure.problem].p50_ms, ".3g"),
            shown(figure.p50_ms, ".3g"),
            str(figure.over_ours),
            shown(figure.error, ".1e"),
        )
        for figure in sheet.figures
        if figure.impl == "arm"
    ]


def table(sheet: Sheet) -> str:
    """Return the figures as a Markdown table with what they mean."""
    return "\n\n".join((f"`{sheet.command}`", markdown(HEAD, rows(sheet), 1), CONTENT))


def write(sheet: Sheet, folder: Path) -> list[Path]:
    """Write arm.md, arm.json and arm.csv into a folder."""
    texts = {"arm.md": table(sheet) + "\n", "arm.csv": sheet.to_csv()}
    texts["arm.json"] = json.dumps(sheet.to_dict(), indent=1) + "\n"
    return write_texts(folder, texts)
