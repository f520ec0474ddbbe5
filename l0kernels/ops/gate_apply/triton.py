# SPDX-License-Identifier: Apache-2.0
# What Triton compiles is not Python: arguments are wrapped, launches have a grid.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportPrivateImportUsage=false
"""The Triton kernels of `gate_apply` and its backward pass.

Activations are dense, and seen as groups of features, each of which has the same number of values
in a group. Features side by side: an example is a group, its rows are the values. Else every
stretch of planes, one of each feature, is a group, the numbers of a plane are the values. A program
works on a tile of features and a part of their values.

Nobody waits for the kernels, so they cannot raise: gates out of bounds count as closed, and nothing
is read there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0kernels import _triton

ROWS = (16, 64)  # values and features of a step of a program where features lie side by side
PLANES = (256, 4)  # and where values do
MAX_PARTS = 64  # of the values of a group: sums that the second launch adds
GATES = 64  # of a program that adds up their gradients
SCANNED = 1024  # features that it looks through at once
ADDED = 64  # features that it adds at once


@triton.jit
def _gates(z, last, maps, stride, feature, inside):
    """The two gates of features and their values, 0 where unknown; `z` are an example's."""
    a = tl.load(maps + feature, mask=inside, other=-1)
    b = tl.load(maps + stride + feature, mask=inside, other=-1)
    known = inside & (a >= 0) & (a <= last) & (b >= 0) & (b <= last)
    return a, b, tl.load(z + a, mask=known, other=0.0), tl.load(z + b, mask=known, other=0.0)


