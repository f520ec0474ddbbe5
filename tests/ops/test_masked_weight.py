# SPDX-License-Identifier: Apache-2.0
"""Masking a weight against products with sigmoids in PyTorch."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from error_table import close, same, within_budget
from harness import ops
from ops.stand_ins import stand_ins
from ops.threads import assert_threads_do_not_matter
from torch.library import opcheck

import l0kernels as l0
from l0kernels._registry import chosen
from l0kernels.functional import masked_weight
from l0kernels.ops.masked_weight import op
from l0kernels.ops.masked_weight.reference import UNDERFLOW, closed_below

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
BETAS = [1.0, 14.0, 200.0, math.inf]


@dataclass
class Case:
    """Arguments of masked_weight."""

    weight: torch.Tensor
    scores: torch.Tensor
    beta: torch.Tensor
    scale: float = 1.0
    skip_below: float = 0.0
    dtype: torch.dtype | None = None

    def exact(self):
        """The same numbers in float64."""
        tensors = (self.weight.detach().double(), self.scores.double(), self.beta.double())
        return Case(*tensors, self.scale)

    def closed(self):
        """Decided in the scores' own dtype, as it has to be."""
        if self.beta.isinf():
            return ~(self.scores > 0)
        return self.scores * self.beta < closed_below(self.skip_below, self.scores.dtype)


def make_case(shape, share=0.5, dtypes=DTYPES[1], beta=14.0, **options):
    """Scores are positive for about a share of the numbers, and no less than 0.01 from 0."""
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    scores = (torch.rand(shape, dtype=compute) + 0.02) / 2
    return Case(
        torch.randn(shape).to(dtypes[0]),
        torch.where(torch.rand(shape) < share, scores, -scores),
        torch.tensor(beta, dtype=compute),
        dtype=dtypes[1],
        **options,
    )


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def call(case, weight, scores):
    return masked_weight(weight, scores, case.beta, case.scale, case.skip_below, case.dtype)


def dense(closed):
    """The masked weight in PyTorch, with what is closed given."""

    def run(case, weight, scores):
        if case.beta.isinf():
            gate = torch.ones_like(scores) + 0 * scores
        else:
            gate = torch.sigmoid(scores * case.beta)
        masked = torch.where(closed, 0, weight.to(gate.dtype) * (gate * case.scale))
        return masked.to(case.dtype or weight.dtype)

    return run


def gradients(case, function, upstream):
    """The masked weight and the gradients of weight and scores."""
    weight = case.weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    scores = case.scores.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    masked = function(case, weight, scores)
    grads = torch.autograd.grad(masked, (weight, scores), upstream.to(masked.dtype))
    return masked.detach(), *grads


def check(case, upstream=None):
    """Compares value and gradients with PyTorch's, exact and in the same dtype."""
    upstream = torch.randn(case.weight.shape) if upstream is None else upstream
    upstream = upstream.to(case.dtype or case.weight.dtype)
    closed = case.closed()
    actual = gradients(case, call, upstream)
    exact = gradients(case.exact(), dense(closed), upstream)
    plain = gradients(case, dense(closed), upstream)
    passes = ("forward", "wgrad", "gates")
    for what, mine, true, other in zip(passes, actual, exact, plain, strict=True):
        if mine.dtype == torch.float64:  # PyTorch's is not exact either
            close("masked_weight", what, mine, true)
        else:
            within_budget("masked_weight", what, mine, true, other)
        assert bool((mine[closed] == 0).all())
    assert actual[0].dtype == (case.dtype or case.weight.dtype)
    assert actual[1].dtype == case.weight.dtype and actual[2].dtype == case.scores.dtype
    return actual


# ---- values and gradients ----

SHAPES = [(), (0,), (0, 3), (1,), (7,), (8, 16), (5, 3), (31, 17), (20, 1, 5, 5), (11, 13, 3, 3)]
SHAPES += [(8, 16, 1, 1), (5, 7, 3, 2, 2)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, shape, beta):
    check(make_case(shape, beta=beta, scale=1.9))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("beta", [1.0, 200.0, math.inf])
def test_shares_of_open_gates(impl, share, beta):
    check(make_case((23, 19), share, beta=beta))


@pytest.mark.parametrize("beta", [14.0, math.inf])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
@pytest.mark.parametrize("last", [False, True])
def test_dtypes(impl, dtypes, last, beta):
    case = make_case((19, 23, 3, 3), dtypes=dtypes, beta=beta, scale=2.0)
    if last:
        case.weight = channels_last(case.weight)
    results = check(case)
    for result in results[:1] if impl == "reference" else results:  # else autograd's layout
        assert result.is_contiguous(memory_format=torch.channels_last) == last
        assert result.is_contiguous() != last


