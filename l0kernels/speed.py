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

from l0kernels._config import current_impl, use_impl
from l0kernels.convert.randomness import same_randomness
from l0kernels.convert.tensors import Inputs, call, named_tensors, own_copy
from l0kernels.gates.base import Gates
from l0kernels.gates.draw import LEAST
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.masked import MaskedLayer
from l0kernels.ops.pack_weight.reference import is_channels_last

WARMUP, ROUNDS = 3, 9
SECONDS = 10.0  # after which a timing has enough rounds
LEAST_MS, MOST_CALLS = 5.0, 16  # shorter work is repeated between two looks at the clock
FASTER = 1.05  # what counts as faster
SMALL = 0.05  # share of a step that is not worth a word
NEARLY_ALL = 0.95  # of a group's units
SINGLE_WEIGHTS = "gates of single weights: closed outputs and inputs alone are left out"

Work = Callable[[], object]


@dataclass(frozen=True)
class GroupSpeed:
    """What the gates of a group do for the layers that make its units and read them.

    Args:
        share: of the masked step that these layers take; layers of two groups count for both.
        speedup: time of these layers at full width over that at the expected open widths.
        why: in words why a step gains little from these gates, "" if it gains.
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
        predicted: what ``packed`` should be: the layers with gates as timed one by one at the
            expected open widths, packing, layers without gates as they are, and the rest of the
            masked step as the numbers between modules shrink.
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
    """One call of a layer: the tensor that came in, as the masked reference has it.

    Args:
        shape: of the tensor.
        channels_last: its memory format.
        dtype: what the layer computes in.
        needs_grad: whether the gradient of the tensor is wanted.
        trains: whether the call is differentiated at all.
    """

    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    needs_grad: bool
    trains: bool


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer, forward and backward, masked at its full and at its open widths."""

    full: float
    open: float


def measure(root: nn.Module, inputs: Inputs) -> Speed:
    """Time a copy of a model and its layers.

    Args:
        root: the model that gates are attached to.
        inputs: arguments of its forward, a training batch.

    Raises:
        ValueError: the model cannot be copied, or no output depends on its parameters.
    """
    try:
        twin = copy.deepcopy(root)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"report: expected a model that can be copied; {error}") from error
    if not root.training:
        twin.train()
    impl = "auto" if current_impl() == "reference" else current_impl()
    with same_randomness({p.device for p in twin.parameters()}), torch.enable_grad():
        return _Measurement(twin, own_copy(inputs), impl).run()


def expected_widths(gates: Gates) -> list[int]:
    """The packed width of every port if as many features are open as are expected to be."""
    p = torch.cat((chance_open(gates), torch.ones(1, dtype=torch.float64)))
    counts = []
    for port_map in gates.port_maps:
        made, extra = port_map.cpu()
        expected = round(float((p[made] * p[extra]).sum()))
        counts.append(max(expected, min(LEAST, made.numel())))
    if gates.rounding is None:
        return counts
    return gates.rounding.widths(counts, gates.rounding.multiples(gates.multiple_of))


def chance_open(gates: Gates) -> Tensor:
    """How likely every gate is to be open in a training step, fp64 on the CPU."""
    if gates.frozen:
        return (gates.deterministic() != 0).double().cpu()
    return gates.open_probability().cpu()


def is_timed(module: nn.Module, gates: Gates) -> TypeGuard[GatedLayer]:
    """Whether a module is a gated layer with a matrix or kernels, where the time goes.

    Gates of single weights leave layers their widths and the time that they take.
    """
    if not isinstance(module, GatedLayer) or module.gates is not gates:
        return False
    has_widths = module.in_port >= 0 or module.out_port >= 0
    return has_widths and module.weight is not None and module.weight.dim() > 1


