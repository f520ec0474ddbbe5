# SPDX-License-Identifier: Apache-2.0
"""What a training step gains from closed gates: predicted layer by layer, and measured."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from tqdm import tqdm

from l0kernels._config import use_impl
from l0kernels.convert.randomness import same_randomness
from l0kernels.convert.tensors import Inputs, call, named_tensors, own_copy
from l0kernels.gates.base import Gates
from l0kernels.nn.base import LEAST, GatedLayer

WARMUP, ROUNDS = 3, 9
SECONDS = 10.0  # after which a timing has enough rounds
FASTER = 1.05  # what counts as faster
SMALL = 0.05  # share of a step that is not worth a word
NEARLY_ALL = 0.95  # of a group's units


@dataclass(frozen=True)
class GroupSpeed:
    """What the gates of a group do for the layers that make its units and read them.

    Args:
        share: of the masked step that these layers take.
        speedup: time of these layers at full width over that at the expected open widths.
        why: in words why they are not faster, "" if they are.
    """

    share: float
    speedup: float
    why: str


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a step: forward and backward in training mode, without loss and optimizer.

    Args:
        masked: the masked reference, measured.
        packed: the model as it trains, measured, the gates drawn anew in every step.
        predicted: what ``packed`` should be by the timings of single layers at full and at the
            expected open widths, and of drawing and packing.
        groups: by name.
    """

    masked: float
    packed: float
    predicted: float
    groups: dict[str, GroupSpeed]

    @property
    def measured_speedup(self) -> float:
        """Masked over packed."""
        return self.masked / self.packed

    @property
    def predicted_speedup(self) -> float:
        """Masked over predicted."""
        return self.masked / self.predicted

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        found = {"measured_speedup": self.measured_speedup}
        return {**asdict(self), **found, "predicted_speedup": self.predicted_speedup}


