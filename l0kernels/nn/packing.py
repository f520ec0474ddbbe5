# SPDX-License-Identifier: Apache-2.0
"""Packed parameters of all layers of a model from one call."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l0kernels.functional import pack_weights
from l0kernels.gates.base import Gates, in_backward
from l0kernels.gates.draw import Draw

if TYPE_CHECKING:
    from l0kernels.nn.base import GatedLayer

Packed = tuple[Tensor, Tensor | None]
Members = weakref.WeakKeyDictionary["GatedLayer", dict[bool, torch.dtype | None]]
"""Layers, and what each packed to in its last forward with and without gradients; None: nothing."""


class Share(NamedTuple):
    """What a call for the whole model packed for one layer.

    Args:
        packed: weight and bias.
        dtype: of them.
        sources: what they were packed from.
        versions: of the sources at that time.
    """

    packed: Packed
    dtype: torch.dtype
    sources: Packed
    versions: tuple[int, ...]

    def serves(self, layer: GatedLayer, dtype: torch.dtype) -> bool:
        """Whether the layer would pack the same by itself now."""
        weight, bias = layer.weight, layer.bias
        return (
            dtype == self.dtype
            and weight is self.sources[0]
            and bias is self.sources[1]
            and _versions(weight, bias) == self.versions
        )


def layers_of(root: nn.Module, gates: Gates) -> Members:
    """The layers of a model that pack together, with nothing known of any."""
    from l0kernels.nn.base import GatedLayer

    found = weakref.WeakKeyDictionary()
    for module in root.modules():
        if isinstance(module, GatedLayer) and module.gates is gates and module.packs_together:
            found[module] = {}
    return found


def take(layer: GatedLayer, gates: Gates, draw: Draw) -> Packed:
    """The packed parameters of a layer, as a part of one call for the whole model.

    The first layer that asks in a forward makes the call, with what each layer packed to last
    time. Every layer takes its part once. A layer that asks again, for a second use in a forward
    or to be recomputed in backward, packs alone; so does one whose dtype or parameters are not
    what the call found. So parts that are not taken are the only ones to outlive their use.

    Under DDP every layer packs alone: gradients are sent while backward goes on, where one call's
    would come all at its end, and every parameter must have its gradient made once, whether its
    layer is used, recomputed or not.
    """
    dtype = layer.compute_dtype()
    share = None
    alone = in_backward() or DistributedDataParallel._get_active_ddp_module() is not None
    if gates.layers is not None and layer in gates.layers and not alone:
        mode = torch.is_grad_enabled()
        gates.layers[layer][mode] = dtype
        if mode not in draw.shares:
            draw.shares[mode] = _pack_model(gates.layers, mode, gates, draw)
        share = draw.shares[mode].pop(layer, None)
    if share is None or not share.serves(layer, dtype):
        return pack({layer: dtype}, gates, draw)[layer]
    return share.packed


def _pack_model(layers: Members, mode: bool, gates: Gates, draw: Draw) -> dict[GatedLayer, Share]:
    dtypes = {
        layer: known[mode] if mode in known else layer.compute_dtype()
        for layer, known in layers.items()
    }
    wanted = {
        layer: dtype
        for layer, dtype in dtypes.items()
        if dtype is not None and gates.packs(layer, draw) and _can_become(layer.weight.dtype, dtype)
    }
    return {
        layer: Share(
            packed,
            wanted[layer],
            (layer.weight, layer.bias),
            _versions(layer.weight, layer.bias),
        )
        for layer, packed in pack(wanted, gates, draw).items()
    }


def pack(
    wanted: Mapping[GatedLayer, torch.dtype], gates: Gates, draw: Draw
) -> dict[GatedLayer, Packed]:
    """Packs the parameters of layers, those of equal dtypes in one call.

    Args:
        wanted: the dtype of each layer's packed parameters.
        gates: of the layers.
        draw: says what is open.
    """
    calls: dict[tuple[torch.dtype, torch.dtype], list[_Part]] = {}
    for layer, dtype in wanted.items():
        for part in _parts_of(layer, gates, draw):
            calls.setdefault((part.full.dtype, dtype), []).append(part)
    found: dict[tuple[GatedLayer, str], Tensor] = {}
    for (_, dtype), parts in calls.items():
        full, spans = [part.full for part in parts], [part.span for part in parts]
        kept = None
        if gates.kept and not torch.compiler.is_compiling():
            kept = [gates.kept.get(weight) for weight in full]
        maps = gates.layout.maps
        results = pack_weights(full, draw.z, draw.whole_index, maps, spans, dtype, kept)
        for part, packed in zip(parts, results, strict=True):
            found[part.layer, part.name] = packed
    # Parameters of which nothing is packed stay as they are, which layers cast themselves.
    return {
        layer: (
            layer._out_in(found[layer, "weight"]) if (layer, "weight") in found else layer.weight,
            found.get((layer, "bias"), layer.bias),
        )
        for layer in wanted
    }


class _Part(NamedTuple):
    layer: GatedLayer
    name: str
    full: Tensor
    span: tuple[int, int, int, int]


def weight_part(layer: GatedLayer, gates: Gates, draw: Draw) -> _Part | None:
    """What is packed of a layer's weight; None: nothing is."""
    return next((part for part in _parts_of(layer, gates, draw) if part.name == "weight"), None)


def _parts_of(layer: GatedLayer, gates: Gates, draw: Draw) -> Iterator[_Part]:
    out_port = layer.out_port if gates.drops(layer.out_port, draw) else -1
    in_port = -1 if layer.in_port in draw.dense else layer.in_port
    rows, cols = gates.span(out_port, draw), gates.span(in_port, draw)
    if max(out_port, in_port) >= 0:
        yield _Part(layer, "weight", layer._out_in(layer.weight), (*rows, *cols))
    if layer.bias is not None and out_port >= 0:
        yield _Part(layer, "bias", layer.bias, (*rows, -1, 0))


def _versions(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Version counters; tensors of inference mode have none."""
    return tuple(0 if t is None or t.is_inference() else t._version for t in (weight, bias))


def _can_become(source: torch.dtype, dtype: torch.dtype) -> bool:
    half = (torch.bfloat16, torch.float16)
    return source == dtype or (source == torch.float32 and dtype in half)
