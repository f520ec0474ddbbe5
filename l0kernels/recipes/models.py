# SPDX-License-Identifier: Apache-2.0
"""The networks of the recipes, plain PyTorch; they are gated by ``convert``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The folder bench/ ships as l0kernels.bench, which pyright does not know.
from l0kernels.bench.models import (  # pyright: ignore[reportMissingImports]
    VGG16,
    BottleneckResNet,
    CifarResNet,
    WideResNet,
)


class MLP(nn.Module):
    """784-300-100-10 with ReLU.

    Shape: x [N, 1, 28, 28]; y [N, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 20 and 50 filters of 5x5, each with ReLU and max-pooling, 500, 10.

    Shape: x [N, 1, 28, 28]; y [N, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def vgg16(classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm for 32x32 images."""
    return VGG16(_whole, classes)


def resnet(blocks: int, classes: int = 10) -> nn.Module:
    """Residual network of 6 ``blocks`` + 2 layers for 32x32 images."""
    return CifarResNet(_whole, classes, blocks=blocks)


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50."""
    return BottleneckResNet(_whole, classes, blocks=(3, 4, 6, 3))


def wide_resnet(depth: int, factor: int, classes: int = 10) -> nn.Module:
    """Wide residual network WRN-depth-factor for 32x32 images."""
    return WideResNet(_whole, classes, depth=depth, factor=factor)


def _whole(width: int) -> int:
    return width


def build(
    make: Callable[[], nn.Module], seed: int, init: Callable[..., Any] = nn.init.kaiming_normal_
) -> nn.Module:
    """A network with fresh parameters, zero biases of convolutions and linear layers.

    Args:
        make: makes the network.
        seed: of the parameters; the global generator is left as it was.
        init: sets the weights of convolutions and linear layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                init(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return net