@dataclass(frozen=True)
class Use:
    """One call of a layer: the tensor that came in, as the masked reference has it."""

    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    needs_grad: bool


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer, forward and backward, at its full and at its open widths."""

    full: float
    open: float


def measure(root: nn.Module, inputs: Inputs) -> Speed:
    """Time a copy of a model and its layers.

    Args:
        root: the model that gates are attached to.
        inputs: arguments of its forward, a training batch.

    Raises:
        ValueError: no output of the model depends on its parameters.
    """
    twin, inputs = copy.deepcopy(root).train(), own_copy(inputs)
    with same_randomness({p.device for p in twin.parameters()}), torch.enable_grad():
        return _measure(twin, gates_in(twin), inputs)


def gates_in(twin: nn.Module) -> Gates:
    gates: Any = twin.l0
    assert isinstance(gates, Gates)
    return gates


def _measure(twin: nn.Module, gates: Gates, inputs: Inputs) -> Speed:
    clock = Clock(gates.log_alpha.device)
    layers = {n: m for n, m in twin.named_modules() if is_timed(m, gates)}
    widths = expected_widths(gates)
    uses, kept = _watch(twin, layers, widths, inputs)
    times: dict[str, LayerTime] = {}
    for name, layer in tqdm(layers.items(), desc="layers", disable=None):
        full, packed = _widths_of(layer, None), _widths_of(layer, widths)
        times[name] = LayerTime(*(clock.layer(layer, uses[name], w) for w in (full, packed)))
    masked, packed = clock.both(
        lambda: _step_of(twin, inputs, "reference"), lambda: _step_of(twin, inputs, "auto")
    )
    # What is no layer of ours takes time by the numbers that it works on.
    others = max(0.0, masked - sum(t.full for t in times.values()))
    predicted = sum(t.open for t in times.values()) + others * kept + clock.packing(twin, gates)
    groups = {name: _of_group(gates, layers, times, masked, at) for name, at in gates.slices()}
    return Speed(masked, packed, predicted, groups)


def expected_widths(gates: Gates) -> list[int]:
    """The packed width of every port if as many features are open as are expected to be."""
    p = torch.cat((gates.open_probability().cpu(), torch.ones(1, dtype=torch.float64)))
    counts = []
    for port_map in gates.port_maps:
        made, extra = port_map.cpu()
        expected = round(float((p[made] * p[extra]).sum()))
        counts.append(max(expected, min(LEAST, made.numel())))
    if gates.rounding is None or gates.multiple_of(max(gates.sizes)) == 1:
        return counts
    return gates.rounding.widths(counts, gates.multiple_of)


def is_timed(module: nn.Module, gates: Gates) -> TypeGuard[GatedLayer]:
    """Whether a module is a gated layer with a matrix or kernels, where the time goes."""
    if not isinstance(module, GatedLayer) or module.gates is not gates:
        return False
    return module.weight is not None and module.weight.dim() > 1


def _widths_of(layer: GatedLayer, widths: list[int] | None) -> tuple[int, int]:
    """Output and input features at full width, or at the widths of the ports."""
    rows, columns = layer._out_in(layer.weight).shape[:2]
    if widths is None:
        return rows, columns
    return (
        rows if layer.out_port < 0 else widths[layer.out_port],
        columns if layer.in_port < 0 else widths[layer.in_port],
    )


def _watch(
    twin: nn.Module, layers: dict[str, GatedLayer], widths: list[int], inputs: Inputs
) -> tuple[dict[str, list[Use]], float]:
    """How layers are called, and the part of all numbers between modules that stays open."""
    gates = gates_in(twin)
    names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
    uses: dict[str, list[Use]] = {name: [] for name in layers}
    numbers = {"full": 0.0, "open": 0.0}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None or any(True for _ in module.children()):
            return
        port = _port_of_inputs(module, gates)
        numbers["full"] += x.numel()
        share = 1.0 if port < 0 else widths[port] / gates.port_maps[port].shape[1]
        numbers["open"] += x.numel() * share
        if module in names:
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            uses[names[module]].append(Use(tuple(x.shape), last, x.dtype, x.requires_grad))

    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in twin.modules()]
    try:
        with use_impl("reference"):
            call(twin, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return uses, numbers["open"] / max(1.0, numbers["full"])


def _port_of_inputs(module: nn.Module, gates: Gates) -> int:
    """The port of the features that come in; -1 for features without gates."""
    if not isinstance(module, GatedLayer) or module.gates is not gates:
        return -1
    weight = module.weight
    passes = weight is None or weight.dim() < 2 or module.depthwise
    return module.out_port if passes else module.in_port


def _step_of(twin: nn.Module, inputs: Inputs, impl: str) -> None:
    with use_impl(impl):
        outputs = [t for _, t in named_tensors(call(twin, inputs)) if t.requires_grad]
        if not outputs:
            raise ValueError("example_inputs: expected an output that depends on parameters")
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    for parameter in twin.parameters():
        parameter.grad = None


@dataclass(frozen=True)
class Clock:
    """Median milliseconds of work on a device."""

    device: torch.device

    def once(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def both(
        self, first: Callable[[], object], second: Callable[[], object]
    ) -> tuple[float, float]:
        """Of two kinds of work that take turns."""
        for _ in range(WARMUP):
            first()
            second()
        times: list[tuple[float, float]] = []
        start = time.perf_counter()
        for _ in tqdm(range(ROUNDS), desc="steps", disable=None):
            times.append((self.once(first), self.once(second)))
            if len(times) > 2 and time.perf_counter() - start > SECONDS:
                break
        one, other = zip(*times, strict=True)
        return statistics.median(one), statistics.median(other)

    def of(self, work: Callable[[], object]) -> float:
        return self.both(lambda: None, work)[1]

    def layer(self, layer: GatedLayer, uses: list[Use], widths: tuple[int, int]) -> float:
        """Forward and backward of all calls of a layer, at these output and input features."""
        return sum(self.of(_call_of(layer, use, *widths)) for use in uses)

    def packing(self, twin: nn.Module, gates: Gates) -> float:
        """Packing the parameters of all layers, and their gradients."""
        layers = [m for m in twin.modules() if is_timed(m, gates)]

        def draw(pack: bool) -> None:
            gates.draw()
            gates.begin_forward(twin)
            found = [
                tensor
                for layer in layers
                if pack
                for tensor in layer.packed_parameters(gates.current_draw())
                if tensor is not None and tensor.grad_fn is not None
            ]
            torch.autograd.backward(found, [tensor.detach() for tensor in found])

        without, packed = self.both(lambda: draw(False), lambda: draw(True))
        for parameter in twin.parameters():
            parameter.grad = None
        return max(0.0, packed - without)


def _call_of(layer: GatedLayer, use: Use, rows: int, columns: int) -> Callable[[], object]:
    """Work that calls a layer with parameters and inputs of other widths."""
    full = layer._out_in(layer.weight).detach()
    weight = layer._out_in(full[:rows, : full.shape[1] if layer.depthwise else columns])
    last = weight.dim() == 4 and layer.weight.is_contiguous(memory_format=torch.channels_last)
    weight = _laid_out(weight, last).requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach()[:rows].clone().requires_grad_()
    shape = list(use.shape)
    shape[layer.feature_dim] = rows if layer.depthwise else columns
    x = _laid_out(torch.randn(shape, dtype=use.dtype, device=weight.device), use.channels_last)
    x.requires_grad_(use.needs_grad)
    needed = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    with torch.enable_grad():
        grad = torch.randn_like(layer.compute(x, weight, bias))

    def work() -> None:
        torch.autograd.grad(layer.compute(x, weight, bias), needed, grad)

    return work


def _laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.clone(memory_format=format)


def _of_group(
    gates: Gates,
    layers: dict[str, GatedLayer],
    times: dict[str, LayerTime],
    masked: float,
    where: slice,
) -> GroupSpeed:
    touched = [t for name, t in times.items() if _touches(gates, layers[name], where)]
    full, packed = sum(t.full for t in touched), sum(t.open for t in touched)
    share, speedup = full / masked, full / packed if packed else 1.0
    is_open = float(gates.open_probability()[where].mean())
    return GroupSpeed(share, speedup, _why(share, speedup, is_open))


def _touches(gates: Gates, layer: GatedLayer, where: slice) -> bool:
    ports = [port for port in (layer.in_port, layer.out_port) if port >= 0]
    maps = [gates.port_maps[port] for port in ports]
    return any(bool(((m >= where.start) & (m < where.stop)).any()) for m in maps)


def _why(share: float, speedup: float, is_open: float) -> str:
    if is_open > NEARLY_ALL:
        return f"{is_open:.0%} of its units are open"
    if speedup < FASTER:
        return "these layers take as long at the open widths: what they call sets their time"
    if share < SMALL:
        return f"these layers take {share:.1%} of a step"
    return ""
