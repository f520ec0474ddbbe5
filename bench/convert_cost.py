# SPDX-License-Identifier: Apache-2.0
"""Memory of converting a network of the zoo, measured in a process of its own."""

from __future__ import annotations

import copy
import gc
import json
import sys

import torch
from torch import Tensor, nn

from . import zoo
from .oracle import cast
from .resident import elsewhere, reset_peak, resident, trim_heap
from .zoo_arms import convert, in_format

CHECK_BATCH = 2


def settled(entry: zoo.Entry, size: zoo.Size) -> nn.Module:
    """Return the network after a few forwards in training mode, for its running statistics."""
    net = entry.build(size)
    with torch.no_grad():
        for seed in range(3):
            net(*entry.example(size, entry.batch, seed))
    return net


def warm_up() -> None:
    """Convert a tiny network: what libraries load and prepare once is no cost of another one."""
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    convert(tiny, (torch.randn(2, 3, 6, 6),))


def growth_elsewhere(name: str, size: zoo.Size) -> int | None:
    """Run `growth` in a process of its own, see `resident.elsewhere`.

    Raises:
        RuntimeError: it failed.
    """
    return elsewhere("l0kernels.bench.convert_cost", [name, size, str(torch.get_num_threads())])


def growth(name: str, size: zoo.Size) -> int | None:
    """Return by how many bytes resident memory grows, at its peak, while `convert` runs.

    The heap is trimmed before, where the C library can do it: memory that the forwards of
    `settled` have freed counts when `convert` takes it.

    None where the system does not tell (it is read from Linux's /proc: the peak that getrusage
    gives includes that of the parent process).
    """
    warm_up()
    net = in_format(settled(zoo.entry(name), size), "NHWC")
    inputs = zoo.entry(name).example(size, CHECK_BATCH)
    gc.collect()
    trim_heap()
    reset_peak()
    before = resident("VmRSS")
    convert(net, inputs)
    peak = resident("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def bytes_needed(net: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a network and its activations in one training forward, in a dtype."""
    net = copy.deepcopy(net).to(dtype)
    return bytes_of_state(net) + bytes_of_activations(net, cast(inputs, dtype))


def bytes_of_state(net: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers()))


def bytes_of_activations(net: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes that autograd saves in a forward, without parameters and buffers.

    Running statistics move with the forward.
    """
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = net(*inputs)  # kept: freed memory could be given to another activation
    del outputs
    return sum(saved.values())


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(growth(sys.argv[1], zoo.SIZES[sys.argv[2]])))
