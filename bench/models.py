# SPDX-License-Identifier: Apache-2.0
"""The networks of the benchmarks and tests, in plain PyTorch, at any open fraction."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """One gated producer and the one layer that reads it, by module name.

    Args:
        producer: convolution or linear layer whose output units are gated.
        consumer: layer whose input the gates multiply.
        norm: batch norm between the two, if any.
        spread: input features of the consumer per unit (16 for a flattened 4x4 map).
    """

    producer: str
    consumer: str
    norm: str | None = None
    spread: int = 1


@dataclass(frozen=True)
class Network:
    """A buildable network: how to make it, what it reads, which units are gated.

    Args:
        name: as on the command line.
        make: builds the module from a function that maps a full gated width to the built one.
        input_shape: shape of one example.
        groups: the gated producers in forward order.
        classes: width of the output, never gated.
    """

    name: str
    make: Callable[[Callable[[int], int], int], nn.Module]
    input_shape: tuple[int, ...]
    groups: tuple[Group, ...]
    classes: int = 10

    def build(self, keep: float = 1.0) -> nn.Module:
        """Return the network with every gated width shrunk to `keep` of it (at least 2).

        Args:
            keep: fraction of the gated units, in (0, 1]; below 1 it is the network a user would
                build after pruning.

        Raises:
            ValueError: keep is outside (0, 1].
        """
        return self.make(partial(kept_width, keep=keep), self.classes)

    def build_at(self, widths: Iterable[int]) -> nn.Module:
        """Return the network with the given gated widths, in the order of `groups`.

        Raises:
            ValueError: another number of widths than groups.
        """
        rest = iter(widths)
        try:
            net = self.make(lambda full: next(rest), self.classes)
        except StopIteration as error:
            raise ValueError(f"expected {len(self.groups)} widths, got fewer") from error
        if next(rest, None) is not None:
            raise ValueError(f"expected {len(self.groups)} widths, got more")
        return net

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return a random (input, label) batch; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.input_shape, generator=generator)
        return x, torch.randint(self.classes, (batch,), generator=generator)


def kept_width(width: int, keep: float) -> int:
    """Return keep * width rounded half up, but not below min(2, width)."""
    if not 0 < keep <= 1:
        raise ValueError(f"expected 0 < keep <= 1, got {keep}")
    return max(int(keep * width + 0.5), min(2, width))


class MLP(nn.Module):
    """784-300-100-10 with ReLU; inputs of any shape are flattened."""

    def __init__(self, kept: Callable[[int], int], classes: int = 10):
        super().__init__()
        first, second = kept(300), kept(100)
        self.fc1 = nn.Linear(784, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class WideMLP(nn.Module):
    """1024-4096-1024 with ReLU."""

    def __init__(self, kept: Callable[[int], int], classes: int = 1024):
        super().__init__()
        hidden = kept(4096)
        self.fc1 = nn.Linear(1024, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class MLPBlock(nn.Module):
    """The MLP of a transformer, width-4*width: LayerNorm, GELU, around it the residual stream."""

    def __init__(self, kept: Callable[[int], int], width: int):
        super().__init__()
        hidden = kept(4 * width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe, 20-50-500, with ReLU after each convolution."""

    def __init__(self, kept: Callable[[int], int], classes: int = 10):
        super().__init__()
        first, second, third = kept(20), kept(50), kept(500)
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 16, third)
        self.fc2 = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16 with batch norm for 32x32 inputs and one linear classifier."""

    def __init__(self, kept: Callable[[int], int], classes: int = 10):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width = 3
        for stage, widths in enumerate(VGG16_STAGES, 1):
            for place, full in enumerate(widths, 1):
                fan_in, width = width, kept(full)
                layers[f"conv{stage}_{place}"] = nn.Conv2d(fan_in, width, 3, padding=1, bias=False)
                layers[f"norm{stage}_{place}"] = nn.BatchNorm2d(width)
                layers[f"relu{stage}_{place}"] = nn.ReLU(inplace=True)
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(width, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class WideBlock(nn.Module):
    """Pre-activation residual block; its inner width is the output of conv1."""

    def __init__(self, fan_in: int, inner: int, fan_out: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, inner, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, fan_out, 3, padding=1, bias=False)
        self.shortcut = (
            None if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x), inplace=True)
        skip = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.norm2(self.conv1(y)), inplace=True)
        return self.conv2(y) + skip


class WideResNet(nn.Module):
    """Wide residual network for 32x32 inputs; only inner widths are gated.

    Args:
        kept: maps a full inner width to the built one.
        classes: outputs.
        depth: 6 n + 4 layers, n blocks in each of three stages.
        factor: widens the stages 16, 32, 64.

    Raises:
        ValueError: the depth is not 6 n + 4.

    Source: Zagoruyko and Komodakis, Wide Residual Networks (2016), section 2.
    """

    def __init__(self, kept: Callable[[int], int], classes: int = 10, *, depth: int, factor: int):
        super().__init__()
        count = wide_blocks(depth)
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stage1 = wide_stage(16, 16 * factor, 1, count, kept)
        self.stage2 = wide_stage(16 * factor, 32 * factor, 2, count, kept)
        self.stage3 = wide_stage(32 * factor, 64 * factor, 2, count, kept)
        self.norm = nn.BatchNorm2d(64 * factor)
        self.classifier = nn.Linear(64 * factor, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in (self.stage1, self.stage2, self.stage3):
            x = stage(x)
        x = F.relu(self.norm(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def wide_stage(
    fan_in: int, width: int, stride: int, blocks: int, kept: Callable[[int], int]
) -> nn.Sequential:
    first = WideBlock(fan_in, kept(width), width, stride)
    return nn.Sequential(
        first, *(WideBlock(width, kept(width), width, 1) for _ in range(blocks - 1))
    )


def wide_blocks(depth: int) -> int:
    """Return the blocks per stage of a wide residual network of this depth."""
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"expected a depth of 6 n + 4 (10, 16, 22, 28, ...), got {depth}")
    return depth // 6


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.relu(norm(x), inplace=True)


def conv3x3(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)


def conv1x1(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)


class PaddedShortcut(nn.Module):
    """Every second pixel, new channels zero: no weights (He et al. 2016, option A)."""

    def __init__(self, new: int):
        super().__init__()
        self.new = new

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, with squeeze-and-excite on request."""

    def __init__(
        self, fan_in: int, inner: int, fan_out: int, stride: int, squeeze: int | None = None
    ):
        super().__init__()
        self.conv1 = conv3x3(fan_in, inner, stride)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, fan_out)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.excite = nn.Identity() if squeeze is None else LinearExcite(fan_out, squeeze)
        self.shortcut = nn.Identity() if fan_in == fan_out else PaddedShortcut(fan_out - fan_in)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.norm1, self.conv1(x))
        return F.relu(self.excite(self.norm2(self.conv2(y))) + self.shortcut(x))


