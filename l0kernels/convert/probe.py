# SPDX-License-Identifier: Apache-2.0
"""Ask a model, by intervention, what depends on what.

The forward is replayed with the output of every convolution and linear layer fixed to what it was,
so that a change in one layer's output reaches the layers that read it and no further. No operation
is looked at by name: flatten, concatenation, padding, pooling, attention and any elementwise
function are followed alike. A model whose training forward calls other layers than its eval forward
(auxiliary heads) is replayed in both modes, and what changes in either counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from l0kernels.convert.randomness import same_randomness
from l0kernels.convert.tensors import (
    Inputs,
    KeptBuffers,
    call,
    kept_tensors,
    named_tensors,
    own_copy,
)
from l0kernels.nn import gated_class

# Dead activations (ReLU, clipping, pooling) hide changes of one sign or size. So several are tried,
# as (size, share of elements that move up): 3 takes every element past zero, 100 most of them past
# a bias that follows; lone elements pass filters that cancel or invert what is common to all. Half
# of them start from one point, half from its mirror image, where what was dead is alive.
SIZES = {
    1.0: ((3.0, 1.0), (30.0, 0.1), (0.3, 1.0), (100.0, 0.0)),
    -1.0: ((3.0, 0.0), (30.0, 0.9), (100.0, 1.0)),
}

# How many of each suffice where all units of a layer change together.
FEW = 2

Change = Callable[[Tensor], Tensor]


def is_depthwise(module: nn.Module) -> bool:
    """A convolution in which every channel passes through its own filter."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and not isinstance(module, nn.modules.conv._ConvTransposeNd)
        and 1 < module.groups == module.in_channels == module.out_channels
    )


def is_layer(module: nn.Module) -> bool:
    """A layer that makes new units: a convolution (not depthwise) or a linear layer."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return not is_depthwise(module)
    return _is_conv1d_of_transformers(module)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """The linear layer of GPT-2, whose weight is [in, out]."""
    gated = gated_class(type(module))
    return gated is not None and gated.__name__ == "GatedConv1D"


def is_passage(module: nn.Module) -> bool:
    """A layer with parameters per channel through which channels pass unmixed."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_depthwise(module)


def feature_dim(module: nn.Module) -> int:
    """Dimension of the features, also of unbatched inputs where the layer takes them."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return -len(module.kernel_size) - 1
    return -1 if is_layer(module) else 1


_DROPOUTS = {
    f"{kind}{suffix}"
    for kind in (
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
    )
    for suffix in ("", "_")
}


class NoDropout(TorchFunctionMode):
    """Leaves dropout out: every run would draw other noise."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "native_dropout":
            x = args[0] if args else kwargs["input"]
            return x, torch.ones_like(x, dtype=torch.bool)
        if "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        if func is scaled_dot_product_attention and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        return func(*args, **kwargs)


