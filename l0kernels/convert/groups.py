# SPDX-License-Identifier: Apache-2.0
"""Decide which units get gates, and say why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l0kernels.convert.probe import Trace, is_depthwise, is_layer
from l0kernels.nn import gated_class

Select = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass
class Plan:
    """Groups of a model, by name, and why the other layers have none.

    Args:
        groups: name -> number of units; a producer's name, or "layer.in" for input features.
        refused: layer -> reason.
    """

    groups: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def input_group(layer: str) -> str:
    """Name of the group of a linear layer's input features."""
    return f"{layer}.in"


def make_plan(model: nn.Module, trace: Trace, select: Select, granularity: str) -> Plan:
    """Choose groups from a trace.

    Args:
        model: the traced model.
        trace: what the probe found.
        select: ``"inner"``, names of layers, or a predicate on (name, module).
        granularity: ``"unit"`` or ``"input"``.

    Raises:
        ValueError: ``select`` names a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    wanted = _selector(select, trace, modules)
    plan = Plan()
    for name in trace.layers:
        reason = _why_unsupported(name, modules, trace) or _why_inexact(name, modules, trace)
        if reason is None:
            reason = wanted(name)
        if reason is None:
            plan.groups[name] = trace.width[name]
        else:
            plan.refused[name] = reason
    if granularity == "input":
        plan.groups = _with_input_groups(plan, modules, trace)
    return plan


def _selector(
    select: Select, trace: Trace, modules: dict[str, nn.Module]
) -> Callable[[str], str | None]:
    if select == "inner":
        return lambda name: _why_not_inner(name, trace)
    if callable(select):
        return lambda name: None if select(name, modules[name]) else "not selected"
    unknown = sorted(set(select) - set(trace.layers))
    if isinstance(select, str) or unknown:
        raise ValueError(
            f"select: expected 'inner', a predicate or names among {trace.layers}, "
            f"got {select if isinstance(select, str) else unknown}"
        )
    return lambda name: None if name in select else "not selected"


def _owners(modules: dict[str, nn.Module], weight: Any) -> list[str]:
    return [n for n, m in modules.items() if any(p is weight for p in m._parameters.values())]


def _why_unsupported(
    name: str, modules: dict[str, nn.Module], trace: Trace, role: str = ""
) -> str | None:
    """Why a layer itself cannot be gated or read packed features."""
    module = modules[name]
    if gated_class(type(module)) is None:
        return f"{role}{type(module).__name__} has no gated layer"
    if trace.calls[name] != 1:
        return f"{role}it is called {trace.calls[name]} times in one forward"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return f"{role}its weight is parametrized"
    if is_layer(module) and getattr(module, "groups", 1) != 1:
        return f"{role}it is a grouped convolution"
    owners = _owners(modules, module._parameters["weight"])
    if module._parameters["weight"] is not None and len(owners) > 1:
        return f"{role}its weight is shared by {owners}"
    return None


def _units(name: str, trace: Trace) -> range:
    return range(trace.first_unit[name], trace.first_unit[name] + trace.width[name])


def readers_of(name: str, trace: Trace) -> list[str]:
    """Layers and passages that a layer's units reach."""
    return [reader for reader, r in trace.readings.items() if name in r.touched_by]


def _why_inexact(name: str, modules: dict[str, nn.Module], trace: Trace) -> str | None:
    """Why closing units of a layer would not be exact."""
    if name in trace.reaches_output:
        return "its units reach an output of the model"
    readers = readers_of(name, trace)
    if not any(is_layer(modules[reader]) for reader in readers):
        return "no convolution or linear layer reads it"
    for reader in readers:
        found = trace.readings[reader].unit
        own = set(found.tolist()) & set(_units(name, trace))
        if len(own) < trace.width[name]:
            return _why_mixed(name, reader, trace, bool((found == -2).any()))
        reason = _why_unsupported(reader, modules, trace, f"read by {reader}: ")
        if reason is not None:
            return reason
    return None


