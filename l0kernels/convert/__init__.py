# SPDX-License-Identifier: Apache-2.0
"""Convert a model to gated layers in place, and back."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from l0kernels.convert.check import STEPS, TOLERANCE, check, perturb
from l0kernels.convert.groups import (
    HEADS,
    Plan,
    Select,
    input_group,
    kinds_of,
    make_plan,
    wants_heads,
    why_unusable,
)
from l0kernels.convert.place import PLACES, why_not_before_norm
from l0kernels.convert.probe import ForwardFails, Probe
from l0kernels.convert.swap import install, install_weights, uninstall
from l0kernels.convert.tensors import Inputs, KeptBuffers, own_copy, to_double, to_dtype
from l0kernels.convert.units import Survey, survey
from l0kernels.convert.weights import find_weights
from l0kernels.gates import METHODS, Gates
from l0kernels.nn import GatedLayer, gated_class
from l0kernels.training import gates_of, root_of

GRANULARITIES = ("unit", "input", "weight")

# Input channels from which oneDNN's convolutions gain from channels_last.
CHANNELS_LAST_FROM = 32


def convert(
    model: nn.Module,
    method: str | type[Gates],
    *,
    example_inputs: Inputs,
    select: Select = "inner",
    granularity: str = "unit",
    place: str = "after_act",
    lam: float | Mapping[str, float] = 1.0,
    n_train: int = 1,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Give a model gates, in place, and make its layers compute open units only.

    Groups are found by intervention on an fp64 copy and checked there: packed and masked runs
    must agree to 1e-9 in outputs, gradients and buffers, or the group is left ungated with the
    reason (see ``report``). The model itself changes only after all checks have passed: classes
    of layers are swapped, parameters, keys and references stay, and ``model.l0`` holds the gates.
    Forward hooks between a gated layer and its readers see packed shapes; hooks of the model also
    run on the copy. What a model does only for other inputs, or once plain attributes change, is
    not seen.

    Args:
        model: any module; converted in place.
        method: a name in ``gates.METHODS``: ``"hard_concrete"``, ``"arm"``, ``"dep"``, ``"cs"``
            or ``"scl"``; or a class derived from ``gates.Gates``.
        example_inputs: arguments of the forward, positional (a tuple) or by keyword (a mapping);
            a batch of 2 to 4 is enough.
        select: ``"inner"`` (units made by one layer, or by the layers of a product, and read only
            by convolutions and linear layers; residual streams, their stems, logits and outputs
            stay ungated), ``l0kernels.select.heads`` (attention heads), both joined by ``|``,
            names of layers, or a predicate on (name, module). Units made by several layers are
            chosen when one of the layers is; their group has the name of the first, a group of
            heads that of their reader and ``".heads"``.
        granularity: ``"unit"``, or ``"input"`` to add one gate per input feature of every linear
            layer whose features have no gate of their own (network inputs, flattened channels);
            it multiplies the producer's gate. Its group is named ``"<layer>.in"``. ``"weight"``
            (``"cs"``; ``"scl"`` has no other): one gate for every number of the weights of
            ``Linear`` and ``Conv2d`` layers instead, all or those that ``select`` names; a group
            has the layer's name. No layer reads packed features, and nothing needs to be found or
            checked.
        place: ``"after_act"``: gates multiply what layers read; or ``"before_norm"``: what a layer
            makes, before the BatchNorm that follows, as L0-HC and L0-ARM do in wide residual
            networks. There a closed channel is a constant behind the norm, its running statistics
            decay, and its beta and the columns that read it learn, all as in masked training. It
            takes one BatchNorm that reads just what the layer makes, and nothing behind it but what
            treats channels alike and one by one (activations, pooling, padding, flattening), up to
            convolutions and linear layers. Not with ``granularity="input"`` or ``"weight"``.
        lam: weight of the penalty, one number or one per group.
        n_train: size of the training set; the penalty is divided by it.
        seed: key of the gate noise.
        options: further arguments of the gate class, such as ``droprate``.

    Returns:
        ``model``.

    Raises:
        ValueError: unknown method, granularity or place, inputs that do not fit, a model that is
            already converted, non-finite parameters, or nothing that can be gated.
        TypeError: ``model`` is not a module, or ``example_inputs`` neither a tuple nor a mapping.
    """
    kind = _kind(method)
    _check_arguments(model, kind, example_inputs, select, granularity)
    _check_place(place, granularity, options.get("scope", "batch"))
    options.update(lam=lam, n_train=n_train, seed=seed)
    device, _ = _place_of(model)
    buffers = KeptBuffers(model)
    autocast = torch.autocast(device.type, enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), autocast:
            inputs = own_copy(example_inputs)
            if granularity == "weight":
                _gate_weights(model, kind, inputs, select, options)
                return model
            how = select, granularity, place
            plan, found = _find(model, kind, inputs, *how, options)
            kept = {name: _for_groups(value, plan) for name, value in options.items()}
            gates = _like(model, kind(plan.groups, **kept))
            _prefer_channels_last(model, plan, found)
            install(model, gates, plan, found)
    finally:
        # Closures of a copied model can reach the model itself.
        buffers.restore()
    return model


