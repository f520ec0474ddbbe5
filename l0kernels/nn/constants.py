# SPDX-License-Identifier: Apache-2.0
"""Gates before a norm: what closed channels pass on.

With ``place="before_norm"`` a gate multiplies what a layer makes, and batch normalisation follows,
y = act(norm(z * (W x + b))), as in the wide residual networks of L0-HC and L0-ARM. The producer
packs its open rows times z. A closed channel is zero before the norm, so behind it it is one number
for all examples and pixels,

    beta                                        normalised by the batch (mean 0, variance 0),
    beta - gamma mean / sqrt(var + eps)         normalised by the running statistics,

and the layers that read it get a share that depends on no example: computed once instead of for
every example, it is added to their output. What lies between norm and reader is the model's own
code, of which the layers know nothing. So the norm appends the constants as further examples: the
closed channels as planes, as many to an example as there are packed channels. They pass through
the same code as everything else, and autograd differentiates it for them too. The reader takes the
planes off, makes them one example of all closed channels, applies the columns that it has for them,
and adds the result: paddings are exact at the border, since they act on a whole plane.

It is exact for anything that treats single channels of single examples alike: elementwise
functions, pooling, padding, flattening; ``convert`` checks that. A group carries its units alone
and in order, and has one producer, one norm and nothing else with parameters per channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._registry import once_differentiable
from l0kernels.ops.packed_norm.reference import layout_of

if TYPE_CHECKING:
    from l0kernels.gates.base import Gates
    from l0kernels.gates.ref import GateRef


def left_out(index: Tensor, features: int) -> Tensor:
    """The features that are not packed, ascending, int64 of shape [features - packed].

    Args:
        index: packed features, int64, distinct.
        features: number of all features.
    """
    packed = torch.zeros(features, dtype=torch.uint8, device=index.device)
    order = torch.argsort(packed.index_fill_(0, index, 1), stable=True)
    return order[: features - index.shape[0]]


def append(y: Tensor, values: Tensor) -> Tensor:
    """Append constant channels as further examples, filled up with zeros.

    Args:
        y: [N, C, ...], packed channels.
        values: [K], the constants of the others.

    Returns:
        [N + ceil(K / C) + 1, C, ...], in the layout of y.
    """
    width = y.shape[1]
    examples = further_examples(values.shape[0], width)
    rows = F.pad(values.to(y.dtype), (0, examples * width - values.shape[0])).view(examples, width)
    planes = rows.view(examples, width, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:])
    # cat takes the layout of its arguments if they agree.
    return torch.cat((y, planes.contiguous(memory_format=layout_of(y))))


def further_examples(constants: int, width: int) -> int:
    """How many examples of ``width`` channels are appended for so many constants.

    One more than are filled: never 1, for which a compiled graph would be another one.
    """
    return -(-constants // width) + 1


def take_off(x: Tensor, dim: int, constants: int) -> tuple[Tensor, Tensor]:
    """Undo ``append`` behind what came after it.

    Args:
        x: examples first, features in ``dim``.
        dim: negative.
        constants: number of features that were not packed.

    Returns:
        The examples, and one example of all features that were not packed.
    """
    width = x.shape[dim]
    x, planes = TakeOff.apply(x, x.shape[0] - further_examples(constants, width))
    planes = planes.movedim(dim, 1)
    planes = planes.reshape(1, -1, *planes.shape[2:])[:, :constants]
    return x, planes.movedim(1, dim)


class TakeOff(torch.autograd.Function):
    """The first n examples and the others; their gradients come in one tensor in x's layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        ctx.layout = layout_of(x)
        return x.narrow(0, 0, n), x.narrow(0, n, x.shape[0] - n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        examples, planes = (g.contiguous(memory_format=ctx.layout) for g in grads)
        return torch.cat((examples, planes)), None


def add_shared(y: Tensor, shared: Tensor) -> Tensor:
    """y + shared, where y is not needed any more.

    Args:
        y: [N, ...], fresh from a layer.
        shared: [1, ...], what all examples get.
    """
    if torch.compiler.is_compiling() or y._is_view() or y.dtype != shared.dtype:
        return y + shared
    return AddShared.apply(y, shared)


class AddShared(torch.autograd.Function):
    """In place; the gradient of what is shared is summed in the order of memory.

    PyTorch's sum over examples takes ten times as long where channels lie side by side.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, shared: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y.add_(shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        turned = layout_of(grad) != torch.contiguous_format
        rows = grad.movedim(1, -1) if turned else grad
        total = rows.flatten(1).sum(0).view(1, *rows.shape[1:])
        return grad, total.movedim(-1, 1) if turned else total


def check_places(gates: Gates, layers: Iterable[Any]) -> None:
    """Check how layers use gates before a norm.

    Raises:
        ValueError: a group has its place before a norm in some references only, has not exactly
            one producer and one norm there, or is not alone and in order in a reference; or each
            example has gates of its own.
    """
    refs = [
        (layer, side, ref)
        for layer in layers
        for side in ("in_gate", "out_gate")
        if (ref := getattr(layer, side)) is not None
    ]
    for name, where in gates.slices():
        mine = [use for use in refs if _meets(use[2], where)]
        before = [use for use in mine if use[2].is_before_norm]
        if not before:
            continue
        if gates.scope == "example":
            raise ValueError(
                f"group {name!r}: expected scope='batch' with gates before a norm, got 'example'"
            )
        if len(before) < len(mine):
            raise ValueError(
                f"group {name!r}: expected its gates before the norm in every reference, got "
                f"{len(mine) - len(before)} of {len(mine)} without before_norm()"
            )
        _check_group(name, where, before)


def _meets(ref: GateRef, where: slice) -> bool:
    return any(bool(((m >= where.start) & (m < where.stop)).any()) for m in ref.maps)


def _check_group(name: str, where: slice, uses: list[tuple[Any, str, GateRef]]) -> None:
    units = torch.arange(where.start, where.stop)
    for layer, side, ref in uses:
        repeat = ref.features // units.numel() if side == "in_gate" else 1
        if not torch.equal(ref.maps[0], units.repeat_interleave(repeat)):
            raise ValueError(
                f"group {name!r}: expected its {units.numel()} units alone and in order before a "
                f"norm, got others in {side} of {type(layer).__name__}"
            )
    made = [layer for layer, side, _ in uses if side == "out_gate"]
    norms = [m for m in made if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if len(norms) != 1 or len(made) != 2:
        raise ValueError(
            f"group {name!r}: expected one producer and one BatchNorm with gates before a norm, "
            f"got {[type(m).__name__ for m in made]}"
        )
