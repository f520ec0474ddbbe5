# SPDX-License-Identifier: Apache-2.0
"""The masked network that packed ones must equal, made with hooks on a plain copy.

It knows nothing of the package's layers: every layer that reads gated units has its input
multiplied by the gates, and norms keep the statistics of closed units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from l0kernels.convert.tensors import InDouble, named_tensors
from l0kernels.gates.ref import GateRef
from l0kernels.nn import GatedLayer
from l0kernels.training import gates_of

from .zoo import Gated, is_in_out, makes_units

# Maps the values of all gates, shape [gates], to a scale per feature of one axis of a layer.
Scale = Callable[[Tensor], Tensor]
# How far a tensor may be below the largest gradient before it counts as rounding noise.
GRADIENT_FLOOR = 1e-3


@dataclass
class Twins:
    """A packed network and its plain twin with the same weights.

    Args:
        packed: the converted network.
        plain: a copy from before conversion.
        inputs: positional arguments of both.
        reads: layer -> scales of its input features; they multiply the twin's inputs.
        makes: layer or norm -> scales of its output features; nothing is multiplied by them, but
            closed features have no gradients and leave statistics alone.
    """

    packed: nn.Module
    plain: nn.Module
    inputs: tuple[Any, ...]
    reads: dict[str, Scale] = field(default_factory=dict)
    makes: dict[str, Scale] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Twins:
        """Return copies in another dtype, inputs included."""
        packed, plain = (copy.deepcopy(net).to(dtype) for net in (self.packed, self.plain))
        return Twins(packed, plain, cast(self.inputs, dtype), self.reads, self.makes)

    def train(self, mode: bool = True) -> None:
        """Put both networks into training or eval mode."""
        self.packed.train(mode)
        self.plain.train(mode)

    def run_packed(self, z: Tensor) -> dict[str, Tensor]:
        """Return outputs, gradients and buffers of the packed network, see `collect`."""
        return collect(self.packed, partial(gates_of(self.packed).using), z, self.inputs)

    def run_masked(self, z: Tensor) -> dict[str, Tensor]:
        """Return outputs, gradients and buffers of the masked network, see `collect`."""
        return collect(self.plain, self.masking, z, self.inputs)

    @contextmanager
    def masking(self, z: Tensor) -> Iterator[None]:
        """Multiply the gates into the plain twin for the scope, and restore closed statistics."""
        with torch.no_grad():
            closed = {name: scale(z) == 0 for name, scale in self.makes.items()}
        norms = {
            name: self.plain.get_submodule(name)
            for name in self.makes
            if getattr(self.plain.get_submodule(name), "running_mean", None) is not None
        }
        before = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
        handles = [
            self.plain.get_submodule(name).register_forward_pre_hook(partial(multiply, scale(z)))
            for name, scale in self.reads.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for name, norm in norms.items():
                for key in ("running_mean", "running_var"):
                    norm.get_buffer(key)[closed[name]] = before[name][key][closed[name]]

    def undetermined(self, z: Tensor, names: Iterable[str], most: float) -> list[str]:
        """Return what rounding alone changes by more than `most` in the masked network.

        With nearly all units closed, norms divide by deviations that are nothing but rounding,
        one after another. Here the parameters move by one rounding error.
        """
        exact = self.run_masked(z)
        before = {name: p.detach().clone() for name, p in self.plain.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.plain.parameters():
                sign = torch.randint(2, p.shape, generator=generator) * 2 - 1
                p.mul_(1 + torch.finfo(p.dtype).eps * sign.to(p))
        errors = relative_errors(exact, self.run_masked(z))
        with torch.no_grad():
            for name, p in self.plain.named_parameters():
                p.copy_(before[name])
        return [name for name in names if errors[name] > most]

    def open_where_closed(self, z: Tensor, found: dict[str, Tensor]) -> list[str]:
        """Return the parameters whose gradient is not exactly zero where gates are closed.

        Args:
            z: the gates of the run.
            found: what `run_packed` gave for them.
        """
        wrong = []
        for scales, dim_of in ((self.reads, in_dim), (self.makes, out_dim)):
            for name, scale in scales.items():
                closed = (scale(z) == 0).nonzero().flatten()
                layer = self.plain.get_submodule(name)
                for kind in ("weight", "bias") if dim_of is out_dim else ("weight",):
                    grad = found.get(f"grad {name}.{kind}")
                    dim = dim_of(layer) if kind == "weight" else 0
                    if grad is not None and bool((grad.index_select(dim, closed) != 0).any()):
                        wrong.append(f"{name}.{kind}")
        return wrong


def twins(packed: nn.Module, plain: nn.Module, inputs: tuple[Any, ...]) -> Twins:
    """Return a converted network beside a copy from before conversion.

    The layers of the converted network say which gates each feature has.
    """
    made = Twins(packed, plain, inputs)
    for name, layer in packed.named_modules():
        if isinstance(layer, GatedLayer):
            if layer.in_gate is not None:
                made.reads[name] = partial(_product, layer.in_gate.maps)
            if layer.out_gate is not None:
                made.makes[name] = partial(_product, layer.out_gate.maps)
    return made


def groups_of(packed: nn.Module) -> list[Gated]:
    """Return the groups of a converted network as its layers have them, in the order of gates."""
    layers = {
        name: layer
        for name, layer in packed.named_modules()
        if isinstance(layer, GatedLayer) and makes_units(layer)
    }
    groups = []
    for _, where in gates_of(packed).slices():
        made = [n for n, layer in layers.items() if _has(layer.out_gate, where)]
        read = [n for n, layer in layers.items() if _has(layer.in_gate, where)]
        groups.append(Gated(tuple(sorted(made)), tuple(sorted(read))))
    return groups


def _has(ref: GateRef | None, where: slice) -> bool:
    maps = () if ref is None else ref.maps
    return any(bool(((m >= where.start) & (m < where.stop)).any()) for m in maps)


def cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return arguments with the floating tensors in a dtype."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _product(maps: tuple[Tensor, ...], z: Tensor) -> Tensor:
    padded = torch.cat((z, z.new_ones(1)))
    scale = padded[maps[0]]
    for extra in maps[1:]:
        scale = scale * padded[extra]
    return scale


def multiply(scale: Tensor, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a layer's arguments with the features of the first one scaled."""
    x, *rest = args
    shape = (-1, *(1,) * spatial(layer))
    return (x * scale.view(shape), *rest)


