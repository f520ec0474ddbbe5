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
from l0kernels.convert.probe import NoDropout, is_passage
from l0kernels.convert.tensors import Inputs, call, named_tensors, to_double
from l0kernels.gates.base import Gates

TOLERANCE = 1e-9
STEPS = 8

# Gradients larger than this are compared by their weighted sums over rows and over columns.
MOST_ELEMENTS = 1 << 14


def run_once(model: nn.Module, inputs: Inputs, values: Tensor, impl: str) -> dict[str, Tensor]:
    """Forward and backward with given gates; buffers are put back afterwards.

    Gradients of large parameters are reduced to weighted sums as soon as they are there, so that
    two of them are never in memory at once.

    Args:
        model: a converted model in fp64.
        inputs: arguments of its forward.
        values: gate values, shape [gates].
        impl: ``"reference"`` (masked) or ``"auto"`` (packed).

    Returns:
        Outputs, gradients of inputs, parameters and open gates, and buffers, by name.
    """
    gates: Gates = model.l0  # pyright: ignore[reportAssignmentType]
    before = {n: b.clone() for n, b in model.named_buffers()}
    inputs = tree_map_only(
        Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), to_double(inputs)
    )
    z = values.clone().requires_grad_()
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]), NoDropout(), use_impl(impl), gates.using(z):
        torch.manual_seed(0)  # other randomness is the same in both runs
        outputs = dict(named_tensors(call(model, inputs)))
        with _collecting(model, found):
            _weigh(list(outputs.values())).backward()
    found |= {name: t.detach() for name, t in outputs.items()}
    for i, t in enumerate(tree_leaves(inputs)):
        if isinstance(t, Tensor) and t.grad is not None:
            found[f"gradient of input {i}"] = t.grad
    if z.grad is not None:
        found["gradient of gates"] = torch.where(values != 0, z.grad, 0.0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            found[f"buffer {name}"] = buffer.clone()
            buffer.copy_(before[name])
    return found


@contextmanager
def _collecting(model: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Take every parameter's gradient away as it comes."""

    def collect(name: str, parameter: Tensor) -> None:
        key, grad = f"gradient of {name}", parameter.grad
        assert grad is not None
        parameter.grad = None
        digest = _digest(grad)
        # Reentrant checkpointing can bring a gradient in parts; sums of digests are digests.
        found[key] = found[key] + digest if key in found else digest

    handles = [
        p.register_post_accumulate_grad_hook(lambda t, name=name: collect(name, t))
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("l0.")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _digest(t: Tensor) -> Tensor:
    if t.numel() <= MOST_ELEMENTS or t.dim() < 2:
        return t
    matrix = t.reshape(t.shape[0], -1)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.rand(n, generator=generator, dtype=t.dtype).add_(0.5).to(t.device)
        for n in matrix.shape
    )
    return torch.cat((matrix @ columns, rows @ matrix))


def _weigh(outputs: list[Tensor]) -> Tensor:
    """A scalar that depends on every element of the outputs differently."""
    generator = torch.Generator().manual_seed(0)
    floating = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    if not floating:
        raise ValueError("expected an output that depends on the parameters, got none")
    return torch.stack(
        [
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)).sum()
            for t in floating
        ]
    ).sum()


def _run_masked(model: nn.Module, inputs: Inputs, values: Tensor) -> dict[str, Tensor]:
    try:
        return run_once(model, inputs, values, "reference")
    except (RuntimeError, ValueError) as error:
        mode = "training" if model.training else "eval"
        raise ValueError(
            f"example_inputs: the model's {mode} forward and backward fail with them: {error}"
        ) from error


def worst_difference(
    masked: dict[str, Tensor], packed: dict[str, Tensor], largest: float = 0.0
) -> tuple[float, str]:
    """Largest error relative to its tensor, and where.

    Gradients share a floor of 1e-3 of the largest of them or of ``largest``, because some are zero
    but for rounding.
    """
    largest = max(largest, largest_gradient(masked))
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


def largest_gradient(found: dict[str, Tensor]) -> float:
    """Largest element of all gradients of a run."""
    return max((_size(t) for n, t in found.items() if n.startswith("gradient")), default=0.0)


def _size(t: Tensor) -> float:
    if t.numel() == 0:
        return 0.0
    return float(t.detach().abs().max())


def forced_draws(gates: Gates) -> list[Tensor]:
    """Gate values in fp64: half of every group, the other half, a tenth, and none open.

    Of the first two, one closes any given unit: a wrong map cannot hide behind an open one. Every
    group is partly open in both, so that its readers read something, and less than everything.
    """
    generator = torch.Generator().manual_seed(0)
    values = 0.1 + 0.9 * torch.rand(gates.count, generator=generator, dtype=torch.float64)
    orders = [torch.randperm(size, generator=generator) for size in gates.sizes]
    half = torch.cat([order < max(1, len(order) // 2) for order in orders])
    tenth = torch.cat([order < max(1, len(order) // 10) for order in orders])
    none = torch.zeros_like(half)
    device = gates.log_alpha.device
    return [torch.where(chosen, values, 0.0).to(device) for chosen in (half, ~half, tenth, none)]


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move parameters and running statistics away from special values (0, 1, symmetric).

    Layers that only pass channels on become lively: a negative filter or bias between two ReLUs
    would hide what depends on what, and structure does not depend on values.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if is_passage(module):
            _enliven(module, generator)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        spread = float(parameter.std()) if parameter.numel() > 1 else float(parameter.abs().mean())
        parameter.add_(noise.to(parameter.device) * (0.1 * spread if spread > 0 else 1e-3))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
            buffer.add_(noise.to(buffer.device) * 1e-3)


def _enliven(module: nn.Module, generator: torch.Generator) -> None:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    mean = module._buffers.get("running_mean")
    if weight is not None:
        taps = weight[0].numel() if weight.dim() > 1 else 1
        weight.copy_(torch.rand(weight.shape, generator=generator).add_(0.5) / taps)
    for offset in (bias, mean):
        if offset is not None:
            offset.zero_()


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
    model: nn.Module, inputs: Inputs, tick: Callable[[], Any] = lambda: None
) -> tuple[float, str]:
    """Compare packed with masked, in training and eval mode, for forced draws.

    Args:
        model: a converted fp64 model, perturbed.
        inputs: arguments of its forward.
        tick: called after each of ``STEPS`` comparisons.

    Returns:
        Worst relative error and the place it was found. It stops at the first that is too large.
    """
    gates: Gates = model.l0  # pyright: ignore[reportAssignmentType]
    worst, where = 0.0, ""
    for training in (True, False):
        with _training(model, training):
            # The size of gradients that matter: with few units open all may be mere rounding.
            everything = torch.ones_like(forced_draws(gates)[0])
            largest = largest_gradient(_run_masked(model, inputs, everything))
            for values in forced_draws(gates):
                masked = _run_masked(model, inputs, values)
                try:
                    packed = run_once(model, inputs, values, "auto")
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    return float("inf"), f"the packed forward fails: {_first_line(error)}"
                error, place = worst_difference(masked, packed, largest)
                if not error <= worst:
                    worst, where = error, place
                if not worst <= TOLERANCE:
                    return worst, where
                tick()
    return worst, where


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
