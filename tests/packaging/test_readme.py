# SPDX-License-Identifier: Apache-2.0
"""The code in the README runs as printed."""

import re

import pytest
import torch
from torch import nn


@pytest.fixture
def code(root):
    return re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def names():
    """What the README's reader is assumed to have: a network, a batch, a loader."""
    x, y = torch.randn(4, 1, 28, 28), torch.randint(10, (4,))
    net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 576, 10))
    return {"net": net, "x": x, "data": range(60), "loader": [(x, y)] * 2}


def test_convert_and_train(code, names, capsys):
    before = names["net"][0].weight.clone()
    exec(code[0], names)
    assert names["net"].l0.log_alpha.shape == (8,)
    assert not torch.equal(names["net"][0].weight, before)
    assert torch.isfinite(names["loss"])
    assert "expected open" in capsys.readouterr().out


def test_layers_wired_by_hand(code, names):
    exec(code[0] + code[1], names)
    net, x = names["net"], names["x"]
    loss = names["l0"].expected_loss(net, lambda: net(x).square().mean())
    loss.backward()
    assert net(x).shape == (4, 10)
    assert names["g"].log_alpha.grad.abs().sum() > 0
