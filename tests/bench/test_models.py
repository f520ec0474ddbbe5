# SPDX-License-Identifier: Apache-2.0
"""The benchmark networks have the published shapes, at any open fraction."""

import pytest
import torch
from torch import nn

from l0kernels.bench import models

WEIGHTS = {
    "mlp-784-300-100": 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10,
    "lenet5": 20 * 26 + 50 * (20 * 25 + 1) + 500 * 801 + 10 * 501,
    "vgg16": 14_724_042,
    "mlp-1024-4096-1024": 1024 * 4096 + 4096 + 4096 * 1024 + 1024,
    "resnet20": 269_722,  # 0.27 million in He et al. 2016, table 6
    "resnet50": 23_508_032 + 2048 * 100 + 100,
    "mlp-block-768-3072": 2 * 768 * 3072 + 3072 + 768 + 2 * 768,
    "wrn-16-4": 2_748_890,
    "wrn-28-10": 36_479_194,
}
WIDTHS = {
    "mlp-784-300-100": [300, 100],
    "lenet5": [20, 50, 500],
    "vgg16": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6,
    "mlp-1024-4096-1024": [4096],
    "resnet20": [16] * 3 + [32] * 3 + [64] * 3,
    "resnet50": [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6,
    "mlp-block-768-3072": [3072],
    "wrn-16-4": [64] * 2 + [128] * 2 + [256] * 2,
    "wrn-28-10": [160] * 4 + [320] * 4 + [640] * 4,
}


def on_meta(name: str, keep: float = 1.0) -> nn.Module:
    with torch.device("meta"):
        return models.network(name).build(keep)


@pytest.mark.parametrize("name", models.NAMES)
def test_parameter_count(name: str):
    assert sum(p.numel() for p in on_meta(name).parameters()) == WEIGHTS[name]


@pytest.mark.parametrize("name", models.NAMES)
def test_gated_widths(name: str):
    groups = models.network(name).groups
    assert models.full_widths(on_meta(name), groups) == WIDTHS[name]


def test_wide_resnet_has_4480_inner_units():
    assert sum(WIDTHS["wrn-28-10"]) == 4480
    assert len(models.wrn(28, 10).groups) == 12


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1])
def test_only_gated_widths_shrink(name: str, keep: float):
    network = models.network(name)
    full, small = on_meta(name), on_meta(name, keep)
    widths = models.full_widths(small, network.groups)
    assert widths == [max(2, int(keep * width + 0.5)) for width in WIDTHS[name]]
    for group, width in zip(network.groups, widths, strict=True):
        assert small.get_parameter(f"{group.consumer}.weight").shape[1] == width * group.spread
        if group.norm is not None:
            assert small.get_parameter(f"{group.norm}.weight").shape == (width,)
    gated = {g.producer for g in network.groups}
    for module, layer in full.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and module not in gated:
            made = layer.weight.shape[0]
            assert small.get_parameter(f"{module}.weight").shape[0] == made, module


@pytest.mark.parametrize("name", ["mlp-784-300-100", "lenet5", "vgg16", "wrn-10-1", "resnet20"])
def test_forward_and_example(name: str):
    network = models.network(name)
    x, y = network.example(3)
    again, other = network.example(3), network.example(3, seed=1)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x, other[0])
    out = network.build(0.1)(x)
    assert out.shape == (3, 10)
    assert torch.isfinite(out).all()


def test_kept_width_rounds_half_up_and_keeps_two():
    assert [models.kept_width(w, 0.1) for w in (1, 2, 5, 24, 25, 640)] == [1, 2, 2, 2, 3, 64]
    assert models.kept_width(5, 0.5) == 3
    for keep in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="expected 0 < keep <= 1"):
            models.kept_width(10, keep)


@pytest.mark.parametrize("name", ["alexnet", "wrn-28", "wrn-28-0", "WRN-28-10"])
def test_unknown_network(name: str):
    with pytest.raises(ValueError, match="expected one of .*lenet5.* got"):
        models.network(name)


@pytest.mark.parametrize("depth", [4, 9, 12, 27])
def test_impossible_depth(depth: int):
    with pytest.raises(ValueError, match="expected a depth of 6 n"):
        models.wrn(depth, 2)
