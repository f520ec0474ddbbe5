# SPDX-License-Identifier: Apache-2.0
"""``lam`` that grows from 0: penalty and gradient, state, bad input."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
METHODS = {
    "hard_concrete": l0.gates.HardConcrete,
    "arm": l0.gates.ARM,
    "dep": l0.gates.DependentHardConcrete,
}
methods = pytest.mark.parametrize("method", METHODS)


def make(method: str = "hard_concrete", **options) -> nn.Sequential:
    torch.manual_seed(0)
    gates = METHODS[method]({"a": 6}, lam=0.7, n_train=3, **options)
    net = nn.Sequential(
        l0.nn.GatedLinear(5, 6, out_gate=gates["a"]),
        nn.Tanh(),
        l0.nn.GatedLinear(6, 2, in_gate=gates["a"]),
    )
    return gates.attach(net, {"0": 1, "2": 1}).double()


def with_gradient(net: nn.Module, **options) -> tuple[Tensor, Tensor]:
    value = l0.penalty(net, **options)
    return value.detach(), torch.autograd.grad(value, net.l0.log_alpha)[0]


@methods
@pytest.mark.parametrize("per", ["weight", "flop"])
@pytest.mark.parametrize("drawn", [True, False])
def test_the_penalty_grows_with_progress(method: str, per: str, drawn: bool):
    value, grad = with_gradient(make(method), per=per)
    assert value > 0 and bool(grad.any())
    net = make(method, lam_warmup=0.4)
    scales = {None: 0.0, 0.1: 0.25, 0.3: 0.75, 0.4: 1.0, 0.9: 1.0, 0.0: 0.0, 0.2: 0.5}
    for t, scale in scales.items():
        if t is not None:
            net.l0.set_progress(t)
        if drawn:
            net(X)
        found, its_grad = with_gradient(net, per=per)
        torch.testing.assert_close(found, scale * value, **CLOSE)
        torch.testing.assert_close(its_grad, scale * grad, **CLOSE)


@pytest.mark.parametrize(
    "method", [l0.gates.ContinuousSparsification, l0.gates.StraightThrough], ids=["cs", "scl"]
)
def test_the_penalty_of_weight_gates_grows_too(method):
    """Progress is more than the scale there: it is compared with gates that have no warm-up."""

    def make_net(**options) -> nn.Sequential:
        gates = method({"w": (3, 5)}, lam=0.7, n_train=3, initial=0.1, **options)
        return gates.attach(nn.Sequential(l0.nn.MaskedLinear(5, 3, gate=gates["w"]))).double()

    plain, net = make_net(), make_net(lam_warmup=0.4)
    for t, scale in {0.0: 0.0, 0.1: 0.25, 0.4: 1.0, 0.9: 1.0}.items():
        for one in (plain, net):
            one.l0.set_progress(t)
            one(X)
        value, grad = with_gradient(plain)
        assert value > 0 and bool(grad.any())
        found, its_grad = with_gradient(net)
        torch.testing.assert_close(found, scale * value, **CLOSE)
        torch.testing.assert_close(its_grad, scale * grad, **CLOSE)


@methods
def test_other_terms_do_not_grow(method: str):
    plain, net = make(method), make(method, lam_warmup=0.5)
    net.l0.set_progress(0.1)
    for one, other in zip(with_gradient(net, lam=2.0), with_gradient(plain, lam=2.0), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(net.l0.density(), plain.l0.density(), **CLOSE)
    if method != "dep":
        plain, net = make(method, l2=3.0), make(method, l2=3.0, lam_warmup=0.5)
        l2 = l0.penalty(plain) - plain.l0.penalty()
        torch.testing.assert_close(l0.penalty(net), l2, **CLOSE)


@methods
def test_progress_changes_nothing_without_the_option(method: str):
    net = make(method)
    before, keys = with_gradient(net), set(net.state_dict())
    net.l0.set_progress(0.1)
    assert "l0.lam_scale" not in keys and set(net.state_dict()) == keys
    for one, other in zip(with_gradient(net), before, strict=True):
        assert one.equal(other)


def test_progress_may_be_set_before_backward():
    net = make(lam_warmup=1.0)
    net.l0.set_progress(0.5)
    (expected,) = torch.autograd.grad(l0.penalty(net), net.l0.log_alpha)
    value = l0.penalty(net)
    net.l0.set_progress(1.0)
    assert torch.autograd.grad(value, net.l0.log_alpha)[0].equal(expected)


def test_progress_is_part_of_the_state():
    net, other = make(lam_warmup=0.5), make(lam_warmup=0.5)
    net.l0.set_progress(0.15)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert l0.penalty(other).equal(l0.penalty(net)) and l0.penalty(net) > 0


def test_the_scale_keeps_its_digits():
    net = make(lam_warmup=0.7)
    net.l0.set_progress(0.3)
    net.bfloat16()
    assert net.l0.lam_scale.dtype == torch.float32
    assert float(net.l0.lam_scale) == pytest.approx(0.3 / 0.7, rel=1e-7)


@methods
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_bad_warm_ups(method: str, value: float):
    with pytest.raises(ValueError, match=f"lam_warmup: expected a number from 0 to 1, got {value}"):
        make(method, lam_warmup=value)


@methods
def test_bad_progress(method: str):
    net = make(method, lam_warmup=0.5)
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="set_progress: expected a number from 0 to 1"):
            net.l0.set_progress(t)
    with l0.hold(net), pytest.raises(RuntimeError, match="expected to be outside hold"):
        net.l0.set_progress(0.5)
    assert float(net.l0.lam_scale) == 0.0
