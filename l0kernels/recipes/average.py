# SPDX-License-Identifier: Apache-2.0
"""Averaged parameters and gates, to be evaluated in place of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from l0kernels.training import gates_of


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a network's parameters, gates included.

    After t updates it is (1 - decay) sum_i decay^(t - i) value_i / (1 - decay^t), which does not
    depend on the parameters before the first. The authors of L0-HC, who divide by 1 - decay^t too,
    start at the initial parameters instead of 0, which makes it too large at first. Buffers, such
    as running statistics, are the latest.

    Args:
        net: converted network.
        decay: from 0 to 1, without 1.
    """
    return AveragedModel(net, multi_avg_fn=partial(_take_in, decay=decay))


def _take_in(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int, decay: float
) -> None:
    """Take one more value into each average.

    Args:
        averages: of the values so far; changed in place.
        values: the next ones.
        count: how many there were; a GPU is waited for once, not once for each average.
        decay: of the averages.
    """
    weight = (1 - decay) / (1 - decay ** (int(count) + 1))
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, weight)


def update(average: AveragedModel, net: nn.Module) -> None:
    """Take the parameters after a step into the average, gates in the range of their method."""
    gates = gates_of(net)
    gates.project(gates.log_alpha.data)
    average.update_parameters(net)
