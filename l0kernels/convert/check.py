# SPDX-License-Identifier: Apache-2.0
"""Self-check of a conversion: packed against masked in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from l0kernels._config import use_impl
from l0kernels.convert.probe import NoDropout, is_layer, is_passage
from l0kernels.convert.randomness import same_randomness
from l0kernels.convert.tensors import (
    InDouble,
    Inputs,
    KeptBuffers,
    call,
    named_tensors,
    own_copy,
    to_double,
)
from l0kernels.gates.base import Gates
from l0kernels.nn import GatedLayer

TOLERANCE = 1e-9
STEPS = 14

# Gradients larger than this are compared by their weighted sums over rows and over columns.
MOST_ELEMENTS = 1 << 14
# Weights larger than this have their gradient checked only in gated layers; what comes before and
# after them tells the rest.
MOST_UNGATED = 1 << 18


def run_once(
    model: nn.Module, inputs: Inputs, values: Tensor, impl: str, gradients: bool = True
) -> dict[str, Tensor]:
    """Forward and backward with given gates; buffers are put back afterwards.

    Gradients of large parameters are reduced to weighted sums as soon as they are there, so that
    two of them are never in memory at once.

    Args:
        model: a converted model in fp64.
        inputs: arguments of its forward.
        values: gate values, shape [gates].
        impl: ``"reference"`` (masked) or ``"auto"`` (packed).
        gradients: whether to run the backward too.

    Returns:
        Outputs, gradients of inputs, parameters and open gates, and buffers, by name.
    """
    before = KeptBuffers(model)
    inputs = tree_map_only(
        Tensor,
        lambda t: t.requires_grad_(gradients and t.is_floating_point()),
        own_copy(to_double(inputs)),
    )
    z = values.clone().requires_grad_(gradients)
    gates: Gates = model.l0  # pyright: ignore[reportAssignmentType]
    found: dict[str, Tensor] = {}
    devices = {p.device for p in model.parameters()}
    try:
        with same_randomness(devices), NoDropout(), InDouble(), use_impl(impl), gates.using(z):
            with torch.set_grad_enabled(gradients):
                # Clones: the forward may change its inputs in place.
                outputs = dict(
                    named_tensors(call(model, tree_map_only(Tensor, torch.clone, inputs)))
                )
            if gradients:
                with _collecting(model, found):
                    _backward(list(outputs.values()), model.training)
        found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    finally:
        before.restore()
    found |= {name: t.detach() for name, t in outputs.items()}
    for i, t in enumerate(tree_leaves(inputs)):
        if isinstance(t, Tensor) and t.grad is not None:
            found[f"gradient of input {i}"] = t.grad
    if z.grad is not None:
        found["gradient of gates"] = torch.where(values != 0, z.grad, 0.0)
    return found


@contextmanager
def _collecting(model: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Take every parameter's gradient away as it comes."""

    def collect(name: str, parameter: Tensor) -> None:
        key, grad = f"gradient of {name}", parameter.grad
        if grad is None:  # packed with the others, but its layer was left out
            return
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


@contextmanager
def _without_large_ungated(model: nn.Module) -> Iterator[None]:
    """Leave out gradients that cost most and tell least."""
    gated = {p for m in model.modules() if isinstance(m, GatedLayer) for p in m.parameters()}
    large = [
        p
        for p in model.parameters()
        if p.requires_grad and p.numel() > MOST_UNGATED and p not in gated
    ]
    for parameter in large:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in large:
            parameter.requires_grad_(True)


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