class _Measurement:
    """All timings of one copy of a model."""

    def __init__(self, twin: nn.Module, inputs: Inputs, impl: str) -> None:
        gates: Any = twin.l0
        assert isinstance(gates, Gates)
        self.twin, self.gates, self.inputs, self.impl = twin, gates, inputs, impl
        self.clock = Clock(gates.log_alpha.device)
        self.layers = {n: m for n, m in twin.named_modules() if is_timed(m, gates)}
        own = set(self.layers.values())
        self.fixed = [
            m
            for m in twin.modules()
            if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and m not in own
        ]
        self.widths = expected_widths(gates)
        self._can_run_dense = {} if gates.dense is None else gates.dense.ports
        self.dense: set[int] = set()  # groups that run dense
        self.uses: dict[nn.Module, list[Use]] = {m: [] for m in (*own, *self.fixed)}

    def run(self) -> Speed:
        numbers = self._numbers("reference")
        kept = self._numbers(self.impl) / numbers if numbers else 1.0
        self._stay_dense()
        times = {
            name: self._times_of(layer)
            for name, layer in tqdm(
                self.layers.items(), desc="layers", disable=None, delay=1.0, leave=False
            )
        }
        calls = [_plain_call(module, use) for module in self.fixed for use in self.uses[module]]
        constant = sum(map(self.clock.of, calls))
        masked, packed = self.clock.both(
            lambda: self._step("reference"), lambda: self._step(self.impl)
        )
        others = max(0.0, masked - constant - sum(t.full for t in times.values()))
        layers = sum(t.open for t in times.values())
        predicted = layers + constant + others * kept + self._packing()
        groups = {
            name: self._of_group(times, masked, at, group in self.dense)
            for group, (name, at) in enumerate(self.gates.slices())
        }
        for module in self.twin.modules():
            if isinstance(module, MaskedLayer) and module.gate is not None:
                groups[module.gate.name] = GroupSpeed(0.0, 1.0, SINGLE_WEIGHTS)
        return Speed(masked, packed, predicted, groups)

    def _numbers(self, impl: str) -> float:
        """How many numbers come into modules; notes how layers are called if they are masked."""
        found = 0

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal found
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            is_layer = module in self.uses
            if x is None or not (is_layer or next(module.children(), None) is None):
                return
            found += x.numel() * (module not in self.fixed)
            if is_layer and impl == "reference":
                self.uses[module].append(_use(module, x))

        handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in self.twin.modules()]
        try:
            with use_impl(impl):
                call(self.twin, own_copy(self.inputs))
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _stay_dense(self) -> None:
        """Note the groups that run dense, now that their layers have been called."""
        p = chance_open(self.gates)
        shares = [float(p[where].mean()) for _, where in self.gates.slices()]
        if not self.gates.frozen:
            self.dense = {g for g, s in enumerate(shares) if self.gates.runs_dense(g, s)}
        for port, (group, features) in self._can_run_dense.items():
            if group in self.dense:
                self.widths[port] = features.numel()

    def _step(self, impl: str) -> None:
        with use_impl(impl):
            found = named_tensors(call(self.twin, own_copy(self.inputs)))
            outputs = [t for _, t in found if t.requires_grad]
            if not outputs:
                raise ValueError("example_inputs: expected an output that depends on parameters")
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        self._forget()

    def _forget(self) -> None:
        for parameter in self.twin.parameters():
            parameter.grad = None

    def _times_of(self, layer: GatedLayer) -> LayerTime:
        rows, columns = layer._out_in(layer.weight).shape[:2]
        uses = self.uses[layer]
        full = sum(self.clock.of(_masked_call(layer, use)) for use in uses)
        if self._all_dense(layer):
            return LayerTime(full, full)
        if layer.out_port >= 0:
            rows = self.widths[layer.out_port]
        if layer.in_port >= 0:
            columns = self.widths[layer.in_port]
        packed = (_packed_call(layer, use, rows, columns, self._arriving(layer)) for use in uses)
        return LayerTime(full, sum(self.clock.of(work) for work in packed))

    def _all_dense(self, layer: GatedLayer) -> bool:
        ports = [self._can_run_dense.get(p) for p in (layer.in_port, layer.out_port) if p >= 0]
        return all(port is not None and port[0] in self.dense for port in ports)

    def _arriving(self, layer: GatedLayer) -> int | None:
        """How many features come in where a layer drops some of them."""
        if layer.in_port < 0 or not self.gates.port_selects[layer.in_port]:
            return None
        p = torch.cat((chance_open(self.gates), torch.ones(1, dtype=torch.float64)))
        return round(float(p[self.gates.port_maps[layer.in_port][0].cpu()].sum()))

    def _packing(self) -> float:
        """Packing the parameters of the layers that were called, and their gradients."""
        called = [layer for layer in self.layers.values() if self.uses[layer]]

        def draw(packs: bool) -> None:
            with use_impl(self.impl):
                self.gates.draw()
                self.gates.begin_forward(self.twin)
                draw = self.gates.current_draw()
                found = [t for layer in called if packs for t in layer.packed_parameters(draw)]
                made = [t for t in found if t is not None and t.grad_fn is not None]
                torch.autograd.backward(made, [t.detach() for t in made])

        without, packed = self.clock.both(lambda: draw(False), lambda: draw(True))
        self._forget()
        return max(0.0, packed - without)

    def _of_group(
        self, times: dict[str, LayerTime], masked: float, where: slice, dense: bool
    ) -> GroupSpeed:
        touched = [t for name, t in times.items() if self._touches(self.layers[name], where)]
        full, packed = sum(t.full for t in touched), sum(t.open for t in touched)
        share, speedup = full / masked, full / packed if packed else 1.0
        is_open = float(chance_open(self.gates)[where].mean())
        return GroupSpeed(share, speedup, reason(share, speedup, is_open, dense))

    def _touches(self, layer: GatedLayer, where: slice) -> bool:
        maps = [self.gates.port_maps[p] for p in (layer.in_port, layer.out_port) if p >= 0]
        return any(bool(((m >= where.start) & (m < where.stop)).any()) for m in maps)


