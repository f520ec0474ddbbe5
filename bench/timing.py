# SPDX-License-Identifier: Apache-2.0
"""Paired timing: variants take turns in one process, ratios are formed round by round."""

import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from l0kernels._version import __version__
from l0kernels.info import cpu_name
from l0kernels.speed import synchronise

# Milliseconds per round of each variant, for every run.
Runs = Sequence[Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} - {self.high:.3f})"


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def paired(times: Mapping[str, Sequence[float]], over: str, under: str) -> Spread:
    """Return the spread of times[over] / times[under], taken round by round."""
    return spread(ratios_in(times, over, under))


def middle(values: Sequence[float]) -> int:
    """Return the index of the median; of an even number, of the lower of the two in the middle.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    return sorted(range(len(values)), key=values.__getitem__)[(len(values) - 1) // 2]


def ratios_in(times: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """Return times[over] / times[under], round by round."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def ratios_of_middle_run(runs: Runs, over: str, under: str) -> list[float]:
    """Return `ratios_in` the run whose median ratio is the middle one."""
    ratios = [ratios_in(times, over, under) for times in runs]
    return ratios[middle([spread(found).median for found in ratios])]


def middle_run(runs: Runs, over: str, under: str) -> Spread:
    """Return `paired` of the run whose median ratio is the middle one."""
    return spread(ratios_of_middle_run(runs, over, under))


def interval_of_median(values: Sequence[float], resamples: int = 4000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a sample's median (percentiles; the same every time).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    sample = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).choice(sample, (resamples, len(sample)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def require_passive_wait() -> None:
    """Refuse to time with spinning OpenMP threads.

    With the default policy, idle threads spin and steal time from the next parallel region: the
    same step can take many times longer in one run than in the next.

    Raises:
        RuntimeError: OMP_WAIT_POLICY is not passive.
    """
    policy = os.environ.get("OMP_WAIT_POLICY")
    if policy is None or policy.strip().lower() != "passive":
        got = "it is not set" if policy is None else f"got {policy!r}"
        raise RuntimeError(
            "expected OMP_WAIT_POLICY=passive in the environment before Python starts, "
            f"{got}; step times are not reproducible otherwise"
        )


def keep_what_onednn_prepares() -> None:
    """Make room for what oneDNN prepares for the widths of all variants.

    It keeps 1,024 prepared convolutions by default. Oracles that are rebuilt at other widths in
    every round would push out those of the variants beside them, which no training does to itself.
    Before the first convolution: oneDNN reads the variable then.
    """
    os.environ.setdefault(ONEDNN_CACHE, "32768")


ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    label: str = "",
    last: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Time each step once per round, the starting variant moving on by one every round.

    oneDNN keeps what it prepares for a shape for the whole process. A network with one set of
    widths prepares once, one whose widths change pays at widths it has not met; so whatever runs
    at the widths of a draw without having to pay for them belongs into `last`.

    Args:
        steps: variant name -> a function that does one whole step.
        rounds: timed rounds.
        warmup: untimed rounds before them.
        device: where the steps run; a GPU is synchronised around each step.
        label: text before the progress bar.
        last: steps that end every round, in this order, and do not take turns: name -> what to
            do right before the step, outside the clock.

    Returns:
        Milliseconds per variant, one entry per round.

    Raises:
        ValueError: rounds < 1 or warmup < 0, or `last` names something that is no step.
        RuntimeError: the wait policy is not passive.
    """
    prepare = dict(last or {})
    unknown = [name for name in prepare if name not in steps]
    if unknown:
        raise ValueError(f"expected last among {', '.join(steps)}, got {', '.join(unknown)}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"expected rounds >= 1 and warmup >= 0, got {rounds} and {warmup}")
    require_passive_wait()
    times = {name: [] for name in steps}
    turns = [name for name in steps if name not in prepare]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with tqdm(total=(warmup + rounds) * len(steps), desc=label, disable=None) as bar:
            for index in range(-warmup, rounds):
                first = index % max(1, len(turns))
                for name in [*turns[first:], *turns[:first], *prepare]:
                    if name in prepare:
                        prepare[name]()
                    took = once(steps[name], torch.device(device))
                    if index >= 0:
                        times[name].append(took)
                    bar.update()
    finally:
        if collecting:
            gc.enable()
    return times


def once(step: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call, a GPU idle before and after it."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def often(step: Callable[[], object], device: torch.device, seconds: float) -> int:
    """Return how many times a step is repeated so that it takes so long; it runs twice."""
    once(step, device)
    return max(1, math.ceil(seconds / max(once(step, device) / 1e3, 1e-7)))


def repeated(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return what a reader needs to judge a figure: hardware, versions, threads, load, commit."""
    device = torch.device(device)
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        ONEDNN_CACHE: os.environ.get(ONEDNN_CACHE),
        "allocator": " ".join(
            f"{name}={os.environ[name]}" for name in sorted(os.environ) if is_of_allocator(name)
        ),
        "load_average": None if load is None else [round(value, 2) for value in load],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "l0kernels": __version__,
        "git": git_commit(),
    }


def is_of_allocator(variable: str) -> bool:
    """Whether a variable changes how memory is taken and given back, which takes much of a step."""
    return variable.startswith("MALLOC_") or variable in ALLOCATOR


def checkout() -> Path | None:
    """Return the git checkout that this file is in, None where it is installed elsewhere."""
    folder = Path(__file__).resolve().parent
    top = run_git("rev-parse", "--show-toplevel", folder=folder)
    return folder.parent if top is not None and Path(top) == folder.parent else None


def git_commit() -> str | None:
    """Return the commit of the checkout this file is in, None when installed elsewhere."""
    folder = checkout()
    if folder is None:
        return None
    commit = run_git("rev-parse", "--short=12", "HEAD", folder=folder)
    changed = run_git("status", "--porcelain", "--untracked-files=no", folder=folder)
    return f"{commit}+changes" if changed else commit


def run_git(*arguments: str, folder: Path) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
