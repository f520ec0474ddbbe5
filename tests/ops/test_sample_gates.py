# SPDX-License-Identifier: Apache-2.0
"""Draws, their gradients and the open lists, each implementation against closed forms."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from error_table import same, within_budget
from harness import ops as harness_ops
from ops.threads import assert_threads_do_not_matter
from torch.library import opcheck

import l0kernels as l0
from l0kernels.functional import (
    GateLayout,
    OpenLists,
    arm_gradient,
    example_noise,
    open_lists,
    sample_gates,
)
from l0kernels.gates.draw import Draw
from l0kernels.ops.sample_gates import op, reference
from l0kernels.testing import max_error, z_score

LAWS = ("hard_concrete", "bernoulli", "antithetic")
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
K = BETA * math.log(-GAMMA / ZETA)


def offsets(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def make_layout(sizes, ports=None):
    """A layout with groups of these sizes; ports are pairs of gate lists, default one per group."""
    gates = sum(sizes)
    if ports is None:
        starts = offsets(sizes).tolist()
        ports = [(range(starts[i], starts[i + 1]), None) for i in range(len(sizes))]
    filled = [
        (list(born), [gates] * len(born) if extra is None else extra) for born, extra in ports
    ]
    maps = torch.tensor(
        [
            [gate for born, _ in filled for gate in born],
            [gate for _, extra in filled for gate in extra],
        ],
        dtype=torch.int64,
    )
    return GateLayout(offsets(sizes), maps, offsets([len(born) for born, _ in filled]))


def make_key(seed=3, step=5):
    return torch.tensor([seed, step])


@dataclass
class Drawn:
    z: torch.Tensor
    expected: torch.Tensor
    lists: OpenLists
    grad: torch.Tensor | None


def draw(log_alpha, law="hard_concrete", key=None, cost=None, layout=None, grad_z=None, **options):
    """One draw, and the gradient of sum(grad_z z) + 1.5 expected."""
    log_alpha = log_alpha.detach().clone().requires_grad_()
    cost = torch.ones_like(log_alpha.detach()) if cost is None else cost
    layout = make_layout([log_alpha.shape[0]]) if layout is None else layout
    key = make_key() if key is None else key
    z, expected, lists = sample_gates(log_alpha, key, cost, layout, law, **options)
    grad_z = torch.ones_like(z) if grad_z is None else grad_z
    (grad,) = torch.autograd.grad(
        [z, expected], log_alpha, [grad_z, torch.full_like(expected, 1.5)]
    )
    return Drawn(z.detach(), expected.detach(), lists, grad)


def textbook(log_alpha, key, beta=BETA, gamma=GAMMA, zeta=ZETA):
    """z of the hard concrete law from u, as published."""
    u = (reference.noise_k(key, log_alpha.shape[0]).double() + 0.5) / (1 << 23)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / beta)
    return F.hardtanh(s * (zeta - gamma) + gamma, 0.0, 1.0)


def decisions(z):
    """1 for closed, -1 for fully open, 0 between."""
    return (z == 0).int() - (z == 1).int()


# ---- values ----


@pytest.mark.parametrize("options", [{}, {"beta": 0.3, "gamma": -0.5, "zeta": 1.2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_concrete_follows_the_textbook(impl, dtype, options):
    log_alpha = (3 * torch.randn(20011)).to(dtype)
    drawn = draw(log_alpha, **options)
    exact = log_alpha.double().requires_grad_()
    z = textbook(exact, make_key(), **options)
    grad_z = torch.autograd.grad(z.sum(), exact)[0]
    shift = options.get("beta", BETA) * math.log(
        -options.get("gamma", GAMMA) / options.get("zeta", ZETA)
    )
    p = torch.sigmoid(exact.detach() - shift)
    rounding = torch.finfo(dtype).eps
    assert max_error(drawn.z[:-1], z) <= 8 * rounding
    assert torch.equal(drawn.z[:-1] == 0, z == 0)
    assert drawn.z[-1] == 1
    assert max_error(drawn.grad, grad_z + 1.5 * p * (1 - p)) <= 16 * rounding
    assert float(drawn.expected) == pytest.approx(float(p.sum()), rel=8 * rounding)


def uniform(key, gates):
    return (reference.noise_k(key, gates).double() + 0.5) / (1 << 23)


@pytest.mark.parametrize("law", ["bernoulli", "antithetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_gates_follow_the_textbook(impl, dtype, law):
    log_alpha = (3 * torch.randn(20011)).to(dtype)
    drawn = draw(log_alpha, law)
    u = uniform(make_key(), 20011)
    u = u if law == "bernoulli" else 1 - u
    p = torch.sigmoid(log_alpha.double())
    assert torch.equal(drawn.z[:-1], (u < p).to(dtype))
    assert max_error(drawn.grad, 1.5 * p * (1 - p)) <= 2 * torch.finfo(dtype).eps
    assert float(drawn.expected) == pytest.approx(float(p.sum()), rel=1e-6)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("impl", ["cpp", "harness"], indirect=True)
def test_ten_million_decisions_equal_the_reference(impl, law):
    gates = 2_000_003
    layout = make_layout([gates], [])
    log_alpha, cost = 4 * torch.randn(gates), torch.rand(gates)
    for seed, step in [(11, 0), (12, (1 << 32) - 1), ((1 << 63) - 1, 1), (1 << 32, 77), (0, 1)]:
        key = make_key(seed, step)
        z, expected, _ = sample_gates(log_alpha, key, cost, layout, law)
        exact, exact_expected, _ = reference.sample_gates(log_alpha, key, cost, layout, law)
        same("sample_gates", decisions(z), decisions(exact))
        assert max_error(z, exact) <= torch.finfo(torch.float32).eps
        assert float(expected) == pytest.approx(float(exact_expected), rel=1e-6)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_ten_million_decisions_on_a_gpu_equal_the_reference(device, law):
    gates, key = 10_000_019, make_key((1 << 40) + 3, (1 << 32) - 2)
    log_alpha, cost, layout = 4 * torch.randn(gates), torch.rand(gates), make_layout([gates], [])
    exact, exact_expected, _ = reference.sample_gates(log_alpha, key, cost, layout, law)
    there = GateLayout(*(tensor.to(device) for tensor in layout))
    z, expected, _ = sample_gates(log_alpha.to(device), key.to(device), cost.to(device), there, law)
    assert torch.equal(z.cpu() == 0, exact == 0)
    assert torch.equal(z.cpu() == 1, exact == 1)
    assert max_error(z.cpu(), exact) <= torch.finfo(torch.float32).eps
    assert float(expected) == pytest.approx(float(exact_expected), rel=1e-6)


@pytest.mark.parametrize("impl", ["cpp", "harness"], indirect=True)
def test_ten_million_numbers_are_the_reference_s(impl):
    gates = 2_000_003
    layout = make_layout([gates], [])
    log_alpha, cost = torch.zeros(2, gates, dtype=torch.float64)
    for seed, step in [(11, 0), (12, (1 << 32) - 1), ((1 << 63) - 1, 1), (1 << 32, 77), (0, 1)]:
        key = make_key(seed, step)
        # Almost not stretched, at temperature 1 and log_alpha 0: z is the uniform number itself.
        options = {"beta": 1.0, "gamma": -1e-13, "zeta": 1 + 1e-13}
        z, _, _ = sample_gates(log_alpha, key, cost, layout, "hard_concrete", **options)
        k = z[:-1] * (1 << 23) - 0.5
        assert torch.equal(k.round().long(), reference.noise_k(key, gates))
        assert max_error(k, k.round()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("impl", ["harness"], indirect=True)
def test_cuda_and_cpu_values_are_the_same_bits(impl, need_cpp, law, dtype):
    gates = 40_009
    log_alpha, cost = (3 * torch.randn(gates)).to(dtype), torch.rand(gates).to(dtype)
    log_alpha[:2] = torch.tensor([math.inf, -math.inf])
    grads = torch.randn(gates + 1).to(dtype), torch.tensor(0.7, dtype=dtype)
    law_options = (LAWS.index(law), BETA, GAMMA, ZETA)
    args = log_alpha, make_key(), cost
    lists = make_layout([gates], [])
    on_cpu = torch.ops.l0kernels
    z, expected, *_ = op._FORWARD(*args, *lists, *law_options)
    cpu_z, cpu_expected, *_ = on_cpu.sample_gates(*args, *lists, *law_options)
    assert torch.equal(z, cpu_z)
    assert float(expected) == pytest.approx(float(cpu_expected), rel=torch.finfo(dtype).eps)
    grad = op._BACKWARD(*args, *grads, *law_options)
    assert torch.equal(grad, on_cpu.sample_gates_backward(*args, *grads, *law_options))


@pytest.mark.parametrize("gates, launches", [(0, 1), (1, 1), (16384, 1), (16385, 2)])
@pytest.mark.parametrize("impl", ["harness"], indirect=True)
def test_a_model_takes_few_launches(impl, gates, launches):
    log_alpha, layout = torch.randn(gates), make_layout([gates])
    harness_ops.launches(reset=True)
    drawn = draw(log_alpha, layout=layout)
    assert harness_ops.launches(reset=True)["sample_gates"] == launches + (gates > 0)
    open_lists(drawn.z, layout)
    assert harness_ops.launches(reset=True)["sample_gates"] == 1


@pytest.mark.parametrize("log_alpha", [-6.0, -2.3979, K, -0.3, 0.0, 1e-9, 0.7, 1.5986, 4.6, 30.0])
def test_thresholds_decide_exactly(log_alpha):
    scalar_math = pytest.importorskip("l0kernels._math", reason="the scalar C++ math is not built")
    closed_below, open_from = scalar_math.hard_concrete_thresholds(log_alpha)
    closed_at, open_at = 1 / (1 + math.exp(log_alpha - K)), 1 / (1 + math.exp(log_alpha + K))
    for k in {0, closed_below - 1, closed_below, open_from - 1, open_from, (1 << 23) - 1}:
        if not 0 <= k < 1 << 23:
            continue
        u = (k + 0.5) / (1 << 23)
        z = scalar_math.hard_concrete_value(k, log_alpha)
        assert (z == 0) == (u <= closed_at)
        assert (z == 1) == (u >= open_at)
        closed, full = reference.hard_concrete_decisions(
            torch.tensor([log_alpha], dtype=torch.float64), torch.tensor([k]), BETA, GAMMA, ZETA
        )
        assert (bool(closed), bool(full)) == (z == 0, z == 1)
        slope = scalar_math.hard_concrete_slope(k, log_alpha)
        assert (slope == 0) == (z in (0, 1))
    below = scalar_math.bernoulli_threshold(log_alpha)
    assert (below - 0.5) / (1 << 23) < 1 / (1 + math.exp(-log_alpha)) <= (below + 0.5) / (1 << 23)


@pytest.mark.parametrize("steps", [-0.75, -0.25, 0.25, 0.75])
def test_decisions_next_to_the_threshold(impl, steps):
    # log_alpha puts each gate's threshold a fraction of a noise step from the number it draws.
    gates, key = 1000, make_key(8, 9)
    edge = (reference.noise_k(key, gates).double() + 0.5 + steps) / (1 << 23)
    closed = draw(K - torch.logit(edge), key=key).z[:-1] == 0
    full = draw(-K - torch.logit(edge), key=key).z[:-1] == 1
    bernoulli = draw(torch.logit(edge), "bernoulli", key=key).z[:-1] == 1
    assert bool((closed == (steps > 0)).all())
    assert bool((full == (steps < 0)).all())
    antithetic = draw(torch.logit(1 - edge), "antithetic", key=key).z[:-1] == 1
    assert bool((bernoulli == (steps > 0)).all())
    assert bool((antithetic == (steps < 0)).all())


@pytest.mark.parametrize("value", [-3.0, -1.0, 0.0, 2.2])
def test_hard_concrete_statistics(impl, value):
    gates = 1 << 17
    z = draw(torch.full((gates,), value), key=make_key(1, 2), layout=make_layout([gates], [])).z[
        :-1
    ]
    closed, full = 1 / (1 + math.exp(value - K)), 1 / (1 + math.exp(-value - K))
    assert abs(z_score(int((z == 0).sum()), gates, closed)) < 4
    assert abs(z_score(int((z == 1).sum()), gates, full)) < 4
    # E[z] = integral over u of the stretched concrete distribution, clipped.
    u = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    exact = F.hardtanh(
        torch.sigmoid((torch.logit(u) + value) / BETA) * (ZETA - GAMMA) + GAMMA, 0, 1
    )
    error = float(z.double().mean() - exact.mean())
    assert abs(error) < 4 * float(exact.std()) / math.sqrt(gates)


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.2])
def test_bernoulli_statistics(impl, value):
    gates = 1 << 17
    layout = make_layout([gates], [])
    z = draw(torch.full((gates,), value), "bernoulli", make_key(1, 2), layout=layout).z[:-1]
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert abs(z_score(int(z.sum()), gates, 1 / (1 + math.exp(-value)))) < 4


def test_draws_depend_on_seed_and_step(impl):
    log_alpha = torch.zeros(64)
    keys = [make_key(1, 1), make_key(1, 2), make_key(2, 1), make_key(1 + (1 << 32), 1)]
    draws = [draw(log_alpha, key=key).z for key in keys]
    assert torch.equal(draws[0], draw(log_alpha, key=make_key(1, 1)).z)
    for i in range(len(draws)):
        for j in range(i):
            assert not torch.equal(draws[i], draws[j])


def test_a_draw_does_not_depend_on_the_gates_behind_it(impl):
    log_alpha = torch.randn(1000)
    whole = draw(log_alpha).z[:-1]
    for gates in (1, 3, 17, 255, 256, 257):
        assert torch.equal(draw(log_alpha[:gates]).z[:-1], whole[:gates])


# ---- what ARM makes of the noise ----


@pytest.mark.parametrize("gates", [0, 1, 3, 255, 257, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arm_gradient_is_the_published_one(impl, dtype, gates):
    factor = torch.randn(gates).to(dtype)
    factor[::5] = 0
    difference = torch.tensor(-1.7, dtype=dtype)
    for key in (make_key(), make_key((1 << 63) - 1, (1 << 32) - 1)):
        grad = arm_gradient(difference, factor, key)
        exact = difference.double() * factor.double() * (uniform(key, gates) - 0.5)
        plain = difference * factor * (uniform(key, gates).to(dtype) - 0.5)
        assert grad.dtype == dtype and grad.shape == (gates,)
        within_budget("sample_gates", "gates", grad, exact, plain)
        assert bool((grad[::5] == 0).all())


def test_arm_gradient_takes_any_strides_and_no_graph(impl):
    factor = torch.randn(200, requires_grad=True)
    difference = torch.tensor(2.0, requires_grad=True)
    grad = arm_gradient(difference, factor[::2], make_key())
    assert not grad.requires_grad
    assert torch.equal(grad, arm_gradient(difference, factor[::2].contiguous(), make_key()))
    constant = arm_gradient(difference, torch.ones(()).expand(100), make_key())
    torch.testing.assert_close(constant, (2 * (uniform(make_key(), 100) - 0.5)).float())


@pytest.mark.parametrize("difference", [math.inf, -math.inf, math.nan])
def test_arm_gradient_is_zero_without_a_factor_whatever_the_losses(impl, difference):
    factor = torch.tensor([0.0, 1.0, -0.0, 2.0])
    grad = arm_gradient(torch.tensor(difference), factor, make_key())
    assert grad[0] == 0 and grad[2] == 0
    assert not grad[[1, 3]].isfinite().any()


def test_estimates_average_to_the_exact_gradient(impl):
    gates, pi = 1 << 16, 0.3
    log_alpha = torch.full((gates,), math.log(pi / (1 - pi)))
    z1, z2 = (draw(log_alpha, law).z[:-1].double() for law in ("bernoulli", "antithetic"))
    noise = arm_gradient(torch.tensor(1.0), torch.ones(gates), make_key()).double()
    # Of f(z) = 5 z + 2: pi (1 - pi) (f(1) - f(0)), from two draws and from one.
    for estimate in (5 * (z2 - z1) * noise, -2 * (5 * z1 + 2) * noise):
        error = float(estimate.mean()) - 5 * pi * (1 - pi)
        assert abs(error) < 4 * float(estimate.std()) / math.sqrt(gates)


BAD_ARM = {
    "half": (TypeError, "factor: expected float32 or float64", {"factor": torch.ones(4).half()}),
    "matrix": (ValueError, "factor: expected 1 dimension", {"factor": torch.ones(2, 2)}),
    "dtype": (TypeError, "difference: expected", {"difference": torch.ones(()).double()}),
    "vector": (ValueError, "difference: expected a scalar", {"difference": torch.ones(1)}),
    "key dtype": (TypeError, "key: expected int64", {"key": torch.tensor([1, 2]).int()}),
    "key shape": (ValueError, r"key: expected shape \[2\]", {"key": torch.tensor([1])}),
}


@pytest.mark.parametrize("name", BAD_ARM)
def test_arm_gradient_refuses_bad_input(impl, name):
    error, message, changes = BAD_ARM[name]
    given = {"difference": torch.ones(()), "factor": torch.ones(4), "key": make_key()} | changes
    with pytest.raises(error, match=message):
        arm_gradient(**given)


@pytest.mark.parametrize("key", [(-1, 0), (0, -1), (0, 1 << 32)])
def test_arm_gradient_of_a_key_that_no_draw_has(impl, key):
    given = torch.tensor(1.0), torch.ones(4), make_key(*key)
    if impl in ("harness", "triton") or impl.endswith("GPU"):
        assert arm_gradient(*given).isnan().all()
    else:
        with pytest.raises(ValueError, match="expected 0 <="):
            arm_gradient(*given)


# ---- the noise of examples ----


@pytest.mark.parametrize("gates", [0, 1, 2, 3, 4, 257, 8191, 20011])
@pytest.mark.parametrize("rows", [range(0), range(1, 2), range(1, 8), range(3, 12, 4)])
def test_example_noise_is_that_of_each_row(impl, gates, rows):
    for key in (make_key(), make_key((1 << 63) - 1, (1 << 32) - 1)):
        k = example_noise(key, len(rows), gates, rows.start, rows.step)
        assert k.dtype == torch.int32 and k.shape == (len(rows), gates) and k.is_contiguous()
        for its, row in zip(k, rows, strict=True):
            assert torch.equal(its.long(), reference.noise_k(key, gates, row=row))


def test_example_noise_of_the_last_rows(impl):
    stride = (1 << 31) - 1
    k = example_noise(make_key(), 3, 9, 1, stride)
    for its, row in zip(k, range(1, 1 << 32, stride), strict=True):
        assert torch.equal(its.long(), reference.noise_k(make_key(), 9, row=row))


def test_example_noise_takes_any_strides(impl):
    """Of the key, and down the rows."""
    key = torch.tensor([3, 0, 5])[::2]
    k = example_noise(key, 3, 9, 12, -5)
    for its, row in zip(k, (12, 7, 2), strict=True):
        assert torch.equal(its.long(), reference.noise_k(make_key(), 9, row=row))


BAD_NOISE = {
    "key dtype": (TypeError, "key: expected int64", {"key": torch.tensor([1, 2]).int()}),
    "key shape": (ValueError, r"key: expected shape \[2\]", {"key": torch.tensor([1])}),
    "examples": (ValueError, "expected examples, gates >= 0; got -1, 4", {"examples": -1}),
    "gates": (ValueError, "expected examples, gates >= 0; got 3, -4", {"gates": -4}),
    "first": (ValueError, "expected rows from 0 to 2.32 - 1; got -1 to 1", {"first": -1}),
    "last": (ValueError, "expected rows from 0 .* to 4294967296", {"first": (1 << 32) - 2}),
}


@pytest.mark.parametrize("name", BAD_NOISE)
def test_example_noise_refuses_bad_input(impl, name):
    error, message, changes = BAD_NOISE[name]
    with pytest.raises(error, match=message):
        example_noise(**({"key": make_key(), "examples": 3, "gates": 4} | changes))


@pytest.mark.parametrize("key", [(-1, 0), (0, -1), (0, 1 << 32)])
def test_example_noise_of_a_key_that_no_draw_has(impl, key):
    if impl in ("harness", "triton") or impl.endswith("GPU"):
        assert bool((example_noise(make_key(*key), 3, 5) == -1).all())
    else:
        with pytest.raises(ValueError, match="expected 0 <="):
            example_noise(make_key(*key), 3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["harness"], indirect=True)
def test_cuda_and_cpu_arm_gradients_are_the_same_bits(impl, need_cpp, dtype):
    given = torch.tensor(0.7, dtype=dtype), torch.randn(40_009).to(dtype), make_key(8, 9)
    assert torch.equal(op._ARM(*given), torch.ops.l0kernels.arm_gradient(*given))


# ---- gradients ----


@pytest.mark.parametrize("law", LAWS)
def test_gradients_within_budget(impl, law):
    log_alpha, cost, grad_z = torch.randn(4480), torch.rand(4480), torch.randn(4481)
    drawn = draw(log_alpha, law, cost=cost, grad_z=grad_z)
    assert drawn.grad is not None
    with l0.use_impl("reference"):
        exact = draw(log_alpha.double(), law, cost=cost.double(), grad_z=grad_z.double())
    plain = exact.grad.float()
    within_budget("sample_gates", "gates", drawn.grad, exact.grad, plain)
    within_budget("sample_gates", "forward", drawn.z, exact.z, exact.z.float())
    within_budget("sample_gates", "forward", drawn.expected, exact.expected, exact.expected.float())
    same("sample_gates", decisions(drawn.z), decisions(exact.z))


@pytest.mark.parametrize("law", LAWS)
def test_gradcheck(impl, law):
    log_alpha = torch.randn(17, dtype=torch.float64, requires_grad=True)
    cost = torch.rand(17, dtype=torch.float64)
    layout = make_layout([10, 7])

    def smooth(log_alpha):
        z, expected, _ = sample_gates(log_alpha, make_key(), cost, layout, law)
        # Bernoulli gates are steps: only the expected cost is differentiable.
        return (z[:-1], expected) if law == "hard_concrete" else expected

    assert torch.autograd.gradcheck(smooth, (log_alpha,))


@pytest.mark.parametrize("strided", [False, True])
def test_each_output_alone_has_a_gradient(impl, strided):
    log_alpha = torch.randn(40)[::2] if strided else torch.randn(20)
    log_alpha = log_alpha.detach().requires_grad_()
    layout, cost = make_layout([20]), torch.rand(40)[::2]
    z, expected, _ = sample_gates(log_alpha, make_key(), cost, layout, "hard_concrete")
    (of_z,) = torch.autograd.grad(z.sum(), log_alpha, retain_graph=True)
    (of_expected,) = torch.autograd.grad(expected, log_alpha, retain_graph=True)
    (of_both,) = torch.autograd.grad(z.sum() + expected, log_alpha)
    assert int((of_z != 0).sum()) == int(((z[:-1] > 0) & (z[:-1] < 1)).sum()) > 0
    assert bool((of_expected > 0).all())
    torch.testing.assert_close(of_both, of_z + of_expected)


def test_saturated_gates_have_gradient_zero_whatever_comes_in(impl):
    log_alpha = torch.randn(2000)
    z = draw(log_alpha).z
    saturated = (z == 0) | (z == 1)
    grad_z = torch.where(saturated, math.inf, 1.0)
    log_alpha = log_alpha.requires_grad_()
    z, _, _ = sample_gates(
        log_alpha, make_key(), torch.ones(2000), make_layout([2000]), "hard_concrete"
    )
    (grad,) = torch.autograd.grad(z, log_alpha, grad_z)
    assert bool((grad[saturated[:-1]] == 0).all())
    assert bool((grad[~saturated[:-1]] > 0).all())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_log_alpha(impl, law, dtype):
    log_alpha = torch.tensor([math.inf, -math.inf] * 50, dtype=dtype)
    drawn = draw(log_alpha, law, cost=torch.full_like(log_alpha, 2.0))
    assert drawn.z.tolist() == [1.0, 0.0] * 50 + [1.0]
    assert drawn.expected == 100
    assert bool((drawn.grad == 0).all())


def test_one_draw_serves_several_backward_passes(op_impl):
    log_alpha = torch.randn(50, requires_grad=True)
    z, expected, _ = sample_gates(
        log_alpha, make_key(), torch.ones(50), make_layout([50]), "hard_concrete"
    )
    (z * 2).sum().backward()
    first = log_alpha.grad.clone()
    (z * 2).sum().backward()
    assert bool((first != 0).any())
    assert torch.equal(log_alpha.grad, 2 * first)


@pytest.mark.parametrize("changed", ["log_alpha", "key", "cost"])
def test_changes_between_draw_and_backward_are_noticed(op_impl, changed):
    tensors = {"log_alpha": torch.randn(5), "key": make_key(), "cost": torch.ones(5)}
    log_alpha = tensors["log_alpha"].requires_grad_()
    z, _, _ = sample_gates(
        log_alpha, tensors["key"], tensors["cost"], make_layout([5]), "hard_concrete"
    )
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        z.sum().backward()


def test_inference_mode(impl):
    log_alpha, layout = torch.randn(50), make_layout([50])
    plain, _, lists = sample_gates(log_alpha, make_key(), torch.ones(50), layout, "hard_concrete")
    with torch.inference_mode():
        args = (log_alpha.clone(), make_key(), torch.ones(50), layout, "hard_concrete")
        z, _, inferred = sample_gates(*args)
        again = open_lists(z, layout)
    assert torch.equal(z, plain)
    assert all(map(torch.equal, inferred, lists)) and all(map(torch.equal, again, lists))


def test_double_backward_is_refused(op_impl):
    log_alpha = torch.zeros(5, requires_grad=True)
    z, _, _ = sample_gates(log_alpha, make_key(), torch.ones(5), make_layout([5]), "hard_concrete")
    (grad,) = torch.autograd.grad((z**2).sum(), log_alpha, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("law", LAWS)
def test_bits_do_not_depend_on_threads(need_cpp, law):
    log_alpha = torch.randn(100_003)
    layout = make_layout([100_003], [])

    def run():
        drawn = draw(log_alpha, law, cost=log_alpha.abs(), layout=layout)
        return drawn.z, drawn.expected, drawn.grad

    assert_threads_do_not_matter(run, (1, 2, 1))


def test_example_noise_does_not_depend_on_threads(need_cpp):
    assert_threads_do_not_matter(lambda: [example_noise(make_key(), 5, 20_011)], (1, 2, 1))


# ---- open lists ----


def lists_by_definition(z, layout):
    """The packed features of every port, straight from the definition."""
    z = z.tolist()
    gates = len(z) - 1
    kept = {gates}
    starts = layout.group_offsets.tolist()
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        group = list(range(begin, end))
        is_open = [gate for gate in group if z[gate] != 0]
        spare = [gate for gate in group if z[gate] == 0]
        kept.update(is_open + spare[: max(0, min(2, len(group)) - len(is_open))])
    ports = []
    starts = layout.port_offsets.tolist()
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        born, extra = layout.maps[:, begin:end].tolist()
        arriving = [f for f in range(end - begin) if born[f] in kept]
        packed = arriving
        if any(gate != gates for gate in extra):
            packed = [f for f in arriving if z[born[f]] * z[extra[f]] != 0]
            spare = [f for f in arriving if f not in packed]
            packed = sorted(packed + spare[: max(0, min(2, len(arriving)) - len(packed))])
        ports.append((packed, [arriving.index(f) for f in packed]))
    return ports


def check_lists(lists, z, layout):
    starts = layout.port_offsets.tolist()
    ports = lists_by_definition(z, layout)
    assert lists.counts.tolist() == [len(packed) for packed, _ in ports]
    assert lists.index.dtype == lists.position.dtype == lists.counts.dtype == torch.int64
    for i, (packed, position) in enumerate(ports):
        padding = [0] * (starts[i + 1] - starts[i] - len(packed))
        assert lists.index[starts[i] : starts[i + 1]].tolist() == packed + padding
        assert lists.position[starts[i] : starts[i + 1]].tolist() == position + padding


LAYOUTS = {
    "one gate": make_layout([1]),
    "three gates": make_layout([3]),
    "two groups": make_layout([10, 7]),
    "empty groups": make_layout([0, 5, 0, 0, 3, 0]),
    "no gates": make_layout([], [([0, 0, 0], None)]),
    "no features": make_layout([4], [([], None), ([], None)]),
    "expanded": make_layout([5, 3], [([j for j in range(5) for _ in range(16)], None)]),
    "concatenated": make_layout([4, 4], [([0, 1, 2, 3, 8, 8, 8, 4, 5, 6, 7], None)]),
    "extra gates": make_layout(
        [6, 12], [(range(6), None), ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], list(range(6, 18)))]
    ),
    "extra gates of inputs": make_layout([9], [([9] * 9, list(range(9)))]),
    "some extra gates": make_layout([4, 2], [([0, 1, 2, 3, 6], [6, 4, 6, 5, 4]), ([3, 2], None)]),
}


@pytest.mark.parametrize("opened", ["none", "one", "all", "half", "few"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_open_lists(impl, name, opened):
    layout = LAYOUTS[name]
    gates = int(layout.group_offsets[-1])
    share = {"none": 0.0, "one": 0.0, "all": 1.0, "half": 0.5, "few": 0.15}[opened]
    for _ in range(4):
        z = torch.rand(gates + 1) * (torch.rand(gates + 1) < share)
        if opened == "one" and gates:
            z[int(torch.randint(gates, ()))] = 0.3
        z[gates] = 1
        check_lists(open_lists(z, layout), z, layout)
        check_lists(open_lists(z.double(), layout), z, layout)


def test_a_draw_lists_its_own_gates(impl):
    layout = LAYOUTS["extra gates"]
    for law in LAWS:
        drawn = draw(torch.randn(18), law, layout=layout)
        check_lists(drawn.lists, drawn.z, layout)


def random_layout(sizes):
    """Ports of every kind, some of more than a block's features."""
    starts, gates = offsets(sizes).tolist(), sum(sizes)
    groups = [list(range(starts[i], starts[i + 1])) for i in range(len(sizes))]
    ports = [(group, None) for group in groups]
    ports += [([gate for gate in group for _ in range(7)], None) for group in groups[:3]]
    ports.append(([*groups[2], *[gates] * 5, *groups[1], *groups[0]], None))
    for width in (0, 1, 2, 40, 2500):
        born = torch.randint(gates + 1, (width,)).tolist()
        extra = torch.randint(gates + 1, (width,)).tolist()
        ports += [(born, None), (sorted(born), extra), ([gates] * width, extra)]
    ports.append((range(2000), [gates] * 1999 + [0]))
    return make_layout(sizes, ports)


