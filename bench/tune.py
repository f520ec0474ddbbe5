# SPDX-License-Identifier: Apache-2.0
"""`l0kernels tune`: which block sizes of the Triton kernels of gated layers are fastest on a GPU.

Every candidate has to compute the same as the reference, as the benchmarks of operators check it,
before it is timed; one that is not clearly faster than the default does not get into the table.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from tqdm import tqdm

from l0kernels import _triton
from l0kernels.ops.gated_linear.tiles import (
    FOLDER,
    HEURISTICS,
    VERSION,
    Place,
    Tiles,
    file_of,
    name_of,
    table_of,
    trying,
)

from .experiments import Clock
from .figures import markdown, write_texts
from .operators import DTYPES, Wrong, arms_of, checked, operator
from .timing import environment

EFFORTS = ("quick", "normal", "thorough")
SIZES = (16, 32, 64, 128)  # of which packed weights are multiples
WARPS, STAGES = (4, 8), (2, 3, 4)
MOST_SHARED = 227 * 1024  # bytes of shared memory that a program can have on Hopper
GAIN = 0.98  # of the default's time, that a better one takes at most
OPEN = 0.5
PASS = {"layer": "forward", "weight": "backward"}
REPEATS = 15
# What is timed at each place: operator, shape, dtype.
Shape = tuple[str, str, str]
PROBLEMS: dict[Place, tuple[Shape, ...]] = {
    ("layer", "float32"): (("gated_linear", "640x640x8192", "f32"),),
    ("layer", "in place"): (("gated_linear", "4096x4096x64", "bf16"),),
    ("layer", "uneven"): (("gated_linear", "641x641x8192", "bf16"),),
    ("layer", "narrow"): (
        ("gated_linear", "640x64x8192", "bf16"),
        ("gated_conv2d", "64x64x3x32x64", "bf16"),
    ),
    ("layer", "wide"): (
        ("gated_linear", "3072x768x8192", "bf16"),
        ("gated_conv2d", "320x320x3x16x64", "bf16"),
    ),
    ("weight", "float32"): (("gated_linear", "640x640x8192", "f32"),),
    ("weight", "uneven"): (("gated_linear", "641x641x8192", "bf16"),),
    ("weight", "narrow"): (
        ("gated_linear", "640x64x8192", "bf16"),
        ("gated_conv2d", "64x64x3x32x64", "bf16"),
    ),
    ("weight", "wide"): (
        ("gated_linear", "3072x768x8192", "bf16"),
        ("gated_conv2d", "320x320x3x16x64", "bf16"),
    ),
}


@dataclass(frozen=True)
class Found:
    """What was found at a place.

    Args:
        place: the place.
        best: the fastest sizes that are right; the default where none is clearly faster.
        ms: what they take, all problems together.
        default_ms: what the default takes.
        tried: candidates, with the default.
        wrong: of these, those that compute something else.
        refused: of these, those that need more than the GPU has.
    """

    place: Place
    best: Tiles
    ms: float
    default_ms: float
    tried: int
    wrong: int
    refused: int


def candidates(place: Place, effort: str) -> list[Tiles]:
    """Sizes to try, the default first; those of less effort are among those of more.

    Args:
        place: see `tiles`.
        effort: "quick" varies warps and stages, "normal" rows and columns too, by a factor of 2,
            "thorough" takes all sizes.
    """
    default = HEURISTICS[place]
    near = [{n // 2, n, 2 * n} & set(SIZES) for n in default[:2]]
    if effort == "quick":
        blocks: list[Sequence[int]] = [[n] for n in default[:3]]
    elif effort == "normal":
        blocks = [*(sorted(n) for n in near), [default.depth]]
    else:
        blocks = [SIZES] * 3
    sizes = [Tiles(*numbers) for numbers in product(*blocks, WARPS, STAGES)]
    itemsize = 4 if place[1] == "float32" else 2
    fit = [t for t in sizes if t != default and shared(t, itemsize) <= MOST_SHARED]
    return [default, *fit]


def shared(tiles: Tiles, itemsize: int) -> int:
    """Bytes of both operands in all stages of the pipeline."""
    return tiles.stages * tiles.depth * (tiles.rows + tiles.columns) * itemsize


Problems = dict[Place, tuple[Shape, ...]]
Step = Callable[[], object]
Steps = tuple[Step, Step]
"""What checks a problem, and what is timed."""
Time = Callable[[Step], float]


def tune(
    device: torch.device,
    effort: str,
    time: Time,
    problems: Problems = PROBLEMS,
    on_candidate: Callable[[], object] = lambda: None,
) -> list[Found]:
    """Try all candidates of all places.

    Args:
        device: a GPU.
        effort: see `candidates`.
        time: milliseconds of a call.
        problems: what is timed at each place.
        on_candidate: called after each one.
    """
    found = []
    for place, shapes in problems.items():
        steps = list(_steps(place, shapes, device))
        times: dict[Tiles, float] = {}
        wrong = refused = 0
        tried = candidates(place, effort)
        for tiles in tried:
            try:
                with trying(place, tiles):
                    for check, _ in steps:
                        check()
                times[tiles] = _total(place, tiles, steps, time)
            except Wrong:
                wrong += 1
            except _too_much():
                refused += 1
            on_candidate()
        default = HEURISTICS[place]
        if default not in times:
            raise RuntimeError(f"{place}: expected the default {default} to compute what is right")
        best = min(times, key=times.__getitem__)
        if best != default:
            # The fastest of many was lucky, and the default was timed first, on a colder GPU.
            times |= {tiles: _total(place, tiles, steps, time) for tiles in (default, best)}
            if times[best] > GAIN * times[default]:
                best = default
        found.append(Found(place, best, times[best], times[default], len(tried), wrong, refused))
    return found


def _total(place: Place, tiles: Tiles, steps: Sequence[Steps], time: Time) -> float:
    """What all problems of a place take."""
    with trying(place, tiles):
        return sum(time(step) for _, step in steps)


def _too_much() -> tuple[type[Exception], ...]:
    """What Triton raises where sizes need more than the GPU has."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def _steps(place: Place, shapes: Sequence[Shape], device: torch.device) -> Iterator[Steps]:
    """For every problem what checks it and what is timed."""
    for name, shape, dtype in shapes:
        torch.manual_seed(0)
        problem = operator(name).make(shape, OPEN, DTYPES[dtype], device)
        arms = arms_of(problem, ["triton"])
        check = partial(checked, problem, arms, ["triton"], DTYPES[dtype])
        yield check, arms["triton"].steps()[PASS[place[0]]]


