# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a training step read, write and compute, counted without running them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import l0kernels as l0
from l0kernels.gates.base import GPU_MULTIPLE
from l0kernels.training import gates_of

from .arms import Arm, Task, best_layout, make_arm, ungated_arm

SMALL_BATCH = 2

# Of torch's fused optimizers (ATen/native/cuda/MultiTensorApply.cuh): numbers in a chunk, chunks
# and tensors in a launch that walks through three lists.
CHUNK, MOST_CHUNKS, MOST_TENSORS = 65536, 320, 48
# What pack_weight_cuda.cu has room for in a launch.
MOST_WEIGHTS = 184
# Beyond so many gates or features sample_gates takes two launches.
MANY_GATES = 16384

NOTHING_RUNS = (
    "prim::device",
    "profiler::",
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::as_strided_",
)


@dataclass(frozen=True)
class Kernel:
    """One operator's share of a step on a GPU.

    Args:
        kind: "forward", "dgrad", "wgrad" (of a convolution), "product", "norm", "pack", "unpack",
            "gates", "optimizer" or "elementwise".
        bytes: read and written.
        flop: floating-point operations.
        dtype: that they are computed in; of products that of their operands.
        launches: kernels.
    """

    kind: str
    bytes: int
    flop: int = 0
    dtype: torch.dtype = torch.float32
    launches: int = 1


Count = Callable[[OpOverload, tuple[Any, ...], dict[str, Any], Any], Iterable[Kernel]]


def size_of(*tensors: Any) -> int:
    """Bytes that tensors have in memory; what is expanded counts once, what is no tensor not."""
    return sum(
        t.itemsize * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)
        for t in tree_leaves(tensors)
        if isinstance(t, Tensor)
    )


def _elementwise(func, args, kwargs, out) -> Iterator[Kernel]:
    """Reads what comes in and writes what comes out, once, for an operation per number."""
    numbers = sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
    yield Kernel("elementwise", size_of(args, kwargs) + size_of(out), numbers)


def _product(func, args, kwargs, out) -> Iterator[Kernel]:
    flop = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    yield Kernel("product", size_of(args) + size_of(out), flop, out.dtype)


def _convolution(func, args, kwargs, out) -> Iterator[Kernel]:
    x, weight, bias, *_ = args
    flop = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    yield Kernel("forward", size_of(x, weight, out), flop, x.dtype)
    if bias is not None:  # cuDNN's result is read and written once more
        yield Kernel("elementwise", 2 * size_of(out) + size_of(bias), out.numel())


def _convolution_backward(func, args, kwargs, out) -> Iterator[Kernel]:
    grad, x, weight, *middle, wanted = args
    flop = partial(flop_registry[func.overloadpacket], grad, x, weight, *middle)
    if wanted[0]:
        work = flop([True, False, False], out_val=out)
        yield Kernel("dgrad", size_of(grad, weight, out[0]), work, x.dtype)
    if wanted[1]:
        work = flop([False, True, False], out_val=out)
        yield Kernel("wgrad", size_of(grad, x, out[1]), work, x.dtype)
    if wanted[2]:
        yield Kernel("elementwise", size_of(grad, out[2]), grad.numel())


def _norm(func, args, kwargs, out) -> Iterator[Kernel]:
    """Moments, what follows for each channel, the result: `packed_norm` counts the same."""
    x = args[0]
    yield Kernel("norm", 3 * size_of(x), 8 * x.numel(), launches=3)


def _norm_backward(func, args, kwargs, out) -> Iterator[Kernel]:
    x = args[1]
    yield Kernel("norm", 5 * size_of(x), 17 * x.numel(), launches=3)