@pytest.mark.parametrize("gates", [3000, 20000])  # drawn again for each port; stored, then listed
@pytest.mark.parametrize("middle", [-8.0, -5.0, 0.0])
def test_lists_of_a_model(impl, gates, middle):
    sizes = [1300, 2, 40, 1, 0, 3, 600]
    sizes.append(gates - sum(sizes))
    layout = random_layout(sizes)
    log_alpha = middle + 2 * torch.randn(gates)
    log_alpha[1302:1343] = -math.inf  # groups in which nothing is open
    log_alpha[1345] = -math.inf
    for law in LAWS:
        drawn = draw(log_alpha, law, layout=layout)
        for mine, exact in zip(drawn.lists, reference.open_lists(drawn.z, layout), strict=True):
            assert torch.equal(mine, exact)


def test_one_open_gate_anywhere(impl):
    layout = make_layout([70], [(range(70), None), (range(70), range(70)), ([70] * 70, range(70))])
    for opened in (0, 1, 2, 31, 32, 33, 69):
        z = torch.zeros(71)
        z[[opened, 70]] = 1.0
        check_lists(open_lists(z, layout), z, layout)


def test_the_last_gate_is_kept_whatever_its_value(impl):
    for name in ("concatenated", "extra gates of inputs"):
        z = torch.zeros(LAYOUTS[name].group_offsets[-1] + 1)
        check_lists(open_lists(z, LAYOUTS[name]), z, LAYOUTS[name])


