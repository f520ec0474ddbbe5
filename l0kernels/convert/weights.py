# SPDX-License-Identifier: Apache-2.0
"""Which weights get a gate for each of their numbers, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from l0kernels.convert.groups import USED_OUTSIDE, Select, kinds_of, owners
from l0kernels.convert.probe import Probe, is_depthwise, is_layer
from l0kernels.nn import masked_class


@dataclass
class Weights:
    """Weights of a model that get gates, and why the other layers have none.

    Args:
        shapes: layer -> shape of its weight.
        refused: layer -> reason.
        positions: output positions of one example per layer.
    """

    shapes: dict[str, tuple[int, ...]]
    refused: dict[str, str]
    positions: dict[str, int]


def find_weights(model: nn.Module, probe: Probe, select: Select) -> Weights:
    """Choose the weights of convolutions and linear layers.

    Nothing is left out of the computation, so what reads the layers does not matter.

    Args:
        model: the model.
        probe: has run a copy of it.
        select: ``"inner"`` for all, names of layers, or a predicate on (name, module).

    Raises:
        ValueError: ``select`` asks for heads, or names a layer that the model does not have.
    """
    modules = dict(model.named_modules())
    layers = [n for n, m in modules.items() if is_layer(m) or is_depthwise(m)]
    chosen = _chooser(select, layers)
    found = Weights({}, {}, probe.positions())
    for name in layers:
        reason = _why_not(name, modules, probe)
        if reason is None and not chosen(name, modules[name]):
            reason = "not selected"
        if reason is None:
            found.shapes[name] = tuple(modules[name]._parameters["weight"].shape)  # pyright: ignore
        else:
            found.refused[name] = reason
    return found


def _chooser(select: Select, layers: list[str]) -> Callable[[str, nn.Module], Any]:
    kinds = kinds_of(select)
    if kinds is not None:
        if "heads" in kinds.names:
            raise ValueError(
                "select: expected 'inner', names or a predicate for weights, got heads"
            )
        return lambda name, module: True
    if callable(select):
        return select
    names = set(select) if isinstance(select, Collection) else set()
    unknown = sorted(names - set(layers))
    if unknown:
        raise ValueError(
            f"select: expected 'inner', a predicate or names among {layers}, got {unknown}"
        )
    return lambda name, module: name in names


def _why_not(name: str, modules: dict[str, nn.Module], probe: Probe) -> str | None:
    module = modules[name]
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized"
    if masked_class(type(module)) is None:
        return f"{type(module).__name__} has no masked layer"
    if name in probe.used_outside:
        return USED_OUTSIDE
    if name not in probe.calls:
        return "it is not called in the forward"
    weight = module._parameters["weight"]
    if not weight.requires_grad:  # pyright: ignore[reportOptionalMemberAccess]
        return "its weight is frozen (requires_grad is False)"
    sharing = owners(modules, weight)
    return f"its weight is shared by {sharing}" if len(sharing) > 1 else None