def _backward(outputs: list[Tensor], training: bool) -> None:
    """Backward of a scalar that depends on every element of the outputs differently.

    Raises:
        ValueError: no output depends on a parameter in training mode; in eval mode none need.
    """
    outputs = [torch.view_as_real(t) if t.is_complex() else t for t in outputs]
    # Where masked logits are -Inf there is nothing to learn, and 0 * Inf would spread.
    floating = [
        t if _is_finite(t.detach()) else torch.where(t.isfinite(), t, 0.0)
        for t in outputs
        if t.is_floating_point() and t.requires_grad
    ]
    if not floating:
        if training:
            raise ValueError("expected an output that depends on the parameters, got none")
        return
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for t in floating:
        weights = torch.randn(t.shape, generator=generator).to(t)
        total = total + (t * weights).sum()
    assert isinstance(total, Tensor)
    total.backward()


def _run_masked(
    model: nn.Module, inputs: Inputs, values: Tensor, gradients: bool = True
) -> dict[str, Tensor]:
    try:
        return run_once(model, inputs, values, "reference", gradients)
    except Exception as error:
        what = "forward and backward fail" if gradients else "forward fails"
        mode = "training" if model.training else "eval"
        raise ValueError(f"example_inputs: the model's {mode} {what} with them: {error}") from error


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
        error = _distance(got, expected) / max(_size(expected), floor, 1e-300)
        if error > worst:
            worst, where = error, name
    return worst, where


def largest_gradient(found: dict[str, Tensor]) -> float:
    """Largest element of all gradients of a run."""
    return max((_size(t) for n, t in found.items() if n.startswith("gradient")), default=0.0)


def _size(t: Tensor) -> float:
    """Largest finite magnitude."""
    if t.numel() == 0:
        return 0.0
    t = _real(t)
    size = _largest(t)
    return size if math.isfinite(size) else _largest(torch.where(t.isfinite(), t, 0.0))


def _is_finite(t: Tensor) -> bool:
    return t.numel() == 0 or math.isfinite(_largest(t))


def _largest(t: Tensor) -> float:
    """Largest magnitude, NaN where an element is."""
    least, most = t.aminmax()
    return max(-float(least), float(most))


def _real(t: Tensor) -> Tensor:
    """In fp64, complex numbers as pairs."""
    return (torch.view_as_real(t.detach()) if t.is_complex() else t.detach()).double()