def test_a_product_that_underflows_is_closed(impl):
    layout = make_layout([4, 4], [(range(4), range(4, 8))])
    z = torch.tensor([1e-30] * 3 + [1.0] + [1e-30] * 4 + [1.0])
    lists = open_lists(z, layout)
    assert (lists.counts.tolist(), lists.index.tolist()) == ([2], [0, 3, 0, 0])
    assert lists.position.tolist() == [0, 3, 0, 0]
    assert open_lists(z.double(), layout).counts.tolist() == [4]


def test_no_gates_at_all(impl):
    drawn = draw(torch.zeros(0), layout=make_layout([], []))
    assert drawn.z.tolist() == [1.0]
    assert drawn.expected == 0
    assert drawn.grad.shape == (0,)
    assert drawn.lists.counts.shape == (0,)


# ---- errors ----


def take(log_alpha, key=None, layout=None):
    """A draw as models make it: operators that nobody waits for have said what is wrong by then."""
    key = make_key() if key is None else key
    layout = make_layout([log_alpha.shape[0]]) if layout is None else layout
    cost = torch.ones_like(log_alpha)
    z, expected, lists = sample_gates(log_alpha, key, cost, layout, "hard_concrete")
    starts = layout.port_offsets.tolist()[:-1]
    selects = [False] * len(starts)
    return Draw(z, lists, starts, selects, True, 0, expected, (log_alpha, key))


