# SPDX-License-Identifier: Apache-2.0
"""Coupled L2: value and gradients against sums written out, whole steps, bad input."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.gates.hard_concrete import BETA, GAMMA, ZETA
from l0kernels.optim import rows

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
L2, N_TRAIN = 0.37, 12

METHODS: dict[str, tuple[type[l0.gates.Gates], dict, Callable[[Tensor], Tensor]]] = {
    "hard concrete": (
        l0.gates.HardConcrete,
        {},
        lambda la: torch.sigmoid(la - BETA * math.log(-GAMMA / ZETA)),
    ),
    "ARM": (l0.gates.ARM, {}, lambda phi: torch.sigmoid(7 * phi)),
    "ARM, hard sigmoid": (
        l0.gates.ARM,
        {"gate": "hard_sigmoid"},
        lambda phi: (phi + 0.5).clamp(0, 1),
    ),
}
methods = pytest.mark.parametrize("method", METHODS)


class Case(NamedTuple):
    """A network by hand.

    Args:
        groups: of its gates.
        shape: of its input.
        wire: makes its layers.
        squares: ||W_j||^2 of every gate, from the weights of all layers that have some.
    """

    groups: dict[str, int]
    shape: tuple[int, ...]
    wire: Callable[[l0.gates.Gates], list[nn.Module]]
    squares: Callable[..., list[Tensor]]


class TwoReaders(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def of_columns(weight: Tensor) -> list[Tensor]:
    return [weight[:, j].square().sum() for j in range(weight.shape[1])]


def of_filters(weight: Tensor) -> list[Tensor]:
    return [weight[j].square().sum() for j in range(weight.shape[0])]


CASES = {
    "MLP with gates on inputs": Case(
        {"in": 4, "hidden": 5},
        (6, 4),
        lambda g: [
            l0.nn.GatedLinear(4, 5, in_gate=g["in"], out_gate=g["hidden"]),
            nn.Tanh(),
            l0.nn.GatedLinear(5, 2, in_gate=g["hidden"]),
        ],
        lambda first, last: of_columns(first) + of_columns(last),
    ),
    "two readers": Case(
        {"hidden": 5},
        (6, 4),
        lambda g: [
            l0.nn.GatedLinear(4, 5, out_gate=g["hidden"]),
            TwoReaders(
                l0.nn.GatedLinear(5, 2, in_gate=g["hidden"]),
                l0.nn.GatedLinear(5, 2, bias=False, in_gate=g["hidden"]),
            ),
        ],
        lambda _, a, b: [x + y for x, y in zip(of_columns(a), of_columns(b), strict=True)],
    ),
    "convolutions, norm, flatten": Case(
        {"a": 4, "b": 3, "c": 6},
        (3, 2, 5, 5),
        lambda g: [
            l0.nn.GatedConv2d(2, 4, 3, out_gate=g["a"]),
            l0.nn.GatedBatchNorm2d(4, out_gate=g["a"]),
            nn.Tanh(),
            l0.nn.GatedConv2d(4, 3, 2, in_gate=g["a"], out_gate=g["b"]),
            nn.Flatten(),
            l0.nn.GatedLinear(12, 6, in_gate=g["b"].expand(4), out_gate=g["c"]),
            nn.Tanh(),
            l0.nn.GatedLinear(6, 2, in_gate=g["c"]),
        ],
        # The flattened channels are their filters' already.
        lambda first, second, _, last: of_filters(first) + of_filters(second) + of_columns(last),
    ),
    "flattened channels with gates of their own": Case(
        {"a": 3, "in": 12},
        (3, 2, 4, 4),
        lambda g: [
            l0.nn.GatedConv2d(2, 3, 3, out_gate=g["a"]),
            nn.Flatten(),
            l0.nn.GatedLinear(12, 2, in_gate=g["a"].expand(4) * g["in"]),
        ],
        lambda first, last: of_filters(first) + of_columns(last),
    ),
    "depthwise and transposed": Case(
        {"a": 4, "b": 3},
        (3, 2, 4, 4),
        lambda g: [
            l0.nn.GatedConv2d(2, 4, 1, out_gate=g["a"]),
            l0.nn.GatedConv2d(4, 4, 3, groups=4, padding=1, out_gate=g["a"]),
            l0.nn.GatedConvTranspose2d(4, 3, 2, in_gate=g["a"], out_gate=g["b"]),
            l0.nn.GatedConv2d(3, 2, 1, in_gate=g["b"]),
        ],
        lambda first, _, transposed, __: of_filters(first) + of_filters(transposed.transpose(0, 1)),
    ),
    "neurons that a convolution reads": Case(
        {"a": 4, "b": 3},
        (3, 6),
        lambda g: [
            l0.nn.GatedLinear(6, 4, out_gate=g["a"]),
            nn.Unflatten(1, (-1, 1)),
            l0.nn.GatedConv1d(4, 3, 1, in_gate=g["a"], out_gate=g["b"]),
            l0.nn.GatedConv1d(3, 2, 1, in_gate=g["b"]),
        ],
        lambda _, second, __: of_columns(second) + of_filters(second),
    ),
}
cases = pytest.mark.parametrize("case", CASES)


def make(case: str, method: str = "hard concrete", **options) -> nn.Sequential:
    torch.manual_seed(0)
    chosen, (kind, more, _) = CASES[case], METHODS[method]
    given = {"lam": 0.3, "n_train": N_TRAIN, "l2": L2, **more, **options}
    gates = kind(chosen.groups, **given)
    net = nn.Sequential(*chosen.wire(gates))
    gates.attach(net, dict.fromkeys((name for name, _ in net.named_modules()), 1)).double()
    scale = 2.0 if method == "hard concrete" else 0.3
    nn.init.uniform_(gates.log_alpha, -scale, scale)
    return net


def term_by_hand(net: nn.Sequential, case: str, method: str) -> Tensor:
    weights = [
        m.weight
        for m in net.modules()
        if isinstance(m, l0.nn.GatedLayer) and m.weight is not None and m.weight.dim() > 1
    ]
    squares = torch.stack(CASES[case].squares(*weights))
    p = METHODS[method][2](net.l0.log_alpha)
    return (p * L2 / 2 * squares).sum() / N_TRAIN


def batch(case: str) -> Tensor:
    return torch.randn(CASES[case].shape, dtype=torch.float64)


def gradients(value: Tensor, net: nn.Module) -> list[Tensor]:
    leaves = list(net.parameters())
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


@cases
@methods
def test_value_and_all_gradients(case: str, method: str):
    net = make(case, method)
    expected = term_by_hand(net, case, method)
    right = gradients(expected, net)
    assert sum(bool(grad.any()) for grad in right) >= 2
    l2 = net.l0.l2
    for prepare in (lambda: None, lambda: net(batch(case)), net.eval):
        for options in ({}, {"lam": 0.0}, {"per": "flop"}):
            prepare()
            net.l0.l2 = 0.0
            without = l0.penalty(net, **options)
            prepare()
            net.l0.l2 = l2
            value = l0.penalty(net, **options)
            torch.testing.assert_close(value - without, expected, **CLOSE)
            found = zip(gradients(value, net), gradients(without, net), strict=True)
            for (whole, part), grad in zip(found, right, strict=True):
                torch.testing.assert_close(whole - part, grad, **CLOSE)


def test_gradients_are_those_of_the_closed_form():
    net = make("MLP with gates on inputs", lam=0.0)
    alpha, weight = net.l0.log_alpha.detach(), net[2].weight.detach()
    l0.penalty(net).backward()
    p = torch.sigmoid(alpha - BETA * math.log(-GAMMA / ZETA))
    norms = weight.square().sum(0)
    slope = (p * (1 - p))[4:] * L2 / 2 * norms / N_TRAIN
    torch.testing.assert_close(net.l0.log_alpha.grad[4:], slope, **CLOSE)
    torch.testing.assert_close(net[2].weight.grad, p[4:] * L2 * weight / N_TRAIN, **CLOSE)
    assert net[0].bias.grad is None and net[2].bias.grad is None


@cases
@methods
def test_a_step_is_that_of_the_masked_reference(case: str, method: str):
    x, found = batch(case), []
    for impl in ("auto", "reference"):
        net = make(case, method)
        with l0.use_impl(impl):
            loss = l0.expected_loss(net, lambda n=net: n(x).square().mean()) + l0.penalty(net)
            loss.backward()
        found.append([p.grad for p in net.parameters()])
    for packed, masked in zip(*found, strict=True):
        torch.testing.assert_close(packed, masked, **CLOSE)


def test_closed_filters_get_their_share_and_nothing_else():
    case = "convolutions, norm, flatten"
    net = make(case)
    with torch.no_grad():
        net.l0.log_alpha[:2] = -100.0  # clamped: P(z != 0) = 4.7 %
    for _ in range(20):
        net.zero_grad()
        loss = net(batch(case)).square().mean()
        if not net.l0["a"].z[:2].any():
            break
    closed = net.l0["a"].z == 0
    assert bool(closed[:2].all())
    (loss + l0.penalty(net)).backward()
    p = net.l0.open_probability()[:4]
    expected = p[:, None, None, None] * L2 * net[0].weight.detach() / N_TRAIN
    torch.testing.assert_close(net[0].weight.grad[closed], expected[closed], **CLOSE)
    assert not torch.allclose(net[0].weight.grad[~closed], expected[~closed])


@methods
def test_frozen_gates_go_on_decaying_weights(method: str):
    case = "MLP with gates on inputs"
    net = make(case, method)
    before = l0.penalty(net)
    net.l0.freeze()
    frozen = l0.penalty(net)
    torch.testing.assert_close(frozen, before, **CLOSE)
    names = [name for name, _ in net.named_parameters()]
    values = zip(gradients(frozen, net), gradients(before, net), strict=True)
    pairs = dict(zip(names, values, strict=True))
    assert not pairs.pop("l0.log_alpha")[0].any()
    for mine, other in pairs.values():
        torch.testing.assert_close(mine, other, **CLOSE)


def test_what_convert_makes_has_it():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    l0.convert(
        net, "hard_concrete", example_inputs=(x,), granularity="input", l2=L2, lam=0.0, n_train=7
    )
    conv, first, last = net[0].weight, net[3].weight, net[5].weight
    squares = {"0": of_filters(conv), "3.in": of_columns(first), "3": of_columns(last)}
    p = {name: net.l0.open_probability()[where] for name, where in net.l0.slices()}
    expected = sum((p[name] * torch.stack(squares[name])).sum() for name in p) * L2 / 2 / 7
    assert set(p) == set(squares)
    torch.testing.assert_close(l0.penalty(net), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype):
    case = "convolutions, norm, flatten"
    net = make(case, lam=0.0).to(dtype)
    value = l0.penalty(net)
    assert value.dtype == torch.float32
    value.backward()
    assert net[0].weight.grad.dtype == dtype
    twin = make(case, lam=0.0).to(dtype).double()
    expected = l0.penalty(twin)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    wanted = twin[0].weight.grad
    torch.testing.assert_close(net[0].weight.grad, wanted.to(dtype), rtol=1e-6, atol=0)


def test_optimizers_of_open_rows_leave_none_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "LEAST", 1)
    case, found = "convolutions, norm, flatten", []
    x = batch(case)
    for kind in (l0.optim.SGD, torch.optim.SGD):
        net = make(case)
        nn.init.constant_(net.l0.log_alpha, -2.0)
        more = {"model": net} if kind is l0.optim.SGD else {}
        optimizer = kind(l0.param_groups(net, lr=0.1), momentum=0.9, **more)
        for _ in range(10):
            optimizer.zero_grad()
            (net(x).square().mean() + l0.penalty(net)).backward()
            optimizer.step()
        if isinstance(optimizer, l0.optim.SGD):
            assert optimizer.row_weights
            optimizer.flush()
        found.append([p.detach() for p in net.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("kind", [l0.gates.HardConcrete, l0.gates.ARM])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_precisions(kind: type, value: float):
    with pytest.raises(ValueError, match=f"l2: expected a number of at least 0, got {value}"):
        kind({"a": 3}, l2=value)


def test_gates_without_a_model():
    gates = l0.gates.HardConcrete({"a": 3}, l2=1.0)
    with pytest.raises(ValueError, match="expected gates that are attached to a model"):
        l0.penalty(nn.ModuleList([gates]))
