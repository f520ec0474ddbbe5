# SPDX-License-Identifier: Apache-2.0
"""Five questions about a GPU whose answers decide how the library uses it.

widths: how long vendor convolutions take at every number of channels, and what a width that is no
multiple of 8 costs. grouped: whether a vendor matmul whose size the device knows is as fast as
one of known size. packing: how fast weights are gathered, scaled and cast. gather: how fast
channels are gathered from channels_last images, by the length of neighbouring runs. launches: how
many kernels a training step of a masked network launches, and how long the GPU waits for them.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import pack_weight

from . import models
from .arms import Task, make_arm
from .ops.pack_weight import Problem, make_problem

Row = dict[str, Any]
Size = dict[str, Any]

FULL: Size = {
    "repeats": 15,
    "stages": ((128, 160, 32), (128, 320, 16), (128, 640, 8)),  # images, most channels, pixels
    "step": 16,
    "matrix": (8192, 4096),  # rows, features
    "weight": (4096, 4096),
    "images": (128 * 32 * 32, 320),  # pixels, channels
    "network": ("wrn-28-10", 128),
}
QUICK: Size = {
    "repeats": 1,
    "stages": ((2, 32, 4),),
    "step": 16,
    "matrix": (32, 64),
    "weight": (64, 64),
    "images": (64, 32),
    "network": ("mlp-784-300-100", 4),
}


@dataclass(frozen=True)
class Clock:
    """Times work on one device.

    Args:
        device: "cuda" or "cpu".
        repeats: how often each piece is timed; the median counts.
    """

    device: str
    repeats: int

    def ms(self, work: Callable[[], object]) -> float:
        """Median milliseconds of `work` on the device, two runs before it not counted."""
        for _ in range(2):
            work()
        return median(self._once(work) for _ in range(self.repeats))

    def _once(self, work: Callable[[], object]) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)


def widths(clock: Clock, size: Size) -> Iterator[Row]:
    """3x3 convolutions in bfloat16, channels_last, as many outputs as inputs."""
    for images, most, pixels in size["stages"]:
        for width in range(size["step"], most + 1, size["step"]):
            for channels in (width, width + 1, width + 8):
                if channels <= most:
                    yield {"channels": channels, "pixels": pixels} | _convolution(
                        clock, images, channels, pixels
                    )


def _convolution(clock: Clock, images: int, channels: int, pixels: int) -> Row:
    layout = torch.channels_last
    x = clock.numbers(images, channels, pixels, pixels).contiguous(memory_format=layout)
    weight = clock.numbers(channels, channels, 3, 3).contiguous(memory_format=layout)
    upstream = torch.randn_like(x)
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def backward(of_x: bool, of_weight: bool) -> object:
        wanted = [of_x, of_weight, False]
        return torch.ops.aten.convolution_backward(upstream, x, weight, *options, wanted)

    found = {
        "forward": clock.ms(lambda: F.conv2d(x, weight, padding=1)),
        "dgrad": clock.ms(lambda: backward(True, False)),
        "wgrad": clock.ms(lambda: backward(False, True)),
    }
    flop = 2 * images * pixels**2 * channels**2 * 9
    rates = {f"{name} TFLOP/s": flop / ms / 1e9 for name, ms in found.items()}
    return {f"{name} ms": ms for name, ms in found.items()} | rates


def grouped(clock: Clock, size: Size) -> Iterator[Row]:
    """One group whose rows, or whose summed features, end at an offset that the device knows."""
    rows, features = size["matrix"]
    for share in (1.0, 0.5, 0.25, 0.1):
        count = max(16, round(features * share / 16) * 16)
        ends = torch.tensor([count], device=clock.device, dtype=torch.int32)
        row: Row = {"open": share}
        for name, known, unknown in (
            ("open outputs", *_rows(clock, rows, features, count, ends)),
            ("open inputs", *_summed(clock, rows, features, count, ends)),
        ):
            row[f"{name} known ms"] = clock.ms(known)
            try:
                row[f"{name} grouped ms"] = clock.ms(unknown)
            except RuntimeError as error:  # not every GPU has it: the table says why
                row[f"{name} grouped"] = f"refused: {str(error).splitlines()[0]}"
        yield row


def _rows(clock, rows, features, count, ends):
    a, b = clock.numbers(features, features), clock.numbers(1, features, rows)
    return lambda: a[:count] @ b[0], lambda: F.grouped_mm(a, b, offs=ends)


def _summed(clock, rows, features, count, ends):
    a, b = clock.numbers(rows, features), clock.numbers(features, features)
    return lambda: a[:, :count] @ b[:count], lambda: F.grouped_mm(a, b, offs=ends)


def packing(clock: Clock, size: Size) -> Iterator[Row]:
    """`pack_weight` of a float32 weight, rows and columns gathered; bytes read and written."""
    source = clock.numbers(*size["weight"], dtype=torch.float32)
    ms = clock.ms(lambda: torch.empty_like(source).copy_(source))
    yield {"what": "copy", "open": 1.0, "ms": ms, "GB/s": 2 * source.nbytes / ms / 1e6}
    for share in (1.0, 0.5, 0.25, 0.1):
        problem = make_problem(
            f"{'x'.join(map(str, size['weight']))}:both", share, device=clock.device
        )
        assert isinstance(problem, Problem)
        for dtype in (torch.float32, torch.bfloat16):
            pack = _packer(problem, dtype)
            packed = pack()
            ms = clock.ms(pack)
            moved = packed.numel() * (4 + packed.itemsize)
            what = f"pack to {str(dtype).removeprefix('torch.')}"
            yield {"what": what, "open": share, "ms": ms, "GB/s": moved / ms / 1e6}


def _packer(problem: Problem, dtype: torch.dtype) -> Callable[[], Tensor]:
    @torch.no_grad()
    def pack() -> Tensor:
        axes = (problem.rows, problem.row_map, problem.cols, problem.col_map)
        return pack_weight(problem.weight, problem.z, *axes, dtype)

    return pack


def gather(clock: Clock, size: Size) -> Iterator[Row]:
    """Half of the channels of bfloat16 images, in runs of neighbouring channels."""
    pixels, channels = size["images"]
    x = clock.numbers(pixels, channels)
    for run in (1, 2, 4, 8):
        blocks = channels // run
        places = torch.randperm(blocks)[: blocks // 2].sort().values.to(clock.device)
        view = x.view(pixels, blocks, run)
        ms = clock.ms(lambda view=view, places=places: view.index_select(1, places))
        yield {"run": run, "ms": ms, "GB/s": x.nbytes / ms / 1e6}


def launches(clock: Clock, size: Size) -> Iterator[Row]:
    """A training step with half of the units open, as users write it and ours."""
    name, batch = size["network"]
    task = Task(models.network(name), batch, torch.device(clock.device))
    for variant in ("masked-nchw", "masked-best", "ours"):
        arm = make_arm(task, variant, 0.5)
        for _ in range(3):
            arm.step()
        yield {"variant": variant} | _profile(arm.step, clock.device)


def _profile(step: Callable[[], None], device: str) -> Row:
    from torch.profiler import DeviceType, ProfilerActivity, profile

    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    events = [e for e in found.events() or () if e.device_type == DeviceType.CUDA]
    kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    busy = sum(e.time_range.elapsed_us() for e in events) / 1e3
    to_host = sum("DtoH" in e.name for e in events)
    return {
        "kernels": len(kernels),
        "copies to the host": to_host,
        "GPU busy ms": busy,
        "wall ms (profiled)": wall,
        "GPU idle": 1 - min(1.0, busy / wall),
    }


EXPERIMENTS: dict[str, Callable[[Clock, Size], Iterator[Row]]] = {
    "widths": widths,
    "grouped": grouped,
    "packing": packing,
    "gather": gather,
    "launches": launches,
}


def measure(device: str, quick: bool = False) -> dict[str, list[Row]]:
    """Runs all experiments: {name: rows}.

    Args:
        device: "cuda" or "cpu".
        quick: tiny sizes, which say nothing: does everything run?
    """
    size = QUICK if quick else FULL
    clock = Clock(device, size["repeats"])
    return {name: list(run(clock, size)) for name, run in EXPERIMENTS.items()}


def markdown(found: dict[str, list[Row]]) -> str:
    """One table per experiment."""
    parts = []
    for name, rows in found.items():
        heads = list(dict.fromkeys(key for row in rows for key in row))
        lines = [f"| {' | '.join(heads)} |", f"|{' ---: |' * len(heads)}"]
        lines += [f"| {' | '.join(_shown(row.get(head, '')) for head in heads)} |" for row in rows]
        what = (EXPERIMENTS[name].__doc__ or "").strip()
        parts.append(f"### {name}\n\n{what}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Prints the tables, or JSON."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.experiments", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu, default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    found = measure(options.device, options.quick)
    print(json.dumps(found, indent=1) if options.json else markdown(found))


if __name__ == "__main__":
    main()