def spatial(layer: nn.Module) -> int:
    """Return the dimensions behind the features in a layer's input."""
    return len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 0


def out_dim(layer: nn.Module) -> int:
    """Return the dimension of the output features in a layer's weight."""
    flipped = isinstance(layer, nn.modules.conv._ConvTransposeNd) or is_in_out(layer)
    return 1 if flipped else 0


def in_dim(layer: nn.Module) -> int:
    """Return the dimension of the input features in a layer's weight."""
    return 1 - out_dim(layer)


def collect(
    net: nn.Module,
    scope: Callable[[Tensor], Any],
    z: Tensor,
    inputs: tuple[Any, ...],
) -> dict[str, Tensor]:
    """Run forward and backward once; the network is left as it was.

    Args:
        net: packed network or plain twin.
        scope: makes a context in which the network runs with the given gates.
        z: gate values, shape [gates].
        inputs: positional arguments.

    Returns:
        Outputs, gradients of inputs, parameters and open gates, and buffers, by name.
    """
    before = {n: b.clone() for n, b in net.named_buffers()}
    net.zero_grad()
    z = z.clone().requires_grad_()
    inputs = tree_map_only(
        Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), inputs
    )
    with scope(z), at_full_precision(z.dtype):
        outputs = net(*inputs)
        weigh(outputs).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(_floating(outputs))}
    found |= {
        f"grad input {i}": t.grad for i, t in enumerate(_floating(inputs)) if t.grad is not None
    }
    assert z.grad is not None
    found["grad gates"] = torch.where(z.detach() != 0, z.grad, 0.0)
    for name, p in net.named_parameters():
        if not name.startswith("l0.") and p.grad is not None:
            found[f"grad {name}"] = p.grad
    with torch.no_grad():
        for name, b in net.named_buffers():
            if not name.startswith("l0."):
                found[f"buffer {name}"] = b.double().clone()
                b.copy_(before[name])
    return found