@triton.jit(do_not_specialize=["groups_per_row", "steps"])
def _scale(
    numbers,
    grads,
    results,
    sums,
    z,
    last,
    maps,
    stride,
    features,
    values,
    feature_step,
    value_step,
    groups_per_row,
    parts,
    steps,
    VALUES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Scales numbers or, where there are any, gradients, whose products with numbers it sums."""
    across = tl.cdiv(features, FEATURES)
    program = tl.program_id(0).to(tl.int64)
    task = program // across
    group = task // parts
    feature = (program % across) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < features
    own = z + group // groups_per_row * (last + 1)
    _, _, z_a, z_b = _gates(own, last, maps, stride, feature, inside)
    scale = z_a * z_b
    start = group * features * values
    total = tl.zeros([FEATURES], tl.float64)
    for step in range(steps):
        value = (task % parts * steps + step) * VALUES + tl.arange(0, VALUES)
        place = start + value[:, None] * value_step + feature[None, :] * feature_step
        there = (value < values)[:, None] & inside[None, :]
        number = tl.load(numbers + place, mask=there, other=0.0).to(scale.dtype)
        if grads is not None:
            grad = tl.load(grads + place, mask=there, other=0.0).to(scale.dtype)
            total += tl.sum(grad.to(tl.float64) * number.to(tl.float64), 0)
            number = grad
        if results is not None:
            result = tl.where((scale != 0)[None, :], number * scale[None, :], 0.0)
            tl.store(results + place, result.to(results.dtype.element_ty), mask=there)
    if grads is not None:
        tl.store(sums + task * features + feature, total, mask=inside)


@triton.jit
def _add_features(
    total,
    gate,
    z,
    last,
    maps,
    stride,
    sums,
    parts,
    features,
    first,
    end,
    FEATURES: tl.constexpr,
):
    """Adds the gradients of gates from features first up to end."""
    for start in range(first, end, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        inside = feature < end
        a, b, z_a, z_b = _gates(z, last, maps, stride, feature, inside)
        product = tl.zeros([FEATURES], tl.float64)
        for part in range(parts):
            product += tl.load(sums + part * features + feature, mask=inside, other=0.0)
        is_open = z_a * z_b != 0
        for_a = tl.where(is_open, product * z_b.to(tl.float64), 0.0)
        for_b = tl.where(is_open, product * z_a.to(tl.float64), 0.0)
        total += tl.sum(tl.where(gate[:, None] == a[None, :], for_a[None, :], 0.0), 1)
        total += tl.sum(tl.where(gate[:, None] == b[None, :], for_b[None, :], 0.0), 1)
    return total


@triton.jit
def _add_gates(
    grad_z,
    sums,
    z,
    last,
    maps,
    stride,
    parts,
    features,
    GATES: tl.constexpr,
    SCANNED: tl.constexpr,
    ADDED: tl.constexpr,
):
    """Gradients of some gates of an example."""
    across = tl.cdiv(last + 1, GATES)
    program = tl.program_id(0).to(tl.int64)
    example = program // across
    first_gate = program % across * GATES
    gate = first_gate + tl.arange(0, GATES)
    own = z + example * (last + 1)
    own_sums = sums + example * parts * features
    total = tl.zeros([GATES], tl.float64)
    for start in range(0, features, SCANNED):
        feature = start + tl.arange(0, SCANNED)
        inside = feature < features
        a = tl.load(maps + feature, mask=inside, other=-1) - first_gate
        b = tl.load(maps + stride + feature, mask=inside, other=-1) - first_gate
        ours = ((a >= 0) & (a < GATES)) | ((b >= 0) & (b < GATES))
        if tl.max((inside & ours).to(tl.int32), 0) > 0:
            end = tl.minimum(start + SCANNED, features)
            total = _add_features(
                total, gate, own, last, maps, stride, own_sums, parts, features, start, end, ADDED
            )
    total = tl.where(gate == last, 0.0, total)  # the gate that is always open
    place = grad_z + example * (last + 1) + gate
    tl.store(place, total.to(grad_z.dtype.element_ty), mask=gate <= last)


class _Groups(NamedTuple):
    """Activations as the kernels see them."""

    groups: int
    examples: int
    features: int
    values: int
    feature_step: int
    value_step: int
    tile: tuple[int, int]  # values, features

    @property
    def steps(self) -> int:
        """Tiles of values in a part."""
        return _triton.cdiv(_triton.cdiv(self.values, self.tile[0]), MAX_PARTS)

    @property
    def parts(self) -> int:
        """Of the values of a group."""
        return _triton.cdiv(self.values, self.tile[0] * self.steps)


def _groups_of(dense: Tensor, z: Tensor, dim: int) -> _Groups:
    """Of what `torch.empty_like` gives, at least one number.

    Raises:
        RuntimeError: gates are per example, and examples do not lie one after the other.
    """
    examples = dense.shape[0] if z.dim() == 2 else 1
    if examples > 1 and dense.stride(0) * examples != dense.numel():
        raise RuntimeError(
            "gate_apply: expected examples one after the other, for gates per example; "
            f"got strides {list(dense.stride())}"
        )
    features, own = dense.shape[dim], dense.numel() // examples
    inner = dense.stride(dim) if features > 1 else own
    if inner == 1:
        return _Groups(examples, examples, features, own // features, 1, features, ROWS)
    groups = dense.numel() // (features * inner)
    return _Groups(groups, examples, features, inner, inner, 1, PLANES)


def _as(tensor: Tensor, dense: Tensor) -> Tensor:
    """The tensor in the strides of another one."""
    same = tensor.stride() == dense.stride()
    return tensor if same else torch.empty_like(dense).copy_(tensor)


def _launch_scale(
    shape: _Groups,
    x: Tensor,
    grad: Tensor | None,
    result: Tensor | None,
    sums: Tensor | None,
    z: Tensor,
    maps: Tensor,
) -> None:
    values, features = shape.tile
    programs = shape.groups * shape.parts * _triton.cdiv(shape.features, features)
    with _triton.on_device_of(x):
        _scale[(programs,)](
            x,
            grad,
            result,
            sums,
            z,
            z.shape[-1] - 1,
            maps,
            maps.stride(0),
            shape.features,
            shape.values,
            shape.feature_step,
            shape.value_step,
            shape.groups // shape.examples,
            shape.parts,
            shape.steps,
            VALUES=values,
            FEATURES=features,
            num_warps=4,
            **_triton.at_most_registers(255),
        )


def gate_apply(x: Tensor, z: Tensor, gate_map: Tensor, dim: int) -> Tensor:
    """The raw operator `gate_apply`."""
    y = torch.empty_like(x)
    if x.numel() > 0:
        shape = _groups_of(y, z, dim)
        _launch_scale(shape, _as(x, y), None, y, None, z.contiguous(), gate_map.contiguous())
    return y


def gate_apply_backward(
    grad: Tensor, x: Tensor, z: Tensor, gate_map: Tensor, dim: int, need_x: bool
) -> tuple[Tensor, Tensor]:
    """The raw operator `gate_apply_backward`."""
    like = torch.empty_like(x)
    grad_x = like if need_x else x.new_empty(0)
    grad_z = z.new_empty(z.shape)
    if x.numel() == 0:
        return grad_x, grad_z.zero_()
    shape = _groups_of(like, z, dim)
    dense, maps = z.contiguous(), gate_map.contiguous()
    parts = shape.groups // shape.examples * shape.parts
    sums = z.new_empty(shape.examples * parts * shape.features, dtype=torch.float64)
    result = grad_x if need_x else None
    _launch_scale(shape, _as(x, like), _as(grad, like), result, sums, dense, maps)
    with _triton.on_device_of(x):
        _add_gates[(shape.examples * _triton.cdiv(z.shape[-1], GATES),)](
            grad_z,
            sums,
            dense,
            z.shape[-1] - 1,
            maps,
            maps.stride(0),
            parts,
            shape.features,
            GATES=GATES,
            SCANNED=SCANNED,
            ADDED=ADDED,
            num_warps=4,
        )
    return grad_x, grad_z
