# SPDX-License-Identifier: Apache-2.0
"""Many kinds of networks, small and full, and which of their units `convert` must gate.

Which groups an entry expects follows from how its network is wired, by the rule of
`select="inner"`: units made by one layer (or by layers whose outputs are multiplied, as in GLU and
squeeze-and-excite) and read only by convolutions and linear layers are gated; residual streams,
stems that feed them, logits and units that a normalisation or attention mixes are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import models
from .models import (
    BasicBlock,
    Bottleneck,
    BottleneckResNet,
    CifarResNet,
    LinearExcite,
    conv1x1,
    conv3x3,
    norm_relu,
)

Size = Literal["small", "full"]
SIZES: dict[str, Size] = {"small": "small", "full": "full"}

# Why layers stay ungated: patterns that the reason given by `report` must contain.
STREAM = r"residual stream"
JOINED = r"joined with those of"
MIXED = r"mixed with one another"
OUTPUT = r"reach an output"
TWICE = r"called 2 times"
SHARED = r"shared by"
# A stream that a LayerNorm or attention reads first is refused for that, which is as true.
STREAM_OR_MIXED = rf"{STREAM}|{MIXED}"
# Queries, keys and values meet in every output of attention; the rest is the stream around it.
ATTENTION = rf"{STREAM_OR_MIXED}|{JOINED}"


class Gated(NamedTuple):
    """One group, by module names, each side sorted.

    Args:
        producers: layers that make its units; several if their outputs are multiplied.
        consumers: layers whose inputs the gates multiply.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Expected:
    """What `convert` must do with a network.

    Args:
        gated: the groups.
        refused: layer -> pattern of the reason why its units have no gates.
    """

    gated: tuple[Gated, ...]
    refused: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo. Its floating outputs are logits.

    Args:
        name: as on the command line.
        make: builds the network in a size, with random weights.
        inputs: random positional arguments for a size, a batch and a generator.
        gated: the groups of a built network.
        refused: module name pattern -> pattern of the reason, for all other layers; the first
            that matches counts.
        batch: examples per timed step at full size.
        class_dim: dimension of the classes in the outputs.
        needs: package without which it cannot be built.
    """

    name: str
    make: Callable[[Size], nn.Module]
    inputs: Callable[[Size, int, torch.Generator], tuple[Tensor, ...]]
    gated: Callable[[Any], Iterable[Gated]]
    refused: dict[str, str] = field(default_factory=dict)
    batch: int = 32
    class_dim: int = 1
    needs: str | None = None

    def build(self, size: Size = "full", seed: int = 0) -> nn.Module:
        """Return the network in training mode; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(size).train()

    def example(self, size: Size, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random positional arguments of the forward."""
        return self.inputs(size, batch, torch.Generator().manual_seed(seed))

    def available(self) -> bool:
        """Whether the package it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None

    def expected(self, net: nn.Module) -> Expected:
        """Return the groups and refusals of a built, unconverted network.

        Raises:
            ValueError: a layer is neither in a group nor among the refused, or a group names a
                module that the network does not have.
        """
        gated = tuple(Gated(*map(_sorted, group)) for group in self.gated(net))
        names = dict(net.named_modules())
        used = [n for group in gated for n in (*group.producers, *group.consumers)]
        unknown = [name for name in used if name not in names]
        if unknown:
            raise ValueError(f"{self.name}: expected names of modules, got {unknown}")
        produced = {name for group in gated for name in group.producers}
        refused = {n: self._reason(n) for n in layers_of(net) if n not in produced}
        return Expected(gated, refused)

    def _reason(self, layer: str) -> str:
        for pattern, reason in self.refused.items():
            if fnmatchcase(layer, pattern):
                return reason
        raise ValueError(f"{self.name}: expected a group or a reason for {layer}, got neither")

    def loss(self, outputs: Any) -> Tensor:
        """Return the cross-entropy of all outputs against fixed labels."""
        losses = []
        for logits in floating(outputs):
            rows = logits.movedim(self.class_dim, -1).flatten(0, -2)
            labels = torch.arange(len(rows), device=rows.device) % rows.shape[1]
            losses.append(F.cross_entropy(rows, labels))
        return torch.stack(losses).sum()

    def predictions(self, outputs: Any) -> Tensor:
        """Return the largest class at every output position, flat."""
        found = [logits.argmax(self.class_dim).flatten() for logits in floating(outputs)]
        return torch.cat(found)


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def floating(outputs: Any) -> list[Tensor]:
    """Return the floating tensors of a nested structure."""
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def layers_of(net: nn.Module) -> list[str]:
    """Return the names of all layers that make units: convolutions, not depthwise, and linear."""
    return [name for name, module in net.named_modules() if makes_units(module)]


def makes_units(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return not 1 < module.groups == module.in_channels == module.out_channels
    return isinstance(module, nn.Linear) or is_in_out(module)


def is_in_out(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers' GPT-2, with its weight as [in, out]."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def chain(names: Sequence[str]) -> list[Gated]:
    """Return one group per layer but the last, each read by the next."""
    return [Gated((first,), (second,)) for first, second in pairwise(names)]


def each(net: nn.Module, kind: type[nn.Module], producer: str, consumer: str) -> list[Gated]:
    """Return a group for every module of a kind, by the names of its layers."""
    return [
        Gated((f"{name}.{producer}",), (f"{name}.{consumer}",))
        for name, module in net.named_modules()
        if isinstance(module, kind)
    ]


def image(small: int, full: int, channels: int = 3) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that makes square images."""

    def inputs(size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        side = small if size == "small" else full
        return (torch.randn(batch, channels, side, side, generator=generator),)

    return inputs


# Networks of the step bench.


def from_models(
    name: str,
    full: str,
    small: str,
    keep: float,
    last: str,
    side: int | None = None,
    batch: int = 32,
) -> Entry:
    """Return an entry for networks of `models`.

    Args:
        name: of the entry.
        full: network of full size.
        small: network of small size; its groups are named like the first ones of `full`.
        keep: fraction of the gated widths that the small network has.
        last: name of the classifier.
        side: of small images, None if the network takes one shape only.
        batch: examples per timed step.
    """

    def make(size: Size) -> nn.Module:
        chosen, fraction = (small, keep) if size == "small" else (full, 1.0)
        return models.network(chosen).build(fraction)

    def inputs(size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = models.network(full).input_shape
        if size == "small" and side is not None:
            shape = (shape[0], side, side)
        return (torch.randn(batch, *shape, generator=generator),)

    def gated(net: nn.Module) -> list[Gated]:
        names = dict(net.named_modules())
        groups = models.network(full).groups
        return [Gated((g.producer,), (g.consumer,)) for g in groups if g.producer in names]

    return Entry(name, make, inputs, gated, {last: OUTPUT, "*": STREAM}, batch)


# ResNets.


def basic_groups(net: nn.Module) -> list[Gated]:
    inner = each(net, LinearExcite, "fc1", "fc2")
    return each(net, BasicBlock, "conv1", "conv2") + inner


def full_width(width: int) -> int:
    return width


def cifar_resnet(name: str, full: int, small: int, reduction: int | None = None) -> Entry:
    """Return an entry with so many blocks per stage."""

    def make(size: Size) -> nn.Module:
        blocks, width = (small, 4) if size == "small" else (full, 16)
        return CifarResNet(full_width, blocks=blocks, width=width, reduction=reduction)

    return Entry(name, make, image(8, 32), basic_groups, {"classifier": OUTPUT, "*": STREAM})


def resnet50(size: Size) -> nn.Module:
    if size == "small":
        return BottleneckResNet(full_width, 5, blocks=(2, 1), width=4)
    return models.network("resnet50").build()


def bottleneck_groups(net: nn.Module) -> list[Gated]:
    return each(net, Bottleneck, "conv1", "conv2") + each(net, Bottleneck, "conv2", "conv3")


# MobileNets.


class ConvExcite(nn.Module):
    """Squeeze-and-excite with 1x1 convolutions (Howard et al. 2019)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


def mobile_norm(width: int) -> nn.BatchNorm2d:
    """Return the norm of the MobileNets; their published networks have this epsilon."""
    return nn.BatchNorm2d(width, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excite on request, project (Sandler et al. 2018).

    Args:
        fan_in: input channels.
        fan_out: output channels.
        inner: expanded channels; there is no expanding convolution if it equals `fan_in`.
        stride: of the depthwise convolution.
        act: activation.
        squeeze: inner width of squeeze-and-excite, None without it.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        inner: int,
        stride: int,
        act: Callable[[Tensor], Tensor],
        squeeze: int | None = None,
    ):
        super().__init__()
        self.act, self.adds = act, stride == 1 and fan_in == fan_out
        self.expand = None if inner == fan_in else conv1x1(fan_in, inner)
        self.norm1 = None if inner == fan_in else mobile_norm(inner)
        self.depth = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.norm2 = mobile_norm(inner)
        self.excite = None if squeeze is None else ConvExcite(inner, squeeze)
        self.project = conv1x1(inner, fan_out)
        self.norm3 = mobile_norm(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.norm1 is not None:
            y = self.act(self.norm1(self.expand(y)))
        y = self.act(self.norm2(self.depth(y)))
        if self.excite is not None:
            y = self.excite(y)
        y = self.norm3(self.project(y))
        return x + y if self.adds else y


class MobileNet(nn.Module):
    """Inverted residuals between a stem and a wide head.

    Args:
        stem: channels of the stem.
        blocks: arguments of every `InvertedResidual` after `fan_in`.
        head: channels of the head.
        act: activation of stem and head.
    """

    def __init__(
        self,
        stem: int,
        blocks: Sequence[tuple[Any, ...]],
        head: int,
        act: Callable[[Tensor], Tensor],
        classes: int = 10,
    ):
        super().__init__()
        self.act = act
        self.stem = conv3x3(3, stem)
        self.norm1 = mobile_norm(stem)
        widths = [stem, *(block[0] for block in blocks)]
        made = (InvertedResidual(w, *block) for w, block in zip(widths, blocks, strict=False))
        self.blocks = nn.Sequential(*made)
        self.head = conv1x1(widths[-1], head)
        self.norm2 = mobile_norm(head)
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = self.act(self.norm2(self.head(self.blocks(x))))
        return self.classifier(x.mean((2, 3)))


def mobilenet_v2(size: Size) -> nn.Module:
    """Table 2 of Sandler et al. 2018, with the strides of 32x32 inputs."""
    rows = (
        [(1, 4, 1, 1), (3, 6, 2, 2), (3, 5, 1, 1)]
        if size == "small"
        else [
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
    )
    stem, head = (6, 9) if size == "small" else (32, 1280)
    blocks, fan_in = [], stem
    for expansion, fan_out, count, stride in rows:
        for block in range(count):
            blocks.append((fan_out, expansion * fan_in, 1 if block else stride, F.relu6))
            fan_in = fan_out
    return MobileNet(stem, blocks, head, F.relu6)


def mobilenet_v3(size: Size) -> nn.Module:
    """Like table 2 of Howard et al. 2019 (small), with 3x3 convolutions only."""
    relu, swish = F.relu, F.hardswish
    if size == "small":
        blocks = [(5, 6, 2, relu, 3), (5, 9, 1, swish, 2), (7, 8, 1, swish)]
        return MobileNet(6, blocks, 9, swish)
    blocks = [
        (16, 16, 2, relu, 8),
        (24, 72, 2, relu),
        (24, 88, 1, relu),
        (40, 96, 2, swish, 24),
        (40, 240, 1, swish, 64),
        (40, 240, 1, swish, 64),
        (48, 120, 1, swish, 32),
        (48, 144, 1, swish, 40),
        (96, 288, 2, swish, 72),
        (96, 576, 1, swish, 144),
        (96, 576, 1, swish, 144),
    ]
    return MobileNet(16, blocks, 576, swish)


def mobilenet_groups(net: MobileNet) -> list[Gated]:
    """The stem and every projection start a stream; it is gated if nothing is added to it."""
    groups, stream, adds = [], "stem", False
    for place, block in enumerate(net.blocks):
        name = f"blocks.{place}"
        assert isinstance(block, InvertedResidual)
        readers = [f"{name}.project"]
        if block.excite is not None:
            readers.insert(0, f"{name}.excite.fc1")
            groups.append(Gated((f"{name}.excite.fc1",), (f"{name}.excite.fc2",)))
        makers = [f"{name}.excite.fc2"] if block.excite is not None else []
        if block.expand is not None:
            groups.append(Gated((f"{name}.expand", *makers), tuple(readers)))
            readers, makers = [f"{name}.expand"], []
        if not adds and not block.adds:
            groups.append(Gated((stream, *makers), tuple(readers)))
        stream, adds = f"{name}.project", block.adds
    if not adds:
        groups.append(Gated((stream,), ("head",)))
    return [*groups, Gated(("head",), ("classifier",))]


# Concatenation: Inception, U-Net, DenseNet.


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.norm, self.conv(x))


class Inception(nn.Module):
    """Four branches, concatenated (Szegedy et al. 2015, figure 2b).

    Args:
        fan_in: input channels.
        widths: 1x1; 3x3 reduce and 3x3; 5x5 reduce and 5x5; pool projection.
    """

    READERS = ("one", "reduce3", "reduce5", "pooled")
    MAKERS = ("one", "conv3", "conv5", "pooled")

    def __init__(self, fan_in: int, widths: Sequence[int]):
        super().__init__()
        one, reduce3, conv3, reduce5, conv5, pooled = widths
        self.one = ConvNorm(fan_in, one)
        self.reduce3, self.conv3 = ConvNorm(fan_in, reduce3), ConvNorm(reduce3, conv3, 3)
        self.reduce5, self.conv5 = ConvNorm(fan_in, reduce5), ConvNorm(reduce5, conv5, 5)
        self.pooled = ConvNorm(fan_in, pooled)
        self.fan_out = one + conv3 + conv5 + pooled

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.max_pool2d(x, 3, 1, padding=1))
        branches = (self.one(x), self.conv3(self.reduce3(x)), self.conv5(self.reduce5(x)), pooled)
        return torch.cat(branches, 1)


class AuxiliaryHead(nn.Module):
    """A second classifier that exists in training only."""

    def __init__(self, fan_in: int, width: int, inner: int, classes: int):
        super().__init__()
        self.conv = nn.Conv2d(fan_in, width, 1)
        self.fc1 = nn.Linear(4 * width, inner)
        self.fc2 = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.adaptive_avg_pool2d(x, 2)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class GoogLeNet(nn.Module):
    """Three Inception modules; a tuple of two outputs in training, one tensor in eval mode."""

    def __init__(self, stem: int, widths: Sequence[Sequence[int]], aux: Sequence[int]):
        super().__init__()
        self.stem = ConvNorm(3, stem, 3)
        modules, fan_in = [], stem
        for row in widths:
            modules.append(Inception(fan_in, row))
            fan_in = modules[-1].fan_out
        self.inceptions = nn.ModuleList(modules)
        self.aux = AuxiliaryHead(modules[0].fan_out, *aux, classes=10)
        self.classifier = nn.Linear(fan_in, 10)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        first, *rest = self.inceptions
        x = first(F.max_pool2d(self.stem(x), 2))
        aux = self.aux(x) if self.training else None
        for module in rest:
            x = module(F.max_pool2d(x, 3, 2, padding=1))
        logits = self.classifier(x.mean((2, 3)))
        return logits if aux is None else (logits, aux)


def googlenet(size: Size) -> nn.Module:
    if size == "small":
        return GoogLeNet(5, ((2, 3, 4, 2, 3, 2), (3, 2, 3, 3, 2, 4)), (3, 5))
    rows = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (192, 96, 208, 16, 48, 64))
    return GoogLeNet(64, rows, (128, 256))


def googlenet_groups(net: GoogLeNet) -> list[Gated]:
    groups, makers = chain(["aux.conv", "aux.fc1", "aux.fc2"]), ["stem.conv"]
    for place in range(len(net.inceptions)):
        name = f"inceptions.{place}"
        readers = [f"{name}.{reader}.conv" for reader in Inception.READERS]
        # The auxiliary head reads what the first module makes, beside the second module.
        readers += ["aux.conv"] if place == 1 else []
        groups += [Gated((maker,), tuple(readers)) for maker in makers]
        groups += [Gated((f"{name}.reduce{k}.conv",), (f"{name}.conv{k}.conv",)) for k in (3, 5)]
        makers = [f"{name}.{maker}.conv" for maker in Inception.MAKERS]
    return groups + [Gated((maker,), ("classifier",)) for maker in makers]


class DoubleConv(nn.Module):
    """Twice convolution, batch norm, ReLU."""

    def __init__(self, fan_in: int, width: int):
        super().__init__()
        self.conv1, self.norm1 = conv3x3(fan_in, width), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv3x3(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.norm2, self.conv2(norm_relu(self.norm1, self.conv1(x))))


class UNet(nn.Module):
    """Encoder and decoder joined by concatenating skips (Ronneberger et al. 2015)."""

    def __init__(self, width: int, levels: int, classes: int = 4):
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(
            DoubleConv(fan_in, w) for fan_in, w in zip([3, *widths], widths, strict=False)
        )
        self.bottom = DoubleConv(widths[-1], 2 * widths[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths)
        self.up = nn.ModuleList(DoubleConv(2 * w, w) for w in widths)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for level in reversed(range(len(skips))):
            x = self.up[level](torch.cat((skips[level], self.grow[level](x)), 1))
        return self.head(x)


def unet_groups(net: UNet) -> list[Gated]:
    levels = len(net.down)
    groups = each(net, DoubleConv, "conv1", "conv2")
    for level in range(levels):
        below = f"down.{level + 1}" if level + 1 < levels else "bottom"
        above = f"grow.{level - 1}" if level else "head"
        groups += [
            Gated((f"down.{level}.conv2",), (f"{below}.conv1", f"up.{level}.conv1")),
            Gated((f"grow.{level}",), (f"up.{level}.conv1",)),
            Gated((f"up.{level}.conv2",), (above,)),
        ]
    return [*groups, Gated(("bottom.conv2",), (f"grow.{levels - 1}",))]


def unet(size: Size) -> nn.Module:
    return UNet(3, 2) if size == "small" else UNet(32, 3)


class DenseLayer(nn.Module):
    """Norm, 1x1 and norm, 3x3; its output joins its input (Huang et al. 2017)."""

    def __init__(self, fan_in: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(fan_in), conv1x1(fan_in, 4 * growth)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat((x, self.conv2(F.relu(self.norm2(y)))), 1)


class Transition(nn.Module):
    """Norm, 1x1 to half the channels, pooling."""

    def __init__(self, fan_in: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(fan_in), conv1x1(fan_in, fan_in // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC: every layer of a block reads all earlier ones."""

    def __init__(self, blocks: Sequence[int], growth: int, classes: int = 10):
        super().__init__()
        width = 2 * growth
        self.stem = conv3x3(3, width)
        self.stages = nn.ModuleList()
        for place, count in enumerate(blocks):
            layers = [DenseLayer(width + k * growth, growth) for k in range(count)]
            width += count * growth
            self.stages.extend(layers)
            if place + 1 < len(blocks):
                self.stages.append(Transition(width))
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


def densenet(size: Size) -> nn.Module:
    return DenseNet((2, 2), 3) if size == "small" else DenseNet((6, 6, 6), 12)


def densenet_groups(net: DenseNet) -> list[Gated]:
    """A maker is read by all layers of its block and by the transition or classifier after it."""
    groups: list[Gated] = []
    readers: dict[str, list[str]] = {"stem": []}
    for place, stage in enumerate(net.stages):
        name = f"stages.{place}"
        dense = isinstance(stage, DenseLayer)
        for found in readers.values():
            found.append(f"{name}.conv1" if dense else f"{name}.conv")
        if dense:
            groups.append(Gated((f"{name}.conv1",), (f"{name}.conv2",)))
            readers[f"{name}.conv2"] = []
            continue
        groups += [Gated((maker,), tuple(found)) for maker, found in readers.items()]
        readers = {f"{name}.conv": []}
    return groups + [Gated((m,), (*found, "classifier")) for m, found in readers.items()]


# Other wirings.


class SignalNet(nn.Module):
    """1-D convolutions with a different activation after each."""

    LAYERS = ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2")

    def __init__(self, width: int, classes: int = 5):
        super().__init__()
        self.conv1 = nn.Conv1d(2, width, 7, stride=2, padding=3)
        self.norm1, self.act1 = nn.BatchNorm1d(width), nn.PReLU(width)
        self.depth = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.conv2 = nn.Conv1d(width, 2 * width, 5, padding=2)
        self.conv3 = nn.Conv1d(2 * width, 2 * width, 3, padding=2, dilation=2)
        self.act3 = nn.PReLU()
        self.conv4 = nn.Conv1d(2 * width, width, 3, padding=1)
        self.fc1 = nn.Linear(4 * width, 2 * width)
        self.fc2 = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(self.depth(self.act1(self.norm1(self.conv1(x)))), 2)
        x = F.softplus(self.conv2(x))
        x = F.gelu(self.conv4(self.act3(self.conv3(x))))
        return self.fc2(F.hardswish(self.fc1(F.adaptive_avg_pool1d(x, 4).flatten(1))))


def signal_net(size: Size) -> nn.Module:
    return SignalNet(4 if size == "small" else 64)


def signal(size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 2, 24 if size == "small" else 256, generator=generator),)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two linear layers, scale, shortcut (Liu et al. 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.depth = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).movedim(1, -1))
        y = self.scale * self.fc2(F.gelu(self.fc1(y)))
        return x + y.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Stages of blocks, a LayerNorm and a strided convolution between them."""

    def __init__(self, blocks: Sequence[int], width: int, classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width)]
        for place, count in enumerate(blocks):
            if place:
                layers += [ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, 2)]
                width *= 2
            layers += [ConvNeXtBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.layers(x).mean((2, 3))))


def convnext(size: Size) -> nn.Module:
    return ConvNeXt((1, 1), 4) if size == "small" else ConvNeXt((2, 2, 6, 2), 40)


class TwoByTwo(nn.Module):
    """An image and a vector in, two sets of logits in a dict out; the branches are added."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.image = nn.Linear(4 * width, 2 * width)
        self.state1 = nn.Linear(7, width)
        self.state2 = nn.Linear(width, 2 * width)
        self.trunk = nn.Linear(2 * width, 2 * width)
        self.kind = nn.Linear(2 * width, 3)
        self.colour1 = nn.Linear(2 * width, width)
        self.colour2 = nn.Linear(width, 5)

    def forward(self, image: Tensor, state: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.conv2(F.relu(self.conv1(image))))
        x = self.image(F.adaptive_avg_pool2d(x, 2).flatten(1))
        x = F.relu(x + self.state2(torch.tanh(self.state1(state))))
        x = F.relu(self.trunk(x))
        return {"kind": self.kind(x), "colour": self.colour2(F.elu(self.colour1(x)))}


def two_by_two(size: Size) -> nn.Module:
    return TwoByTwo(4 if size == "small" else 64)


def image_and_vector(size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    side = 8 if size == "small" else 32
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return pixels, torch.randn(batch, 7, generator=generator)


def two_by_two_groups(net: TwoByTwo) -> list[Gated]:
    return [
        *chain(["conv1", "conv2", "image"]),
        Gated(("state1",), ("state2",)),
        Gated(("trunk",), ("kind", "colour1")),
        Gated(("colour1",), ("colour2",)),
    ]


class Reused(nn.Module):
    """A layer that is called twice and two layers with one weight, among others."""

    def __init__(self, width: int, classes: int = 4):
        super().__init__()
        self.first = nn.Linear(12, width)
        self.before = nn.Linear(width, width)
        self.twice = nn.Linear(width, width)
        self.between = nn.Linear(width, width)
        self.tied1 = nn.Linear(width, width)
        self.tied2 = nn.Linear(width, width)
        self.tied2.weight = self.tied1.weight
        self.last = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(F.relu(self.first(x))))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = F.relu(self.tied2(F.relu(self.tied1(F.relu(self.between(x))))))
        return self.classifier(F.relu(self.last(x)))


def vector(size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 12, generator=generator),)


# Networks of transformers, from configurations, with random weights and without dropout.


def tokens(vocabulary: int, small: int, full: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that makes token numbers; small networks know 40 tokens."""

    def inputs(size: Size, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        known, length = (40, small) if size == "small" else (vocabulary, full)
        return (torch.randint(known, (batch, length), generator=generator),)

    return inputs


def vit(size: Size) -> nn.Module:
    """ViT-S at 64x64 pixels in patches of 8x8."""
    from transformers import ViTConfig, ViTForImageClassification

    hidden, layers, heads = (16, 2, 4) if size == "small" else (384, 12, 6)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=24 if size == "small" else 4 * hidden,
        image_size=8 if size == "small" else 64,
        patch_size=4 if size == "small" else 8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5 if size == "small" else 100
    return ViTForImageClassification(config)


def bert(size: Size) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    hidden, layers, heads = (16, 2, 4) if size == "small" else (512, 4, 8)
    config = BertConfig(
        vocab_size=40 if size == "small" else 30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=24 if size == "small" else 4 * hidden,
        max_position_embeddings=16 if size == "small" else 128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5
    return BertForSequenceClassification(config)


def gpt2(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    hidden, layers, heads = (16, 2, 4) if size == "small" else (768, 12, 12)
    words = 40 if size == "small" else 50257
    config = GPT2Config(
        vocab_size=words,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_inner=24 if size == "small" else 4 * hidden,
        n_positions=16 if size == "small" else 128,
        bos_token_id=words - 1,
        eos_token_id=words - 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv = (16, 2, 8, 4) if size == "small" else (512, 8, 8, 2)
    config = LlamaConfig(
        vocab_size=40 if size == "small" else 8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=24 if size == "small" else 1376,
        max_position_embeddings=16 if size == "small" else 128,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def mlp_groups(net: Any) -> list[Gated]:
    """MLP neurons, told by their number: names of modules change between versions."""
    neurons = getattr(net.config, "intermediate_size", None) or net.config.n_inner
    makers: dict[str, list[str]] = {}
    readers: dict[str, str] = {}
    for name in layers_of(net):
        layer = net.get_submodule(name)
        fan_in, fan_out = fans(layer)
        block = re.match(r".*?\.\d+\.", name)
        if block is not None and fan_out == neurons:
            makers.setdefault(block[0], []).append(name)
        elif block is not None and fan_in == neurons:
            readers[block[0]] = name
    return [Gated(tuple(made), (readers[block],)) for block, made in makers.items()]


def fans(layer: nn.Module) -> tuple[int, int]:
    """Return input and output features of a linear layer, also where its weight is [in, out]."""
    assert isinstance(layer.weight, Tensor)
    first, second = layer.weight.shape[:2]
    return (first, second) if is_in_out(layer) else (second, first)


def bert_groups(net: Any) -> list[Gated]:
    return [*mlp_groups(net), Gated(("bert.pooler.dense",), ("classifier",))]


LAST_IS_OUTPUT = {"classifier": OUTPUT, "*": STREAM}
MLP_ONLY = {"classifier": OUTPUT, "*": ATTENTION}
CAUSAL = {"lm_head": rf"{OUTPUT}|{SHARED}", "*": ATTENTION}
REUSES = {
    "before": rf"{TWICE}|{JOINED} twice",
    "twice": TWICE,
    "between": rf"read by tied1: .*{SHARED}",
    "tied?": SHARED,
    "classifier": OUTPUT,
}


def entries() -> tuple[Entry, ...]:
    """Return all networks of the zoo, also those whose packages are missing."""
    return (
        from_models("mlp", "mlp-784-300-100", "mlp-784-300-100", 0.1, "fc3", batch=128),
        from_models("lenet5", "lenet5", "lenet5", 0.2, "fc2", batch=64),
        from_models("vgg16", "vgg16", "vgg16", 0.05, "classifier"),
        cifar_resnet("resnet20", full=3, small=1),
        cifar_resnet("resnet56", full=9, small=2),
        Entry("resnet50", resnet50, image(16, 64), bottleneck_groups, LAST_IS_OUTPUT, batch=16),
        from_models("wrn-16-4", "wrn-16-4", "wrn-10-1", 0.4, "classifier", side=8),
        Entry("mobilenetv2", mobilenet_v2, image(8, 32), mobilenet_groups, LAST_IS_OUTPUT),
        Entry("mobilenetv3", mobilenet_v3, image(8, 32), mobilenet_groups, LAST_IS_OUTPUT),
        cifar_resnet("se-resnet20", full=3, small=1, reduction=4),
        Entry("googlenet", googlenet, image(12, 32), googlenet_groups, {"*": OUTPUT}),
        Entry("unet", unet, image(8, 64), unet_groups, {"head": OUTPUT}, batch=8),
        Entry("densenet40", densenet, image(8, 32), densenet_groups, {"classifier": OUTPUT}),
        Entry("signal", signal_net, signal, lambda _: chain(SignalNet.LAYERS), {"fc2": OUTPUT}),
        Entry(
            "convnext",
            convnext,
            image(16, 64),
            lambda net: each(net, ConvNeXtBlock, "fc1", "fc2"),
            {"classifier": OUTPUT, "*": STREAM_OR_MIXED},
        ),
        Entry(
            "two-by-two",
            two_by_two,
            image_and_vector,
            two_by_two_groups,
            {"image": JOINED, "state2": JOINED, "*": OUTPUT},
        ),
        Entry(
            "reused",
            lambda size: Reused(6 if size == "small" else 256),
            vector,
            lambda _: [Gated(("first",), ("before",)), Gated(("last",), ("classifier",))],
            REUSES,
            batch=128,
        ),
        Entry("vit", vit, image(8, 64), mlp_groups, MLP_ONLY, 16, needs="transformers"),
        Entry("bert", bert, tokens(30522, 6, 64), bert_groups, MLP_ONLY, 16, needs="transformers"),
        Entry("gpt2", gpt2, tokens(50257, 6, 64), mlp_groups, CAUSAL, 4, -1, "transformers"),
        Entry("llama", llama, tokens(8192, 6, 64), mlp_groups, CAUSAL, 8, -1, "transformers"),
    )


def entry(name: str) -> Entry:
    """Return the entry of this name.

    Raises:
        ValueError: there is none.
    """
    found = {e.name: e for e in entries()}
    if name not in found:
        raise ValueError(f"expected one of {', '.join(found)}, got {name!r}")
    return found[name]
