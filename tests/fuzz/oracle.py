# SPDX-License-Identifier: Apache-2.0
"""The masked network, made of a plain copy and hooks only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

TOLERANCE = 1e-9
# Size of the noise that stands for rounding when a difference is judged.
ROUNDING = 1e-15
Scope = Callable[[Tensor], AbstractContextManager[None]]


@dataclass
class Masks:
    """Where gates multiply and what they close, read off a converted network.

    Args:
        read: layer -> maps of the gates that multiply its input features.
        made: layer -> map of the gates that close its output features.
    """

    read: dict[str, tuple[Tensor, ...]]
    made: dict[str, tuple[Tensor, ...]]

    @staticmethod
    def of(packed: nn.Module) -> Masks:
        """The masks of a converted network."""
        named = [(n, m) for n, m in packed.named_modules() if hasattr(m, "in_gate")]
        sides = [{}, {}]
        for found, side in zip(sides, ("in_gate", "out_gate"), strict=True):
            for name, module in named:
                ref = getattr(module, side)
                if ref is not None:
                    found[name] = tuple(m.clone() for m in ref.maps)
        return Masks(*sides)


def scale(maps: tuple[Tensor, ...], z: Tensor) -> Tensor:
    """Product of the gates of every feature; an index past the last gate stands for none."""
    values = torch.cat((z, z.new_ones(1)))
    result = values[maps[0]]
    for extra in maps[1:]:
        result = result * values[extra]
    return result


def feature_dim(module: nn.Module) -> int:
    """Dimension of the features that a layer reads."""
    return -1 if isinstance(module, nn.Linear) else -len(module.kernel_size) - 1  # pyright: ignore


@contextmanager
def masked(plain: nn.Module, masks: Masks, z: Tensor) -> Iterator[None]:
    """In the scope a plain network is the masked one; statistics of closed units stay."""
    modules = dict(plain.named_modules())
    norms = [(modules[n], maps) for n, maps in masks.made.items() if _has_statistics(modules[n])]
    before = [(m.running_mean.clone(), m.running_var.clone()) for m, _ in norms]
    handles = [
        modules[name].register_forward_pre_hook(_multiply(scale(maps, z)), with_kwargs=True)
        for name, maps in masks.read.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (norm, maps), (mean, var) in zip(norms, before, strict=True):
            closed = scale(maps, z.detach()) == 0
            norm.running_mean[closed] = mean[closed]
            norm.running_var[closed] = var[closed]


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


def _multiply(values: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        dim = feature_dim(module)
        aligned = values.view([-1] + [1] * (-1 - dim))
        if args:
            return (args[0] * aligned, *args[1:]), kwargs
        return args, kwargs | {"input": kwargs["input"] * aligned}

    return hook


@contextmanager
def rounding(plain: nn.Module, seed: int) -> Iterator[None]:
    """In the scope every layer errs as if it rounded otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def err(module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        noise = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        return out + noise * (ROUNDING * float(out.detach().abs().mean()))

    leaves = [m for m in plain.modules() if not list(m.children())]
    handles = [m.register_forward_hook(err) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(
    net: nn.Module, scope: Scope, inputs: tuple[Tensor, ...], z: Tensor
) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one forward and backward in a scope; buffers are put back.

    Args:
        net: the masked or the packed network.
        scope: makes it use the gates it is given.
        inputs: of its forward.
        z: gate values, shape [gates].
    """
    before = {n: b.clone() for n, b in net.named_buffers()}
    net.zero_grad(set_to_none=True)
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    z = z.clone().requires_grad_()
    try:
        with scope(z):
            outputs = tree_leaves(net(*inputs))
            weighed(outputs).backward()
        found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        found |= {f"grad input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
        if z.grad is not None:
            found["grad gates"] = torch.where(z.detach() != 0, z.grad, 0.0)
        for name, p in net.named_parameters():
            if p.grad is not None and not name.startswith("l0."):
                found[f"grad {name}"] = p.grad
        for name, b in net.named_buffers():
            if not name.startswith("l0."):
                found[f"buffer {name}"] = b.double().clone()
    finally:
        with torch.no_grad():
            for name, b in net.named_buffers():
                b.copy_(before[name])
    return found


def is_finite(found: dict[str, Tensor]) -> bool:
    """Whether there is no NaN or infinity among these."""
    return all(bool(t.isfinite().all()) for t in found.values())


def weighed(outputs: list[Tensor]) -> Tensor:
    """A scalar that depends on every element of the outputs in another way."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for t in outputs:
        total = total + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
    return total


def difference(exact: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error relative to its tensor, and where.

    Gradients share a floor of 1e-3 of the largest (at least 1e-3, the inputs, weights and
    parameters being near 1): some vanish but for rounding.
    """
    if set(exact) != set(got):
        return float("inf"), f"only in one of the two: {sorted(set(exact) ^ set(got))}"
    largest = max((_size(t) for n, t in exact.items() if n.startswith("grad")), default=0.0)
    worst, where = 0.0, ""
    for name, expected in exact.items():
        if expected.shape != got[name].shape:
            return float("inf"), f"{name}: {tuple(got[name].shape)} for {tuple(expected.shape)}"
        floor = 1e-3 * max(largest, 1.0) if name.startswith("grad") else 1e-6
        error = _size(got[name].double() - expected) / max(_size(expected), floor)
        if not math.isfinite(error):
            return float("inf"), name
        if error > worst:
            worst, where = error, name
    return worst, where


def _size(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0
