# SPDX-License-Identifier: Apache-2.0
"""Whether gates can multiply what a layer makes, before a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l0kernels.convert.probe import Probe, is_layer
from l0kernels.convert.units import Units
from l0kernels.nn import gated_class

PLACES = ("after_act", "before_norm")


def why_not_before_norm(probe: Probe, units: list[Units]) -> dict[str, str]:
    """Groups whose gates cannot stand before a norm, with the reason.

    What `l0kernels.nn.constants` asks for is found out here, but for functions that treat
    channels or examples differently: the self-check sees these.

    Args:
        probe: an entered probe.
        units: of its model.
    """
    noisy = probe.with_dropout()
    found = {u.name: _why_not(probe, u, noisy) for u in units if u.problem is None}
    return {name: reason for name, reason in found.items() if reason is not None}


def _why_not(probe: Probe, units: Units, noisy: set[str]) -> str | None:
    if len(units.makers) != 1:
        return "before_norm: its units are made by several layers, so no norm follows one of them"
    maker = next(iter(units.makers))
    passages = [r for r in units.readers if not is_layer(probe.modules[r])]
    norms = [r for r in passages if _is_norm(probe.modules[r]) and probe.reads_just(r, maker)]
    if not norms:
        return "before_norm: no BatchNorm reads what it makes, as it is"
    norm = norms[0]
    for other in passages:
        if other != norm:
            kind = type(probe.modules[other]).__name__
            return f"before_norm: behind {norm} its units pass through {kind} {other}"
    past = probe.reading_past(norm, maker)
    for reader in (maker, *units.readers):
        reason = None if reader == norm else _why_not_there(probe, reader, past, norm)
        if reason is None and reader in units.readers:
            reason = _why_not_constant(units, reader, noisy)
        if reason is not None:
            return f"before_norm: {reason}"
    return None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _why_not_there(probe: Probe, layer: str, past: set[str], norm: str) -> str | None:
    """Why a layer can neither make what a norm reads nor read what it makes."""
    kind = type(probe.modules[layer])
    gated = gated_class(kind)
    if gated is None or not gated.knows_constants:
        return f"{kind.__name__} {layer} cannot work with constants for closed units"
    return f"{layer} reads its units past {norm}" if layer in past else None


def _why_not_constant(units: Units, reader: str, noisy: set[str]) -> str | None:
    """Why closed units are not constants, alone and in order, where they are read."""
    if not _in_order(units.readers[reader], units.size):
        return f"{reader} reads its units beside others or in another order"
    return f"dropout acts on what {reader} reads" if reader in noisy else None


def _in_order(unit: Tensor, size: int) -> bool:
    return torch.equal(unit, torch.arange(size).repeat_interleave(unit.numel() // size))