def _like(model: nn.Module, gates: Gates) -> Gates:
    """The gates in the model's place, precision (float32 at least) and mode."""
    device, dtype = _place_of(model)
    gates.to(device, torch.promote_types(dtype, torch.float32))
    return gates.train(model.training)


def _gate_weights(
    model: nn.Module,
    method: Callable[..., Gates],
    example_inputs: Inputs,
    select: Select,
    options: dict[str, Any],
) -> None:
    work = _copy(model)
    with _probing(work, example_inputs) as probe:
        found = find_weights(model, probe, select)
    if not found.shapes:
        raise ValueError(f"convert: nothing can be gated: {found.refused}")
    install_weights(model, _like(model, method(found.shapes, **options)), found)


def _find(
    model: nn.Module,
    method: type[Gates],
    example_inputs: Inputs,
    select: Select,
    granularity: str,
    place: str,
    options: dict[str, Any],
) -> tuple[Plan, Survey]:
    """Groups that are exact, and what the probe found."""
    work = _copy(model)
    perturb(work)
    found = _survey(model, work, example_inputs, wants_heads(select), place)
    plan = make_plan(model, found, select, granularity, place)
    _refuse_empty(plan)
    # Wrong options show before the self-check, which takes longest.
    method(plan.groups, **{name: _completed(value, plan) for name, value in options.items()})
    plan = _Checker(method, work, example_inputs, found).exact(plan)
    _refuse_empty(plan)
    return plan, found


def revert(model: nn.Module) -> nn.Module:
    """Undo ``convert`` in place: plain layer classes, no gates; parameters stay as they are.

    Args:
        model: a converted model, or a wrapper around one.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not converted, or has layers that ``convert`` does not make.
    """
    gates = gates_of(model)
    uninstall(root_of(model, gates), gates)
    return model


def _kind(method: Any) -> type[Gates]:
    """The class of a method that is named or given."""
    if isinstance(method, type) and issubclass(method, Gates):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"method: expected one of {sorted(METHODS)} or a class of gates, got {method!r}"
        )
    return METHODS[method]