@pytest.mark.parametrize("gates", [30, 20000])
def test_nan_is_reported(impl, gates):
    log_alpha = torch.zeros(gates)
    log_alpha[[7, gates - 1]] = math.nan
    with pytest.raises(ValueError, match=f"got 2 of {gates}, first at 7"):
        take(log_alpha)


BAD_KEYS = [
    (-1, 0, "seed"),
    (0, -1, "step"),
    (0, 1 << 32, "step"),
    (-(1 << 63), 0, "seed"),
    (-1, -1, "seed"),
]


@pytest.mark.parametrize("seed, step, message", BAD_KEYS)
def test_seed_and_step_have_a_range(impl, seed, step, message):
    got = seed if message == "seed" else step
    with pytest.raises(ValueError, match=f"{message}: expected 0 <= {message}.*got {got}"):
        take(torch.zeros(3), make_key(seed, step))


def test_the_first_thing_wrong_is_reported(impl):
    log_alpha = torch.tensor([math.nan])
    with pytest.raises(ValueError, match="seed: expected"):
        take(log_alpha, make_key(-1, -1))
    with pytest.raises(ValueError, match="step: expected"):
        take(log_alpha, make_key(0, -1))


@pytest.mark.parametrize("impl", ["cpp", "harness"], indirect=True)
def test_models_report_bad_values(impl):
    gates = l0.gates.HardConcrete({"a": 30})
    net = gates.attach(torch.nn.Sequential(l0.nn.GatedLinear(30, 3, in_gate=gates["a"])))
    net(torch.ones(2, 30))
    with torch.no_grad():
        gates.log_alpha[3] = math.nan
    with pytest.raises(ValueError, match="log_alpha: expected no NaN; got 1 of 30, first at 3"):
        net(torch.ones(2, 30))
    with torch.no_grad():
        gates.log_alpha.zero_()
    gates.step.fill_((1 << 32) - 1)
    with pytest.raises(ValueError, match=f"step: expected 0 <= step < 2.32; got {1 << 32}"):
        net(torch.ones(2, 30))


