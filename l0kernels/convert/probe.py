# SPDX-License-Identifier: Apache-2.0
"""Find which unit every feature comes from, by intervention.

The forward is replayed with the output of every convolution and linear layer fixed to what it was,
so that a change in one layer's output reaches the layers that read it and no further. Units are
numbered over the whole model, and replay b changes the units whose number has bit b set, then
those whose number has it clear. A feature made by one unit changes in exactly one replay of each
pair, and the pattern spells the unit's number; a feature made by several units changes in both.
No operation is looked at by name, so flatten, concatenation, padding, pooling and any elementwise
function are followed alike. 2 log2(units) replays serve the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Dead activations (ReLU, clipping, pooling) hide a change of one sign or size: several are tried.
# 3 takes every element past zero.
SCALES = (3.0, -3.0, 0.3)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution in which every channel passes through its own filter."""
    return isinstance(module, nn.modules.conv._ConvNd) and (
        1 < module.groups == module.in_channels == module.out_channels
    )


def is_layer(module: nn.Module) -> bool:
    """A layer that makes new units: a convolution (not depthwise) or a linear layer."""
    mixes = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    return mixes and not is_depthwise(module)


def is_passage(module: nn.Module) -> bool:
    """A layer with parameters per channel through which channels pass unmixed."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_depthwise(module)


def feature_dim(module: nn.Module) -> int:
    """Dimension of the features, also of unbatched inputs where the layer takes them."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -len(module.kernel_size) - 1
    return -1 if isinstance(module, nn.Linear) else 1


@dataclass
class Reading:
    """What a layer or passage reads.

    Args:
        touched_by: layers whose units reach it.
        unit: global unit number per feature; -1 where no layer's unit reaches the feature,
            -2 where several units do (or one that could not be told).
    """

    touched_by: list[str] = field(default_factory=list)
    unit: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


@dataclass
class Trace:
    """The result of probing a model.

    Args:
        layers: names of convolutions and linear layers, in order of their first call.
        first_unit: global number of a layer's first unit.
        width: number of units of a layer.
        readings: for every called layer and passage, by name.
        calls: how often each was called.
        reaches_output: layers whose units change an output of the model.
        positions: output positions (pixels or tokens, over the batch of one example) per layer.
    """

    layers: list[str]
    first_unit: dict[str, int]
    width: dict[str, int]
    readings: dict[str, Reading]
    calls: dict[str, int]
    reaches_output: set[str]
    positions: dict[str, int]


def to_double(value: Any) -> Any:
    """Floating tensors of a nested structure in fp64, detached."""
    return tree_map_only(
        Tensor, lambda t: t.detach().double() if t.is_floating_point() else t.detach(), value
    )


class NoDropout(TorchFunctionMode):
    """Leaves dropout out: every run would draw other noise."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class _Replayer:
    """A model whose layers return recorded outputs.

    Recording fills ``inputs_of`` and ``recorded``; from then on every forward fills ``touched``
    with the features of every layer and passage whose input differs from the recording.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self.model = model.eval()
        self.arguments = to_double(example_inputs)
        # One entry per call of a layer in a forward.
        self.inputs_of: dict[str, list[Tensor]] = {}
        self.recorded: dict[str, list[Tensor]] = {}
        self.touched: dict[str, Tensor] = {}
        self.dims: dict[str, int] = {}
        self._recording = True
        for name, module in self.model.named_modules():
            if is_layer(module) or is_passage(module):
                self.dims[name] = feature_dim(module)
                module.forward = self._watched(name, module)
        self.outputs = self._run()
        self._recording = False
        self.layers = list(self.recorded)
        self._current = self.recorded

    def _watched(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Tensor:
            x = args[0] if args else kwargs["input"]
            if self._recording:
                # Cloned: an in-place operation may follow.
                self.inputs_of.setdefault(name, []).append(x.clone())
                out = forward(*args, **kwargs)
                if is_layer(module):
                    self.recorded.setdefault(name, []).append(out.clone())
                return out
            call = self._compare(name, x)
            if name not in self._current:
                return forward(*args, **kwargs)
            return self._current[name][call].clone()

        return run

    def _compare(self, name: str, x: Tensor) -> int:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        new = (x != self.inputs_of[name][call]).movedim(self.dims[name], 0)
        new = new.reshape(len(new), -1).any(1)
        self.touched[name] = self.touched[name] | new if name in self.touched else new
        return call

    def _run(self) -> list[Tensor]:
        self._calls: dict[str, int] = {}
        torch.manual_seed(0)  # other randomness is the same in every run
        with NoDropout():
            leaves = tree_leaves(self.model(*self.arguments))
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]

    def replay(self, changed: dict[str, list[Tensor]]) -> bool:
        """Run with these layer outputs; returns whether an output of the model changed."""
        self._current = self.recorded | changed
        outputs = self._run()
        return any(not torch.equal(a, b) for a, b in zip(outputs, self.outputs, strict=True))


