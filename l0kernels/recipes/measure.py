# SPDX-License-Identifier: Apache-2.0
"""Measurements on throwaway copies: warm-up, the fastest layout, memory of a step."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from l0kernels.recipes.arm import LAYOUTS, Arm
from l0kernels.recipes.images import Batch
from l0kernels.speed import synchronise

WARM_UP = 10
ROUNDS = 15
BATCHES = 2


def warm_up(arm: Arm, batches: list[Batch]) -> None:
    """Run steps on a copy, so that the first timed step pays for no first use.

    Args:
        arm: left as it is.
        batches: (images, labels).
    """
    copy = arm.throwaway()
    for number in range(WARM_UP):
        images, labels = batches[number % len(batches)]
        copy.step(arm.place(images), labels)


def fastest_layout(arm: Arm, batches: list[Batch]) -> str:
    """The layout in which an arm's steps have the lowest median time, measured in turns.

    Args:
        arm: left as it is.
        batches: (images, labels).

    Returns:
        A key of ``LAYOUTS``; ``"nchw"`` without measuring for a network without convolutions.
    """
    if all(parameter.dim() != 4 for parameter in arm.net.parameters()):
        return "nchw"
    copies = {layout: arm.throwaway(layout) for layout in LAYOUTS}
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for number in range(WARM_UP + ROUNDS):
        images, labels = batches[number % len(batches)]
        for layout, copy in copies.items():
            step = copy.step(copy.place(images), labels)
            if number >= WARM_UP:
                seconds[layout].append(step.seconds)
    return min(LAYOUTS, key=lambda layout: statistics.median(seconds[layout]))


def step_memory(arm: Arm, batch: Batch) -> int:
    """Peak of what PyTorch's allocator holds in one step beyond what it holds before.

    That is activations, packed weights, gradients and temporaries; parameters, optimizer state
    and what libraries allocate on their own (oneDNN's scratchpads) are not in it. On a GPU the
    workspaces of cuDNN and cuBLAS are in it: they come from PyTorch's allocator.

    Args:
        arm: left as it is; its next draw is the one measured.
        batch: (images, labels).

    Returns:
        Bytes.
    """
    copy = arm.throwaway()
    images, labels = copy.place(batch[0]), batch[1]
    copy.step(images, labels)
    # Drop what the first step left behind: its gradients, and its draw, as evaluation does.
    copy.zero_grad()
    with copy.evaluating():
        pass
    return allocated(lambda: copy.step(images, labels), copy.device)


def allocated(work: Callable[[], object], device: torch.device) -> int:
    """Peak of what PyTorch's allocator of a device holds during some work beyond that before.

    Args:
        work: to run.
        device: where it runs.

    Returns:
        Bytes.
    """
    return _allocated_on_gpu(work, device) if device.type == "cuda" else _allocated_on_cpu(work)


def _allocated_on_gpu(work: Callable[[], object], device: torch.device) -> int:
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocated_on_cpu(work: Callable[[], object]) -> int:
    # The profiler's own log lines go to stderr; they are no part of a progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
