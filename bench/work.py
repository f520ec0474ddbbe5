# SPDX-License-Identifier: Apache-2.0
"""How much work a network leaves at an open fraction."""

from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from .models import Network


@cache
def operations(network: Network, keep: float) -> int:
    """Return the floating-point operations of forward, dgrad and wgrad for one example.

    Counted by PyTorch on the network built at the open widths, layers without gates included;
    norms, activations and the optimizer are not.

    Args:
        network: the network.
        keep: open fraction of the gated units.
    """
    with torch.device("meta"):
        net = network.build(keep)
        x = torch.empty(2, *network.input_shape)
        labels = torch.empty(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(net(x), labels).backward()
    return counter.get_total_flops() // 2


def work_left(network: Network, keep: float) -> float:
    """Return the fraction of a step's operations that are left at an open fraction."""
    return operations(network, keep) / operations(network, 1.0)