def _change(out: Tensor, dim: int, chosen: Tensor, scale: float, generator: Any) -> Tensor:
    noise = torch.randn(out.shape, generator=generator, dtype=out.dtype).abs().to(out.device)
    size = scale * (out.abs() + out.abs().mean().clamp_min(1e-3))
    shape = [1] * out.dim()
    shape[dim] = -1
    return out + chosen.view(shape).to(out.device) * (noise + 0.5) * size


class _Prober:
    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self.replayer = _Replayer(model, example_inputs)
        self.readers = list(self.replayer.inputs_of)
        dims = self.replayer.dims
        self.width = {n: outs[0].shape[dims[n]] for n, outs in self.replayer.recorded.items()}
        self.first_unit: dict[str, int] = {}
        total = 0
        for name in self.replayer.layers:
            self.first_unit[name] = total
            total += self.width[name]
        self.bits = max(1, total.bit_length())

    def replay(self, chosen: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], bool]:
        """Features that change, by reader, and whether an output changes, over all scales."""
        replayer = self.replayer
        replayer.touched = {}
        output = False
        for scale in SCALES:
            generator = torch.Generator().manual_seed(seed)
            changed = {
                name: [
                    _change(out, replayer.dims[name], units, scale, generator)
                    for out in replayer.recorded[name]
                ]
                for name, units in chosen.items()
            }
            output |= replayer.replay(changed)
        return replayer.touched, output

    def steps(self) -> int:
        return 2 * self.bits + len(self.replayer.layers)

    def reach(self, tick: Callable[[], None]) -> tuple[dict[str, list[str]], set[str]]:
        """Which layers reach which readers, and which reach an output."""
        touched_by: dict[str, list[str]] = {name: [] for name in self.readers}
        reaches_output: set[str] = set()
        for seed, name in enumerate(self.replayer.layers):
            touched, output = self.replay({name: torch.ones(self.width[name]).bool()}, seed)
            if output:
                reaches_output.add(name)
            for reader, features in touched.items():
                if features.any():
                    touched_by[reader].append(name)
            tick()
        return touched_by, reaches_output

    def codes(self, tick: Callable[[], None]) -> dict[str, Tensor]:
        """Global unit number of every feature, -1 for none, -2 for several."""
        spelled: dict[str, list[Tensor]] = {name: [] for name in self.readers}
        for bit in range(self.bits):
            pair = []
            for value in (1, 0):
                chosen = {
                    name: ((torch.arange(width) + self.first_unit[name] + 1) >> bit & 1) == value
                    for name, width in self.width.items()
                }
                pair.append(self.replay(chosen, 1000 + 2 * bit + value)[0])
                tick()
            for name in spelled:
                spelled[name].append(torch.stack((pair[0][name], pair[1][name])))
        return {name: _decode(torch.stack(pairs)) for name, pairs in spelled.items()}


def _decode(changed: Tensor) -> Tensor:
    """Unit numbers from the replays, changed [bits, (set, clear), features]."""
    once = changed[:, 0] ^ changed[:, 1]
    weights = 1 << torch.arange(changed.shape[0], device=changed.device)
    unit = (changed[:, 0] * weights[:, None]).sum(0) - 1
    unit = torch.where(once.all(0), unit, torch.full_like(unit, -2))
    return torch.where(changed.any(0).any(0), unit, torch.full_like(unit, -1)).cpu()


@torch.no_grad()
def probe(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    progress: Callable[[int], Any] | None = None,
) -> Trace:
    """Trace every feature that a convolution, linear layer or passage reads to its unit.

    Args:
        model: an fp64 copy that is not needed afterwards: its layers' forwards are replaced.
        example_inputs: positional arguments of the forward.
        progress: called once with the number of steps, returns a function to call after each.

    Returns:
        The trace.

    Raises:
        Exception: whatever the forward raises with these inputs.
    """
    with torch.random.fork_rng(devices=[]):
        prober = _Prober(model, example_inputs)
        tick = progress(prober.steps()) if progress is not None else lambda: None
        touched_by, reaches_output = prober.reach(tick)
        units = prober.codes(tick)
    replayer = prober.replayer
    return Trace(
        layers=replayer.layers,
        first_unit=prober.first_unit,
        width=prober.width,
        readings={name: Reading(touched_by[name], units[name]) for name in prober.readers},
        calls={name: len(inputs) for name, inputs in replayer.inputs_of.items()},
        reaches_output=reaches_output,
        positions={
            name: outs[0].numel() // prober.width[name] // max(1, outs[0].shape[0])
            for name, outs in replayer.recorded.items()
        },
    )
