# SPDX-License-Identifier: Apache-2.0
"""Networks as other libraries prune them, and linear layers by oneDNN.

Both pruning peers drop the filters of smallest norm once, to round(open fraction x width) units;
nothing is drawn afterwards.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from l0kernels.nn import matmul

from .models import Network, kept_width

ALL_IN_ONEDNN = dict.fromkeys(matmul.PRODUCTS, True)


def dropped(layer: nn.Module, keep: float) -> Tensor:
    """Return the indices of the filters of smallest L2 norm that are pruned."""
    weight = layer.get_parameter("weight").detach()
    count = len(weight) - kept_width(len(weight), keep)
    return weight.flatten(1).norm(dim=1).argsort()[:count].sort().values


def prune_by_masks(net: nn.Module, network: Network, keep: float) -> nn.Module:
    """Mask pruned units with `torch.nn.utils.prune`, in place: everything is still computed."""
    for group in network.groups:
        layer = net.get_submodule(group.producer)
        kept = torch.ones(len(layer.get_parameter("weight")))
        kept[dropped(layer, keep)] = 0
        for name, parameter in list(layer.named_parameters(recurse=False)):
            mask = kept.view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter)
            prune.custom_from_mask(layer, name, mask.contiguous())
    return net


def why_no_torch_pruning() -> str:
    """Return why Torch-Pruning cannot run here, "" if it can."""
    return "" if find_spec("torch_pruning") else "torch-pruning is not installed"


def prune_by_torch_pruning(net: nn.Module, network: Network, keep: float, x: Tensor) -> nn.Module:
    """Cut pruned units out with Torch-Pruning, in place.

    Args:
        net: the full network.
        network: says which layers' units are pruned.
        keep: fraction that stays.
        x: an input to follow.
    """
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(net, example_inputs=x)
    for group in network.groups:
        layer = net.get_submodule(group.producer)
        cut = (
            tp.prune_linear_out_channels
            if isinstance(layer, nn.Linear)
            else tp.prune_conv_out_channels
        )
        graph.get_pruning_group(layer, cut, idxs=dropped(layer, keep).tolist()).prune()
    return net


class OneDNNLinear(nn.Linear):
    """A linear layer whose three matmuls run in oneDNN instead of MKL; float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return matmul.Linear.apply(input, self.weight, self.bias, ALL_IN_ONEDNN)


def with_onednn(net: nn.Module) -> nn.Module:
    """Let the linear layers of a network run in oneDNN, in place."""
    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    return net