@pytest.mark.parametrize("gates", [30, 20000])
@pytest.mark.parametrize("impl", ["harness"], indirect=True)
def test_what_a_gpu_gives_for_bad_values(impl, gates):
    log_alpha = torch.zeros(gates)
    log_alpha[7] = math.nan
    drawn = draw(log_alpha, key=make_key(2, 3))
    assert drawn.lists.counts.tolist() == [-1]
    assert drawn.expected.isnan()
    for values in (drawn.z, drawn.grad):
        assert values.isnan().nonzero().flatten().tolist() == [7]
    for seed, step, message in BAD_KEYS:
        drawn = draw(log_alpha, key=make_key(seed, step))
        assert drawn.lists.counts.tolist() == [-2 if message == "seed" else -3]
        assert drawn.expected.isnan()
        assert drawn.z[:-1].isnan().all() and drawn.grad.isnan().all()


def test_the_ends_of_the_range_are_legal(impl):
    assert draw(torch.zeros(3), key=make_key((1 << 63) - 1, (1 << 32) - 1)).z.shape == (4,)


BAD = {
    "half": (TypeError, "float32 or float64", {"log_alpha": torch.zeros(4).half()}),
    "matrix": (ValueError, "1 dimension", {"log_alpha": torch.zeros(2, 2)}),
    "cost dtype": (TypeError, "cost: expected", {"cost": torch.ones(4).double()}),
    "cost shape": (ValueError, "cost: expected shape", {"cost": torch.ones(3)}),
    "cost grad": (ValueError, "no gradient", {"cost": torch.ones(4, requires_grad=True)}),
    "key dtype": (TypeError, "key: expected int64", {"key": torch.tensor([1, 2]).int()}),
    "key shape": (ValueError, r"key: expected shape \[2\]", {"key": torch.tensor([1])}),
    "law": (ValueError, "hard_concrete, bernoulli, antithetic; got 'soft'", {"law": "soft"}),
    "beta": (ValueError, "beta > 0", {"beta": 0.0}),
    "gamma": (ValueError, "gamma < 0", {"gamma": 0.0}),
    "zeta": (ValueError, "zeta > 1", {"zeta": 1.0}),
    "maps shape": (ValueError, "expected shape .2, F", {"maps": torch.zeros(3, 4).long()}),
    "maps dtype": (TypeError, "maps: expected int64", {"maps": torch.zeros(2, 4)}),
    "no offsets": (ValueError, "start with 0", {"group_offsets": torch.zeros(0).long()}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(impl, name):
    error, message, changes = BAD[name]
    layout = make_layout([4])
    layout = layout._replace(**{k: v for k, v in changes.items() if k in layout._fields})
    args = {
        "log_alpha": torch.zeros(4),
        "key": make_key(),
        "cost": torch.ones(4),
        "layout": layout,
        "law": "hard_concrete",
    }
    args |= {k: v for k, v in changes.items() if k not in layout._fields}
    with pytest.raises(error, match=message):
        sample_gates(**args)


OUT_OF_BOUNDS = [
    ("maps", torch.tensor([[0, 1, 2, 5], [4, 4, 4, 4]])),
    ("maps", torch.tensor([[0, 1, 2, -1], [4, 4, 4, 4]])),
    ("maps", torch.tensor([[0, 1, 2, 3], [4, 1 << 60, 4, 4]])),
    ("group_offsets", torch.tensor([0, 3])),
    ("group_offsets", torch.tensor([0, 3, 2, 4])),
    ("group_offsets", torch.tensor([0, 9])),
    ("group_offsets", torch.tensor([-9, 4])),
    ("port_offsets", torch.tensor([1, 4])),
    ("port_offsets", torch.tensor([0, 9])),
    ("port_offsets", torch.tensor([0, 3])),
    ("port_offsets", torch.tensor([0, -1, 4])),
]


@pytest.mark.parametrize("field, value", OUT_OF_BOUNDS)
def test_cpp_refuses_layouts_out_of_bounds(need_cpp, field, value):
    layout = make_layout([4])._replace(**{field: value})
    with pytest.raises(RuntimeError, match=f"{field}: expected"), l0.use_impl("cpp"):
        open_lists(torch.ones(5), layout)


# Who searches unordered offsets finds some group: a wrong list, but nothing outside is touched.
@pytest.mark.parametrize("field, value", [case for case in OUT_OF_BOUNDS if len(case[1]) != 4])
@pytest.mark.parametrize("impl", ["harness"], indirect=True)
def test_cuda_refuses_layouts_out_of_bounds(impl, field, value):
    layout = make_layout([4])._replace(**{field: value})
    # Closed gates: nobody looks for the group of an open one.
    lists = open_lists(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]), layout)
    assert min(lists.counts.tolist()) == -4
    with pytest.raises(RuntimeError, match="expected a layout with ascending offsets"):
        take(torch.full((4,), -math.inf), layout=layout)


