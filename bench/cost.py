# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench cost`: a step on a GPU as a model predicts it, beside what was measured.

The model: a kernel takes as long as its bytes or its operations need at an attainable part of the
device's peak, whichever is longer, and at least what an empty kernel takes. A step keeps the GPU
busy for the sum of its kernels; the host needs the same time for every launch. In eager mode the
step takes the longer of the two, replayed from a graph of the same widths the first.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from . import experiments, models
from .arms import Task, require_variants
from .figures import markdown, write_texts
from .kernels import Counter, Kernel, kernels_of
from .operators import options_of
from .step import AMP
from .timing import environment, spread


@dataclass(frozen=True)
class Device:
    """Peaks of a GPU, without sparsity.

    Args:
        name: as results name it.
        memory: bytes per second.
        rates: operations per second: of products by the dtype of their operands, float32 ones in
            TF32 where they are convolutions (PyTorch's defaults); "f32" and "f64" of everything
            else.
        source: where they come from.
    """

    name: str
    memory: float
    rates: dict[str, float]
    source: str


HOPPER = {"half": 989e12, "tf32": 494e12, "f32": 67e12, "f64": 34e12}
DEVICES = {
    "h100": Device("NVIDIA H100", 3.35e12, HOPPER, "data sheet of the H100 SXM"),
    "h200": Device("NVIDIA H200", 4.8e12, HOPPER, "data sheet of the H200 SXM"),
    "b200": Device(
        "NVIDIA B200",
        8e12,
        {"half": 2250e12, "tf32": 1125e12, "f32": 75e12, "f64": 37e12},
        "data sheet of the HGX B200, an eighth; f64 assumed to be half of f32",
    ),
}
# Parts of the peaks that kernels attain: assumed, the same for every device.
ATTAINED = {"memory": 0.9, "product": 0.8, "convolution": 0.5}
EMPTY_KERNEL = 2e-6  # seconds; assumed
# What the host needs for an operator of an eager step, Python and autograd included: assumed.
LAUNCH_US = 40.0
CONVOLUTIONS = ("forward", "dgrad", "wgrad")
TRACED = (
    "dense",
    "masked-nchw",
    "masked-best",
    "oracle",
    "oracle-rounded",
    "ours",
)
"""Variants that can be predicted."""
MEASURED_BATCH = 128  # of the steps that `make gpu` times
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        devices: of `DEVICES`.
        model: name as in `models.network`.
        batch: examples per step.
        keep: open fractions.
        variants: which of `arms.VARIANTS`.
        amp: dtype of autocast.
        launch: microseconds of the host per launch.
        seed: of weights and gates.
    """

    devices: tuple[str, ...] = tuple(DEVICES)
    model: str = "wrn-28-10"
    batch: int = 128
    keep: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    variants: tuple[str, ...] = ("dense", "masked-nchw", "masked-best", "oracle", "ours")
    amp: str = "bf16"
    launch: float = LAUNCH_US
    seed: int = 0


def seconds(kernel: Kernel, device: Device) -> float:
    """What a kernel takes by the model."""
    if kernel.kind in (*CONVOLUTIONS, "product"):
        part = ATTAINED["product" if kernel.kind == "product" else "convolution"]
        single = "f32" if kernel.kind == "product" else "tf32"
        rate = part * device.rates["half" if kernel.dtype.itemsize == 2 else single]
    else:
        rate = device.rates["f64" if kernel.dtype == torch.float64 else "f32"]
    moved = kernel.bytes / (ATTAINED["memory"] * device.memory)
    return max(moved, kernel.flop / rate, EMPTY_KERNEL * kernel.launches)


@dataclass(frozen=True)
class Work:
    """What the kernels of one kind do in a step, and how long by the model."""

    kind: str
    bytes: int
    flop: int
    launches: int
    ms: float


@dataclass(frozen=True)
class Row:
    """A step of one variant: predicted, and measured where there is a measurement.

    Args:
        device: of `DEVICES`.
        variant: as in the step benchmark.
        keep: open fraction.
        works: by kind of kernel.
        host_ms: launches times the cost of one.
        measured_ms: of an eager step; None: not measured.
    """

    device: str
    variant: str
    keep: float
    works: list[Work]
    host_ms: float
    measured_ms: float | None

    @property
    def launches(self) -> int:
        return sum(work.launches for work in self.works)

    @property
    def busy_ms(self) -> float:
        """Of the GPU: what a step replayed from a graph of the same widths takes."""
        return sum(work.ms for work in self.works)

    @property
    def eager_ms(self) -> float:
        return max(self.busy_ms, self.host_ms)

    @property
    def off(self) -> float | None:
        """Predicted over measured, less 1."""
        return None if self.measured_ms is None else self.eager_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Comparison:
    """Predicted over measured, of things measured by themselves.

    Args:
        what: was measured.
        count: measurements.
        low, median, high: quartiles of predicted over measured.
    """

    what: str
    count: int
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Report:
    """Everything predicted, and what it was compared with."""

    setting: Setting
    environment: dict[str, Any]
    rows: list[Row]
    comparisons: list[Comparison]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "command": command(self.setting)}


class Measured:
    """What `make gpu` measured on a device, as bench/results has it; nothing where it has none."""

    def __init__(self, device: Device):
        self._rows: dict[tuple[str, str, str], dict[str, str]] = {}
        path = RESULTS / f"{device.name.lower().replace(' ', '-')}.csv"
        if not path.exists():
            return
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                key = (line["stage"], line["part"], line["row"])
                self._rows.setdefault(key, {})[line["figure"]] = line["value"]

    def rows(self, stage: str, part: str = "") -> list[dict[str, str]]:
        """Figures of every row of a stage."""
        return [row for key, row in self._rows.items() if key[:2] == (stage, part)]

    def step(self, setting: Setting, variant: str, keep: float) -> float | None:
        """Milliseconds of an eager step; None: not measured."""
        if setting.batch != MEASURED_BATCH:
            return None
        found = self.rows(f"step {setting.model} {setting.amp}")
        values = [row.get(f"ms {variant}") for row in found if float(row["keep"]) == keep]
        return float(values[0]) if values and values[0] is not None else None


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench cost", *options_of(setting, Setting())])


def check(setting: Setting) -> None:
    """Refuse what cannot be predicted.

    Raises:
        ValueError: unknown device, network or variant, or numbers out of range.
    """
    strange = [name for name in setting.devices if name not in DEVICES]
    if strange or not setting.devices:
        raise ValueError(f"expected devices of {', '.join(DEVICES)}, got {strange or 'none'}")
    require_variants(setting.variants)
    unknown = [name for name in setting.variants if name not in TRACED]
    if unknown:
        raise ValueError(f"expected variants among {', '.join(TRACED)}, got {', '.join(unknown)}")
    if any(not 0 < keep <= 1 for keep in setting.keep):
        raise ValueError(f"expected open fractions in (0, 1], got {setting.keep}")
    if setting.batch < 1 or not 0 <= setting.launch < float("inf"):
        got = f"{setting.batch} and {setting.launch}"
        raise ValueError(f"expected batch >= 1 and a launch cost of at least 0, got {got}")


def predict(setting: Setting) -> Report:
    """Predict every variant at every open fraction, and compare.

    Raises:
        ValueError: see `check`.
    """
    check(setting)
    task = Task(
        models.network(setting.model),
        setting.batch,
        torch.device("cpu"),
        setting.seed,
        AMP[setting.amp],
    )
    measured = {name: Measured(DEVICES[name]) for name in setting.devices}
    rows = []
    for variant in tqdm(setting.variants, desc="variants", disable=None):
        traced = kernels_of(task, variant, setting.keep)
        for name in setting.devices:
            for keep, kernels in zip(setting.keep, traced, strict=True):
                works = by_kind(kernels, DEVICES[name])
                host = setting.launch * sum(work.launches for work in works) / 1e3
                found = measured[name].step(setting, variant, keep)
                rows.append(Row(name, variant, keep, works, host, found))
    comparisons = []
    for name, of_it in measured.items():
        comparisons += compare(of_it, name)
        if (setting.model, setting.batch) == experiments.FULL["network"]:
            comparisons += _profiles(of_it, name)
    return Report(setting, environment(), rows, comparisons)


def by_kind(kernels: Sequence[Kernel], device: Device) -> list[Work]:
    """Add up kernels of a kind, in the order in which kinds come."""
    found = []
    for kind in dict.fromkeys(kernel.kind for kernel in kernels):
        of_kind = [kernel for kernel in kernels if kernel.kind == kind]
        found.append(
            Work(
                kind,
                sum(kernel.bytes for kernel in of_kind),
                sum(kernel.flop for kernel in of_kind),
                sum(kernel.launches for kernel in of_kind),
                1e3 * sum(seconds(kernel, device) for kernel in of_kind),
            )
        )
    return found


def compare(measured: Measured, name: str) -> list[Comparison]:
    """Predicted over measured, of single convolutions."""
    return [
        *_convolutions(measured, name, "128 or more", lambda n: n % 16 == 0 and n >= 128),
        *_convolutions(measured, name, "fewer", lambda n: n % 16 == 0 and n < 128),
        *_convolutions(measured, name, "no multiple of 16", lambda n: n % 16 > 0),
    ]


def _convolutions(
    measured: Measured, name: str, channels: str, counts: Callable[[int], bool]
) -> Iterator[Comparison]:
    images = {pixels: number for number, _, pixels in experiments.FULL["stages"]}
    rows = [row for row in measured.rows("experiments", "widths") if counts(int(row["channels"]))]
    found: dict[str, list[float]] = {}
    for row in rows:
        width, pixels = int(row["channels"]), int(row["pixels"])
        for kernel in convolution(images[pixels], width, pixels):
            ratio = 1e3 * seconds(kernel, DEVICES[name]) / float(row[f"{kernel.kind} ms"])
            found.setdefault(kernel.kind, []).append(ratio)
    for kind, ratios in found.items():
        what = f"{name}: 3x3 convolutions, {kind}, channels: {channels}"
        yield _comparison(what, ratios)


def convolution(images: int, width: int, pixels: int) -> list[Kernel]:
    """The kernels of a 3x3 convolution in bfloat16 that keeps width and pixels."""
    with FakeTensorMode(), Counter() as counter:
        shape = (images, width, pixels, pixels)
        x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(width, width, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    return [kernel for kernel in counter.kernels if kernel.kind in CONVOLUTIONS]


def _profiles(measured: Measured, name: str) -> Iterator[Comparison]:
    """Predicted over measured, of steps in which kernels were counted."""
    model, batch = experiments.FULL["network"]
    task = Task(models.network(model), batch, torch.device("cpu"))
    for row in measured.rows("experiments", "launches"):
        (kernels,) = kernels_of(task, row["variant"], (0.5,))
        busy = 1e3 * sum(seconds(kernel, DEVICES[name]) for kernel in kernels)
        launches = sum(kernel.launches for kernel in kernels)
        what = f"{name}: {model}, float32, half open, {row['variant']}"
        yield _comparison(f"{what}: kernels", [launches / float(row["kernels"])])
        yield _comparison(f"{what}: GPU busy", [busy / float(row["GPU busy ms"])])


def _comparison(what: str, ratios: list[float]) -> Comparison:
    found = spread(ratios)
    return Comparison(what, len(ratios), found.low, found.median, found.high)


def table(report: Report) -> str:
    """Return everything as Markdown tables with what they mean."""
    setting = report.setting
    parts = [
        f"`{command(setting)}`: predicted by a model; {setting.model}, batch {setting.batch}, "
        f"autocast {setting.amp}",
        _steps(report),
        f"The kernels of {setting.variants[-1]}, by kind:",
        _kinds(report),
    ]
    if report.comparisons:
        head = ("predicted over measured", "measurements", "low", "median", "high")
        rows = [
            (one.what, str(one.count), *(f"{v:.2f}" for v in (one.low, one.median, one.high)))
            for one in report.comparisons
        ]
        parts.append(markdown(head, rows, 1))
    return "\n\n".join((*parts, meaning(report)))


def _steps(report: Report) -> str:
    head = ("predicted step", "device", "open", "launches", "GB", "TFLOP")
    head += ("GPU busy [ms]", "host [ms]", "eager [ms]", "measured eager [ms]", "off by")
    rows = [
        (
            row.variant,
            row.device,
            f"{row.keep:g}",
            str(row.launches),
            f"{sum(work.bytes for work in row.works) / 1e9:.2f}",
            f"{sum(work.flop for work in row.works) / 1e12:.2f}",
            f"{row.busy_ms:.2f}",
            f"{row.host_ms:.2f}",
            f"{row.eager_ms:.2f}",
            "" if row.measured_ms is None else f"{row.measured_ms:.2f}",
            "" if row.off is None else f"{row.off:+.0%}",
        )
        for row in report.rows
    ]
    return markdown(head, rows, 2)


def _kinds(report: Report) -> str:
    """By kind of kernel, of the last variant."""
    setting = report.setting
    head = ("kernels", "open", "launches", "GB", "TFLOP")
    head += tuple(f"{name} predicted [ms]" for name in setting.devices)
    of_last = [row for row in report.rows if row.variant == setting.variants[-1]]
    lines = []
    for keep in setting.keep:
        devices = [row.works for row in of_last if row.keep == keep]
        for works in zip(*devices, strict=True):
            work = works[0]
            counted = (str(work.launches), f"{work.bytes / 1e9:.3f}", f"{work.flop / 1e12:.3f}")
            took = (f"{one.ms:.3f}" for one in works)
            lines.append((work.kind, f"{keep:g}", *counted, *took))
    return markdown(head, lines, 1)


def meaning(report: Report) -> str:
    """Return what the model is, and how far off it is."""
    parts = ", ".join(f"{what} {part:g}" for what, part in ATTAINED.items())
    devices = "; ".join(
        f"{name}: {device.memory / 1e12:g} TB/s, {device.rates['half'] / 1e12:g} TFLOP/s in half "
        f"precision ({device.source})"
        for name, device in DEVICES.items()
        if name in report.setting.devices
    )
    text = (
        "Predicted, not measured: bytes and operations as the operators of the step need them, "
        f"over the peaks of the device times an assumed attained part ({parts}), at least "
        f"{1e6 * EMPTY_KERNEL:g} us a launch. {devices}. Host: {report.setting.launch:g} us a "
        f"launch ({LAUNCH_US:g} is about what the steps in nvidia-h200.csv show, so that eager "
        "steps there are no independent test of it). Eager: the longer of the two; a graph of the "
        "same widths: busy. Steps of ours that are captured have planned widths, which are larger "
        "(`l0kernels bench capacity`): they are not predicted here. Left out: odd "
        "widths, tiles, waves and plans of the vendor's kernels, caches, and waiting for the "
        "counts of a draw. Single convolutions were measured from the host, which takes 20 us and "
        "more for each."
    )
    return f"{text}{_how_far_off(report)}"


def _how_far_off(report: Report) -> str:
    """Of the eager steps that were measured, by variant."""
    found: dict[str, list[float]] = {}
    for row in report.rows:
        if row.off is not None:
            found.setdefault(row.variant, []).append(row.off)
    told = [
        f"{variant} {median(off):+.0%} (at worst {max(off, key=abs):+.0%})"
        for variant, off in found.items()
    ]
    return f" Eager steps are off, in the median, by: {', '.join(told)}." if told else ""


def write(report: Report, folder: Path) -> list[Path]:
    """Write cost.md and cost.json into a folder."""
    texts = {"cost.md": table(report) + "\n"}
    texts["cost.json"] = json.dumps(report.to_dict(), indent=1) + "\n"
    return write_texts(folder, texts)