def _check_arguments(
    model: Any, method: type[Gates], example_inputs: Any, select: Select, granularity: str
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {GRANULARITIES}, got {granularity!r}")
    if granularity not in method.granularities:
        raise ValueError(
            f"granularity: expected one of {method.granularities} for {method.__name__}, "
            f"got {granularity!r}"
        )
    if not isinstance(example_inputs, (tuple, Mapping)):
        raise TypeError(
            f"example_inputs: expected a tuple of the forward's positional arguments or a mapping "
            f"of its keyword arguments, got {type(example_inputs).__name__}"
        )
    kinds_of(select)
    if hasattr(model, "_orig_mod"):
        raise ValueError("convert: expected a plain model, got a compiled one; compile afterwards")
    if any(isinstance(m, (Gates, GatedLayer)) for m in model.modules()):
        raise ValueError("convert: expected a model without gates, got a converted one")
    if hasattr(model, "l0"):
        raise ValueError("convert: expected a model without an attribute l0, got one; rename it")
    parameters = dict(model.named_parameters())
    if not any(p.is_floating_point() for p in parameters.values()):
        raise ValueError("convert: expected a model with parameters, got none")
    unmade = [n for n, p in parameters.items() if p.device.type == "meta" or is_lazy(p)]
    if unmade:
        raise ValueError(f"convert: expected parameters with values, got none in {unmade[:3]}")
    devices = {p.device for p in parameters.values()}
    devices |= {t.device for t in tree_leaves(example_inputs) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(
            f"convert: expected model and example_inputs on one device, "
            f"got {sorted(str(d) for d in devices)}"
        )
    broken = [name for name, p in parameters.items() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(f"convert: expected finite parameters, got NaN or Inf in {broken[:3]}")


def _check_place(place: str, granularity: str, scope: str) -> None:
    if place not in PLACES:
        raise ValueError(f"place: expected one of {PLACES}, got {place!r}")
    if place != "after_act" and granularity != "unit":
        raise ValueError(f"place: expected 'after_act' with {granularity!r} gates, got {place!r}")
    if place != "after_act" and scope == "example":
        raise ValueError(f"place: expected 'after_act' with scope='example', got {place!r}")


def _refuse_empty(plan: Plan) -> None:
    if not plan.groups:
        raise ValueError(f"convert: nothing can be gated: {plan.refused}")


def _bar(title: str) -> Callable[[int], Callable[[], Any]]:
    def start(total: int) -> Callable[[], Any]:
        # Shown only where the work takes seconds, and only to people.
        bar = tqdm(total=total, desc=title, delay=1.0, leave=False, disable=not _interactive())
        return bar.update

    return start


def _interactive() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _copy(model: nn.Module) -> nn.Module:
    """A copy to probe, in fp32 (or fp64 if the model is)."""
    double = any(p.dtype == torch.float64 for p in model.parameters())
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"convert: the model cannot be copied: {error}") from error
    copied.zero_grad(set_to_none=True)
    return copied.double() if double else copied.float()


def _survey(
    model: nn.Module, work: nn.Module, example_inputs: Inputs, heads: bool, place: str
) -> Survey:
    modules = dict(model.named_modules())
    with _probing(work, example_inputs) as probe:

        @functools.cache
        def usable(name: str) -> bool:
            return why_unusable(name, modules, probe.calls, probe.used_outside) is None

        found = survey(probe, usable, heads, _bar("finding groups"))
        if place == "before_norm":
            found.misplaced = why_not_before_norm(probe, found.units)
        return found


@contextmanager
def _probing(work: nn.Module, example_inputs: Inputs) -> Iterator[Probe]:
    dtype = next(p.dtype for p in work.parameters() if p.is_floating_point())
    try:
        with Probe(work, to_dtype(example_inputs, dtype)) as probe:
            yield probe
    except ForwardFails as error:
        raise ValueError(f"example_inputs: {error}") from error.__cause__


class _Checker:
    """Finds out which groups are exact.

    Args:
        method: class of the gates.
        work: the copy, perturbed; it becomes fp64, and is plain between checks.
        example_inputs: arguments of its forward.
        found: what the probe found.
    """

    def __init__(
        self, method: type[Gates], work: nn.Module, example_inputs: Inputs, found: Survey
    ) -> None:
        self.method, self.work, self.found = method, work, found
        self.inputs = to_double(example_inputs)
        work.double()

    def exact(self, plan: Plan) -> Plan:
        """The plan without the groups that are not exact, alone or beside the others."""
        refused: dict[str, str] = {}
        names = self._exact(plan, list(plan.groups), refused)
        if len(names) == len(plan.groups):
            return plan
        if names and self._verdict(plan.only(names)) is not None:
            names = self._one_by_one(plan, names, refused)
        kept = plan.only(names)
        for name, reason in refused.items():
            units = plan.units.get(name)
            named = units is None or name.endswith(HEADS)
            layers = [*([name] if named else []), *(units.makers if units else [])]
            kept.refused.update(dict.fromkeys(layers, reason))
        return kept

    def _one_by_one(self, plan: Plan, names: list[str], refused: dict[str, str]) -> list[str]:
        """As many of the names as are exact together."""
        kept: list[str] = []
        for name in names:
            reason = self._verdict(plan.only([*kept, name]))
            if reason is None:
                kept.append(name)
            else:
                refused[name] = f"beside other groups {reason}"
        return kept

    def _exact(self, plan: Plan, names: list[str], refused: dict[str, str]) -> list[str]:
        """The names that pass: all at once if possible, else half by half."""
        reason = self._verdict(plan.only(names))
        if reason is None:
            return names
        if len(names) == 1:
            refused[names[0]] = reason
            return []
        middle = len(names) // 2
        halves = names[:middle], names[middle:]
        return [name for half in halves for name in self._exact(plan, half, refused)]

    def _verdict(self, plan: Plan) -> str | None:
        """Why packed and masked runs of this plan differ, or None."""
        gates = self.method(plan.groups).double().to(next(self.work.parameters()).device)
        install(self.work, gates, plan, self.found)
        try:
            tick = _bar("checking packed against masked")(STEPS)
            error, where = check(self.work, self.inputs, tick)
        finally:
            uninstall(self.work, gates)
        if error <= TOLERANCE:
            return None
        if where.startswith("the packed forward fails"):
            return f"the self-check found that {where}{self._hint(plan)}"
        return f"the self-check found packed and masked to differ by {error:.1e} in {where}"

    def _hint(self, plan: Plan) -> str:
        """Parameters and buffers of a group's size outside supported layers: the usual cause."""
        if len(plan.units) != 1:
            return ""
        size = next(iter(plan.units.values())).size
        tensors = {
            f"{path}.{key}".lstrip("."): t
            for path, module in self.work.named_modules()
            if gated_class(type(module)) is None
            for key, t in (module._parameters | module._buffers).items()
            if t is not None and size in t.shape
        }
        shown = [f"{name} {tuple(t.shape)}" for name, t in tensors.items()]
        return f"; outside supported layers there is {', '.join(shown[:2])}" if shown else ""


def _for_groups(value: Any, kept: Plan) -> Any:
    """Leave out what a per-group option says of groups that the self-check refused."""
    if not isinstance(value, Mapping):
        return value
    return {name: value[name] for name in kept.groups if name in value}


def _completed(value: Any, plan: Plan) -> Any:
    """Fill a per-group option up: a group without a value may still be refused."""
    if not isinstance(value, Mapping) or not value:
        return value
    return dict.fromkeys(plan.groups, next(iter(value.values()))) | dict(value)


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return parameter.device, parameter.dtype


def _prefer_channels_last(model: nn.Module, plan: Plan, found: Survey) -> None:
    """Store wide gated filters as [O, kh, kw, I], the layout CPU convolutions are fastest in."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not _is_touched(name, plan, found):
            continue
        weight = module.weight
        usable = weight.device.type == "cpu" and not weight.is_shared()
        if weight.shape[1] >= CHANNELS_LAST_FROM and usable:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _is_touched(name: str, plan: Plan, found: Survey) -> bool:
    if input_group(name) in plan.groups:
        return True
    return any(name in u.makers or name in u.readers for u in plan.units.values())


__all__ = ["convert", "revert"]
