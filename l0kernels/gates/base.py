# SPDX-License-Identifier: Apache-2.0
"""What all gate methods share: the flat vector, its draws and its penalty."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from l0kernels.functional import GateLayout, OpenLists, open_lists, sample_gates
from l0kernels.gates.dense import DenseGroups
from l0kernels.gates.draw import LEAST, Draw, Graph, engine, on_host, raise_for
from l0kernels.gates.examples import ExampleGates, mean_loss
from l0kernels.gates.ref import GateRef
from l0kernels.gates.rounding import Rounding

if TYPE_CHECKING:
    from l0kernels.gates.capacity import Plan
    from l0kernels.ops.unpack_rows import KeptGradient

GPU_MULTIPLE = 16  # channels that a tensor core's instruction takes
# Channels of a vector of oneDNN, which prepares a convolution for a width in about a millisecond.
# Of small groups it computes less without what would be added.
CPU_MULTIPLES = (16, 8)
MOST_ADDED = 1 / 8  # of a group
# Units of a group without convolutions for which MKL's odd widths cost more than to sort.
LEAST_ROUNDED = 1024
# Attributes that steps set.
OF_A_STEP = frozenset(("_draw", "_awaiting", "_held", "_plan"))
# Prices of units that are remembered on the device.
MOST_COSTS = 8
# Numbers in the weights of a model for which a call costs more than keeping packed gradients.
FEW_WEIGHTS = 1 << 22


def per_group(what: str, value: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Spread one number over all groups, or check that a mapping names every group once."""
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(f"{what}: expected one value for each of {names}, got {list(value)}")
        values = {name: float(value[name]) for name in names}
    else:
        values = dict.fromkeys(names, float(value))
    if not all(math.isfinite(v) for v in values.values()):
        raise ValueError(f"{what}: expected finite numbers, got {value}")
    return values


