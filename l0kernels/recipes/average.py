# SPDX-License-Identifier: Apache-2.0
"""Averaged parameters and gates, to be evaluated in place of the last ones."""

from __future__ import annotations

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
    return AveragedModel(net, avg_fn=partial(_next, decay=decay))


def _next(average: Tensor, value: Tensor, count: Tensor | int, decay: float) -> Tensor:
    """The average of one more value.

    Args:
        average: of the values so far.
        value: the next one.
        count: how many there were.
        decay: of the average.
    """
    return average.lerp(value, (1 - decay) / (1 - decay ** (int(count) + 1)))


def update(average: AveragedModel, net: nn.Module) -> None:
    """Take the parameters after a step into the average, gates in the range of their method."""
    gates = gates_of(net)
    gates.project(gates.log_alpha.data)
    average.update_parameters(net)
