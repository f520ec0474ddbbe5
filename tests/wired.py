# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' networks with gates wired by hand, which takes no search for groups."""

from torch import nn

import l0kernels as l0
from l0kernels.bench.models import Network, full_widths
from l0kernels.nn import GatedLayer, gated_class


def wired(network: Network) -> nn.Module:
    """The network as ``convert`` makes it, with gates in the groups that it names."""
    net = network.build()
    widths = full_widths(net, network.groups)
    names = [group.producer for group in network.groups]
    gates = l0.gates.HardConcrete(dict(zip(names, widths, strict=True)))
    ends: dict[str, dict[str, l0.gates.GateRef]] = {}
    for group in network.groups:
        ref = gates[group.producer]
        ends.setdefault(group.producer, {})["out_gate"] = ref
        ends.setdefault(group.consumer, {})["in_gate"] = ref.expand(group.spread)
        if group.norm is not None:
            ends.setdefault(group.norm, {})["out_gate"] = ref
    for name, refs in ends.items():
        layer = net.get_submodule(name)
        layer.__class__ = gated_class(type(layer))  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(layer, GatedLayer)
        layer.connect(refs.get("in_gate"), refs.get("out_gate"))
    return gates.attach(net)
