# SPDX-License-Identifier: Apache-2.0
"""What closed units leave of a step's products, in README's table: forward, dgrad and wgrad."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import l0kernels as l0

INPUTS, FIRST, SECOND, CLASSES, BATCH = 24, 40, 32, 5, 64
METHODS = {
    "hard_concrete": {},
    "ar": {"estimator": "ar"},
    "arm": {},
    "dep": {"bias": 0.0},
    "cs": {"skip_below": 0.5},
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(INPUTS, FIRST), nn.ReLU(), nn.Linear(FIRST, SECOND), nn.ReLU(),
        nn.Linear(SECOND, CLASSES),
    )  # fmt: skip
    x = torch.randn(BATCH, INPUTS)
    method = "arm" if name == "ar" else name
    l0.convert(net, method, example_inputs=(x[:2],), **METHODS[name])
    if name == "cs":
        with torch.no_grad():
            net.l0.log_alpha[::2] = -1.0
    return net, x


@contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """Multiply-adds of what runs inside."""
    with FlopCounterMode(display=False) as counter:
        yield
    found.append(counter.get_total_flops() // 2)


def products(widths: dict[str, int]) -> tuple[int, int]:
    """Multiply-adds of a forward pass, and of a backward pass: wgrad, dgrad but of the input."""
    first, second = widths["0"], widths["2"]
    behind = BATCH * (first * second + second * CLASSES)
    forward = BATCH * INPUTS * first + behind
    return forward, forward + behind


@pytest.mark.parametrize("name", METHODS)
def test_all_products_are_of_open_units(name: str):
    net, x = make(name)
    y = torch.randint(CLASSES, (BATCH,))
    seen: list[dict[str, int]] = []

    def loss() -> Tensor:
        seen.append({group: net.l0[group].count for group in net.l0.names})
        return F.cross_entropy(net(x), y)

    found: list[int] = []
    with counted(found):
        estimate = l0.expected_loss(net, loss) + l0.penalty(net)
    with counted(found):
        estimate.backward()
    passes = 2 if name == "arm" else 1
    assert len(seen) == passes
    assert all(0 < w["0"] < FIRST and 0 < w["2"] < SECOND for w in seen)
    # The last pass is the one that learns; the other has a forward pass alone.
    assert found == [sum(products(widths)[0] for widths in seen), products(seen[-1])[1]]


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_closed_units_are_zero(name: str):
    net, x = make(name)
    l0.expected_loss(net, lambda: net(x).square().mean()).backward()
    closed = [net.l0[group].z == 0 for group in net.l0.names]
    for where, layer, reader in zip(closed, (net[0], net[2]), (net[2], net[4]), strict=True):
        assert bool(where.any())
        assert bool((layer.weight.grad[where] == 0).all())
        assert bool((layer.bias.grad[where] == 0).all())
        assert bool((reader.weight.grad[:, where] == 0).all())
    if name in ("hard_concrete", "cs"):
        assert bool((net.l0.log_alpha.grad[torch.cat(closed)] == 0).all())


def test_soft_gates_of_cs_skip_nothing():
    net, x = make("cs")
    net.l0.skip_below = 0.0
    assert_nothing_is_skipped(net, x)


def test_gates_of_examples_skip_nothing():
    net, x = make("hard_concrete")
    l0.revert(net)
    l0.convert(net, "hard_concrete", example_inputs=(x[:2],), scope="example")
    assert_nothing_is_skipped(net, x)


def assert_nothing_is_skipped(net: nn.Module, x: Tensor) -> None:
    found: list[int] = []
    with counted(found):
        loss = l0.expected_loss(net, lambda: net(x).square().mean())
    with counted(found):
        loss.backward()
    assert found == [*products({"0": FIRST, "2": SECOND})]
