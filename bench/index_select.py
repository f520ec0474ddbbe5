# SPDX-License-Identifier: Apache-2.0
"""Weight packing in plain PyTorch: gather the open rows and columns, run the small layer.

What a competent user writes without custom kernels. Rows of the producer and of its batch norm,
columns of the consumer are gathered with `index_select`, the gate is folded into the consumer's
columns; autograd scatters the gradients back to full shape. Memory formats are kept, and columns
are gathered on a 2-D view, which is several times faster than on the 4-D weight.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masked import FlatGated, replace
from .models import Group


class Slot:
    """The open units of one group in this draw, shared by the layers around it.

    Args:
        spread: input features of the consumer per unit.
    """

    def __init__(self, spread: int):
        self.spread = spread
        self.units = self.features = torch.empty(0, dtype=torch.long)
        self.scale = torch.empty(0)

    def fill(self, z: Tensor) -> None:
        """Take a new draw: open units, the consumer's open features and their scale."""
        self.units = self.features = open_units(z)
        self.scale = z.index_select(0, self.units)
        if self.spread > 1:
            inside = torch.arange(self.spread, device=z.device)
            self.features = (self.units[:, None] * self.spread + inside).flatten()
            self.scale = self.scale.repeat_interleave(self.spread)


def open_units(z: Tensor) -> Tensor:
    """Return the ascending open units, filled up with the first ones to two if need be."""
    units = z.detach().nonzero().squeeze(1)
    if len(units) < min(2, len(z)):
        forced = (z != 0).index_fill(0, (z == 0).nonzero().squeeze(1)[: 2 - len(units)], True)
        units = forced.nonzero().squeeze(1)
    return units


def channels_last_view(weight: Tensor) -> Tensor:
    """Return a convolution weight as [out, kh, kw, in]; a linear one as it is."""
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight


def pack(weight: Tensor, source: Slot | None, target: Slot | None) -> Tensor:
    """Return the open rows and columns of a weight, columns scaled, convolutions channels_last.

    Args:
        weight: [out, in] or [out, in, kh, kw].
        source: gates of its input, None for all columns.
        target: gates of its output, None for all rows.
    """
    packed = channels_last_view(weight)
    if target is not None:
        packed = packed.index_select(0, target.units)
    if source is not None:
        flat = packed.reshape(-1, packed.shape[-1])
        columns = flat.index_select(1, source.features) * source.scale
        packed = columns.view(*packed.shape[:-1], -1)
    return packed.permute(0, 3, 1, 2) if weight.dim() == 4 else packed


class PackedLayer(nn.Module):
    """A convolution or linear layer run on its open rows and columns.

    Args:
        layer: the full layer.
        source: gates of its input, None where the input is ungated.
        target: gates of its output, None where the output is ungated.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, source: Slot | None, target: Slot | None):
        super().__init__()
        self.layer = layer
        self.source, self.target = source, target

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight, bias = pack(layer.weight, self.source, self.target), layer.bias
        if bias is not None and self.target is not None:
            bias = bias.index_select(0, self.target.units)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


class PackedNorm(nn.Module):
    """A batch norm over the open channels; closed ones keep their statistics."""

    def __init__(self, norm: nn.BatchNorm2d, slot: Slot):
        super().__init__()
        self.norm, self.slot = norm, slot

    def forward(self, x: Tensor) -> Tensor:
        norm, units = self.norm, self.slot.units
        mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None and var is not None and count is not None
        packed_mean, packed_var = mean.index_select(0, units), var.index_select(0, units)
        momentum = 0.1 if norm.momentum is None else norm.momentum
        weight, bias = norm.weight.index_select(0, units), norm.bias.index_select(0, units)
        out = F.batch_norm(x, packed_mean, packed_var, weight, bias, True, momentum, norm.eps)
        mean.index_copy_(0, units, packed_mean)
        var.index_copy_(0, units, packed_var)
        count.add_(1)
        return out


class IndexSelect(FlatGated):
    """A network with one flat draw whose gated layers run packed, in plain PyTorch."""

    def __init__(self, net: nn.Module, groups: Sequence[Group], n_train: int):
        super().__init__(net, groups, n_train)
        self.slots = [Slot(group.spread) for group in groups]
        sources, targets = {}, {}
        for group, slot in zip(groups, self.slots, strict=True):
            sources[group.consumer], targets[group.producer] = slot, slot
            if group.norm is not None:
                norm = net.get_submodule(group.norm)
                assert isinstance(norm, nn.BatchNorm2d)
                replace(net, group.norm, PackedNorm(norm, slot))
        for name in sorted(sources.keys() | targets.keys()):
            layer = net.get_submodule(name)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            replace(net, name, PackedLayer(layer, sources.get(name), targets.get(name)))

    def forward(self, x: Tensor) -> Tensor:
        self.gates.draw()
        for slot, z in zip(self.slots, self.gates.z, strict=True):
            slot.fill(z)
        return self.net(x)
