# SPDX-License-Identifier: Apache-2.0
"""Turn layers into gated layers and back, in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l0kernels.convert.groups import Plan, gate_map, input_group, is_passage_of
from l0kernels.convert.units import Survey
from l0kernels.convert.weights import Weights
from l0kernels.gates.base import Gates, draw_before_forward
from l0kernels.gates.ref import GateRef
from l0kernels.nn import GatedLayer, MaskedLayer, gated_class, masked_class


def install(model: nn.Module, gates: Gates, plan: Plan, survey: Survey) -> None:
    """Swap the classes of all layers that the plan touches and attach the gates."""
    modules = dict(model.named_modules())
    made = {
        maker: GateRef(gates, (unit + gates.starts[name],))
        for name, units in plan.units.items()
        for maker, unit in units.makers.items()
    }
    for name in survey.readers:
        in_gate, out_gate = _reading_ref(name, gates, plan, survey), made.get(name)
        if is_passage_of(plan, name, modules[name]):
            in_gate, out_gate = None, in_gate
        if plan.before_norm:
            in_gate, out_gate = (r and r.before_norm() for r in (in_gate, out_gate))
        if in_gate is not None or out_gate is not None:
            _connect(modules[name], in_gate, out_gate)
    _call_layers(model)
    gates.refused = plan.refused
    gates.attach(model, survey.positions)


def install_weights(model: nn.Module, gates: Gates, found: Weights) -> None:
    """Swap the classes of all layers whose weights have gates and attach the gates."""
    modules = dict(model.named_modules())
    for name in found.shapes:
        module = modules[name]
        swapped = masked_class(type(module))
        assert swapped is not None
        module.__class__ = swapped
        assert isinstance(module, MaskedLayer)
        ref: Any = gates[name]
        module.connect_weight(ref)
    _call_layers(model)
    gates.refused = found.refused
    gates.attach(model, found.positions)


def _call_layers(model: nn.Module) -> None:
    """Have modules that would use the weights of gated layers themselves call the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_gated(module):
            module.register_forward_pre_hook(keep_to_submodules)
        if isinstance(module, nn.TransformerEncoder) and _has_gated(module):
            # Nested tensors are for the fused function only.
            module.__dict__[_USED_NESTED] = module.use_nested_tensor
            module.use_nested_tensor = False


def keep_to_submodules(module: nn.Module, args: object) -> None:
    """A hook that changes nothing: its presence makes ``nn.TransformerEncoderLayer`` call its
    layers in eval mode too, where it would otherwise hand their weights to a fused function.
    """


_USED_NESTED = "_l0_used_nested_tensor"


def _has_gated(module: nn.Module) -> bool:
    return any(isinstance(m, GatedLayer) for m in module.modules())


def _connect(module: nn.Module, in_gate: GateRef | None, out_gate: GateRef | None) -> None:
    swapped = gated_class(type(module))
    assert swapped is not None
    module.__class__ = swapped
    assert isinstance(module, GatedLayer)
    module.connect(in_gate, out_gate)


def _reading_ref(name: str, gates: Gates, plan: Plan, survey: Survey) -> GateRef | None:
    mapped: Tensor = gate_map(name, plan, survey, gates.starts, gates.count)
    made = GateRef(gates, (mapped,)) if bool((mapped != gates.count).any()) else None
    own = gates[input_group(name)] if input_group(name) in plan.groups else None
    if made is not None and own is not None:
        return made * own
    return made or own


REFERENCES = ("in_gate", "out_gate", "in_port", "out_port", "gate")
"""What a layer has for its gates and a plain one has not."""


def can_be_plain(layer: GatedLayer) -> bool:
    """Whether a layer is of the very class that a plain one is swapped to."""
    return type(layer) in (gated_class(layer.plain_class), masked_class(layer.plain_class))


def uninstall(root: nn.Module, gates: Gates) -> None:
    """Give every layer of these gates its plain class back and remove the gates.

    Raises:
        ValueError: a layer is of a class that ``convert`` does not make; nothing is changed.
    """
    layers = [m for m in root.modules() if isinstance(m, GatedLayer) and m.gates is gates]
    strange = sorted({type(m).__name__ for m in layers if not can_be_plain(m)})
    if strange:
        raise ValueError(f"revert: expected layers of l0kernels.nn, got {strange}")
    for follower in list(gates.followers):
        follower.release()
    if gates.captured is not None:
        gates.captured.release()
    for module in layers:
        module.__class__ = module.plain_class  # pyright: ignore
        for name in REFERENCES:
            module.__dict__.pop(name, None)
    for module in root.modules():
        if _USED_NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_USED_NESTED)
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook in (draw_before_forward, keep_to_submodules):
                del module._forward_pre_hooks[handle]
    del root._modules["l0"]