def _sgd(func, args, kwargs, out) -> Iterator[Kernel]:
    """Weights and momentum are read and written, gradients read."""
    weights, grads, momenta, *_ = args
    numbers = sum(t.numel() for t in weights)
    chunks = sum(-(-t.numel() // CHUNK) for t in weights)
    launches = max(-(-len(weights) // MOST_TENSORS), -(-chunks // MOST_CHUNKS))
    moved = 2 * size_of(weights, momenta) + size_of(grads)
    yield Kernel("optimizer", moved, 6 * numbers, launches=launches)


def _pack(func, args, kwargs, out) -> Iterator[Kernel]:
    """Open rows are read whole, what is packed is written."""
    weights = args[0]
    read = sum(
        size_of(weight) * packed.shape[0] // weight.shape[0]
        for weight, packed in zip(weights, out, strict=True)
    )
    numbers = sum(t.numel() for t in out)
    launches = -(-len(weights) // MOST_WEIGHTS)
    yield Kernel("pack", read + size_of(out), numbers, launches=launches)


def _unpack(func, args, kwargs, out) -> Iterator[Kernel]:
    """The packed gradient and open rows are read, the full gradient is written."""
    grads, weights = args[:2]
    read = sum(
        size_of(weight) * grad.shape[0] // weight.shape[0]
        for grad, weight in zip(grads, weights, strict=True)
    )
    numbers = sum(t.numel() for t in grads)
    launches = 2 * -(-len(weights) // MOST_WEIGHTS)
    yield Kernel(
        "unpack", read + size_of(grads) + size_of(out[:-1]), 3 * numbers, launches=launches
    )


def _draw(func, args, kwargs, out) -> Iterator[Kernel]:
    gates, features = args[0].numel(), out[2].numel()
    launches = 1 + (max(gates, features) > MANY_GATES)
    moved = 12 * gates + 36 * features
    yield Kernel("gates", moved, 200 * gates, torch.float64, launches)


def _draw_backward(func, args, kwargs, out) -> Iterator[Kernel]:
    gates = args[0].numel()
    yield Kernel("gates", 16 * gates, 200 * gates, torch.float64)


# Bytes and operations of ours are those of the docstrings in l0kernels/ops/*/op.py.
COUNTS: dict[str, Count] = {
    "aten::mm": _product,
    "aten::addmm": _product,
    "aten::bmm": _product,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::native_batch_norm": _norm,
    "aten::native_batch_norm_backward": _norm_backward,
    "aten::_fused_sgd_": _sgd,
    "l0kernels::packed_norm": _norm,
    "l0kernels::packed_norm_backward": _norm_backward,
    "l0kernels::pack_weights": _pack,
    "l0kernels::pack_weights_backward": _unpack,
    "l0kernels::sample_gates": _draw,
    "l0kernels::sample_gates_backward": _draw_backward,
}


class Counter(TorchDispatchMode):
    """Notes the kernels that the operators within it would be on a GPU, in `kernels`.

    Raises:
        ValueError: an operator of ours that nobody has counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name().split(".")[0]
        if not (func.is_view or name.startswith(NOTHING_RUNS)):
            if name.startswith("l0kernels::") and name not in COUNTS:
                raise ValueError(f"expected one of {', '.join(COUNTS)}, got {name}")
            self.kernels += COUNTS.get(name, _elementwise)(func, args, kwargs, out)
        return out


def kernels_of(task: Task, variant: str, keeps: Sequence[float]) -> list[list[Kernel]]:
    """What a step of a variant launches on a GPU, gates drawn, optimizer included.

    The step is that of the step benchmark, run on tensors without memory, so no size is assumed:
    it is what the modules dispatch. Rebuilt variants have the widths keep x full, rounded.

    Args:
        task: the network; its device is the CPU.
        variant: one of `arms.VARIANTS`.
        keeps: open fractions.

    Returns:
        For each open fraction the kernels of a step.
    """
    small, mode = replace(task, batch=SMALL_BATCH), FakeTensorMode(allow_non_fake_inputs=True)
    if variant in ("oracle", "oracle-rounded"):
        built = [ungated_arm(small, task.network.build(keep)) for keep in keeps]
        return [_traced(arm, task, variant, mode) for arm in built]
    arm = make_arm(small, variant)
    if variant == "ours":
        _as_on_a_gpu(arm)
    found = []
    for keep in keeps:
        arm.set_open(keep)
        found.append(_traced(arm, task, variant, mode))
    return found


def _as_on_a_gpu(arm: Arm) -> None:
    """All weights are packed in one call, at multiples of 16, and no group runs dense."""
    gates = gates_of(arm.net)
    assert gates.dense is not None
    gates._together, gates._multiple = True, GPU_MULTIPLE
    gates.dense.ports.clear()


def _traced(arm: Arm, task: Task, variant: str, mode: FakeTensorMode) -> list[Kernel]:
    counter = Counter()
    with ExitStack() as stack:
        if variant == "ours":
            with counter:  # the host reads the widths of a draw: it cannot be without memory
                stack.enter_context(l0.hold(arm.net))
        stack.enter_context(mode)
        x = torch.empty(task.batch, *task.network.input_shape)
        arm.x = x if variant == "masked-nchw" else best_layout(nn.Identity(), x)[1]
        arm.y = torch.empty(task.batch, dtype=torch.int64)
        with counter:
            arm.step()
    return counter.kernels