def _why_mixed(name: str, reader: str, trace: Trace, mixed: bool) -> str:
    if not mixed:
        return f"only some of its units reach {reader}"
    others = [other for other in trace.readings[reader].touched_by if other != name]
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        return f"its units are joined with those of {shown} before {reader} (residual stream)"
    return f"its units are mixed with one another before {reader}"


def _why_not_inner(name: str, trace: Trace) -> str | None:
    """A stem: two of its readers lead to one sum, so its units are the residual stream itself."""
    readers = [r for r in readers_of(name, trace) if r in trace.first_unit]
    sums = _sums(trace)
    ends = [_ends(reader, trace, sums, set()) for reader in readers]
    for i, first in enumerate(ends):
        for second in ends[i + 1 :]:
            if any(len((first | second) & s) > 1 and first & s and second & s for s in sums):
                return "its units are the residual stream (a stem)"
    return None


def _sums(trace: Trace) -> list[set[str]]:
    """Sets of layers whose units meet in one feature."""
    return [
        set(r.touched_by)
        for r in trace.readings.values()
        if len(r.touched_by) > 1 and (r.unit == -2).any()
    ]


def _ends(name: str, trace: Trace, sums: list[set[str]], seen: set[str]) -> set[str]:
    """Layers downstream of ``name`` (itself included) whose units are first to join a sum."""
    if name in seen:
        return set()
    seen.add(name)
    if any(name in s for s in sums):
        return {name}
    further = (r for r in readers_of(name, trace) if r in trace.first_unit)
    return set().union(*(_ends(r, trace, sums, seen) for r in further))


def _with_input_groups(plan: Plan, modules: dict[str, nn.Module], trace: Trace) -> dict[str, int]:
    """Add a group for the inputs of every linear layer whose features have no gate of their own."""
    groups: dict[str, int] = {}
    for name in trace.layers:
        reading = trace.readings[name]
        if type(modules[name]) is nn.Linear and not _why_unsupported(name, modules, trace):
            gated = _gated_units(reading.unit, plan, trace)
            one_to_one = (gated >= 0).all() and gated.unique().numel() == gated.numel()
            if not one_to_one:
                groups[input_group(name)] = gated.numel()
        if name in plan.groups:
            groups[name] = plan.groups[name]
    return groups


def _gated_units(unit: Tensor, plan: Plan, trace: Trace) -> Tensor:
    """Global unit numbers where the unit's layer has a group, else -1."""
    gated = torch.full_like(unit, -1)
    for name in plan.groups:
        if name in trace.first_unit:
            units = _units(name, trace)
            mine = (unit >= units.start) & (unit < units.stop)
            gated = torch.where(mine, unit, gated)
    return gated


def gate_map(reader: str, plan: Plan, trace: Trace, starts: dict[str, int], none: int) -> Tensor:
    """Flat gate index of every feature that a layer or passage reads.

    Args:
        reader: its name.
        plan: the groups.
        trace: what the probe found.
        starts: flat index of every group's first gate.
        none: the index that stands for no gate.

    Returns:
        int64 of shape [features].
    """
    unit = trace.readings[reader].unit
    mapped = torch.full_like(unit, none)
    for name in plan.groups:
        if name in trace.first_unit:
            units = _units(name, trace)
            mine = (unit >= units.start) & (unit < units.stop)
            mapped = torch.where(mine, unit - units.start + starts[name], mapped)
    return mapped


def passages_of(plan: Plan, modules: dict[str, nn.Module], trace: Trace) -> list[str]:
    """Normalisations and depthwise convolutions that gated units pass through."""
    return [
        reader
        for reader, reading in trace.readings.items()
        if (is_depthwise(modules[reader]) or not is_layer(modules[reader]))
        and set(reading.touched_by) & set(plan.groups)
    ]