def not_negative(what: str, value: float) -> float:
    """A finite number of at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{what}: expected a number of at least 0, got {value!r}")
    return float(value)


def one_of(what: str, value: Any, names: tuple[str, ...]) -> str:
    """One of some names."""
    if value not in names:
        raise ValueError(f"{what}: expected one of {names}, got {value!r}")
    return value


def droprates(droprate: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """Initial P(z = 0) of every group.

    Raises:
        ValueError: one outside (0, 1), or not one for every group.
    """
    rates = per_group("droprate", droprate, names)
    bad = {name: rate for name, rate in rates.items() if not 0 < rate < 1}
    if bad:
        raise ValueError(f"droprate: expected values in (0, 1), got {bad}")
    return rates


def whole_number(what: str, value: Any, expected: str, low: int, high: int) -> int:
    """An integer of any kind (numpy's too) with low <= value < high."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number < high:
        raise ValueError(f"{what}: expected {expected}, got {value!r}")
    return number


class Follower(Protocol):
    """Who brings parameters up to date before layers read them."""

    def drawn(self, draw: Draw) -> None:
        """Gates were drawn: the layers are about to read what is open in this draw."""

    def release(self) -> None:
        """The gates are about to be removed: bring all up to date and follow no more."""


class Captured(Protocol):
    """Who makes training steps of which the host learns later whether they have to be redone."""

    def flush(self) -> None:
        """Parameters, buffers or gates are about to be read or changed: finish all steps."""

    def release(self) -> None:
        """The gates are about to be removed, or to have others: finish, and make no more steps."""


class Gates(nn.Module):
    """All gates of a model in one flat vector ``log_alpha``, drawn together.

    Subclasses name the law or draw by ``sample``, set ``log_alpha`` and give the deterministic gate
    and the probability of being open, computed from ``alpha``. ``forward`` is the identity, so that
    the gates can live anywhere in a model.

    Args:
        groups: name -> number of units.
        lam: weight of the penalty, one number or one per group.
        n_train: size of the training set; the penalty is divided by it.
        seed: key of the noise.
        lam_warmup: part of the training over which ``lam`` grows from 0, from 0, for none, to 1.
    """

    law: ClassVar[str]
    granularities: ClassVar[tuple[str, ...]] = ("unit", "input")
    """What ``convert`` may give gates of this method to."""
    l2: float = 0.0
    """Precision of the coupled L2, see ``l0kernels.penalty``; methods that have it set it."""
    scope: str = "batch"
    """Whether a training draw serves the ``"batch"`` or each ``"example"``; methods that can do
    both set it."""
    # Of tests that run on a CPU what a GPU does; None: what the device asks for.
    _together: bool | None = None
    _multiple: int | None = None
    log_alpha: nn.Parameter
    step: Tensor
    seed: Tensor
    lam_scale: Tensor

    def __init__(
        self,
        groups: Mapping[str, int],
        *,
        lam: float | Mapping[str, float] = 1.0,
        n_train: int = 1,
        seed: int = 0,
        lam_warmup: float = 0.0,
    ) -> None:
        super().__init__()
        if not groups:
            raise ValueError("groups: expected at least one, got none")
        self.names = list(groups)
        self.sizes = [
            whole_number(f"group {name!r}", size, "a positive number of units", 1, 2**63)
            for name, size in groups.items()
        ]
        self.count = sum(self.sizes)
        self._lam = per_group("lam", lam, self.names)
        if not 0 <= lam_warmup <= 1:
            raise ValueError(f"lam_warmup: expected a number from 0 to 1, got {lam_warmup!r}")
        self.lam_warmup = float(lam_warmup)
        if lam_warmup > 0:
            self.register_buffer("lam_scale", torch.zeros(()))
        self.n_train = whole_number("n_train", n_train, "a positive integer", 1, 2**63)
        seed = whole_number("seed", seed, "an integer 0 <= seed < 2**63", 0, 2**63)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        offsets = torch.tensor([0, *self.sizes]).cumsum(0)
        self.starts = dict(zip(self.names, offsets.tolist(), strict=False))
        empty = torch.zeros(2, 0, dtype=torch.int64)
        self.layout = GateLayout(offsets, empty, torch.zeros(1, dtype=torch.int64))
        self.port_maps: list[Tensor] = []
        self.port_starts: list[int] = []
        self.port_selects: list[bool] = []
        # Of each port, whether as many packed features as it has say that all are open.
        self.tells_open: list[bool] = []
        self.port_arrivals: list[list[tuple[int, int]] | None] = []
        self.rounding: Rounding | None = None
        self._ports: dict[tuple[str, ...], int] = {}
        self._norms: list[tuple[str, ...]] = []
        self.unit_weights = torch.ones(self.count, dtype=torch.float64)
        self.unit_flops: Tensor | None = None
        # Of each gate, whether it stands for a filter, else for columns; and of "no gate".
        self.has_filter = torch.zeros(0, dtype=torch.bool)
        self.refused: dict[str, str] = {}
        self._cost = self._cost_of(self._lam, self.unit_weights).float()
        # What each unit has of all gated weights, and of all work, once asked for.
        self._shares: dict[str, Tensor] = {}
        # What each unit costs by other prices than ``_cost``, as it was asked for lately.
        self._costs: dict[tuple[Any, ...], Tensor] = {}
        self._draw: Draw | None = None
        self._awaiting: Draw | None = None
        self._frozen_at: Tensor | None = None
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        # Those that pack together, from the first forward on: see l0kernels.nn.packing.Members.
        self.layers: weakref.WeakKeyDictionary[Any, dict[bool, torch.dtype | None]] | None = None
        self._has_few_weights = self._has_convolutions = False
        self.dense: DenseGroups | None = None
        self._held = 0
        # Optimizers that leave closed rows behind: they are told of every draw.
        self.followers: list[Follower] = []
        # Memory for gradients of weights that these follow.
        self.kept: dict[Tensor, KeptGradient] = {}
        self.captured: Captured | None = None
        # Widths that draws have whatever is open, while a step is captured.
        self._plan: Plan | None = None

    # What a method supplies.

    def deterministic(self) -> Tensor:
        """Test gates, shape [gates]."""
        raise NotImplementedError

    def open_probability(self) -> Tensor:
        """P(z != 0) of every gate, fp64 of shape [gates], without gradient."""
        raise NotImplementedError

    def openness(self) -> Tensor:
        """P(z != 0) of every gate, fp64 of shape [gates], differentiable.

        Only methods that set ``l2`` supply it: nothing else asks for it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no coupled L2")

    def project(self, values: Tensor) -> None:
        """Bring the parameters into the range the method asks for, before each sample.

        Args:
            values: of ``log_alpha``, to be changed in place.
        """

    def sample(self, cost: Tensor, key: Tensor) -> tuple[Tensor, Tensor, OpenLists]:
        """Values of all gates and a final 1, their expected cost (0-d), both differentiable, and
        open lists, of the draw with this key (seed and step).
        """
        return sample_gates(self.log_alpha, key, cost, self.layout, self.law)

    def example_values(self, k: Tensor, law: str) -> Tensor:
        """Values of all gates of some examples, [examples, gates], differentiable.

        Only methods that set ``scope`` supply it.

        Args:
            k: the noise, int32 from 0 to 2^23 - 1 of shape [examples, gates].
            law: of the values, the method's own or what goes with it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gates per example")

    def masks_of(self, values: Tensor) -> dict[str, Any]:
        """What masks the weight of each group of weight gates, with these gate values.

        Args:
            values: shape [gates].
        """
        return {}

    def estimate(self, closure: Callable[[], Tensor], model: nn.Module) -> Tensor:
        """Estimator of the expected loss (0-d) under the current draw.

        Args:
            closure: computes the loss with the model, where ``scope`` is ``"example"`` maybe one
                for each example.
            model: what the user called ``expected_loss`` with.
        """
        return mean_loss(closure())

    # Frozen gates.

    @property
    def frozen(self) -> bool:
        """Whether ``freeze`` has been called."""
        return self._frozen_at is not None

    @property
    def alpha(self) -> Tensor:
        """The values that count, shape [gates]: ``log_alpha``, or what it was when frozen."""
        return self.log_alpha if self._frozen_at is None else self._frozen_at

    def freeze(self) -> None:
        """Train on with the present test gates: nothing is sampled, and widths stay.

        ``log_alpha`` gets gradients of exactly zero, of the data loss and of the penalty, instead
        of none: DDP waits for them. As momentum and weight decay move a parameter at zero
        gradient, the gates depend on a copy made here, and ``log_alpha`` is put back to it before
        the next draw. ``step`` stands still. Frozen twice is frozen once.

        A ``state_dict`` has the frozen values as ``log_alpha``, and whether gates are frozen as
        extra state. Gates are frozen at the ``log_alpha`` that they load, if the state says so or
        if they are frozen and it says nothing (tensors only).

        Call it between training steps, under DDP on every rank. An averaged (EMA) model has gates
        of its own: freeze them too, or they go on following ``log_alpha``.

        Raises:
            RuntimeError: inside ``hold`` or ``expected_loss``.
        """
        self._check_free("freeze")
        if self._frozen_at is None:
            self._freeze_at(self.log_alpha.detach().clone())

    def unfreeze(self) -> None:
        """Sample again, from ``log_alpha`` as it was when frozen.

        Raises:
            RuntimeError: inside ``hold`` or ``expected_loss``.
        """
        self._check_free("unfreeze")
        if self._frozen_at is not None:
            if not self.log_alpha.equal(self._frozen_at):  # writes through .data have no version
                with torch.no_grad():
                    self.log_alpha.copy_(self._frozen_at)
            self._freeze_at(None)

    def _check_free(self, what: str) -> None:
        if self._held:
            raise RuntimeError(f"{what}: expected to be outside hold and expected_loss")
        self.finish_steps()

    def finish_steps(self) -> None:
        """Have steps that were captured and are not known to be right finished."""
        if self.captured is not None:
            self.captured.flush()

    def _freeze_at(self, values: Tensor | None) -> None:
        self._frozen_at = values
        self._draw = None

    # Structure.

    @property
    def lam(self) -> dict[str, float]:
        """Weight of the penalty per group; ``penalty(lam=...)`` replaces it for one call."""
        return dict(self._lam)

    def __getitem__(self, name: str) -> GateRef:
        if name not in self.starts:
            raise KeyError(f"no group {name!r}; the groups are {self.names}")
        start = self.starts[name]
        return GateRef(self, (torch.arange(start, start + self.sizes[self.names.index(name)]),))

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Every group's name and its range in the flat vector."""
        for name, size in zip(self.names, self.sizes, strict=True):
            yield name, slice(self.starts[name], self.starts[name] + size)

    def attach(self, root: nn.Module, positions: Mapping[str, int] | None = None) -> nn.Module:
        """Connect the gates to the gated layers of a model and draw before its forward.

        ``root.l0`` becomes these gates. Call it once, after the layers have their references.

        Args:
            root: the model whose training forward draws the gates.
            positions: output positions (pixels, tokens) per example by name, of all gated layers
                whose weight has two dimensions or more; only ``penalty(per="flop")`` needs them.

        Returns:
            ``root``.

        Raises:
            ValueError: no layer of the model uses these gates, the model has other gates, a
                feature would have two producers' gates, gates before a norm are used otherwise
                than ``nn.constants`` says, or positions lack a layer.
        """
        from l0kernels.nn.base import GatedLayer
        from l0kernels.nn.constants import check_places

        other = getattr(root, "l0", None)
        if other is not None and other is not self:
            raise ValueError(f"attach: expected a model without gates, got l0 = {type(other)}")
        layers = [m for m in root.modules() if isinstance(m, GatedLayer) and m.gates is self]
        if not layers:
            raise ValueError("attach: expected a model with layers that use these gates, got none")
        check_places(self, layers)
        self.layers = self._draw = None
        names = {module: name for name, module in root.named_modules()}
        self._take(layers, names, positions)
        self._cost = self._cost_of(self._lam, self.unit_weights).to(self.log_alpha)
        self._shares, self._costs = {}, {}
        _keep_draws_out_of_graphs()
        if other is None:
            root.add_module("l0", self)
        if draw_before_forward not in root._forward_pre_hooks.values():
            root.register_forward_pre_hook(draw_before_forward)
        return root

    def _take(
        self, layers: list[Any], names: Mapping[nn.Module, str], positions: Mapping[str, int] | None
    ) -> None:
        """Learn which layers use which gates, and what each gate's unit costs."""
        self._plan_ports(layers)
        self._has_convolutions = any(isinstance(m, nn.modules.conv._ConvNd) for m in layers)
        norms = [m for m in layers if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._norms = [tuple(names[norm].split(".")) for norm in norms]
        self.has_filter = _find_filters(self, layers).to(self.log_alpha.device)
        self.unit_weights = _size_per_unit(self, [(layer, 1) for layer in layers])
        if positions is not None:
            work = [(layer, uses_of(layer, names[layer], positions)) for layer in layers]
            self.unit_flops = _size_per_unit(self, work)

    def _plan_ports(self, layers: list[Any]) -> None:
        produced = torch.zeros(self.count + 1, dtype=torch.bool)
        for layer in layers:
            if layer.out_gate is not None:
                for gate_map in layer.out_gate.maps:
                    produced[gate_map] = True
        produced[self.count] = False
        self._ports, self.port_maps = {}, []
        self.port_selects, self.port_arrivals = [], []
        for name in self.names:
            self._add_port(self[name], produced)
        for layer in layers:
            for ref in (layer.in_gate, layer.out_gate):
                if ref is not None:
                    self._add_port(ref, produced)
            layer.in_port = -1 if layer.in_gate is None else self.port_of(layer.in_gate)
            layer.out_port = -1 if layer.out_gate is None else self.port_of(layer.out_gate)
        device = self.log_alpha.device
        ends = torch.tensor([0, *(m.shape[1] for m in self.port_maps)]).cumsum(0)
        self.port_starts = ends.tolist()[:-1]
        sizes = dict(zip(self.starts.values(), self.sizes, strict=True))
        self.rounding = Rounding.of(self.port_maps, self.port_selects, sizes)
        self.dense = DenseGroups(self.sizes, self.starts.values(), self.port_maps, self.rounding)
        self.rounding.apply(lambda tensor: tensor.to(device))
        self.layout = GateLayout(
            self.layout.group_offsets.to(device),
            torch.cat(self.port_maps, 1).to(device),
            ends.to(device),
        )
        small = torch.tensor([*(size <= LEAST for size in self.sizes), False])
        fills = small.repeat_interleave(torch.tensor([*self.sizes, 1]))
        self.tells_open = [
            not selects and not bool(fills[m[0]].any())
            for m, selects in zip(self.port_maps, self.port_selects, strict=True)
        ]
        self.port_widths = [m.shape[1] for m in self.port_maps]
        self.port_maps = [m.to(device) for m in self.port_maps]

    def _add_port(self, ref: GateRef, produced: Tensor) -> None:
        key = _port_key(ref)
        if key in self._ports:
            return
        made, extra = (torch.full((ref.features,), self.count) for _ in range(2))
        for gate_map in ref.maps:
            born = produced[gate_map]
            other = ~born & (gate_map != self.count)
            if (born & (made != self.count)).any() or (other & (extra != self.count)).any():
                raise ValueError(
                    "gates: expected at most one producer's gate per feature and one gate "
                    "without a producer, got two of a kind"
                )
            made = torch.where(born, gate_map, made)
            extra = torch.where(other, gate_map, extra)
        self._ports[key] = len(self.port_maps)
        self.port_arrivals.append(arrivals(made, self.starts, self.sizes, self.count))
        self.port_maps.append(torch.stack((made, extra)))
        self.port_selects.append(bool((extra != self.count).any()))

    def port_of(self, ref: GateRef) -> int:
        """Number of the port that ``attach`` made for a reference.

        Raises:
            RuntimeError: no layer of the model has this reference.
        """
        port = self._ports.get(_port_key(ref))
        if port is None:
            raise RuntimeError(f"{ref}: expected a reference that a layer of the model has")
        return port

    def arriving(self, port: int, draw: Draw) -> int | None:
        """Number of features that reach a port packed in this draw, where it is easily told."""
        parts = self.port_arrivals[port]
        if parts is None:
            return None
        # The first ports are the groups themselves.
        return sum(n if group < 0 else n * draw.widths[group] for group, n in parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        # The maps are not buffers: they would be sent by DDP at every step.
        before, scale = self.log_alpha.data, getattr(self, "lam_scale", None)
        super()._apply(fn, recurse)
        if self.log_alpha.dtype in (torch.float16, torch.bfloat16):
            # Gates of a half-precision model stay in the precision their law needs.
            self.log_alpha.data = before.to(self.log_alpha.device, torch.float32)
        if scale is not None:
            self.lam_scale = scale.to(self.log_alpha)
        if self._frozen_at is not None:
            self._frozen_at = self._frozen_at.to(self.log_alpha)
        self.layout = GateLayout(*(fn(t) for t in self.layout))
        if self.rounding is not None:
            self.rounding.apply(fn)
        self.port_maps = [fn(m) for m in self.port_maps]
        self.has_filter = fn(self.has_filter)
        # Anew rather than converted: a detour over a narrow dtype would lose digits.
        self._cost = self._cost_of(self._lam, self.unit_weights).to(self.log_alpha)
        self._shares, self._costs = {}, {}
        self._draw = None
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # A module looks for parameters in all that is set: not in what is set in every step.
        if name in OF_A_STEP:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A draw belongs to one graph: it is never copied or pickled.
        self._rows_seen()  # a copy does not know the layers at first
        state = self.__dict__.copy()
        state.update(_draw=None, _awaiting=None, _held=0, layers=None)
        state.update(followers=[], kept={}, captured=None, _plan=None)
        del state["_graphs"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = weakref.WeakSet()
        _keep_draws_out_of_graphs()

    def get_extra_state(self) -> dict[str, Any]:
        """Group names and sizes, so that a checkpoint of other gates is noticed, whether the
        gates are frozen, and the rows by which groups run dense, so that a run that is resumed
        goes on with the same bits.
        """
        groups = dict(zip(self.names, self.sizes, strict=True))
        return {"groups": groups, "frozen": self.frozen, "rows": self._rows_seen()}

    def _rows_seen(self) -> list[float] | None:
        return None if self.dense is None else self.dense.state(self.layers or ())

    def set_extra_state(self, state: Any) -> None:
        """Nothing: it has to be read before the parameters are loaded."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._frozen_at is not None:
            # Not the parameter, which an optimizer may have moved.
            destination[f"{prefix}log_alpha"] = self._frozen_at.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix and not any(key.startswith(prefix) for key in state_dict):
            return  # A checkpoint from before conversion has no gates: keep the present ones.
        self._check_free("load_state_dict")
        extra = state_dict.get(f"{prefix}_extra_state")
        freeze, rows = self._frozen_in(extra), self._rows_in(extra)
        self.unfreeze()  # A log_alpha that the state does not have is the frozen one.
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._draw = None
        if self.dense is not None:
            self.dense.load(rows)
        if freeze:
            self.freeze()

    def _rows_in(self, state: Any) -> list[float] | None:
        """The rows in this extra state, None where it has none, as older ones.

        Raises:
            ValueError: they are not one number for each group.
        """
        rows = state.get("rows") if isinstance(state, Mapping) else None
        if rows is None or isinstance(rows, int):  # bare groups, one of that name
            return None
        numbers = isinstance(rows, list) and all(isinstance(r, (int, float)) for r in rows)
        if not numbers or len(rows) != len(self.names):
            raise ValueError(
                f"load_state_dict: expected rows of {len(self.names)} groups, got {rows!r}"
            )
        return rows

    def _frozen_in(self, state: Any) -> bool:
        """Whether gates that load this extra state are frozen.

        States without ``"frozen"`` leave it as it is: None where there are tensors only, and the
        bare groups that gates had before they could be frozen.

        Raises:
            ValueError: the state is of other gates, or none of gates.
        """
        if state is None:
            return self.frozen
        expected = dict(zip(self.names, self.sizes, strict=True))
        new = isinstance(state, Mapping) and isinstance(state.get("groups"), Mapping)
        groups = state["groups"] if new else state
        # The order counts: groups stand one after another in log_alpha.
        if not isinstance(groups, Mapping) or [*groups.items()] != [*expected.items()]:
            raise ValueError(f"load_state_dict: expected gates {expected}, got {groups}")
        frozen = state.get("frozen") if new else None
        if frozen is not None and not isinstance(frozen, bool):
            raise ValueError(f"load_state_dict: expected frozen True or False, got {frozen!r}")
        return self.frozen if frozen is None else frozen

    def forward(self, x: Any) -> Any:
        return x

    # Packing.

    @property
    def together(self) -> bool:
        """Whether layers pack in one call for the model, unless compiled: on a GPU, where each
        launch counts, and where weights are few.
        """
        if torch.compiler.is_compiling():
            return False
        if self._together is not None:
            return self._together
        return self._has_few_weights or self.log_alpha.is_cuda

    def multiple_of(self, size: int) -> int:
        """What the packed width of a group is rounded up to multiples of, where it can be."""
        if self._multiple is not None:
            return self._multiple
        if self.log_alpha.is_cuda:
            return GPU_MULTIPLE
        if not self._has_convolutions and size < LEAST_ROUNDED:
            return 1
        return next((m for m in CPU_MULTIPLES if m <= MOST_ADDED * size), 1)

    def span(self, port: int, draw: Draw) -> tuple[int, int]:
        """Where the packed features of a port lie in the lists of a draw; (-1, 0) for no port."""
        return (-1, 0) if port < 0 else (self.port_starts[port], draw.widths[port])

    def drops(self, port: int, draw: Draw) -> bool:
        """Whether features of a port are left out by the layer that makes them; no port: no.

        Not where the host knows that all are open, nor in groups that run dense. Of groups so small
        that closed units may fill them up it is not known whether all are open: yes.
        """
        if port < 0 or port in draw.dense:
            return False
        whole = draw.counts[port] == self.port_widths[port] and not draw.is_planned
        return not (whole and self.tells_open[port])

    def packs(self, layer: Any, draw: Draw) -> bool:
        """Whether any parameter of a layer is packed, or is as it is."""
        reads = layer.in_port >= 0 and layer.in_port not in draw.dense
        return reads or self.drops(layer.out_port, draw)

    def runs_dense(self, group: int, is_open: float) -> bool:
        """Whether a group runs dense with a part of its units open, see ``DenseGroups``."""
        if self.dense is None or self.log_alpha.is_cuda:  # a GPU packs in no time
            return False
        return self.dense.runs_dense(group, is_open, self.layers or ())

    def _dense_ports(self, counts: list[int]) -> dict[int, Tensor]:
        """All features of the ports that run dense, given the open features of every port."""
        if self.dense is None or self.log_alpha.is_cuda:
            return {}
        return self.dense.of_draw(counts, self.layers or ())  # the first ports are the groups

    def begin_forward(self, root: nn.Module) -> None:
        """Have the layers of the model pack anew, also under a draw that is held: parameters may
        have changed since.
        """
        from l0kernels.nn.packing import layers_of

        self._drop_shares()
        if self._draw is not None and self._draw.examples is not None:
            self._draw.examples.begin_forward()
        if self.layers is None:
            self.layers = layers_of(root, self)
            weights = sum(layer.weight.numel() for layer in self.layers)
            self._has_few_weights = weights <= FEW_WEIGHTS
            if self.dense is not None:
                self.dense.forget()

    def _drop_shares(self) -> None:
        if self._draw is None or self.layers is None:
            return
        for mode, shares in self._draw.shares.items():
            for layer in shares:
                self.layers[layer][mode] = None
        self._draw.shares.clear()

    # Draws.

    def current_draw(self, ports: tuple[int, int] | None = None) -> Draw:
        """The draw that layers use now.

        Args:
            ports: of the layer that asks, input and output; None if it is none.

        Raises:
            RuntimeError: nothing was drawn yet, the draw is of another mode or of parameters that
                have changed, or a layer is recomputed in backward (activation checkpointing)
                after its draw was replaced.
        """
        draw = self._draw
        if draw is None:
            raise RuntimeError(
                "no gates are drawn: call the model that the gates are attached to, or use "
                "expected_loss, hold or frozen"
            )
        if not torch.compiler.is_compiling():
            self._check_mode(draw)
            if in_backward():
                self._check_recomputation(draw)
            elif draw.differentiable and not torch.is_grad_enabled():
                draw.awaits_backward = True
            if draw.prefix is not None:
                draw.prefix.reach(ports)
        return draw

    def _check_mode(self, draw: Draw) -> None:
        if draw.training != self.training:
            modes = {True: "training", False: "eval"}
            raise RuntimeError(
                f"gates: expected a draw of {modes[self.training]} mode, got one of "
                f"{modes[draw.training]} mode; call the model that the gates are attached to"
            )
        if not self._held and draw.version != self.log_alpha._version:
            raise RuntimeError(
                "gates: expected a draw of the present parameters, got an older one; call the "
                "model that the gates are attached to, or use hold"
            )

    def _check_recomputation(self, draw: Draw) -> None:
        replaced = self._awaiting is not None or any(g is not draw.graph for g in self._graphs)
        self._awaiting = None
        draw.awaits_backward = False
        if replaced:
            raise RuntimeError(
                f"recomputation in backward: expected the draw of the forward being recomputed, "
                f"but the gates were drawn again (step {int(self.step)}) while that forward waits "
                f"for backward; call backward before the next draw, put both forwards under one "
                f"l0kernels.hold, and keep no other loss of this model alive"
            )

    def keep_for_recomputation(self) -> None:
        """Let the model be run again in backward under the draw of its forward.

        Raises:
            RuntimeError: that draw was made without gradients, by reentrant checkpointing around
                the whole model.
        """
        if not self.current_draw().differentiable:
            raise RuntimeError(
                "reentrant checkpointing around the model runs its forward without gradients: "
                "expected it inside l0kernels.expected_loss or l0kernels.hold, got neither "
                "(or pass use_reentrant=False)"
            )

    def _drop_draw(self) -> None:
        self._drop_shares()
        self._draw = None

    def _set_draw(self, draw: Draw) -> None:
        self._drop_shares()
        if self._draw is not None and self._draw.awaits_backward:
            self._awaiting = self._draw
        self._draw = draw
        if draw.differentiable:
            self._graphs.add(draw.graph)
        for follower in self.followers:
            follower.drawn(draw)

    def draw(self) -> None:
        """Draw the gates: sampled in training mode, deterministic in eval mode and when frozen.

        Raises:
            ValueError: NaN in log_alpha, or a step that no longer fits the noise counter.
        """
        if not self.training:
            self.draw_given(self._checked_deterministic())
        elif self.frozen:
            self._settle()
            self.draw_given(Constant.apply(self.log_alpha, self._checked_deterministic()))
        else:
            self.step.add_(1)
            if self.dense is not None:
                self.dense.next_draw()
            z, expected, lists, key = self._sample(self._cost)
            drawn_from = self.log_alpha, key
            if self.scope == "example":
                if min(on_host(lists.counts), default=0) < 0:
                    raise_for(drawn_from)
                self._set_draw(self._by_example(self.law, key, expected))
                return
            self._set_draw(self._make_draw(z, lists, expected, drawn_from, self._dense_ports))

    @torch.no_grad()
    def _checked_deterministic(self) -> Tensor:
        values = self.deterministic()
        if values.device.type == "cpu" and bool(values.isnan().any()):
            nan = values.isnan().nonzero().flatten()
            raise ValueError(
                f"log_alpha: expected no NaN; got {nan.numel()} of {self.count}, "
                f"first at {int(nan[0])}"
            )
        return values

    def draw_given(self, values: Tensor) -> None:
        """Use these gate values as the draw.

        Args:
            values: shape [gates].
        """
        z = torch.cat((values, values.new_ones(1)))
        lists = open_lists(z.detach(), self.layout)
        draw = self._make_draw(z, lists)
        draw.masks = self.masks_of(values)
        self._set_draw(draw)

    def _make_draw(
        self,
        z: Tensor,
        lists: OpenLists,
        expected: Tensor | None = None,
        drawn_from: tuple[Tensor, Tensor] | None = None,
        dense: Callable[[list[int]], Mapping[int, Tensor]] | None = None,
    ) -> Draw:
        places = self.port_starts, self.port_selects
        mode = self.training, self.log_alpha._version
        if self._plan is not None:
            lists = self._plan.lists(z, lists)
            planned = self._plan.widths
            return Draw(z, lists, *places, *mode, expected, drawn_from, planned=planned)
        rounding, widths, index = self.rounding, None, None
        # The largest group has the largest multiple.
        if rounding is not None and self.multiple_of(max(self.sizes)) > 1:
            multiples = rounding.multiples(self.multiple_of)
            index = rounding.index(z, lists, multiples)
            widths = functools.partial(rounding.widths, multiples=multiples)
        return Draw(z, lists, *places, *mode, expected, drawn_from, widths, index, dense)

    def _by_example(self, law: str, key: Tensor, expected: Tensor | None = None) -> Draw:
        """The draw that gives each example its own gates: all features stay where they are."""
        z = self.log_alpha.new_ones(self.count + 1)
        lists = open_lists(z, self.layout)
        dense = {
            port: torch.arange(features.shape[1], device=z.device)
            for port, features in enumerate(self.port_maps)
        }
        draw = self._make_draw(z, lists, expected, (self.log_alpha, key), lambda _: dense)
        draw.examples = ExampleGates(self, law, key, draw.graph)
        return draw

    def _sample(self, cost: Tensor) -> tuple[Tensor, Tensor, OpenLists, Tensor]:
        """Values, expected cost and lists of the present step, and the key they came from."""
        if self.training:
            self._settle()
        key = torch.stack((self.seed, self.step))
        with engine():
            return *self.sample(cost, key), key

    def _settle(self) -> None:
        """Bring log_alpha to where the method, or having been frozen, wants it.

        Always: no version says that a fused optimizer has written to it, and to compare values
        would be to wait for a GPU. Without a new version: a graph of values that stay as they are
        may wait for backward.
        """
        if self._frozen_at is None:
            self.project(self.log_alpha.data)
        else:
            self.log_alpha.data.copy_(self._frozen_at)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Draw on entry and keep that draw until the outermost scope ends."""
        if not self._held:
            self.draw()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextmanager
    def using(self, values: Tensor) -> Iterator[None]:
        """Use these gate values, shape [gates], in every forward of the scope."""
        self.draw_given(values)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextmanager
    def instead(self, draw: Draw) -> Iterator[None]:
        """Use another draw in the scope; afterwards the present one is as it was."""
        present, awaiting = self._draw, self._awaiting
        self._set_draw(draw)
        try:
            yield
        finally:
            self._drop_shares()
            self._draw, self._awaiting = present, awaiting

    @contextmanager
    def at_capacity(self, plan: Plan) -> Iterator[None]:
        """Give all draws of the scope these widths; none of them outlives it.

        Nor does one from before live on in it: its autograd graph ties gradients to the stream that
        it was made on, which is not the one of a capture.
        """
        self._drop_draw()
        self._plan = plan
        try:
            yield
        finally:
            self._drop_draw()
            self._plan = None

    @contextmanager
    def caching_eval(self) -> Iterator[None]:
        """Keep the deterministic gates and what layers pack with them (eval mode)."""
        if self.training:
            raise RuntimeError("frozen: expected a model in eval mode, got training mode")
        self._check_free("frozen")
        with torch.inference_mode(False), torch.no_grad():
            self.draw()
        assert self._draw is not None
        self._draw.packed = {}
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._draw = None

    # Penalty and numbers.

    def _cost_of(self, lam: Mapping[str, float], sizes: Tensor) -> Tensor:
        lams = torch.tensor([lam[name] for name in self.names], dtype=torch.float64)
        return lams.repeat_interleave(torch.tensor(self.sizes)) * sizes / self.n_train

    def penalty(
        self, per: str = "weight", lam: float | Mapping[str, float] | None = None
    ) -> Tensor:
        """See ``l0kernels.penalty``, which adds the coupled L2 of the model's weights."""
        value = self._penalty(per, lam)
        if lam is None and self.lam_warmup > 0:
            return value * self.lam_scale.clone()  # may be set before backward, by DDP too
        return value

    def _penalty(self, per: str, lam: float | Mapping[str, float] | None) -> Tensor:
        self.check_per(per)
        draw = self._draw
        if per == "weight" and lam is None:
            if draw is not None and draw.expected is not None and self._is_current(draw):
                # Once: parameters can change later in ways that no version shows.
                expected, draw.expected = draw.expected, None
                return expected
            return self._expected(self._cost)
        lams = self._lam if lam is None else per_group("lam", lam, self.names)
        return self._expected(self._prices_of(per, lams, lambda: self._sizes(per)))

    def _prices_of(self, what: str, lam: dict[str, float], sizes: Callable[[], Tensor]) -> Tensor:
        """What each unit costs, which is copied to a GPU when it is asked for first."""
        key = what, *lam.values()
        if key not in self._costs:
            if len(self._costs) == MOST_COSTS:
                self._costs.pop(next(iter(self._costs)))
            self._costs[key] = self._on_device(self._cost_of(lam, sizes()))
        return self._costs[key]

    def prices(self) -> list[Tensor]:
        """What units cost, as penalties and densities read it now on the device."""
        return [self._cost, *self._costs.values(), *self._shares.values()]

    def set_progress(self, t: float) -> None:
        """Say how far training is: with ``lam_warmup``, ``lam`` counts min(1, t / lam_warmup).

        ``penalty(lam=...)`` and the coupled L2 are not scaled. What was set is part of the state.

        Args:
            t: how much is over, from 0 to 1; e / epochs in epoch e.

        Raises:
            ValueError: t is out of range.
            RuntimeError: inside ``hold`` or ``expected_loss``.
        """
        self._check_free("set_progress")
        if not 0 <= t <= 1:
            raise ValueError(f"set_progress: expected a number from 0 to 1, got {t}")
        if self.lam_warmup > 0:
            self.lam_scale.fill_(min(1.0, t / self.lam_warmup))

    def density(self, per: str = "weight") -> Tensor:
        """Expected open part of what is gated, 0-d, differentiable: what ``Budget`` steers.

        sum_j |G_j| P(z_j != 0) / sum_j |G_j|, with |G_j| as in the penalty, whatever ``lam``.

        Args:
            per: ``"weight"`` counts weights, ``"flop"`` their multiply-adds per example.

        Raises:
            ValueError: unknown ``per``, work per layer is not known, or no weight is gated.
        """
        self.check_per(per)
        if per not in self._shares:
            sizes = self._sizes(per)
            if not float(sizes.sum()) > 0:
                raise ValueError("density: expected gates that multiply weights, got none")
            self._shares[per] = self._on_device(sizes / sizes.sum())
        return self._expected(self._shares[per])

    def _sizes(self, per: str) -> Tensor:
        sizes = self.unit_flops if per == "flop" else self.unit_weights
        assert sizes is not None
        return sizes.cpu()

    def check_per(self, per: str) -> None:
        """Raise ValueError for an unknown ``per``, or for work that is not known."""
        if per not in ("weight", "flop"):
            raise ValueError(f"per: expected 'weight' or 'flop', got {per!r}")
        if per == "flop" and self.unit_flops is None:
            raise ValueError(
                "per='flop': expected output positions per layer (convert records them, "
                "attach takes them), got none"
            )

    def _on_device(self, values: Tensor) -> Tensor:
        """Values of the host as ``log_alpha`` has them; it does not wait for a GPU."""
        values = values.to(self.log_alpha.dtype)
        if self.log_alpha.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.log_alpha.device, non_blocking=True)

    def _is_current(self, draw: Draw) -> bool:
        differentiable = draw.differentiable or not torch.is_grad_enabled()
        return differentiable and draw.version == self.log_alpha._version

    def _expected(self, cost: Tensor) -> Tensor:
        if self.frozen:
            value = (cost.double() * self.open_probability()).sum()
            return Constant.apply(self.log_alpha, value.to(cost.dtype))
        # No draw is made of it, whose counts the host would wait for.
        return self._sample(cost)[1]

    def expected_open(self) -> dict[str, float]:
        """Expected number of open units per group under the training law."""
        p = self.open_probability()
        return {name: float(p[where].sum()) for name, where in self.slices()}

    @torch.no_grad()
    def open_now(self) -> dict[str, int]:
        """Number of units per group that the test gate leaves open."""
        z = self.deterministic()
        return {name: int((z[where] != 0).sum()) for name, where in self.slices()}

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={s}" for n, s in zip(self.names, self.sizes, strict=True))


class Constant(torch.autograd.Function):
    """A value that hands a parameter gradients of zero, whatever comes in (Inf and NaN too)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        ctx.shape = parameter.shape
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_zeros(ctx.shape), None


def in_backward() -> bool:
    """Whether autograd is running a backward pass now: layers are recomputed."""
    return torch._C._current_graph_task_id() != -1


def draw_before_forward(root: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root; a module-level function, so that it survives copies."""
    gates = root.l0
    assert isinstance(gates, Gates)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check_norms(root, gates._norms)
    if not compiling and in_backward():
        gates.keep_for_recomputation()
    elif not gates._held:
        _draw(gates)
    if not compiling:
        gates.begin_forward(root)


def _check_norms(root: nn.Module, places: list[tuple[str, ...]]) -> None:
    """Notice SyncBatchNorm in the place of gated norms: it takes packed features for all."""
    for place in places:
        module: nn.Module | None = root
        for part in place:
            module = None if module is None else module._modules.get(part)
        if isinstance(module, nn.SyncBatchNorm):
            raise RuntimeError(
                f"{'.'.join(place)}: expected the gated BatchNorm that convert made, got "
                f"SyncBatchNorm, which knows no gates; call convert_sync_batchnorm before convert"
            )


def _draw_by_method(gates: Gates) -> None:
    gates.finish_steps()
    gates.draw()


_draw: Callable[[Gates], Any] = _draw_by_method


def _keep_draws_out_of_graphs() -> None:
    """Make the hook's draw run eagerly, between graphs, under ``torch.compile``.

    Not at import: it loads the compiler, as the first optimizer does. Inside ``expected_loss``
    and ``hold`` the draw is made before the model runs, and the model is one graph; with gates per
    example, drawn when a layer sees the batch, it is several.
    """
    global _draw
    if _draw is _draw_by_method:
        between = "gates are drawn between graphs"
        _draw = torch.compiler.disable(_draw_by_method, reason=between)
        made = torch.compiler.disable(ExampleGates.of, reason=between)
        ExampleGates.of = made  # pyright: ignore[reportAttributeAccessIssue]


def _port_key(ref: GateRef) -> tuple[str, ...]:
    return tuple(hashlib.sha256(m.numpy().tobytes()).hexdigest() for m in ref.maps)


def arrivals(
    made: Tensor, starts: Mapping[str, int], sizes: list[int], none: int
) -> list[tuple[int, int]] | None:
    """(group, features per unit) of the gates by which a port's features are born packed.

    Group -1 stands for features without such a gate, one unit each. None where the units of a
    group have different numbers of features.
    """
    per_gate = torch.bincount(made, minlength=none + 1)
    found = [(-1, int(per_gate[none]))]
    for group, (start, size) in enumerate(zip(starts.values(), sizes, strict=True)):
        repeats = per_gate[start : start + size].unique()
        if repeats.numel() > 1:
            return None
        found.append((group, int(repeats)))
    return found


def _find_filters(gates: Gates, layers: Sequence[Any]) -> Tensor:
    """Which gates are of a convolution's output channels, bool of shape [gates + 1].

    Layers learn whether any column of theirs belongs to another gate.
    """
    found = torch.zeros(gates.count + 1, dtype=torch.bool)
    for layer in layers:
        if makes_filters(layer):
            found[layer.out_gate.maps[0]] = True
    found[gates.count] = True  # no gate has no columns either
    for layer in layers:
        maps = () if layer.in_gate is None else layer.in_gate.maps
        layer.has_columns = any(not bool(found[gate_map].all()) for gate_map in maps)
    return found


def makes_filters(layer: Any) -> bool:
    """Whether gates of this layer's outputs stand for the filters that make them."""
    weight = getattr(layer, "weight", None)
    has_filters = weight is not None and weight.dim() > 2
    return has_filters and layer.out_gate is not None and not layer.depthwise


def _size_per_unit(gates: Gates, layers: Sequence[tuple[Any, float]]) -> Tensor:
    """|G_j|: the filter of a convolution's output channel, else the columns that read the unit.

    This is what a gate multiplies in L0-HC: output channels of convolutions, input neurons of
    linear layers (Louizos et al., 2018, section 4). With the number of uses of every layer's
    weights as second entry it is the unit's multiply-adds per example.
    """
    made = torch.zeros(gates.count + 1, dtype=torch.float64)
    read = torch.zeros(gates.count + 1, dtype=torch.float64)
    for layer, uses in layers:
        if not has_matrix(layer):
            continue
        outputs, inputs, elements = layer.shape_out_in()
        if makes_filters(layer):
            size = inputs * elements * uses
            made.index_add_(0, layer.out_gate.maps[0], _full(layer.out_gate, size))
        if layer.in_gate is not None:
            size = outputs * elements * uses
            for gate_map in layer.in_gate.maps:
                read.index_add_(0, gate_map, _full(layer.in_gate, size))
    return torch.where(gates.has_filter.cpu(), made, read)[: gates.count]


def has_matrix(layer: Any) -> bool:
    """Whether the penalty counts a layer's weight: not that of a norm or an activation."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.dim() >= 2


def uses_of(layer: Any, name: str, positions: Mapping[str, int]) -> float:
    """Multiply-adds per example of each number of a layer's weight.

    Raises:
        ValueError: the penalty counts them, and their positions are missing.
    """
    if not has_matrix(layer):
        return 1
    if name not in positions:
        raise ValueError(f"attach: expected positions of {name!r} too, got {sorted(positions)}")
    return layer.uses(positions[name])


def _full(ref: GateRef, value: float) -> Tensor:
    return torch.full((ref.features,), float(value), dtype=torch.float64)
