# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench predict`: the speed-up that `l0kernels.report` predicts, beside the measured."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import l0kernels as l0
from l0kernels.training import gates_of

from . import models
from .arms import N_TRAIN, best_layout
from .figures import markdown, write_texts
from .masked import log_alpha_for
from .operators import options_of
from .timing import environment, require_passive_wait

# What a batch costs differs a lot: one for each network, of the size that its step is timed at.
BATCHES = {
    "mlp-784-300-100": 128,
    "mlp-1024-4096-1024": 512,
    "lenet5": 128,
    "vgg16": 64,
    "resnet20": 128,
    "resnet50": 16,
    "wrn-16-4": 32,
    "wrn-28-10": 32,
    "mlp-block-768-3072": 64,
}
CONTENT = (
    "Forward and backward of one batch, gates drawn anew in each, against the masked reference of "
    "the same model (`l0kernels.report(net, example_inputs)`), without loss and optimizer. "
    "Predicted: from timings of the single layers at full and at expected open widths."
)


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        models: names as in `models.network`; empty for all.
        keep: open fraction.
        seed: of weights and gates.
        threads: of the CPU; None: torch's choice.
    """

    models: tuple[str, ...] = ()
    keep: float = 0.5
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Row:
    """One network: milliseconds of a step, and speed-ups over the masked reference."""

    model: str
    batch: int
    masked: float
    packed: float
    measured: float
    predicted: float

    @property
    def off(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Report:
    """All rows and where they come from."""

    setting: Setting
    environment: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "command": command(self.setting), "predict": CONTENT}


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench predict", *options_of(setting, Setting())])


def measure(setting: Setting) -> Report:
    """Predict and measure every network.

    Raises:
        ValueError: unknown network, or an open fraction out of range.
        RuntimeError: the wait policy is not passive.
    """
    require_passive_wait()
    if not 0 < setting.keep <= 1:
        raise ValueError(f"expected an open fraction in (0, 1], got {setting.keep}")
    unknown = [name for name in setting.models if name not in BATCHES]
    if unknown:
        raise ValueError(f"expected models of {', '.join(BATCHES)}, got {', '.join(unknown)}")
    names = tqdm(setting.models or tuple(BATCHES), desc="networks", disable=None)
    return Report(setting, environment(), [_row(name, setting) for name in names])


def _row(name: str, setting: Setting) -> Row:
    network, batch = models.network(name), BATCHES[name]
    torch.manual_seed(setting.seed)
    plain: nn.Module = network.build()
    x, _ = network.example(batch, setting.seed)
    plain, x = best_layout(plain, x)
    example = (x[:2],)
    net = l0.convert(
        plain, "hard_concrete", example_inputs=example, n_train=N_TRAIN, seed=setting.seed
    )
    with torch.no_grad():
        gates_of(net).log_alpha.fill_(log_alpha_for(setting.keep))
    speed = l0.report(net, (x,)).speed
    assert speed is not None
    figures = (speed.masked, speed.packed, speed.measured_speedup, speed.predicted_speedup)
    return Row(name, batch, *figures)


def table(report: Report) -> str:
    """Return the rows as a Markdown table with what they mean."""
    head = ("network", "batch", "masked [ms]", "ours [ms]", "measured", "predicted", "off by")
    rows = [
        (
            row.model,
            str(row.batch),
            f"{row.masked:.1f}",
            f"{row.packed:.1f}",
            f"{row.measured:.2f}",
            f"{row.predicted:.2f}",
            f"{row.off:+.0%}",
        )
        for row in report.rows
    ]
    where = report.environment
    place = (
        f"`{command(report.setting)}`: {where['cpu']}, {where['threads']} threads, torch "
        f"{where['torch']}, l0kernels {where['l0kernels']} ({where['git']})"
    )
    return "\n\n".join((place, markdown(head, rows, 1), CONTENT))


def write(report: Report, folder: Path) -> list[Path]:
    """Write predict.md and predict.json into a folder."""
    texts = {"predict.md": table(report) + "\n"}
    texts["predict.json"] = json.dumps(report.to_dict(), indent=1) + "\n"
    return write_texts(folder, texts)