class LinearExcite(nn.Module):
    """Squeeze-and-excite with linear layers (Hu et al. 2018)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


class CifarResNet(nn.Module):
    """Residual network of three stages (He et al. 2016, section 4.2).

    Args:
        kept: maps a full inner width to the built one.
        classes: outputs.
        blocks: per stage.
        width: of the first stage.
        reduction: units per unit inside squeeze-and-excite, None without it.
    """

    def __init__(
        self,
        kept: Callable[[int], int],
        classes: int = 10,
        *,
        blocks: int,
        width: int = 16,
        reduction: int | None = None,
    ):
        super().__init__()
        self.stem = conv3x3(3, width)
        self.norm = nn.BatchNorm2d(width)
        stages, fan_in = [], width
        for stage in range(3):
            fan_out = width << stage
            squeeze = None if reduction is None else max(2, fan_out // reduction)
            made = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                made.append(BasicBlock(fan_in, kept(fan_out), fan_out, stride, squeeze))
                fan_in = fan_out
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(fan_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(norm_relu(self.norm, self.stem(x)))
        return self.classifier(x.mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; both inner widths can be gated."""

    def __init__(self, fan_in: int, first: int, second: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = conv1x1(fan_in, first)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = conv3x3(first, second, stride)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = conv1x1(second, fan_out)
        self.norm3 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or fan_in != fan_out:
            self.shortcut.append(conv1x1(fan_in, fan_out, stride)).append(nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.norm1, self.conv1(x))
        y = norm_relu(self.norm2, self.conv2(y))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class BottleneckResNet(nn.Module):
    """Residual network of bottlenecks; ResNet-50 has (3, 4, 6, 3) (He et al. 2016, table 1).

    Args:
        kept: maps a full inner width to the built one.
        classes: outputs.
        blocks: per stage.
        width: inner width of the first stage.
    """

    def __init__(
        self, kept: Callable[[int], int], classes: int, *, blocks: Sequence[int], width: int = 64
    ):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        stages, fan_in = [], width
        for stage, count in enumerate(blocks):
            made, inner = [], width << stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                made.append(Bottleneck(fan_in, kept(inner), kept(inner), 4 * inner, stride))
                fan_in = 4 * inner
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(fan_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(norm_relu(self.norm, self.stem(x)))
        return self.classifier(self.stages(x).mean((2, 3)))


def init_convolutions(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def mlp() -> Network:
    groups = (Group("fc1", "fc2"), Group("fc2", "fc3"))
    return Network("mlp-784-300-100", MLP, (784,), groups)


def wide_mlp() -> Network:
    return Network("mlp-1024-4096-1024", WideMLP, (1024,), (Group("fc1", "fc2"),), classes=1024)


def mlp_block(width: int) -> Network:
    """Return the MLP of a transformer; every row of a batch is a token."""
    name = f"mlp-block-{width}-{4 * width}"
    return Network(name, MLPBlock, (width,), (Group("fc1", "fc2"),), classes=width)


def lenet5() -> Network:
    groups = (Group("conv1", "conv2"), Group("conv2", "fc1", spread=16), Group("fc1", "fc2"))
    return Network("lenet5", LeNet5, (1, 28, 28), groups)


def vgg16() -> Network:
    names = [
        f"{stage}_{place}"
        for stage, widths in enumerate(VGG16_STAGES, 1)
        for place in range(1, len(widths) + 1)
    ]
    readers = [f"features.conv{name}" for name in names[1:]] + ["classifier"]
    groups = tuple(
        Group(f"features.conv{name}", reader, f"features.norm{name}")
        for name, reader in zip(names, readers, strict=True)
    )
    return Network("vgg16", VGG16, (3, 32, 32), groups)


def wrn(depth: int, factor: int) -> Network:
    """Return the wide residual network WRN-depth-factor."""
    blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(wide_blocks(depth))]
    groups = tuple(Group(f"{b}.conv1", f"{b}.conv2", f"{b}.norm2") for b in blocks)
    make = partial(WideResNet, depth=depth, factor=factor)
    return Network(f"wrn-{depth}-{factor}", make, (3, 32, 32), groups)


def resnet20() -> Network:
    blocks = [f"stages.{stage}.{block}" for stage in range(3) for block in range(3)]
    groups = tuple(Group(f"{b}.conv1", f"{b}.conv2", f"{b}.norm1") for b in blocks)
    return Network("resnet20", partial(CifarResNet, blocks=3), (3, 32, 32), groups)


def resnet50() -> Network:
    """Return ResNet-50 for 64x64 images of 100 classes."""
    depths = (3, 4, 6, 3)
    groups = tuple(
        Group(f"{b}.conv{i}", f"{b}.conv{i + 1}", f"{b}.norm{i}")
        for stage, count in enumerate(depths)
        for b in [f"stages.{stage}.{block}" for block in range(count)]
        for i in (1, 2)
    )
    make = partial(BottleneckResNet, blocks=depths)
    return Network("resnet50", make, (3, 64, 64), groups, classes=100)


BUILDERS: dict[str, Callable[[], Network]] = {
    "mlp-784-300-100": mlp,
    "mlp-1024-4096-1024": wide_mlp,
    "lenet5": lenet5,
    "vgg16": vgg16,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "wrn-16-4": partial(wrn, 16, 4),
    "wrn-28-10": partial(wrn, 28, 10),
    "mlp-block-768-3072": partial(mlp_block, 768),
}
NAMES = tuple(BUILDERS)


def network(name: str) -> Network:
    """Return the network of this name: one of `NAMES`, any wrn-DEPTH-FACTOR, or mlp-block-N-4N.

    Raises:
        ValueError: there is no such network.
    """
    if name in BUILDERS:
        return BUILDERS[name]()
    block = re.fullmatch(r"mlp-block-(\d+)-(\d+)", name)
    if block and int(block[2]) == 4 * int(block[1]) > 0:
        return mlp_block(int(block[1]))
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if wide is None or int(wide[2]) < 1:
        known = f"{', '.join(NAMES)}, wrn-DEPTH-FACTOR or mlp-block-N-4N"
        raise ValueError(f"expected one of {known}, got {name!r}")
    return wrn(int(wide[1]), int(wide[2]))


def full_widths(net: nn.Module, groups: Iterable[Group]) -> list[int]:
    """Return the number of units each group's producer has in `net`."""
    return [net.get_parameter(f"{group.producer}.weight").shape[0] for group in groups]