def reason(share: float, speedup: float, is_open: float, dense: bool = False) -> str:
    """Why a step gains little from the gates of a group, "" if it gains.

    Args:
        share: of the masked step that its layers take.
        speedup: of these layers.
        is_open: part of its units.
        dense: whether all of them are computed.
    """
    if not share:
        return "none of its layers ran"
    if is_open > NEARLY_ALL:
        return f"{is_open:.0%} of its units are open"
    if dense:
        return f"{is_open:.0%} of its units are open: skipping the others costs more than it saves"
    if speedup < FASTER:
        return f"at the open widths these layers take {1 / speedup:.2f} times as long"
    if share < SMALL:
        return f"these layers take {share:.1%} of a step"
    return ""


def _use(module: nn.Module, x: Tensor) -> Use:
    # Inside the forward: autocast and no_grad are as the layer has them.
    dtype = GatedLayer.compute_dtype(module)  # pyright: ignore[reportArgumentType]
    return Use(tuple(x.shape), is_channels_last(x), dtype, x.requires_grad, torch.is_grad_enabled())


def _input(use: Use, device: torch.device, width: int | None = None, dim: int = -1) -> Tensor:
    shape = list(use.shape)
    if width is not None:
        shape[dim] = width
    x = torch.randn(shape, dtype=use.dtype, device=device)
    x = x.contiguous(memory_format=_format(use.channels_last))
    return x.requires_grad_(use.needs_grad and use.trains)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _both_ways(forward: Callable[[], Tensor], leaves: list[Tensor | None], trains: bool) -> Work:
    """Work that runs a forward and the gradients of those leaves that want one."""
    needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not trains or not needed:
        return torch.no_grad()(forward)
    grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), needed, grad)


def _plain_call(module: nn.Module, use: Use) -> Work:
    """A layer without gates as it is."""
    weight: Any = module.weight
    x = _input(use, weight.device)
    lower = use.dtype != weight.dtype

    def forward() -> Tensor:
        with torch.autocast(weight.device.type, use.dtype if lower else None, enabled=lower):
            return module(x)

    return _both_ways(forward, [x, *module.parameters()], use.trains)


def _masked_call(layer: GatedLayer, use: Use) -> Work:
    """A gated layer at full width, its input multiplied by gates."""
    parameters = _parameters(layer, use, None, None)
    x, dim = _input(use, layer.weight.device), layer.feature_dim
    if layer.in_port < 0:
        return _both_ways(lambda: layer.compute(x, *parameters), [x, *parameters], use.trains)
    scale = torch.rand(x.shape[dim], dtype=x.dtype, device=x.device).requires_grad_()
    broad = [-1, *[1] * (-dim - 1)]
    return _both_ways(
        lambda: layer.compute(x * scale.view(broad), *parameters),
        [x, scale, *parameters],
        use.trains,
    )


def _packed_call(
    layer: GatedLayer, use: Use, rows: int, columns: int, arriving: int | None
) -> Work:
    """A gated layer at packed widths; of ``arriving`` features it takes the first."""
    parameters = _parameters(layer, use, rows, None if layer.depthwise else columns)
    width = rows if layer.depthwise else columns
    x = _input(use, layer.weight.device, arriving or width, layer.feature_dim)
    if arriving is None:
        return _both_ways(lambda: layer.compute(x, *parameters), [x, *parameters], use.trains)
    first = torch.arange(min(columns, arriving), device=x.device)
    return _both_ways(
        lambda: layer.compute(x.index_select(layer.feature_dim, first), *parameters),
        [x, *parameters],
        use.trains,
    )


def _parameters(
    layer: GatedLayer, use: Use, rows: int | None, columns: int | None
) -> tuple[Tensor, Tensor | None]:
    """Leading rows and columns of a layer's parameters; they want gradients as packed ones do."""
    weight = layer._out_in(layer._out_in(layer.weight).detach()[:rows, :columns])
    weight = weight.to(use.dtype).contiguous(memory_format=_format(is_channels_last(layer.weight)))
    weight = weight.clone().requires_grad_(layer.weight.requires_grad or layer.in_port >= 0)
    if layer.bias is None:
        return weight, None
    bias = layer.bias.detach()[:rows].to(use.dtype).clone()
    return weight, bias.requires_grad_(layer.bias.requires_grad)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; work on a CPU is done when its call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Clock:
    """Median milliseconds of work on a device."""

    device: torch.device

    def once(self, work: Work, calls: int = 1) -> float:
        synchronise(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronise(self.device)
        return 1e3 * (time.perf_counter() - start) / calls

    def both(self, first: Work, second: Work) -> tuple[float, float]:
        """Of two kinds of work that take turns."""
        for _ in range(WARMUP):
            first()
            second()
        times: list[tuple[float, float]] = []
        start = time.perf_counter()
        while len(times) < ROUNDS:
            times.append((self.once(first), self.once(second)))
            if len(times) > 2 and time.perf_counter() - start > SECONDS:
                break
        one, other = zip(*times, strict=True)
        return statistics.median(one), statistics.median(other)

    def of(self, work: Work) -> float:
        """Of one kind of work, repeated where it is short."""
        self.once(work)
        calls = max(1, min(MOST_CALLS, int(LEAST_MS / max(self.once(work), 1e-3))))
        return statistics.median(self.once(work, calls) for _ in range(ROUNDS))