def at_full_precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a scope in which networks in fp64 do not go to fp32 and back (norms of Llama do)."""
    return InDouble() if dtype == torch.float64 else nullcontext()


def _floating(value: Any) -> list[Tensor]:
    return [t for _, t in named_tensors(value) if t.is_floating_point()]


def weigh(outputs: Any) -> Tensor:
    """Return a scalar that depends on every element of the outputs differently."""
    generator = torch.Generator().manual_seed(2)
    parts = []
    for t in _floating(outputs):
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        parts.append((t * weights).sum())
    return torch.stack(parts).sum()


def gate_values(sizes: list[int], seed: int) -> Tensor:
    """Return gates of one draw: mostly random fractions; the first three are special.

    Seed 0 has all gates closed, 1 all open at 1, 2 one open per group.

    Args:
        sizes: units per group.
        seed: of the draw.
    """
    count = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(2, count, generator=generator, dtype=torch.float64)
    fraction = (0.5, 0.1, 0.9, 0.25, 0.03)[seed % 5]
    z = torch.where(u[0] < fraction, 0.05 + 0.95 * u[1], 0.0)
    if seed == 0:
        z = torch.zeros(count, dtype=torch.float64)
    if seed == 1:
        z = torch.ones(count, dtype=torch.float64)
    if seed == 2:
        z = torch.zeros(count, dtype=torch.float64)
        z[torch.tensor([0, *sizes[:-1]]).cumsum(0)] = 0.7
    return z


def relative_errors(exact: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest error per tensor relative to its size.

    Gradients share a floor, and a running mean counts against its standard deviation: some are
    zero but for rounding.

    Raises:
        ValueError: other tensors, or other shapes.
    """
    if {n: t.shape for n, t in exact.items()} != {n: t.shape for n, t in got.items()}:
        other = sorted(set(exact) ^ set(got)) or [
            n for n in exact if exact[n].shape != got[n].shape
        ]
        raise ValueError(f"expected the same tensors in both runs, got {other} in one or unequal")
    largest = max(float(t.abs().max()) for n, t in exact.items() if n.startswith("grad"))
    errors = {}
    for name, t in exact.items():
        size = max(float(t.abs().max()), _floor(name, exact, largest))
        error = float((got[name].double() - t).abs().max()) / size
        # No order is defined for NaN: the largest of several would hide it.
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def _floor(name: str, exact: dict[str, Tensor], largest_gradient: float) -> float:
    if name.startswith("grad"):
        return GRADIENT_FLOOR * largest_gradient
    variance = exact.get(name.removesuffix("mean") + "var")
    return 1e-12 if variance is None else float(variance.max().sqrt())


def errors_by_kind(exact: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Return L2 errors relative to the exact values: outputs, gradients by kind, buffers."""
    kinds = {
        "output": [n for n in exact if n.startswith("output")],
        "grad input": [n for n in exact if n.startswith("grad input")],
        "grad gates": ["grad gates"],
        "grad parameters": [n for n in exact if n.startswith("grad ") and "." in n],
        "buffers": [n for n in exact if n.startswith("buffer")],
    }
    errors = {}
    for kind, names in kinds.items():
        if names:
            t = torch.cat([exact[n].double().flatten() for n in names])
            error = torch.cat([got[n].double().flatten() for n in names]) - t
            errors[kind] = float(error.norm() / t.norm().clamp_min(1e-30))
    return errors


def fp32_errors(single: Twins, seeds: range) -> dict[str, tuple[float, float]]:
    """Return the errors of fp32 runs against fp64: packed and masked, by kind, medians over draws.

    Medians: a rounding error that flips one ReLU is worth more than all others together.
    """
    exact = single.to(torch.float64)
    match_layout(single.plain, single.packed)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for seed in seeds:
        z = gate_values(gates_of(single.packed).sizes, seed).float()
        truth = exact.run_masked(z.double())
        for side, got in enumerate((single.run_packed(z), single.run_masked(z))):
            for kind, error in errors_by_kind(truth, got).items():
                found.setdefault(kind, ([], []))[side].append(error)
    return {kind: (median(ours), median(theirs)) for kind, (ours, theirs) in found.items()}


def match_layout(plain: nn.Module, packed: nn.Module) -> None:
    """Give the parameters the memory format of the packed network: rounding depends on it."""
    own = dict(packed.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data = torch.empty_like(own[name]).copy_(parameter)


@torch.no_grad()
def perturb(net: nn.Module, seed: int = 0) -> nn.Module:
    """Move parameters and statistics of a network, in place, off special values (0, 1, equal)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(0.1 * noise)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator).to(buffer))
    return net
