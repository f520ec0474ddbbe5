# SPDX-License-Identifier: Apache-2.0
"""Decide which units get gates, and say why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0kernels.convert.probe import is_depthwise, is_layer
from l0kernels.convert.units import Survey, Units
from l0kernels.nn import gated_class
from l0kernels.select import Kinds, inner

Select = str | Kinds | Collection[str] | Callable[[str, nn.Module], bool]

HEADS = ".heads"


@dataclass
class Plan:
    """Groups of a model and why the other layers have none.

    Args:
        groups: name -> number of gates, in the order of the flat vector.
        units: the groups that layers make; the others are input groups, ``"<layer>.in"``.
        refused: layer, or ``"<layer>.heads"`` -> reason.
        before_norm: whether gates multiply what layers make, before a norm, not what they read.
    """

    groups: dict[str, int] = field(default_factory=dict)
    units: dict[str, Units] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    before_norm: bool = False

    def only(self, names: Iterable[str]) -> Plan:
        """The same plan with some of its groups."""
        kept = set(names)
        return Plan(
            {name: size for name, size in self.groups.items() if name in kept},
            {name: units for name, units in self.units.items() if name in kept},
            dict(self.refused),
            self.before_norm,
        )


def input_group(layer: str) -> str:
    """Name of the group of a linear layer's input features."""
    return f"{layer}.in"


def kinds_of(select: Select) -> Kinds | None:
    """The kinds of units to gate, or None where names or a predicate choose.

    Raises:
        ValueError: a string other than ``"inner"``.
    """
    if isinstance(select, Kinds):
        return select
    if select == "inner":
        return inner
    if isinstance(select, str):
        raise ValueError(
            f"select: expected 'inner', kinds from l0kernels.select, names of layers or a "
            f"predicate, got {select!r}"
        )
    return None


def wants_heads(select: Select) -> bool:
    """Whether attention heads must be looked for."""
    kinds = kinds_of(select)
    if kinds is not None:
        return "heads" in kinds.names
    return isinstance(select, Collection) and any(name.endswith(HEADS) for name in select)


