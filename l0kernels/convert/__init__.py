# SPDX-License-Identifier: Apache-2.0
"""Convert a model to gated layers in place, and back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from l0kernels.convert.check import STEPS, TOLERANCE, check
from l0kernels.convert.groups import Plan, Select, make_plan
from l0kernels.convert.probe import Trace, probe, to_double
from l0kernels.convert.swap import install, uninstall
from l0kernels.gates import METHODS, Gates
from l0kernels.training import gates_of, root_of

GRANULARITIES = ("unit", "input")

# Input channels from which oneDNN's convolutions gain from channels_last.
CHANNELS_LAST_FROM = 32


def convert(
    model: nn.Module,
    method: str,
    *,
    example_inputs: tuple[Any, ...],
    select: Select = "inner",
    granularity: str = "unit",
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
    Forward hooks between a gated layer and its readers see packed shapes.

    Args:
        model: any module; converted in place.
        method: ``"hard_concrete"``.
        example_inputs: positional arguments of the forward; a batch of 2 to 4 is enough.
        select: ``"inner"`` (units made by one layer and read only by convolutions and linear
            layers; residual streams, their stems, logits and outputs stay ungated), names of
            layers, or a predicate on (name, module).
        granularity: ``"unit"``, or ``"input"`` to add one gate per input feature of every linear
            layer whose features have no gate of their own (network inputs, flattened channels);
            it multiplies the producer's gate. Its group is named ``"<layer>.in"``.
        lam: weight of the penalty, one number or one per group.
        n_train: size of the training set; the penalty is divided by it.
        seed: key of the gate noise.
        options: further arguments of the gate class, such as ``droprate``.

    Returns:
        ``model``.

    Raises:
        ValueError: unknown method or granularity, inputs that do not fit, a model that is
            already converted, non-finite parameters, or nothing that can be gated.
        TypeError: ``model`` is not a module or ``example_inputs`` is not a tuple.
    """
    _check_arguments(model, method, example_inputs, granularity)
    trace = _trace(_copy(model), example_inputs)
    plan = make_plan(model, trace, select, granularity)
    if not plan.groups:
        raise ValueError(f"convert: nothing can be gated: {plan.refused}")
    options.update(lam=lam, n_train=n_train, seed=seed)
    gates = METHODS[method](plan.groups, **options)
    checked = _drop_inexact(model, gates, example_inputs, plan, trace)
    if checked is not plan:
        kept = {name: _for_groups(value, checked) for name, value in options.items()}
        gates = METHODS[method](checked.groups, **kept)
    parameter = next(model.parameters())
    gates.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    gates.train(model.training)
    _prefer_channels_last(model, checked, trace)
    install(model, gates, checked, trace)
    return model


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


def _check_arguments(model: Any, method: str, example_inputs: Any, granularity: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {GRANULARITIES}, got {granularity!r}")
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            f"example_inputs: expected a tuple of the forward's positional arguments, "
            f"got {type(example_inputs).__name__}"
        )
    if hasattr(model, "l0"):
        raise ValueError("convert: expected a model without an attribute l0, got a converted one")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("convert: expected a model with parameters, got none")
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


def _bar(title: str) -> Callable[[int], Callable[[], Any]]:
    def start(total: int) -> Callable[[], Any]:
        # Shown only where the work takes seconds, and only to people.
        bar = tqdm(total=total, desc=title, delay=1.0, leave=False, disable=not _interactive())
        return bar.update

    return start


def _interactive() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).double()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"convert: the model cannot be copied: {error}") from error


def _trace(model: nn.Module, example_inputs: tuple[Any, ...]) -> Trace:
    try:
        return probe(model, example_inputs, _bar("finding groups"))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"example_inputs: the model's forward fails with them: {error}") from error


def _drop_inexact(
    model: nn.Module, gates: Gates, example_inputs: tuple[Any, ...], plan: Plan, trace: Trace
) -> Plan:
    """The plan, or a copy without the groups that the self-check finds inexact."""

    def verdict(trial: Plan) -> str | None:
        return _verdict(model, type(gates), example_inputs, trial, trace)

    if verdict(plan) is None:
        return plan
    kept = Plan({}, dict(plan.refused))
    for name, size in plan.groups.items():
        reason = verdict(Plan({name: size}))
        if reason is None:
            kept.groups[name] = size
        else:
            kept.refused[name] = reason
    if not kept.groups:
        raise ValueError(f"convert: nothing can be gated: {kept.refused}")
    reason = verdict(kept)
    if reason is not None:
        raise RuntimeError(f"convert: groups are exact one by one but not together: {reason}")
    return kept


def _verdict(
    model: nn.Module,
    method: type[Gates],
    example_inputs: tuple[Any, ...],
    plan: Plan,
    trace: Trace,
) -> str | None:
    """Why packed and masked runs of this plan differ, or None."""
    trial = _copy(model)
    trial.zero_grad(set_to_none=True)
    install(trial, method(plan.groups).double(), plan, trace)
    tick = _bar("checking packed against masked")(STEPS)
    error, where = check(trial, to_double(example_inputs), tick)
    if error <= TOLERANCE:
        return None
    return f"the self-check found packed and masked to differ by {error:.1e} in {where}"


def _for_groups(value: Any, kept: Plan) -> Any:
    """Leave out what a per-group option says of groups that the self-check refused."""
    if not isinstance(value, Mapping):
        return value
    return {name: value[name] for name in kept.groups}


def _prefer_channels_last(model: nn.Module, plan: Plan, trace: Trace) -> None:
    """Store wide gated filters as [O, kh, kw, I], the layout CPU convolutions are fastest in."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not _is_touched(name, plan, trace):
            continue
        weight = module.weight
        if weight.shape[1] >= CHANNELS_LAST_FROM and weight.device.type == "cpu":
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _is_touched(name: str, plan: Plan, trace: Trace) -> bool:
    reading = trace.readings.get(name)
    return name in plan.groups or (
        reading is not None and bool(set(reading.touched_by) & set(plan.groups))
    )


__all__ = ["convert", "revert"]