@pytest.mark.parametrize("numbers", [2048, 2051, 70000, 70001])
@pytest.mark.parametrize("dtypes", [DTYPES[1], DTYPES[2], DTYPES[4]], ids=str)
def test_more_than_one_block(impl, numbers, dtypes):
    check(make_case((numbers,), dtypes=dtypes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_gates_open_and_close(impl, dtype):
    """Around the limits of a sigmoid, where all implementations decide alike."""
    limit = -UNDERFLOW[dtype]
    steps = torch.arange(-40, 41, dtype=dtype) * torch.finfo(dtype).eps * limit
    x = torch.cat([steps - limit, steps + limit, torch.tensor([-math.inf, math.inf, 0.0, -0.0])])
    case = Case(torch.ones(len(x), dtype=dtype), x / 3, torch.tensor(3.0, dtype=dtype), 1.5)
    masked, grad, grad_scores = check(case, torch.ones(len(x)))
    same("masked_weight", masked != 0, ~case.closed())
    assert 0 < int(case.closed().sum()) < len(x) // 2
    assert masked[-3] == 1.5 and masked[-4] == 0
    assert masked[-1] == masked[-2] == 0.75
    assert grad_scores[-1] == grad_scores[-2] == 1.5 * 3 / 4
    assert bool((grad == masked).all()) and grad_scores[-3] == 0


def test_unit_step(impl):
    scores = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1e-45, 3.0, math.inf])
    case = Case(torch.full((7,), 5.0), scores, torch.tensor(math.inf), 2.0)
    masked, grad, grad_scores = gradients(case, call, torch.full((7,), 3.0))
    assert masked.tolist() == [0, 0, 0, 0, 10, 10, 10]
    assert grad.tolist() == [0, 0, 0, 0, 6, 6, 6]
    assert bool((grad_scores == 0).all())


@pytest.mark.parametrize("skip_below", [1e-3, 0.5, 0.9])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=str)
def test_gates_below_a_value_are_closed(impl, skip_below, dtypes):
    case = make_case((41, 29), dtypes=dtypes, skip_below=skip_below)
    masked, _, grad_scores = check(case)
    is_open = torch.sigmoid(case.scores * case.beta) >= skip_below
    assert 0 < int(is_open.sum()) < is_open.numel()
    same("masked_weight", masked != 0, is_open)
    assert bool((grad_scores[~is_open] == 0).all())


def test_a_unit_step_knows_no_value_to_skip_below(impl):
    case = make_case((41, 29), beta=math.inf, skip_below=0.99)
    assert torch.equal(call(case, case.weight, case.scores), case.weight * (case.scores > 0))


@pytest.mark.parametrize("need_weight, need_scores", [(True, False), (False, True)])
@pytest.mark.parametrize("beta", [14.0, math.inf])
@pytest.mark.parametrize("width", [10, 11])
def test_only_the_gradient_asked_for(impl, need_weight, need_scores, beta, width):
    case = make_case((12, width), beta=beta)
    upstream = torch.randn(12, width)
    both = gradients(case, call, upstream)
    weight = case.weight.clone().requires_grad_(need_weight)
    scores = case.scores.clone().requires_grad_(need_scores)
    call(case, weight, scores).backward(upstream)
    assert (weight.grad is not None) == need_weight
    assert (scores.grad is not None) == need_scores
    found, expected = (weight.grad, both[1]) if need_weight else (scores.grad, both[2])
    assert torch.equal(found, expected)


def test_what_nobody_needs_is_not_computed(op_impl):
    case = make_case((12, 10))
    arguments = (case.weight, case.weight, case.scores, case.beta, 1.0, -87.0)
    for needed in ((False, False), (True, False), (False, True)):
        found = chosen(op._BACKWARD)(*arguments, *needed)
        assert tuple(one.numel() > 0 for one in found) == needed


@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(impl, last):
    case = make_case((5, 4, 3, 2), dtypes=DTYPES[0], beta=3.0, scale=1.9)
    weight = channels_last(case.weight) if last else case.weight
    leaves = weight.requires_grad_(), case.scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: call(case, *leaves), leaves)


def test_inference_mode(impl):
    case = make_case((12, 10, 3, 3))
    plain = call(case, case.weight, case.scores)
    with torch.inference_mode():
        inferred = call(case, case.weight.clone(), case.scores.clone())
    assert torch.equal(inferred, plain)


# ---- strides ----


