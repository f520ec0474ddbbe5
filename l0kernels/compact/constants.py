# SPDX-License-Identifier: Apache-2.0
"""Closed units before a norm in a compact model: one of them stands for all.

Behind the norm a closed unit is a constant a_f (see ``l0kernels.nn.constants``) in every feature f
that a layer reads. A sum of constant planes, each through its own filter, is one of the planes
through one filter,

    sum_f filter_f * a_f = (sum_f a_f / a_k filter_f) * a_k,

at the border too. So of the closed units one that is not 0 stays for each layer, with this filter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0kernels.gates.base import Gates
from l0kernels.gates.draw import Draw
from l0kernels.nn import GatedLayer

SAME = 1e-12  # part of a constant by which vectorised code may differ from the rest


class Fold(NamedTuple):
    """Which feature stands for all closed ones that a layer reads.

    Args:
        feature: its number.
        shares: of every feature, what its columns count there, [features]; 0 for open ones.
    """

    feature: int
    shares: Tensor


@contextmanager
def watching_constants(whole: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What layers read in every feature, by name, NaN where it varies; filled by a forward."""
    found: dict[str, Tensor] = {}

    def note(name: str, layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = next(iter((*args, *kwargs.values())))
        least, most = x.movedim(layer.feature_dim, 0).flatten(1).aminmax(dim=1)
        same = most - least <= SAME * most.abs()
        found[name] = torch.where(same, most, torch.nan)

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in whole.named_modules()
        if isinstance(module, GatedLayer) and module.reads_constants
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_folds(
    whole: nn.Module, gates: Gates, z: Tensor, constants: Mapping[str, Tensor]
) -> dict[GatedLayer, Fold]:
    """How layers get what closed units are worth, where it is not 0.

    Args:
        whole: the model.
        gates: of the model.
        z: gate values and a final 1, shape [gates + 1].
        constants: what ``watching_constants`` found.

    Raises:
        ValueError: a closed unit is not one constant where a layer reads it.
    """
    folds = {}
    for name, layer in whole.named_modules():
        if not isinstance(layer, GatedLayer) or not layer.reads_constants:
            continue
        if name not in constants:  # not called in eval mode
            continue
        closed = z[gates.port_maps[layer.in_port][0]] == 0
        values = torch.where(closed, constants[name].to(z), 0.0)
        if bool(values.isnan().any()):
            raise ValueError(
                f"compact: expected closed units before a norm to be the same at all pixels where "
                f"{name} reads them, got others (padding behind the norm); no plain layer adds "
                f"what they add there"
            )
        most = int(values.abs().argmax())
        if values[most] != 0:
            folds[layer] = Fold(most, values / values[most])
    return folds


def fold_columns(layer: GatedLayer, weight: Tensor, draw: Draw, fold: Fold | None) -> Tensor:
    """The packed weight of a layer with the columns of closed features folded into one.

    Args:
        layer: reads constants.
        weight: packed, [rows, columns, ...].
        draw: says what is packed.
        fold: where to; None: the constants are 0.
    """
    gates = layer.gates
    assert gates is not None
    is_open = draw.z[gates.port_maps[layer.in_port][0]] != 0
    index = draw.index[layer.in_port]
    weight = torch.where(_along_columns(is_open[index], weight), weight, 0.0)
    if fold is not None:
        closed = (~is_open).nonzero().flatten()
        dtype = layer.compute_dtype()
        columns = layer._pack_one(layer.weight, draw, dtype, columns=True, closed=closed).double()
        shares = _along_columns(fold.shares[closed].double(), columns)
        weight[:, index == fold.feature] = (columns * shares).sum(1, keepdim=True).to(weight)
    return weight


def _along_columns(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (weight.dim() - 2))