# Functions that look at a tensor's dtype, device or shape only.
_LOOKS = {"to", "type_as", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_LOOKS |= {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn")}


class _Recorder(NoDropout):
    """Notes modules whose parameters are computed with outside their own forward."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(name)
        self.active: list[str] = []
        self.used_outside: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        made = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(made, Tensor) and getattr(func, "__name__", "") not in _LOOKS:
            for arg in (*args, *(kwargs or {}).values()):
                owners = self.owners.get(id(arg), []) if isinstance(arg, nn.Parameter) else []
                if owners and not set(owners) & set(self.active):
                    self.used_outside.update(owners)
        return out


@dataclass
class _Mode:
    """What a plain forward does in one mode.

    Args:
        training: the mode.
        calls: how often each module runs.
        outputs_of: what layers return, one entry per call of a layer in a forward.
        results: what the model returns and keeps.
    """

    training: bool
    calls: dict[str, int] = field(default_factory=dict)
    outputs_of: dict[str, list[Tensor]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)

    def signature(self) -> Any:
        return self.calls, {name: t.shape for name, t in self.results.items()}


@dataclass
class _Point:
    """Where replays start from.

    Args:
        training: the mode.
        sign: of the arguments and outputs; two points share their tensors.
        sizes: changes to make from here, see ``SIZES``.
        arguments: of the model, but for the sign.
        outputs_of: what layers return, one entry per call of a layer in a forward, but for the
            sign.
        inputs_of: what layers and passages read then.
        sums_of: two sums over what other modules with parameters read then.
        results: what the model returns and keeps then.
    """

    training: bool
    sign: float
    sizes: tuple[tuple[float, float], ...]
    arguments: Inputs
    outputs_of: dict[str, list[Tensor]]
    inputs_of: dict[str, list[Tensor]] = field(default_factory=dict)
    sums_of: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)

    def can_be_read(self) -> bool:
        """Whether no layer or passage reads NaN, which never equals itself."""
        return not any(bool(t.isnan().any()) for calls in self.inputs_of.values() for t in calls)

    def output(self, name: str, index: int) -> Tensor:
        """A new tensor: an in-place operation may follow."""
        out = self.outputs_of[name][index]
        return out.clone() if self.sign > 0 else -out

    def signed_arguments(self) -> Inputs:
        turn = self.sign < 0
        return tree_map_only(
            Tensor, lambda t: -t if turn and t.is_floating_point() else t, self.arguments
        )


class Touched:
    """What changed in a replay.

    Args:
        features: by layer or passage, bool of shape [features].
        others: further modules with parameters whose input changed.
        output: name of a result of the model that changed, or None.
    """

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.others: set[str] = set()
        self.output: str | None = None


class ForwardFails(Exception):
    """The model's forward raised with the example inputs."""


class Probe:
    """A model whose layers return recorded outputs, changed at will.

    Use it as a context manager: the layers get their own forwards back at the end.

    Args:
        model: a copy in fp32 or fp64; its buffers and training flags are put back at the end.
        inputs: positional (tuple) or keyword (mapping) arguments of its forward, in its dtype.

    Raises:
        ForwardFails: on entry.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        self.inputs = inputs
        self.modules: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if is_layer(module) or is_passage(module) or _has_own_parameters(module)
        }
        self._modules_read = {n for n, m in self.modules.items() if is_layer(m) or is_passage(m)}
        # Of what layers and depthwise convolutions return, at their first call.
        self._shapes: dict[str, torch.Size] = {}
        self.used_outside: set[str] = set()
        self._settling = False
        # The norm that goes on making what it made when the point was recorded.
        self._still: str | None = None
        self._last: tuple[Any, Tensor, Tensor] | None = None
        self._forwards: list[tuple[nn.Module, Any]] = []

    @torch.no_grad()
    def __enter__(self) -> Probe:
        self._flags = [(m, m.training) for m in self.model.modules()]
        self._buffers = KeptBuffers(self.model)
        self._devices = {p.device for p in self.model.parameters()}
        try:
            self._record_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for module, forward in self._forwards:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
        for module, training in self._flags:
            module.training = training

    def _record_all(self) -> None:
        for name, module in self.modules.items():
            self._forwards.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = self._watched(name, module)
        modes = [self._record(training=False)]
        training = self._record(training=True)
        if training.signature() != modes[0].signature():
            modes.append(training)
        self._points = [point for mode in modes for point in self._points_of(mode)]
        outputs = [t for mode in modes for calls in mode.outputs_of.values() for t in calls]
        largest = max((t.numel() for t in outputs), default=0)
        self._noise = _Noise(largest, next(self.model.parameters()).device)
        # In the order of the mode that calls more.
        modes.sort(key=lambda mode: -len(mode.calls))
        readers = dict.fromkeys(name for mode in modes for name in mode.calls)
        self.readers = [name for name in readers if name in self._modules_read]
        self.layers = [name for name in self.readers if is_layer(self.modules[name])]
        self.width = {name: self._size(name, "outputs_of") for name in self.layers}
        self._features = {name: self._size(name, "inputs_of") for name in self.readers}
        self.calls = {name: max(mode.calls.get(name, 0) for mode in modes) for name in self.readers}

    def _first(self, name: str, what: str) -> Tensor:
        return next(getattr(p, what)[name][0] for p in self._points if name in getattr(p, what))

    def _size(self, name: str, what: str) -> int:
        return self._first(name, what).shape[feature_dim(self.modules[name])]

    def features(self, reader: str) -> int:
        """Number of features that a layer or passage reads."""
        return self._features[reader]

    def positions(self) -> dict[str, int]:
        """Output positions (pixels, tokens) of one example per layer or depthwise convolution."""
        found = {}
        for name, shape in self._shapes.items():
            dim = feature_dim(self.modules[name]) % len(shape)
            examples = shape[0] if dim > 0 else 1  # unbatched
            found[name] = shape.numel() // max(1, shape[dim] * examples)
        return found

    def _record(self, training: bool) -> _Mode:
        """Run the plain forward: which modules run, and what layers return."""
        self._mode = mode = _Mode(training)
        self._recorder: _Recorder | None = _Recorder(self.modules)
        try:
            mode.results = dict(self._run(training, self.inputs, self._recorder))
        except Exception as error:
            what = "training" if training else "eval"
            kind = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            raise ForwardFails(
                f"the model's {what} forward fails with them (on a copy in {kind}): {error}"
            ) from error
        self.used_outside |= self._recorder.used_outside
        self._recorder = None
        return mode

    def _points_of(self, mode: _Mode) -> list[_Point]:
        """Two points that mirror each other: layer outputs and inputs of random sign.

        What the model really computes is the only point where it cannot take these.
        """
        generator = torch.Generator().manual_seed(0)

        def lively(t: Tensor) -> Tensor:
            return _lively(t, generator) if t.is_floating_point() else t

        arguments = tree_map_only(Tensor, lively, self.inputs)
        outputs = {name: [lively(t) for t in calls] for name, calls in mode.outputs_of.items()}
        points = [_Point(mode.training, *at, arguments, outputs) for at in SIZES.items()]
        if all(self._settle(point) for point in points):
            return points
        every = tuple(size for sizes in SIZES.values() for size in sizes)
        real = _Point(mode.training, 1.0, every, self.inputs, mode.outputs_of)
        if not self._settle(real):
            raise ForwardFails("the model's layers read NaN, or its forward fails when repeated")
        return [real]

    def _settle(self, point: _Point) -> bool:
        """Note what modules read at a point; whether the model can be there."""
        self._now, self._changes, self._calls, self._settling = point, {}, {}, True
        self._last, self._changed = None, True
        try:
            results = self._run(point.training, point.signed_arguments(), NoDropout())
        except Exception:  # values of another sign need not be legal inputs
            return False
        finally:
            self._settling = False
        # Cloned: the next forward may write there.
        point.results = {name: t.clone() for name, t in results}
        return point.can_be_read()

    def _watched(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._recorder is None:
                return self._replayed(name, forward, args, kwargs)
            self._mode.calls[name] = self._mode.calls.get(name, 0) + 1
            self._recorder.active.append(name)
            out = forward(*args, **kwargs)
            self._recorder.active.pop()
            if is_layer(module) or is_depthwise(module):
                self._shapes.setdefault(name, out.shape)
            if is_layer(module):
                # Cloned: an in-place operation may follow.
                self._mode.outputs_of.setdefault(name, []).append(out.clone())
            return out

        return run

    def _replayed(self, name: str, forward: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        index = self._calls.get(name, 0)
        self._calls[name] = index + 1
        if isinstance(x, Tensor):
            if name not in self._modules_read:
                self._note_sums(name, x, index)
            elif self._changed or name in self._kept:
                self._note(name, x, index)
        if name == self._still:
            return forward(self._now.inputs_of[name][index].clone())
        if name not in self._now.outputs_of:
            return forward(*args, **kwargs)
        out = self._now.output(name, index)
        change = self._changes.get(name)
        if change is None:
            return out
        self._changed = True
        return change(out)

    def _note(self, name: str, x: Tensor, index: int) -> None:
        """Record or compare what a layer or passage reads."""
        dim = feature_dim(self.modules[name])
        key = (id(x), x._version, dim, x.shape)
        # Layers called one after another often read the same tensor (query, key and value).
        if self._last is None or self._last[0] != key:
            if self._settling:
                # Cloned: the next forward may write there.
                found = x.clone()
            else:
                found = _features_of(x != self._now.inputs_of[name][index], dim).cpu()
            self._last = (key, x, found)
        found = self._last[2]
        if self._settling:
            self._now.inputs_of.setdefault(name, []).append(found)
            return
        if name in self._kept:
            self._kept[name].append(x.clone())
        before = self._touched.features.get(name)
        self._touched.features[name] = found if before is None else before | found

    def _note_sums(self, name: str, x: Tensor, index: int) -> None:
        """Record or compare what another module reads."""
        if self._settling or self._changed and name not in self._touched.others:
            x = torch.view_as_real(x) if x.is_complex() else x
            x = x if x.dtype in (torch.float32, torch.float64) else x.double()
            sums = float(x.sum()), float(torch.linalg.vector_norm(x))
            if self._settling:
                self._now.sums_of.setdefault(name, []).append(sums)
            elif sums != self._now.sums_of[name][index]:
                self._touched.others.add(name)

    def _run(
        self, training: bool, arguments: Inputs, function_mode: AbstractContextManager[Any]
    ) -> list[tuple[str, Tensor]]:
        self.model.train(training)
        try:
            with same_randomness(self._devices), function_mode:
                returned = call(self.model, own_copy(arguments))
            return [*named_tensors(returned), *kept_tensors(self.model)]
        finally:
            # Statistics that this run has moved would show as changes in the next.
            self._buffers.restore()

    def _replay(self, point: _Point, changes: Mapping[str, Change]) -> None:
        self._now, self._changes, self._calls, self._last = point, changes, {}, None
        self._changed = False
        try:
            results = self._run(point.training, point.signed_arguments(), NoDropout())
        except Exception:
            # Values steer the forward itself, as in routing to experts.
            self._touched.output = self._touched.output or "the forward fails when they change"
            return
        for name, tensor in results:
            if self._touched.output is not None:
                return
            recorded = point.results.get(name)
            if recorded is None or not _equal(tensor, recorded):
                self._touched.output = name

    @torch.no_grad()
    def touched(self, chosen: Mapping[str, Tensor], seed: int, most: int | None = None) -> Touched:
        """Change some units of some layers; see what changes, over all sizes and points.

        Args:
            chosen: by layer, bool of shape [units].
            seed: of the change.
            most: number of sizes to try at each point; None for all.
        """
        self._touched, self._kept = Touched(), {}
        for point in self._points:
            for size, share in point.sizes[:most]:
                noise = self._noise.starting(seed)
                changes = {
                    name: _shift(units, feature_dim(self.modules[name]), size, share, noise)
                    for name, units in chosen.items()
                }
                self._replay(point, changes)
        for name in self.readers:
            if name not in self._touched.features:
                self._touched.features[name] = torch.zeros(self.features(name), dtype=torch.bool)
        return self._touched

    @torch.no_grad()
    def reads_just(self, reader: str, maker: str) -> bool:
        """Whether a layer or passage reads what a layer makes, and nothing was done to it."""
        return all(
            torch.equal(point.inputs_of[reader][0], point.output(maker, 0))
            for point in self._points
            if reader in point.inputs_of
        )

    def reading_past(self, norm: str, maker: str) -> set[str]:
        """Who reads what a layer makes, other than through a norm that reads it."""
        self._still = norm
        try:
            everything = torch.ones(self.width[maker], dtype=torch.bool)
            found = self.touched({maker: everything}, 0, FEW).features
        finally:
            self._still = None
        return {name for name, features in found.items() if name != norm and features.any()}

    @torch.no_grad()
    def with_dropout(self) -> set[str]:
        """Layers and passages that read something else in training mode when dropout acts.

        Raises:
            ForwardFails: the model cannot be replayed in training mode.
        """
        outputs = self._record(training=True).outputs_of
        if not self._settle(_Point(True, 1.0, (), self.inputs, outputs)):
            raise ForwardFails(
                "the model's layers read NaN in training mode, or its forward fails when repeated"
            )
        self._touched, self._kept = Touched(), {}
        self._calls, self._last, self._changed = {}, None, True
        self._run(True, self.inputs, nullcontext())
        return {name for name, features in self._touched.features.items() if features.any()}

    @torch.no_grad()
    def inputs_with(
        self, changes: Mapping[str, Change], readers: Iterable[str]
    ) -> dict[str, list[Tensor]]:
        """What readers get when layers return changed outputs, at the first point that has them."""
        found: dict[str, list[Tensor]] = {}
        for point in self._points:
            wanted = {name for name in readers if name in point.inputs_of} - set(found)
            if wanted:
                self._touched, self._kept = Touched(), {name: [] for name in wanted}
                self._replay(point, changes)
                found.update(self._kept)
        return found


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two results are the same; NaN equals NaN, as in masked logits."""
    if first.shape != second.shape:
        return False
    if torch.equal(first, second):  # as nearly always, and three times as fast
        return True
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _features_of(new: Tensor, dim: int) -> Tensor:
    """Which features are new anywhere, bool of shape [features]."""
    others = [d for d in range(new.dim()) if d != dim % new.dim()]
    if not others:
        return new
    if new.numel() == 0:  # as an expert that is given no token reads
        return new.new_zeros(new.shape[dim])
    return new.view(torch.uint8).amax(others).bool()  # faster than any()


def _has_own_parameters(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def _lively(t: Tensor, generator: torch.Generator) -> Tensor:
    """Values of random sign, of the same magnitude but not small beside a bias that follows."""
    factor = torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5
    sign = torch.rand(t.shape, generator=generator, dtype=t.dtype).sub_(0.5).sign_()
    return (t.abs() + t.abs().mean().clamp_min(1.0)) * (sign * factor).to(t.device)


class _Noise:
    """Uniform numbers in [0, 1): slices of one pool, since drawing would take most of a replay.

    Args:
        largest: number of elements of the largest slice.
        device: where they are wanted.
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.rand(largest + MOST_STARTS - 1, generator=generator).to(device)

    def starting(self, seed: int) -> Callable[[torch.Size], Tensor]:
        """A function that returns slices by shape, not to be written to; a seed gives the same."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: torch.Size) -> Tensor:
            start = int(torch.randint(MOST_STARTS, (), generator=generator))
            return self._pool[start : start + shape.numel()].view(shape)

        return draw


MOST_STARTS = 1 << 16


def _shift(
    chosen: Tensor, dim: int, size: float, share: float, noise: Callable[[torch.Size], Tensor]
) -> Change:
    """Move the chosen units by random amounts around ``size`` times their magnitude."""

    def change(out: Tensor) -> Tensor:
        magnitude = out.abs()
        magnitude += magnitude.mean().clamp_min(1e-3)
        # Up where another random number is below the share.
        amount = ((noise(out.shape) + 0.5) * size).copysign_(share - noise(out.shape))
        shape = [1] * out.dim()
        shape[dim] = -1
        moved = out + amount * magnitude
        if moved.dtype != out.dtype:  # in an autocast region; not Inf, which spreads as NaN
            limits = torch.finfo(out.dtype)
            moved = moved.clamp(limits.min, limits.max).to(out.dtype)
        # Not a product: 0 * NaN would mark units that were left alone.
        return torch.where(chosen.view(shape).to(out.device), moved, out)

    return change


def spell(
    probe: Probe, numbers: Mapping[str, Tensor], tick: Callable[[], Any]
) -> dict[str, Tensor]:
    """Which number reaches every feature.

    Replay b changes the units whose number has bit b set, then those whose number has it clear. A
    feature that depends on one number changes in exactly one replay of each pair, and the pattern
    spells the number; a feature that depends on several changes in both replays of some pair. One
    that changes in some pairs only hides behind a dead activation: these pairs are repeated.

    Args:
        probe: the model.
        numbers: by layer, int64 of shape [units], at least 1; units with equal numbers count as
            one, so layers that share numbers must not meet in a feature.
        tick: called after each of ``2 * bits(numbers)`` replays.

    Returns:
        By reader, int64 of shape [features]: the number, -1 for none, -2 for several.
    """
    digits = range(bits(numbers))
    pairs = torch.stack([_replay_pair(probe, numbers, bit, bit, tick) for bit in digits])
    for attempt in range(1, MOST_ATTEMPTS):
        unclear = pairs.any(0).any(0) & ~pairs.all(1).any(0) & ~pairs.any(1)
        hidden = [bit for bit in digits if bool(unclear[bit].any())]
        for bit in hidden:
            seed = attempt * len(pairs) + bit
            pairs[bit] |= _replay_pair(probe, numbers, bit, seed, lambda: None)
    sizes = [probe.features(name) for name in probe.readers]
    return dict(zip(probe.readers, _decode(pairs).split(sizes), strict=True))


MOST_ATTEMPTS = 5


def _replay_pair(
    probe: Probe, numbers: Mapping[str, Tensor], bit: int, seed: int, tick: Callable[[], Any]
) -> Tensor:
    """Which features of all readers, in a row, change with the bit set and clear, [2, features]."""
    found = []
    for value in (1, 0):
        chosen = {name: (n >> bit & 1) == value for name, n in numbers.items()}
        touched = probe.touched(chosen, 1000 + 2 * seed + value).features
        found.append(torch.cat([touched[name] for name in probe.readers]))
        tick()
    return torch.stack(found)


def bits(numbers: Mapping[str, Tensor]) -> int:
    """Number of binary digits of the largest number."""
    return max(int(n.max()) for n in numbers.values()).bit_length()


def _decode(changed: Tensor) -> Tensor:
    """Numbers from the replays, changed [bits, (set, clear), features]."""
    once = changed[:, 0] ^ changed[:, 1]
    weights = 1 << torch.arange(changed.shape[0])
    number = (changed[:, 0] * weights[:, None]).sum(0)
    number = torch.where(once.all(0), number, -2)
    return torch.where(changed.any(0).any(0), number, -1)