def strided(shape):
    """Numbers of a shape in memory of every kind, by name."""
    reverse = list(reversed(range(len(shape))))
    twice = [2 * n for n in shape]
    return {
        "one number": torch.randn(()).expand(shape),
        "one row": torch.randn(1, *shape[1:]).expand(shape),
        "reversed": torch.randn(shape[::-1]).permute(*reverse),
        "every second": torch.randn(twice)[tuple(slice(0, None, 2) for _ in shape)],
        "channels_last": channels_last(torch.randn(shape)),
        "off by one": torch.randn(math.prod(shape) + 1)[1:].view(shape),
    }


KINDS = list(strided((2, 2, 2, 2)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients_of_any_strides(impl, kind, last):
    case = make_case((12, 11, 3, 3))
    if last:
        case.weight = channels_last(case.weight)
    check(case, strided((12, 11, 3, 3))[kind])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_any_strides(impl, kind, last):
    case = make_case((12, 11, 3, 3))
    case.scores = strided((12, 11, 3, 3))[kind]
    if last:
        case.weight = channels_last(case.weight)
    check(case)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_any_strides(impl, kind):
    case = make_case((12, 11, 3, 3))
    case.weight = strided((12, 11, 3, 3))[kind]
    check(case)


def test_gradients_after_cat_and_sum(impl):
    case = make_case((13, 11))
    weight, scores = case.weight.clone().requires_grad_(), case.scores.clone().requires_grad_()
    torch.cat([call(case, weight, scores), call(case, 2 * weight, scores)], 1).sum().backward()
    _, grad, grad_scores = gradients(case, dense(case.closed()), torch.ones(13, 11))
    torch.testing.assert_close(weight.grad, 3 * grad)
    torch.testing.assert_close(scores.grad, 3 * grad_scores)


# ---- Inf and NaN ----


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("beta", [400.0, math.inf])
@pytest.mark.parametrize("last", [False, True])
def test_closed_weights_do_not_matter(impl, bad, beta, last):
    case = make_case((8, 9, 3, 3), beta=beta)
    case.scores = torch.where(case.scores < 0, case.scores - 0.25, case.scores)
    if last:
        case.weight = channels_last(case.weight)
    upstream = torch.randn(8, 9, 3, 3)
    clean = gradients(case, call, upstream)
    assert 0 < int(case.closed().sum()) < case.weight.numel()
    case.weight[case.closed()] = upstream[case.closed()] = bad
    for mine, other in zip(gradients(case, call, upstream), clean, strict=True):
        assert torch.equal(mine, other)


def test_open_weights_keep_inf_and_nan(impl):
    case = make_case((4, 5), 1.0)
    case.weight[1, 2], case.weight[3, 0] = math.inf, math.nan
    masked = call(case, case.weight, case.scores)
    assert masked[1, 2] == math.inf and masked[3, 0].isnan()
    assert int(masked.isfinite().sum()) == 18


# CPUs make the first of an invalid operation, GPUs the second in float32: all bits but the sign.
@pytest.mark.parametrize("bits", ["usual", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_scores_shows(impl, dtype, bits):
    case = make_case((4, 4), dtypes=(dtype, dtype))
    case.scores[1, 2] = math.nan
    if bits == "all":
        whole = torch.int32 if dtype == torch.float32 else torch.int64
        case.scores.view(whole)[1, 2] = torch.iinfo(whole).max
    for result in gradients(case, call, torch.ones(4, 4)):
        assert result[1, 2].isnan() and int(result.isfinite().sum()) == 15


def test_results_are_written_completely(impl):
    # conftest fills uninitialised memory with NaN; check here that it does.
    assert torch.empty(3).isnan().all()
    case = make_case((40, 31, 3, 3), 0.3)
    for result in gradients(case, call, torch.randn(case.weight.shape)):
        assert bool(result.isfinite().all())


# ---- bits ----


@pytest.mark.parametrize("shape", [(300, 1000), (96, 64, 3, 3)], ids=str)
def test_bits_do_not_depend_on_threads(need_cpp, shape):
    case = make_case(shape)
    upstream = torch.randn(shape)
    assert_threads_do_not_matter(lambda: gradients(case, call, upstream), (1, 2, 3))


def test_same_bits_twice(impl):
    case = make_case((33, 31))
    upstream = torch.randn(33, 31)
    assert all(map(torch.equal, gradients(case, call, upstream), gradients(case, call, upstream)))


on_harness = pytest.mark.parametrize("op_impl", ["harness"], indirect=True)


@on_harness
@pytest.mark.parametrize("beta", [14.0, 200.0, math.inf])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
def test_same_bits_as_the_cpu_kernels(op_impl, need_cpp, dtypes, beta):
    case = make_case((37, 40), dtypes=dtypes, beta=beta)
    numbers = (1.9, closed_below(0, case.scores.dtype))
    arguments = (case.weight, case.scores, case.beta, *numbers)
    cpu = torch.ops.l0kernels
    masked = chosen(op._FORWARD)(*arguments, dtypes[1])
    assert torch.equal(masked, cpu.masked_weight(*arguments, dtypes[1]))
    grad = torch.randn(37, 40).to(dtypes[1])
    found = chosen(op._BACKWARD)(grad, *arguments, True, True)
    expected = cpu.masked_weight_backward(grad, *arguments, True, True)
    assert all(map(torch.equal, found, expected))


@on_harness
def test_launches(op_impl):
    case = make_case((12, 10))
    weight, scores = case.weight.requires_grad_(), case.scores.requires_grad_()
    ops.launches(reset=True)
    masked = call(case, weight, scores)
    assert ops.launches(reset=True)["masked_weight"] == 1
    masked.sum().backward()
    assert ops.launches(reset=True)["masked_weight"] == 1


# ---- bad input ----

BAD = {
    "weight dtype": (
        TypeError,
        "weight: expected a floating dtype",
        {"weight": torch.ones(4, 3).int()},
    ),
    "dtype": (TypeError, "dtype: expected torch.float32", {"dtype": torch.float64}),
    "scores dtype": (
        TypeError,
        "scores: expected torch.float32; got torch.float64",
        {"scores": torch.ones(4, 3).double()},
    ),
    "beta dtype": (
        TypeError,
        "beta: expected torch.float32; got torch.int64",
        {"beta": torch.tensor(1)},
    ),
    "scores shape": (
        ValueError,
        r"scores: expected shape \[4, 3\]; got \[4, 1\]",
        {"scores": torch.ones(4, 1)},
    ),
    "beta shape": (
        ValueError,
        r"beta: expected shape \[\]; got \[1\]",
        {"beta": torch.ones(1)},
    ),
    "device": (
        ValueError,
        "scores: expected a tensor on cpu; got meta",
        {"scores": torch.ones(4, 3, device="meta")},
    ),
    "scale": (ValueError, "scale: expected a positive number; got 0", {"scale": 0.0}),
    "infinite scale": (ValueError, "scale: expected a positive", {"scale": math.inf}),
    "skip_below": (ValueError, "skip_below: expected a number from 0 up to 1", {"skip_below": 1.0}),
    "negative skip_below": (ValueError, "got -0.5", {"skip_below": -0.5}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(impl, name):
    error, message, changes = BAD[name]
    case = replace(make_case((4, 3)), **changes)
    with pytest.raises(error, match=message):
        call(case, case.weight, case.scores)


# ---- registration and compilation ----


def check_raw_operators(forward, backward, requires_grad):
    case = make_case((6, 5, 3, 3))
    weight = channels_last(case.weight).requires_grad_(requires_grad)
    scores = case.scores.requires_grad_(requires_grad)
    arguments = (weight, scores, case.beta, 1.9, -87.0)
    opcheck(forward, (*arguments, torch.float32))
    opcheck(forward, (*arguments, torch.bfloat16))
    grad = torch.randn(6, 5, 3, 3)
    opcheck(backward, (grad, *arguments, True, True))
    opcheck(backward, (grad.bfloat16(), *arguments, True, False))
    opcheck(backward, (grad, *arguments, False, False))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    check_raw_operators(op._FORWARD, op._BACKWARD, requires_grad)


def test_python_stand_in_passes_opcheck():
    # The same checks as above, also where the C++ kernels own the operators.
    namespace = stand_ins("masked_weight")
    raw = namespace.masked_weight.default, namespace.masked_weight_backward.default
    check_raw_operators(*raw, requires_grad=False)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_one_graph_for_all_betas_and_sizes(name):
    def loss(weight, scores, beta):
        return (masked_weight(weight, scores, beta, 1.9) ** 2).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with l0.use_impl(name):
        for shape, beta in (((12, 10), 1.0), ((5, 7), 30.0), ((3, 4), math.inf)):
            case = make_case(shape, beta=beta)
            arguments = case.weight.requires_grad_(), case.scores.requires_grad_(), case.beta
            value = compiled(*arguments)
            plain = loss(*arguments)
            torch.testing.assert_close(value, plain)
            grads = torch.autograd.grad(value, arguments[:2])
            for mine, other in zip(grads, torch.autograd.grad(plain, arguments[:2]), strict=True):
                torch.testing.assert_close(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
