# SPDX-License-Identifier: Apache-2.0
"""Time and memory of converting a network of the zoo, in a process of its own."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import zoo
from .zoo_arms import convert, in_channels_last

CHECK_BATCH = 2


def settled(entry: zoo.Entry, size: zoo.Size) -> nn.Module:
    """Return the network after a few forwards in training mode, for its running statistics."""
    net = entry.build(size)
    with torch.no_grad():
        for seed in range(3):
            net(*entry.example(size, entry.batch, seed))
    return net


def convert_elsewhere(name: str, size: zoo.Size) -> dict[str, Any]:
    """Run `convert_here` in a new process, where nothing else has used memory.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "l0kernels.bench.convert_cost", name, size]
    threads = str(torch.get_num_threads())
    done = subprocess.run([*command, threads], capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"convert: {told[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def convert_here(name: str, size: zoo.Size) -> dict[str, Any]:
    """Return seconds of `convert` and by how many bytes resident memory grew at its peak.

    The bytes are None where the system does not tell (it is read from Linux's /proc: the peak
    that getrusage gives includes that of the parent process).
    """
    warm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    convert(warm, (torch.randn(2, 3, 6, 6),))
    entry = zoo.entry(name)
    net = in_channels_last(settled(entry, size))
    inputs = entry.example(size, CHECK_BATCH)
    gc.collect()
    reset_peak()
    before = resident("VmRSS")
    start = time.perf_counter()
    convert(net, inputs)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    grown = None if before is None or peak is None else max(0, peak - before)
    return {"seconds": seconds, "bytes": grown}


def resident(field_name: str) -> int | None:
    """Return a figure of /proc/self/status in bytes, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field_name}:")]
    return int(found[0]) * 1024 if found else None


def reset_peak() -> None:
    """Let the peak of resident memory start from now, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak so far is that of building the network, hardly above the network itself


def bytes_of_state(net: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))


def bytes_of_activations(net: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes that autograd saves in a forward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    twin = copy.deepcopy(net)
    own |= {t.untyped_storage().data_ptr() for t in (*twin.parameters(), *twin.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = twin(*inputs)  # kept: freed memory could be given to another activation
    del outputs
    return sum(saved.values())


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(convert_here(sys.argv[1], zoo.SIZES[sys.argv[2]])))