def content(found: Sequence[Found], device: torch.device, effort: str) -> dict[str, Any]:
    """What a table says: sizes that are faster than the default, and where they were measured."""
    better = [one for one in found if one.best != HEURISTICS[one.place]]
    return {
        "version": VERSION,
        "gpu": name_of(device),
        "effort": effort,
        "environment": environment(device),
        "tiles": [[*one.place, *one.best] for one in better],
        "ms": [[*one.place, one.ms, one.default_ms] for one in better],
    }


def table(found: Sequence[Found]) -> str:
    """Return what was found as a Markdown table."""
    head = ("kernel", "kind", "rows x columns x depth, warps, stages", "[ms]", "default [ms]")
    rows = [
        (
            *one.place,
            f"{one.best.rows}x{one.best.columns}x{one.best.depth}, {one.best.warps}, "
            f"{one.best.stages}",
            f"{one.ms:.4g}",
            f"{one.default_ms:.4g}",
            f"{one.tried} ({one.wrong} wrong, {one.refused} refused)",
        )
        for one in found
    ]
    return markdown((*head, "tried"), rows, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--effort", choices=EFFORTS, default="normal", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder for the table (default: the package's)"
    )


def require_writable(folder: Path) -> None:
    """Make a folder, and see before anything is timed that a table can be written into it.

    Raises:
        ValueError: it cannot, as in the folder of a package that another user installed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out: expected a folder to write into, got {folder}: {error}") from None


def run(args: argparse.Namespace) -> int:
    """Tune for the GPU at hand and write its table.

    Raises:
        RuntimeError: there is no GPU, or no Triton.
        ValueError: the table could not be written.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("expected a GPU to tune for, got none")
    if reason := _triton.why_not():
        raise RuntimeError(f"expected Triton: {reason}")
    require_writable(args.out)
    device = torch.device("cuda", torch.cuda.current_device())
    total = sum(len(candidates(place, args.effort)) for place in PROBLEMS)
    with tqdm(total=total, desc=name_of(device), unit="candidate", disable=None) as bar:
        time = Clock("cuda", REPEATS).ms
        found = tune(device, args.effort, time, on_candidate=bar.update)
    print(table(found))
    path = file_of(name_of(device), args.out)
    text = json.dumps(content(found, device, args.effort), indent=1) + "\n"
    print(*write_texts(args.out, {path.name: text}))
    table_of.cache_clear()
    return 0
