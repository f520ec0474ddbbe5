# SPDX-License-Identifier: Apache-2.0
"""Turn layers into gated layers and back, in place."""

from __future__ import annotations

from torch import nn

from l0kernels.convert.groups import Plan, gate_map, input_group, passages_of
from l0kernels.convert.probe import Trace
from l0kernels.gates.base import Gates, draw_before_forward
from l0kernels.gates.ref import GateRef
from l0kernels.nn import GatedLayer, gated_class


def install(model: nn.Module, gates: Gates, plan: Plan, trace: Trace) -> None:
    """Swap the classes of all layers that the plan touches and attach the gates."""
    modules = dict(model.named_modules())
    passages = set(passages_of(plan, modules, trace))
    for name in trace.readings:
        in_gate = None if name in passages else _reading_ref(name, gates, plan, trace)
        out_gate = gates[name] if name in plan.groups else None
        if name in passages:
            out_gate = _reading_ref(name, gates, plan, trace)
        if in_gate is not None or out_gate is not None:
            module = modules[name]
            swapped = gated_class(type(module))
            assert swapped is not None
            module.__class__ = swapped
            assert isinstance(module, GatedLayer)
            module.connect(in_gate, out_gate)
    gates.refused = plan.refused
    gates.attach(model, trace.positions)


def _reading_ref(name: str, gates: Gates, plan: Plan, trace: Trace) -> GateRef | None:
    mapped = gate_map(name, plan, trace, gates.starts, gates.count)
    made = GateRef(gates, (mapped,)) if (mapped != gates.count).any() else None
    own = gates[input_group(name)] if input_group(name) in plan.groups else None
    if made is not None and own is not None:
        return made * own
    return made or own


def uninstall(root: nn.Module, gates: Gates) -> None:
    """Give every layer of these gates its plain class back and remove the gates.

    Raises:
        ValueError: a layer is of a class that ``convert`` does not make; nothing is changed.
    """
    layers = [m for m in root.modules() if isinstance(m, GatedLayer) and m.gates is gates]
    strange = sorted(
        {type(m).__name__ for m in layers if gated_class(m.plain_class) is not type(m)}
    )
    if strange:
        raise ValueError(f"revert: expected layers of l0kernels.nn, got {strange}")
    for module in layers:
        module.__class__ = module.plain_class  # pyright: ignore
        for name in ("in_gate", "out_gate", "in_port", "out_port"):
            module.__dict__.pop(name, None)
    for handle, hook in list(root._forward_pre_hooks.items()):
        if hook is draw_before_forward:
            del root._forward_pre_hooks[handle]
    del root._modules["l0"]