def make_plan(
    model: nn.Module, survey: Survey, select: Select, granularity: str, place: str
) -> Plan:
    """Choose groups from what probing a model told.

    Args:
        model: the probed model.
        survey: what the probe found.
        select: kinds of units, names of layers, or a predicate on (name, module).
        granularity: ``"unit"`` or ``"input"``.
        place: ``"after_act"`` or ``"before_norm"``.

    Raises:
        ValueError: ``select`` names a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    wanted = _selector(select, survey, modules)
    plan = Plan(refused=_uncalled(modules, survey), before_norm=place == "before_norm")
    for units in survey.units:
        reason = _why_not(units, modules, survey) or wanted(units)
        reason = reason or survey.misplaced.get(units.name)
        if reason is None:
            plan.groups[units.name] = units.size
            plan.units[units.name] = units
        for maker in units.makers:
            if reason is None:
                plan.refused.pop(maker, None)  # its heads are gated
            elif not units.name.endswith(HEADS):
                plan.refused[maker] = reason
        if reason is not None and units.name.endswith(HEADS):
            plan.refused[units.name] = reason
    if granularity == "input":
        plan.groups = _with_input_groups(plan, modules, survey)
    return plan


def _uncalled(modules: dict[str, nn.Module], survey: Survey) -> dict[str, str]:
    """Convolutions and linear layers that never run as modules."""
    return {
        name: USED_OUTSIDE if name in survey.used_outside else "it is not called in the forward"
        for name, module in modules.items()
        if is_layer(module) and name not in survey.calls
    }


USED_OUTSIDE = "its parameters are used outside its own forward (functionally)"


def _selector(
    select: Select, survey: Survey, modules: dict[str, nn.Module]
) -> Callable[[Units], str | None]:
    kinds = kinds_of(select)
    if kinds is not None:
        return lambda units: _why_not_of_kind(units, kinds, survey)
    if callable(select):
        return lambda units: _NOT_SELECTED if not _any(select, units, modules) else None
    names = set(select) if isinstance(select, Collection) else set()
    known = [*survey.layers, *(u.name for u in survey.units if u.name.endswith(HEADS))]
    unknown = sorted(names - set(known))
    if unknown:
        raise ValueError(
            f"select: expected 'inner', kinds from l0kernels.select, a predicate or names among "
            f"{known}, got {unknown}"
        )
    return lambda units: None if {units.name, *units.makers} & names else _NOT_SELECTED


_NOT_SELECTED = "not selected"


def _any(chosen: Callable[[str, nn.Module], bool], units: Units, modules: Any) -> bool:
    return any(chosen(name, modules[name]) for name in units.makers)


def _why_not_of_kind(units: Units, kinds: Kinds, survey: Survey) -> str | None:
    kind = "heads" if units.name.endswith(HEADS) else "inner"
    if kind not in kinds.names:
        return _NOT_SELECTED
    return _why_not_inner(units, survey) if kind == "inner" else None


def _why_not(units: Units, modules: dict[str, nn.Module], survey: Survey) -> str | None:
    """Why closing these units would not be exact, or is not allowed."""
    for maker in units.makers:
        reason = why_unusable(maker, modules, survey.calls, survey.used_outside)
        if reason is not None:
            return reason
        if maker in survey.outputs:
            return f"its units reach an output of the model ({survey.outputs[maker]})"
    if not any(is_layer(modules[reader]) for reader in units.readers):
        return "no convolution or linear layer reads it"
    # A reader that is called again may itself be what its units meet.
    again = [reader for reader in units.readers if survey.calls[reader] != 1]
    if units.problem is not None and not again:
        return units.problem
    for reader in again or units.readers:
        reason = _why_unsupported(reader, modules, survey.calls, survey.used_outside)
        if reason is not None:
            return f"read by {reader}: {reason}"
    return None


def why_unusable(
    name: str, modules: dict[str, nn.Module], calls: dict[str, int], used_outside: set[str]
) -> str | None:
    """Why a layer cannot make gated units, whatever happens to them."""
    reason = _why_unsupported(name, modules, calls, used_outside)
    if reason is None and not modules[name]._parameters["weight"].requires_grad:  # pyright: ignore
        return "its weight is frozen (requires_grad is False)"
    return reason


def _why_unsupported(
    name: str, modules: dict[str, nn.Module], calls: dict[str, int], used_outside: set[str]
) -> str | None:
    """Why a layer itself can neither make gated units nor read packed features."""
    module = modules[name]
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized"
    if gated_class(type(module)) is None:
        return f"{type(module).__name__} has no gated layer"
    if calls[name] != 1:
        return f"it is called {calls[name]} times in one forward"
    if name in used_outside:
        return USED_OUTSIDE
    if is_layer(module) and getattr(module, "groups", 1) != 1:
        return "it is a grouped convolution"
    sharing = owners(modules, module._parameters["weight"])
    if module._parameters["weight"] is not None and len(sharing) > 1:
        return f"its weight is shared by {sharing}"
    return None


def owners(modules: dict[str, nn.Module], weight: Any) -> list[str]:
    """The modules that have a parameter."""
    return [n for n, m in modules.items() if any(p is weight for p in m._parameters.values())]


def _why_not_inner(units: Units, survey: Survey) -> str | None:
    """A stem: two of its readers lead to one sum, so its units are the residual stream itself."""
    ends = [_ends(reader, survey, set()) for reader in units.readers if reader in survey.read_by]
    for i, first in enumerate(ends):
        for second in ends[i + 1 :]:
            if any(len((first | second) & s) > 1 and first & s and second & s for s in survey.sums):
                return "its units are the residual stream (a stem)"
    return None


def _ends(name: str, survey: Survey, seen: set[str]) -> set[str]:
    """Layers downstream of ``name`` (itself included) whose units are first to join a sum."""
    if name in seen:
        return set()
    seen.add(name)
    if any(name in s for s in survey.sums):
        return {name}
    further = (r for r in survey.read_by[name] if r in survey.read_by)
    return set().union(*(_ends(r, survey, seen) for r in further))


def _with_input_groups(plan: Plan, modules: dict[str, nn.Module], survey: Survey) -> dict[str, int]:
    """Add a group for the inputs of every linear layer whose features have no gate of their own."""
    groups: dict[str, int] = {}
    starts = dict(zip(plan.groups, _offsets(plan.groups.values()), strict=True))
    for name in survey.layers:
        usable = _why_unsupported(name, modules, survey.calls, survey.used_outside) is None
        if type(modules[name]) is nn.Linear and usable:
            gated = gate_map(name, plan, survey, starts, -1)
            one_to_one = (gated >= 0).all() and gated.unique().numel() == gated.numel()
            if not one_to_one:
                groups[input_group(name)] = gated.numel()
        if name in plan.groups:
            groups[name] = plan.groups[name]
    return groups | plan.groups


def _offsets(sizes: Iterable[int]) -> list[int]:
    return torch.tensor([0, *sizes]).cumsum(0).tolist()[:-1]


def gate_map(reader: str, plan: Plan, survey: Survey, starts: dict[str, int], none: int) -> Tensor:
    """Flat gate index of every feature that a layer or passage reads.

    Args:
        reader: its name.
        plan: the groups.
        survey: what the probe found.
        starts: flat index of every group's first gate.
        none: the index that stands for no gate.

    Returns:
        int64 of shape [features].
    """
    mapped = torch.full((survey.features[reader],), none)
    for name, units in plan.units.items():
        unit = units.readers.get(reader)
        if unit is not None:
            mapped = torch.where(unit >= 0, unit + starts[name], mapped)
    return mapped


def is_passage_of(plan: Plan, reader: str, module: nn.Module) -> bool:
    """Whether gated units pass through: a normalisation, depthwise convolution or activation."""
    passes = is_depthwise(module) or not is_layer(module)
    return passes and any(reader in units.readers for units in plan.units.values())