# ---- registration and compilation ----


def raw_arguments(requires_grad):
    layout = LAYOUTS["extra gates"]
    log_alpha = torch.randn(18, requires_grad=requires_grad)
    return log_alpha, make_key(), torch.rand(18), layout


# The gradient lives outside the raw operators; PyTorch says so when asked to differentiate them.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("law", [0, 1, 2])
def test_opcheck(requires_grad, law):
    log_alpha, key, cost, layout = raw_arguments(requires_grad)
    opcheck(op._FORWARD, (log_alpha, key, cost, *layout, law, BETA, GAMMA, ZETA))
    grads = torch.randn(19), torch.tensor(1.0)
    opcheck(op._BACKWARD, (log_alpha, key, cost, *grads, law, BETA, GAMMA, ZETA))
    opcheck(op._BACKWARD, (log_alpha, key, cost, None, None, law, BETA, GAMMA, ZETA))
    opcheck(op._LISTS, (torch.rand(19, requires_grad=requires_grad), *layout))
    factor = torch.rand(18, requires_grad=requires_grad)
    opcheck(op._ARM, (torch.tensor(0.5, requires_grad=requires_grad), factor, key))
    opcheck(op._NOISE, (key, 3, 7, 1, 2))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_compiles_to_one_graph(name):
    log_alpha, _, cost, layout = raw_arguments(True)

    def loss(key):
        z, expected, lists = sample_gates(log_alpha, key, cost, layout, "hard_concrete")
        return (z * torch.arange(19)).sum() + expected, lists.index

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with l0.use_impl(name):
        for step in range(3):
            value, index = compiled(make_key(1, step))
            (grad,) = torch.autograd.grad(value, log_alpha)
            plain, plain_index = loss(make_key(1, step))
            torch.testing.assert_close(value, plain)
            torch.testing.assert_close(grad, torch.autograd.grad(plain, log_alpha)[0])
            assert torch.equal(index, plain_index)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_example_noise_compiles_to_one_graph(name):
    def drawn(key, x):
        return x * example_noise(key, x.shape[0], x.shape[1])

    compiled = torch.compile(drawn, fullgraph=True, dynamic=True, backend="aot_eager")
    with l0.use_impl(name):
        for step, shape in enumerate(((3, 7), (5, 11), (2, 300))):
            x = torch.ones(shape, dtype=torch.int32)
            assert torch.equal(compiled(make_key(1, step), x), drawn(make_key(1, step), x))


def test_same_draws_on_every_device(device):
    layout = LAYOUTS["extra gates"]
    log_alpha, cost, grad_z = torch.randn(18), torch.rand(18), torch.randn(19)
    with l0.use_impl("reference"):
        plain = draw(log_alpha, cost=cost, layout=layout, grad_z=grad_z)
    there = draw(
        log_alpha.to(device),
        key=make_key().to(device),
        cost=cost.to(device),
        layout=GateLayout(*(tensor.to(device) for tensor in layout)),
        grad_z=grad_z.to(device),
    )
    torch.testing.assert_close(there.z.cpu(), plain.z)
    torch.testing.assert_close(there.grad.cpu(), plain.grad)
    for mine, other in zip(there.lists, plain.lists, strict=True):
        assert torch.equal(mine.cpu(), other)
