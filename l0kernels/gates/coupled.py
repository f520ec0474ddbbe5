# SPDX-License-Identifier: Apache-2.0
"""Coupled L2: weight decay in proportion to how likely a unit is to be open."""

from __future__ import annotations

from torch import Tensor, nn

from l0kernels.gates.base import Constant, Gates, makes_filters


def coupled_l2(model: nn.Module, gates: Gates) -> Tensor:
    """(1 / n_train) sum_j P(z_j != 0) l2 / 2 ||W_j||^2, 0-d, differentiable in gates and weights.

    W_j is what |G_j| counts: the filter of a convolution's output channel, else the columns that
    read the unit. With p_j = P(z_j != 0), the gradients are p_j l2 W_j / n_train and
    dp_j / dlog_alpha_j l2 / 2 ||W_j||^2 / n_train.

    Args:
        model: with the layers that the gates are attached to.
        gates: of the model, with ``l2``.

    Raises:
        ValueError: the gates are not attached to a model.

    Source: Louizos, Welling, Kingma, 2018, arXiv:1712.01312, section 2.3 and the authors' code.
    """
    if gates.has_filter.numel() == 0:
        raise ValueError("penalty: expected gates that are attached to a model, got others")
    if gates.frozen:
        p = Constant.apply(gates.log_alpha, gates.open_probability().to(gates.log_alpha))
    else:
        p = gates.openness()
    value = (p * _squares(model, gates)).sum() * (gates.l2 / 2 / gates.n_train)
    return value.to(gates.log_alpha.dtype)


def _squares(model: nn.Module, gates: Gates) -> Tensor:
    """||W_j||^2 of every gate, shape [gates]."""
    from l0kernels.nn.base import GatedLayer

    filters = gates.log_alpha.new_zeros(gates.count + 1)
    columns = gates.log_alpha.new_zeros(gates.count + 1)
    for layer in model.modules():
        if not isinstance(layer, GatedLayer) or layer.gates is not gates:
            continue
        weight = layer.weight
        if weight is None or weight.dim() < 2 or not (makes_filters(layer) or layer.has_columns):
            continue
        squares = layer._out_in(weight).to(filters.dtype).square()
        kernel = tuple(range(2, squares.dim()))
        if makes_filters(layer):
            rows = gates.port_maps[layer.out_port][0]
            filters = filters.index_add(0, rows, squares.sum((1, *kernel)))
        if layer.has_columns:
            by_column = squares.sum((0, *kernel))
            # On a GPU, features that share a gate are added in a fixed order only with
            # deterministic algorithms.
            for column_map in gates.port_maps[layer.in_port]:
                columns = columns.index_add(0, column_map, by_column)
    return filters.where(gates.has_filter, columns)[: gates.count]


__all__ = ["coupled_l2"]
