# SPDX-License-Identifier: Apache-2.0
"""Self-check of a conversion: packed against masked in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from l0kernels._config import use_impl
from l0kernels.convert.probe import NoDropout, to_double
from l0kernels.gates.base import Gates

TOLERANCE = 1e-9
STEPS = 8


def run_once(
    model: nn.Module, inputs: tuple[Any, ...], values: Tensor, impl: str
) -> dict[str, Tensor]:
    """Forward and backward with given gates; buffers are put back afterwards.

    Args:
        model: a converted model in fp64.
        inputs: positional arguments of its forward.
        values: gate values, shape [gates].
        impl: ``"reference"`` (masked) or ``"auto"`` (packed).

    Returns:
        Outputs, gradients of inputs, parameters and open gates, and buffers, by name.
    """
    gates: Gates = model.l0  # pyright: ignore[reportAssignmentType]
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    inputs = tree_map_only(
        Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), to_double(inputs)
    )
    z = values.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]), NoDropout(), use_impl(impl), gates.using(z):
        torch.manual_seed(0)  # other randomness is the same in both runs
        outputs = [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    _weigh(outputs).backward()
    for i, t in enumerate(tree_leaves(inputs)):
        if isinstance(t, Tensor) and t.grad is not None:
            found[f"gradient of input {i}"] = t.grad
    for name, parameter in model.named_parameters():
        if not name.startswith("l0.") and parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    if z.grad is not None:
        found["gradient of gates"] = torch.where(values != 0, z.grad, 0.0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            found[f"buffer {name}"] = buffer.clone()
            buffer.copy_(before[name])
    return found


def _weigh(outputs: list[Tensor]) -> Tensor:
    """A scalar that depends on every element of the outputs differently."""
    generator = torch.Generator().manual_seed(0)
    floating = [t for t in outputs if t.is_floating_point()]
    return torch.stack(
        [(t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in floating]
    ).sum()


def _run_masked(model: nn.Module, inputs: tuple[Any, ...], values: Tensor) -> dict[str, Tensor]:
    try:
        return run_once(model, inputs, values, "reference")
    except (RuntimeError, ValueError) as error:
        mode = "training" if model.training else "eval"
        raise ValueError(
            f"example_inputs: the model's {mode} forward and backward fail with them: {error}"
        ) from error


def worst_difference(masked: dict[str, Tensor], packed: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error relative to its tensor, and where; gradients share a floor of 1e-3 of the
    largest, because some are zero but for rounding.
    """
    largest = max((_size(t) for n, t in masked.items() if n.startswith("gradient")), default=0.0)
    worst, where = 0.0, ""
    if set(masked) != set(packed):
        return float("inf"), ", ".join(sorted(set(masked) ^ set(packed)))
    for name, expected in masked.items():
        got = packed[name]
        if expected.shape != got.shape:
            return float("inf"), f"{name}: {tuple(got.shape)} for {tuple(expected.shape)}"
        floor = 1e-3 * largest if name.startswith("gradient") else 1e-12
        error = _size(got - expected) / max(_size(expected), floor, 1e-300)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _size(t: Tensor) -> float:
    if t.numel() == 0:
        return 0.0
    return float(t.detach().abs().max())


def forced_draws(gates: Gates) -> list[Tensor]:
    """Gate values in fp64: a random half, its complement, a tenth, and none open.

    Of the first two, one closes any given unit: a wrong map cannot hide behind an open one.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(3, gates.count, generator=generator, dtype=torch.float64)
    values = 0.1 + 0.9 * u[0]
    half, tenth = u[1] < 0.5, u[2] < 0.1
    return [torch.where(chosen, values, 0.0) for chosen in (half, ~half, tenth, tenth & ~tenth)]


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move parameters and running statistics away from special values (0, 1, symmetric)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
        parameter.add_(noise * (0.1 if float(spread.nan_to_num()) == 0 else 0.1 * spread))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
            buffer.add_(noise * 0.3)


@contextmanager
def _training(model: nn.Module, mode: bool) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def check(
    model: nn.Module, inputs: tuple[Any, ...], tick: Callable[[], None] = lambda: None
) -> tuple[float, str]:
    """Compare packed with masked, in training and eval mode, for forced draws.

    Args:
        model: a converted fp64 model; its parameters are perturbed.
        inputs: example inputs.
        tick: called after each of ``STEPS`` comparisons.

    Returns:
        Worst relative error and the place it was found.
    """
    gates: Gates = model.l0  # pyright: ignore[reportAssignmentType]
    perturb(model)
    worst, where = 0.0, ""
    for training in (True, False):
        for values in forced_draws(gates):
            with _training(model, training):
                masked = _run_masked(model, inputs, values)
                try:
                    packed = run_once(model, inputs, values, "auto")
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    return float("inf"), f"the packed forward fails: {_first_line(error)}"
            error, place = worst_difference(masked, packed)
            if not error <= worst:
                worst, where = error, place
            tick()
    return worst, where


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