def _distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where one of the two alone is not finite."""
    if got.numel() == 0:
        return 0.0
    got, expected = _real(got), _real(expected)
    distance = _largest(got - expected)
    if math.isfinite(distance):
        return distance
    same = (got == expected) | (got.isnan() & expected.isnan())
    apart = torch.where(same, 0.0, (got - expected).abs())
    return _largest(torch.where(apart.isnan(), torch.inf, apart))


def forced_draws(gates: Gates) -> list[Tensor]:
    """Gate values in fp64: each third of every group, a tenth, and none open.

    Every unit is closed in one of the first three draws at least: a wrong map cannot hide behind
    an open one. Not more than a third are open at once because the packed weights, which autograd
    keeps, are the largest part of what a check needs beyond the copy itself.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(size, generator=generator) for size in gates.sizes]
    thirds = [[_third(order, k) for order in orders] for k in range(3)]
    tenth = [order < max(1, len(order) // 10) for order in orders]
    none = [torch.zeros_like(order, dtype=torch.bool) for order in orders]
    return [_values(gates, chosen, generator) for chosen in (*thirds, tenth, none)]


def _third(order: Tensor, k: int) -> Tensor:
    """The k-th of three parts of a group; two units take turns, a single one closes after k = 0."""
    if len(order) == 1:
        return order == k
    return order % 3 == k % min(3, len(order))


def more_draws(gates: Gates) -> list[Tensor]:
    """More gate values: at either end of every group, and any number of units at random.

    What depends on places or counts of channels can be right for some of them by chance.
    """
    generator = torch.Generator().manual_seed(1)
    places = [torch.arange(size) for size in gates.sizes]
    ends = [
        [place > 0 for place in places],
        [place < len(place) - 1 for place in places],
        [place < len(place) // 2 for place in places],
        [place >= len(place) // 2 for place in places],
    ]
    at_random = [
        [
            torch.randperm(size, generator=generator)
            < torch.randint(1, max(2, size), (), generator=generator)
            for size in gates.sizes
        ]
        for _ in range(4)
    ]
    return [_values(gates, chosen, generator) for chosen in ends + at_random]


def _values(gates: Gates, chosen: list[Tensor], generator: torch.Generator) -> Tensor:
    values = 0.1 + 0.9 * torch.rand(gates.count, generator=generator, dtype=torch.float64)
    return torch.where(torch.cat(chosen), values, 0.0).to(gates.log_alpha.device)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Give a copy other parameters and statistics: lively ones, away from special values.

    Structure does not depend on values, but dead units, zero weights and strong negative biases
    would hide it. Weights of layers are drawn anew with their own spread, layers that only pass
    channels on let everything through, all else moves a little.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if is_passage(module) or is_layer(module):
            _enliven(module, generator)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            spread = _spread(parameter)
            if spread == 0:
                noise = noise.abs_()  # a scale or variance stays one
            parameter.add_(noise.to(parameter.device), alpha=0.1 * spread or 1e-3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None:
                    noise = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
                    buffer.add_(noise.to(buffer.device) * 1e-3)


def _spread(t: Tensor) -> float:
    return float(t.std()) if t.numel() > 1 else float(t.abs().mean())


def _enliven(module: nn.Module, generator: torch.Generator) -> None:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    mean = module._buffers.get("running_mean")
    if weight is not None and is_layer(module):
        size = _spread(weight) or weight[0].numel() ** -0.5
        weight.normal_(0, size, generator=_on(weight.device, generator))
    elif weight is not None:
        taps = weight[0].numel() if weight.dim() > 1 else 1
        weight.copy_(torch.rand(weight.shape, generator=generator).add_(0.5) / taps)
    for offset in (bias, mean):
        if offset is not None:
            offset.zero_()


def _on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator, or one on another device that continues it."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def _training(model: nn.Module, mode: bool) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _keeping_multiple(gates: Gates) -> Iterator[None]:
    before = gates._multiple
    try:
        yield
    finally:
        gates._multiple = before


def check(
    model: nn.Module, inputs: Inputs, tick: Callable[[], Any] = lambda: None
) -> tuple[float, str]:
    """Compare packed with masked for forced draws.

    In training mode with gradients; in eval mode with gradients for one draw, and without for more,
    the latter at exact widths: a group may be right only because its device packs all its units.

    Args:
        model: a converted fp64 model, perturbed.
        inputs: arguments of its forward.
        tick: called after each of ``STEPS`` comparisons.

    Returns:
        Worst relative error and the place it was found. It stops at the first that is too large.
    """
    gates: Gates = model.l0  # pyright: ignore[reportAssignmentType]
    draws = forced_draws(gates)
    worst, where = 0.0, ""
    cases = [
        (True, True, draws, gates._multiple),
        (False, True, draws[:1], gates._multiple),
        (False, False, more_draws(gates), 1),
    ]
    with _without_large_ungated(model), _keeping_multiple(gates):
        # The size of gradients that matter: with few units open all may be mere rounding.
        with _training(model, True):
            everything = _run_masked(model, inputs, torch.ones_like(draws[0]))
        largest = largest_gradient(everything)
        for training, gradients, some, multiple in cases:
            gates._multiple = multiple
            for values in some:
                with _training(model, training):
                    error, place = _compare(model, inputs, values, gradients, largest)
                if error > worst:
                    worst, where = error, place
                if worst > TOLERANCE:
                    return worst, where
                tick()
    return worst, where


def _compare(
    model: nn.Module, inputs: Inputs, values: Tensor, gradients: bool, largest: float
) -> tuple[float, str]:
    masked = _run_masked(model, inputs, values, gradients)
    try:
        packed = run_once(model, inputs, values, "auto", gradients)
    except Exception as error:  # whatever a forward raises at another width
        return float("inf"), f"the packed forward fails: {_first_line(error)}"
    return worst_difference(masked, packed, largest)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
