# SPDX-License-Identifier: Apache-2.0
"""Packed weights and their gradients, each implementation against the masked dense weight."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from error_table import within_budget
from harness import ops
from ops.stand_ins import stand_ins
from ops.threads import assert_threads_do_not_matter
from torch.library import opcheck

import l0kernels as l0
from l0kernels._registry import chosen
from l0kernels.functional import GateLayout, open_lists, pack_weight, pack_weights
from l0kernels.ops.pack_weight import op
from l0kernels.testing import max_error

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
EXPANDED = 16


@dataclass
class Case:
    """Arguments of pack_weight."""

    weight: torch.Tensor
    z: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_map: torch.Tensor | None = None
    cols: torch.Tensor | None = None
    col_map: torch.Tensor | None = None
    dtype: torch.dtype | None = None

    def exact(self):
        """The same numbers in float64."""
        z = None if self.z is None else self.z.double()
        indices = (self.rows, self.row_map, self.cols, self.col_map)
        return Case(self.weight.detach().double(), z, *indices)


def gates_of(features, first, gates):
    """The map of features that have one gate each, numbered from `first`."""
    return torch.stack([torch.arange(first, first + features), torch.full((features,), gates)])


def make_case(shape, share=0.5, dtypes=DTYPES[1], rows=True, cols=True):
    """A weight with one gate per output and per input feature; the open ones are packed.

    At least two of each are packed, so that closed ones are among them if need be.
    """
    out = shape[0]
    width = shape[1] if len(shape) > 1 else 0
    gates = out + width
    is_open = torch.rand(gates) < share
    z = torch.where(is_open, torch.rand(gates) + 0.25, 0.0)
    z = torch.cat([z, torch.ones(1)])
    case = Case(
        torch.randn(shape).to(dtypes[0]),
        z.double() if dtypes[0] == torch.float64 else z,
        dtype=dtypes[1],
    )
    if rows:
        case.rows, case.row_map = kept(is_open[:out]), gates_of(out, 0, gates)
    if cols and width:
        case.cols, case.col_map = kept(is_open[out:]), gates_of(width, out, gates)
    return case


def kept(is_open):
    closed = (~is_open).nonzero().flatten()
    missing = max(0, min(2, len(is_open)) - int(is_open.sum()))
    return torch.cat([is_open.nonzero().flatten(), closed[:missing]]).sort().values


def scale_of(z, feature_map):
    fixed = torch.cat([z[:-1], torch.ones_like(z[-1:])])
    return fixed[feature_map[0]] * fixed[feature_map[1]]


def masked_dense(case):
    """The masked weight with closed rows and columns zeroed, then cut to the packed ones."""
    weight = case.weight
    if case.col_map is not None:
        scale = scale_of(case.z, case.col_map).reshape(1, -1, *[1] * (weight.dim() - 2))
        weight = torch.where(scale == 0, 0.0, weight) * scale
    if case.row_map is not None:
        is_open = scale_of(case.z, case.row_map) != 0
        weight = torch.where(is_open.reshape(-1, *[1] * (weight.dim() - 1)), weight, 0.0)
    rows = slice(None) if case.rows is None else case.rows
    weight = weight[rows]
    return weight if case.cols is None else weight[:, case.cols]


def call(case, weight, z):
    return pack_weight(weight, z, case.rows, case.row_map, case.cols, case.col_map, case.dtype)


def gradients(case, function, upstream):
    """The packed weight and the gradients of weight and z."""
    weight = case.weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = None if case.z is None else case.z.detach().clone().requires_grad_()
    packed = function(case, weight, z)
    wanted = [weight] if z is None else [weight, z]
    grads = torch.autograd.grad(packed, wanted, upstream.to(packed.dtype), allow_unused=True)
    return (packed.detach(), *grads)


def dense_call(case, weight, z):
    indices = (case.rows, case.row_map, case.cols, case.col_map)
    packed = masked_dense(Case(weight, z, *indices))
    return packed.to(case.dtype or weight.dtype)


def check(impl, case, upstream=None):
    """Compares value and gradients with the masked dense weight, exact and in the same dtype."""
    packed_shape = masked_dense(case.exact()).shape
    upstream = torch.randn(packed_shape) if upstream is None else upstream
    upstream = upstream.to(case.dtype or case.weight.dtype)
    actual = gradients(case, call, upstream)
    exact = gradients(case.exact(), dense_call, upstream)
    plain = gradients(case, dense_call, upstream)
    assert actual[1] is not None
    assert impl == "reference" or actual[1].stride() == case.weight.stride()
    assert actual[1].dtype == case.weight.dtype
    passes = ("forward", "wgrad", "gates")[: len(actual)]
    for what, mine, true, other in zip(passes, actual, exact, plain, strict=True):
        if true is None:  # nothing is scaled by z
            assert mine is None or bool((mine == 0).all())
            continue
        within_budget("pack_weight", what, mine, true, other)
        assert bool((mine[true == 0] == 0).all())
    return actual


# ---- values and gradients ----

SHAPES = [
    (7,),
    (1, 1),
    (5, 3),
    (31, 17),
    (20, 1, 5, 5),
    (13, 11, 3),
    (11, 13, 3, 3),
    (8, 16, 1, 1),
    (5, 7, 3, 2, 2),
]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, shape, share):
    check(impl, make_case(shape, share))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes(impl, dtypes, channels_last):
    case = make_case((19, 23, 3, 3), dtypes=dtypes)
    if channels_last:
        case.weight = case.weight.to(memory_format=torch.channels_last)
    packed = check(impl, case)[0]
    assert packed.dtype == dtypes[1]
    assert packed.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert packed.is_contiguous() != channels_last


ARGUMENTS = ("z", "rows", "row_map", "cols", "col_map")


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=5)), ids=str)
def test_every_combination_of_arguments(impl, present):
    case = make_case((12, 10, 3, 3), 0.6)
    case.weight = case.weight.to(memory_format=torch.channels_last)
    for name, keep in zip(ARGUMENTS, present, strict=True):
        if not keep:
            setattr(case, name, None)
    if case.z is None and (case.row_map is not None or case.col_map is not None):
        with pytest.raises(ValueError, match="expected z with them"):
            call(case, case.weight, None)
        return
    check(impl, case)


@pytest.mark.parametrize("shape", [(300, 200), (96, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_more_than_one_task(impl, shape, share):
    case = make_case(shape, share)
    if len(shape) == 4:
        case.weight = case.weight.to(memory_format=torch.channels_last)
    check(impl, case)


def test_one_open_row_and_column(impl):
    case = make_case((9, 9, 3, 3), 0.0)
    case.z[4] = 0.5
    case.z[9 + 6] = 0.25
    case.rows, case.cols = torch.tensor([0, 4]), torch.tensor([0, 6])
    packed, grad, grad_z = check(impl, case)
    assert bool((packed[0] == 0).all()) and bool((packed[:, 0] == 0).all())
    assert torch.equal(packed[1, 1], case.weight[4, 6] * 0.25)
    assert int((grad != 0).sum()) == 9
    assert grad_z.nonzero().flatten().tolist() == [9 + 6]


def test_index_order_is_the_order_of_the_result(impl):
    case = make_case((8, 9), 1.0)
    case.rows, case.cols = torch.tensor([5, 0, 3]), torch.tensor([8, 1, 4, 0])
    check(impl, case)


def test_all_rows_in_another_order(impl):
    case = make_case((6, 5), 1.0)
    case.rows, case.cols = torch.arange(5, -1, -1), torch.tensor([1, 0, 2, 3, 4])
    check(impl, case)


@pytest.mark.parametrize("empty", ["rows", "cols", "both"])
def test_nothing_is_packed(impl, empty):
    case = make_case((6, 5, 3, 3), 1.0)
    if empty != "cols":
        case.rows = torch.zeros(0, dtype=torch.int64)
    if empty != "rows":
        case.cols = torch.zeros(0, dtype=torch.int64)
    _, grad, grad_z = check(impl, case)
    assert bool((grad == 0).all()) and bool((grad_z == 0).all())


def test_expanded_gates_add_up(impl):
    producers, out = 5, 12
    width = producers * EXPANDED
    features = torch.arange(producers).repeat_interleave(EXPANDED)
    z = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.25, 1.0])
    col_map = torch.stack([features, torch.full((width,), producers)])
    cols = (z[features] != 0).nonzero().flatten()
    grad_z = check(impl, Case(torch.randn(out, width), z, None, None, cols, col_map))[2]
    assert grad_z.nonzero().flatten().tolist() == [0, 2, 4]


def test_products_of_two_gates(impl):
    producers, out = 4, 6
    width = producers * 3
    gates = producers + width
    col_map = torch.stack(
        [torch.arange(producers).repeat_interleave(3), torch.arange(producers, gates)]
    )
    z = torch.cat([torch.rand(gates) + 0.1, torch.ones(1)])
    z[[1, 5, 9, 10, 11]] = 0  # a producer's gate, single extra ones, all extra ones of a producer
    cols = torch.tensor([0, 2, 3, 4, 5, 6, 9, 10])
    check(impl, Case(torch.randn(out, width), z, None, None, cols, col_map))


def test_one_gate_twice_on_a_feature(impl):
    z = torch.tensor([0.5, 0.0, 1.0])
    check(impl, Case(torch.randn(4, 2), z, None, None, None, torch.tensor([[0, 1], [0, 1]])))


def test_negative_gates(impl):
    z = torch.tensor([-0.5, 0.0, -2.0, 1.0])
    check(impl, Case(torch.randn(4, 3), z, None, None, None, gates_of(3, 0, 3)))


def test_the_gate_that_is_always_open_gets_no_gradient(impl):
    z = torch.tensor([0.5, 1.0])
    case = Case(torch.randn(4, 3), z, None, None, None, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    grad_z = check(impl, case)[2]
    assert grad_z[1] == 0 and grad_z[0] != 0


@pytest.mark.parametrize("need_weight, need_z", [(True, False), (False, True)])
def test_only_the_gradient_asked_for(impl, need_weight, need_z):
    case = make_case((12, 10, 3, 3), 0.6)
    upstream = torch.randn(masked_dense(case).shape)
    both = gradients(case, call, upstream)
    weight = case.weight.clone().requires_grad_(need_weight)
    z = case.z.clone().requires_grad_(need_z)
    call(case, weight, z).backward(upstream)
    assert (weight.grad is not None) == need_weight
    assert (z.grad is not None) == need_z
    assert torch.equal(weight.grad, both[1]) if need_weight else torch.equal(z.grad, both[2])


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(impl, channels_last):
    case = make_case((5, 4, 3, 2), 0.7, DTYPES[0])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = case.weight.to(memory_format=layout).requires_grad_()
    # Closed gates are left out: opening them a little would change what is packed.
    width = case.weight.shape[1]
    gates = case.z.shape[0] - 1
    case.cols = (case.z[gates - width : -1] != 0).nonzero().flatten()
    is_open = case.z[:-1] != 0
    open_z = case.z[:-1][is_open].clone().requires_grad_()

    def packed(weight, open_z):
        z = torch.ones(gates + 1, dtype=torch.float64)
        z = z.masked_scatter(torch.cat([is_open, torch.tensor([False])]), open_z)
        return call(case, weight, torch.where(case.z == 0, 0.0, z))

    assert torch.autograd.gradcheck(packed, (weight, open_z))


def test_inference_mode(impl):
    case = make_case((12, 10, 3, 3), 0.6)
    plain = call(case, case.weight, case.z)
    with torch.inference_mode():
        inferred = call(case, case.weight.clone(), case.z.clone())
    assert torch.equal(inferred, plain)


# ---- strides ----


def upstreams(shape):
    yield "one number", torch.randn(()).expand(shape)
    yield "one row", torch.randn(1, *shape[1:]).expand(shape)
    yield "reversed", torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    yield (
        "every second",
        torch.randn([2 * n for n in shape])[tuple(slice(0, None, 2) for _ in shape)],
    )
    if len(shape) == 4:
        yield "channels_last", torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "name", ["one number", "one row", "reversed", "every second", "channels_last"]
)
def test_upstream_gradients_of_any_strides(impl, name, channels_last):
    case = make_case((13, 11, 3, 3), 0.6)
    if channels_last:
        case.weight = case.weight.to(memory_format=torch.channels_last)
    check(impl, case, dict(upstreams(masked_dense(case).shape))[name])


def test_gradients_after_cat_and_sum(impl):
    case = make_case((13, 11), 0.6)
    weight, z = case.weight.clone().requires_grad_(), case.z.clone().requires_grad_()
    torch.cat([call(case, weight, z), call(case, 2 * weight, z)], 1).sum().backward()
    ones = torch.ones(masked_dense(case).shape)
    _, grad, grad_z = gradients(case, dense_call, ones)
    torch.testing.assert_close(weight.grad, 3 * grad)
    torch.testing.assert_close(z.grad, 3 * grad_z)


def weights(name):
    if name == "transposed":
        return torch.randn(11, 13).t()
    if name == "every second":
        return torch.randn(26, 22, 3, 3)[::2, ::2]
    if name == "expanded":
        return torch.randn(13, 1, 3, 3).expand(13, 11, 3, 3)
    if name == "permuted":
        return torch.randn(3, 11, 3, 13).permute(3, 1, 0, 2)
    return torch.randn(13, 11, 1, 1).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "name", ["transposed", "every second", "expanded", "permuted", "one by one"]
)
def test_weights_of_any_strides(impl, name):
    case = make_case((13, 11, 3, 3), 0.6)
    weight = weights(name).requires_grad_()
    z = case.z.clone().requires_grad_()
    packed = call(case, weight, z)
    dense = dense_call(case, weight, z)
    torch.testing.assert_close(packed, dense)
    upstream = torch.randn(packed.shape)
    grads = torch.autograd.grad(packed, (weight, z), upstream)
    for mine, other in zip(grads, torch.autograd.grad(dense, (weight, z), upstream), strict=True):
        torch.testing.assert_close(mine, other)
    assert impl == "reference" or grads[0].stride() == torch.empty_like(weight).stride()


def test_strided_gates_and_indices(impl):
    case = make_case((13, 11), 0.6)
    plain = gradients(case, call, torch.ones(masked_dense(case).shape))
    for name in ("z", "rows", "cols"):
        setattr(case, name, getattr(case, name).repeat_interleave(2)[::2])
    for name in ("row_map", "col_map"):
        setattr(case, name, getattr(case, name).t().contiguous().t())
    strided = gradients(case, call, torch.ones(masked_dense(case).shape))
    assert all(map(torch.equal, plain, strided))


# ---- matrices stored [I, O] ----


def transposed(case):
    case.weight = case.weight.t().contiguous().t()
    return case


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 2), (31, 17), (17, 31), (70, 1300), (1300, 70)], ids=str)
def test_transposed_shapes(impl, shape, share):
    check(impl, transposed(make_case(shape, share)))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
def test_transposed_dtypes(impl, dtypes):
    packed, grad, _ = check(impl, transposed(make_case((19, 23), dtypes=dtypes)))
    assert packed.dtype == dtypes[1]
    if impl in ("cpp", "python"):
        assert packed.t().is_contiguous() and grad.t().is_contiguous()


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=4)), ids=str)
def test_transposed_with_every_combination_of_arguments(impl, present):
    case = transposed(make_case((12, 10), 0.6))
    for name, keep in zip(ARGUMENTS[1:], present, strict=True):
        if not keep:
            setattr(case, name, None)
    check(impl, case)


@pytest.mark.parametrize("name", ["one number", "one row", "reversed", "every second"])
def test_transposed_with_upstream_gradients_of_any_strides(impl, name):
    case = transposed(make_case((13, 11), 0.6))
    check(impl, case, dict(upstreams(masked_dense(case).shape))[name])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("selects", [False, True])
def test_transposed_closed_weights_do_not_matter(impl, bad, selects):
    case = transposed(make_case((8, 9), 1.0))
    case.z[[1, 8 + 2]] = 0
    if not selects:
        case.rows = case.cols = None
    upstream = torch.randn(masked_dense(case).shape)
    clean = gradients(case, call, upstream)
    case.weight[1] = case.weight[:, 2] = bad
    upstream[1] = upstream[:, 2] = bad
    for mine, other in zip(gradients(case, call, upstream), clean, strict=True):
        assert torch.equal(mine, other)


def test_transposed_fake_has_the_strides_of_the_result():
    case = transposed(make_case((13, 11), 0.6))
    arguments = (case.weight, case.z, case.rows, case.row_map, case.cols, case.col_map)
    ops_to_check = torch.ops.l0kernels.pack_weight.default
    opcheck(ops_to_check, (*arguments, torch.float32), test_utils="test_faketensor")


# ---- Inf and NaN ----


@pytest.mark.parametrize("shape", [(9, 1, 3, 3), (9, 6, 1, 1)])
@pytest.mark.parametrize("strides", ["channels_last", "contiguous"])
def test_strides_decide_where_memory_leaves_the_layout_open(impl, shape, strides):
    """Convolutions choose their layout by them: one channel or one pixel is dense in both."""
    layout = torch.channels_last if strides == "channels_last" else torch.contiguous_format
    weight = torch.empty(shape, memory_format=layout).normal_().requires_grad_()
    rows = torch.tensor([1, 4, 5])
    packed = pack_weight(weight, rows=rows)
    assert packed.stride() == torch.empty_like(weight[:3]).stride()
    assert torch.equal(packed, weight[rows])
    packed.sum().backward()
    assert weight.grad is not None
    if impl != "reference":  # whose gradient autograd lays out
        assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dummies", [False, True])
def test_closed_weights_do_not_matter(impl, bad, channels_last, dummies):
    case = make_case((8, 9, 3, 3), 1.0)
    case.z[[1, 8 + 2]] = 0
    if not dummies:
        case.rows = case.rows[case.rows != 1]
        case.cols = case.cols[case.cols != 2]
    if channels_last:
        case.weight = case.weight.to(memory_format=torch.channels_last)
    upstream = torch.randn(masked_dense(case).shape)
    if dummies:
        upstream[1] = upstream[:, 2] = bad
    clean = gradients(case, call, upstream.nan_to_num(0, 0, 0))
    case.weight[1] = case.weight[:, 2] = bad
    poisoned = gradients(case, call, upstream)
    for mine, other in zip(poisoned, clean, strict=True):
        assert torch.equal(mine, other)
    assert bool((poisoned[1][1] == 0).all()) and bool((poisoned[1][:, 2] == 0).all())
    assert poisoned[2][8 + 2] == 0


@pytest.mark.parametrize("cols", [False, True])
def test_open_weights_keep_inf_and_nan(impl, cols):
    case = make_case((4, 5), 1.0)
    if not cols:
        case.cols = None
    case.weight[1, 2], case.weight[3, 0] = math.inf, math.nan
    packed = call(case, case.weight, case.z)
    assert packed[1, 2] == math.inf and packed[3, 0].isnan()
    assert int(packed.isfinite().sum()) == 18


def test_results_are_written_completely(impl):
    # conftest fills uninitialised memory with NaN; check here that it does.
    assert torch.empty(3).isnan().all()
    case = make_case((40, 30, 3, 3), 0.3)
    upstream = torch.randn(masked_dense(case).shape)
    for result in gradients(case, call, upstream):
        assert bool(result.isfinite().all())


# ---- threads ----


@pytest.mark.parametrize("shape", [(300, 200), (96, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("cols", [False, True])
def test_bits_do_not_depend_on_threads(need_cpp, shape, cols):
    case = make_case(shape, 0.6)
    if not cols:
        case.cols = None
    upstream = torch.randn(masked_dense(case).shape)
    assert_threads_do_not_matter(lambda: gradients(case, call, upstream), (1, 2, 1))


def test_gate_gradients_of_many_small_numbers(impl):
    case = make_case((2048, 4), 1.0, rows=False)
    case.weight = torch.rand(2048, 4)
    exact = gradients(case.exact(), dense_call, torch.ones(2048, 4))[2]
    grad_z = gradients(case, call, torch.ones(2048, 4))[2]
    assert max_error(grad_z / exact.clamp(min=1), exact / exact.clamp(min=1)) < 3e-7


# ---- lists of weights ----


@dataclass
class ListCase:
    """Arguments of pack_weights."""

    weights: list[torch.Tensor]
    z: torch.Tensor
    index: torch.Tensor
    maps: torch.Tensor
    spans: list[tuple[int, int, int, int]]
    dtype: torch.dtype | None = None

    def single(self, i):
        """The arguments of pack_weight for one weight."""
        case = Case(self.weights[i], self.z, dtype=self.dtype)
        row_start, row_count, col_start, col_count = self.spans[i]
        if row_start >= 0:
            case.rows = self.index[row_start : row_start + row_count]
            case.row_map = self.maps[:, row_start : row_start + case.weight.shape[0]]
        if col_start >= 0:
            case.cols = self.index[col_start : col_start + col_count]
            case.col_map = self.maps[:, col_start : col_start + case.weight.shape[1]]
        return case

    def singles(self):
        return [self.single(i) for i in range(len(self.weights))]

    def upstreams(self):
        shapes = [masked_dense(case.exact()).shape for case in self.singles()]
        return [torch.randn(shape).to(self.dtype or self.weights[0].dtype) for shape in shapes]

    @property
    def flat(self):
        return [number for span in self.spans for number in span]

    def call(self, weights, z):
        return pack_weights(weights, z, self.index, self.maps, self.spans, self.dtype)


def make_list(share=0.5, dtypes=DTYPES[1], groups=(12, 9, 6)):
    """Weights of all kinds that share the gates of three groups."""
    first, second, third = groups
    gates = first + second + third
    is_open = torch.rand(gates) < share
    z = torch.cat([torch.where(is_open, torch.rand(gates) + 0.25, 0.0), torch.ones(1)])
    made = [torch.arange(first), torch.arange(first, first + second)]
    ports = [
        gates_map(made[0], gates),
        gates_map(made[1], gates),
        gates_map(made[0].repeat_interleave(4), gates),  # behind a flatten
        gates_map(torch.cat([made[1], torch.full((5,), gates)]), gates),  # behind a concat
        torch.stack([made[1], torch.arange(second) % third + first + second]),  # two gates
    ]
    offsets = torch.tensor([0, *(port.shape[1] for port in ports)]).cumsum(0)
    layout = GateLayout(torch.tensor([0, *groups]).cumsum(0), torch.cat(ports, 1), offsets)
    lists = open_lists(z, layout)
    kinds = [
        (torch.randn(first, 3, 3, 3), 0, None),
        (to_channels_last(torch.randn(second, first, 3, 3)), 1, 0),
        (to_channels_last(torch.randn(first, first, 1, 1)), 0, 0),
        (torch.randn(10, 4 * first), None, 2),
        (torch.randn(second + 5, 7).t(), None, 3),
        (torch.randn(first), 0, None),
        (torch.randn(second), 1, None),
        (torch.randn(5, second, 3, 2, 2), None, 4),
        (torch.randn(4, 3), None, None),
        (torch.randn(first, second, 3), 0, 1),
    ]
    return ListCase(
        [weight.to(dtypes[0]) for weight, _, _ in kinds],
        z.to(torch.float64 if dtypes[0] == torch.float64 else torch.float32),
        lists.index,
        layout.maps,
        [(*span(lists, offsets, row), *span(lists, offsets, col)) for _, row, col in kinds],
        dtypes[1],
    )


def gates_map(first, gates):
    return torch.stack([first, torch.full_like(first, gates)])


def to_channels_last(weight):
    return weight.to(memory_format=torch.channels_last)


def span(lists, offsets, port):
    return (-1, 0) if port is None else (int(offsets[port]), int(lists.counts[port]))


def as_leaves(case, need_weights=None):
    need_weights = need_weights or [True] * len(case.weights)
    weights = [
        weight.detach().clone(memory_format=torch.preserve_format).requires_grad_(needed)
        for weight, needed in zip(case.weights, need_weights, strict=True)
    ]
    return weights, case.z.clone().requires_grad_()


def list_gradients(case, upstreams):
    """The packed weights, their gradients, and the gradient of z."""
    weights, z = as_leaves(case)
    packed = case.call(weights, z)
    *grads, grad_z = torch.autograd.grad(packed, [*weights, z], upstreams)
    return [one.detach() for one in packed], grads, grad_z


def check_list(impl, case, upstreams=None):
    """Compares with one weight at a time, and the gradient of z with the exact one."""
    upstreams = case.upstreams() if upstreams is None else upstreams
    packed, grads, grad_z = list_gradients(case, upstreams)
    exact = torch.zeros_like(case.z, dtype=torch.float64)
    plain = torch.zeros_like(case.z)
    for i, single in enumerate(case.singles()):
        one = gradients(single, call, upstreams[i])
        assert torch.equal(packed[i], one[0]) and packed[i].stride() == one[0].stride()
        assert torch.equal(grads[i], one[1])
        assert impl == "reference" or grads[i].stride() == case.weights[i].stride()
        if single.col_map is not None:
            exact += gradients(single.exact(), dense_call, upstreams[i])[2]
            plain += gradients(single, dense_call, upstreams[i])[2]
    within_budget("pack_weight", "gates", grad_z, exact, plain)
    assert bool((grad_z[exact == 0] == 0).all())
    return packed, grads, grad_z


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_lists_of_weights(impl, share):
    check_list(impl, make_list(share))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
def test_lists_of_all_dtypes(impl, dtypes):
    packed, _, grad_z = check_list(impl, make_list(dtypes=dtypes))
    assert {one.dtype for one in packed} == {dtypes[1]}
    assert grad_z.dtype == (torch.float64 if dtypes[0] == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_of_wide_weights(impl, dtype):
    # More gates, places and lines than a block of a kernel has room for.
    case = make_list(0.6, (dtype, dtype), (300, 9, 5))
    case.weights[3] = torch.randn(2, 1200).to(dtype)
    case.weights.append(torch.randn(300, 300).to(dtype))
    case.spans.append((*case.spans[2][:2], *case.spans[1][2:]))
    check_list(impl, case)


def test_lists_of_widths_that_fill_16_bytes(impl):
    for dtypes in (DTYPES[1], DTYPES[2], DTYPES[4]):
        case = make_list(1.0, dtypes, (16, 8, 8))
        check_list(impl, case)
        for first in (case.spans[1][0], case.spans[1][2]):  # half of each is packed
            port = case.index[first : first + 8]
            port.copy_(port[torch.tensor([0, 1, 2, 3, 5, 6, 7, 4])])
        check_list(impl, case)


def test_more_weights_than_parameters_have_room_for(impl):
    case = make_list()
    case.weights = [torch.randn(9, 12) for _ in range(200)]
    case.spans = [case.spans[1]] * 200
    check_list(impl, case)


def test_empty_widths_and_weights(impl):
    case = make_list()
    case.spans = [(row, 0, col, 0) for row, _, col, _ in case.spans]
    case.weights.append(torch.randn(0, 12))
    case.spans.append((-1, 0, *case.spans[1][2:]))
    packed, grads, _ = check_list(impl, case)
    for one, grad, (row, _, col, _) in zip(packed, grads, case.spans, strict=True):
        assert (one.numel() == 0) == (row >= 0 or col >= 0 or grad.numel() == 0)
        assert one.numel() > 0 or bool((grad == 0).all())
    assert pack_weights([], case.z, case.index, case.maps, []) == []


def test_gates_shared_by_layers_add_up(impl):
    case = make_list(1.0)
    case.weights, case.spans = [case.weights[1]] * 3, [case.spans[1]] * 3
    upstream = torch.randn(masked_dense(case.single(0)).shape)
    one = gradients(case.single(0), call, upstream)[2]
    _, _, grad_z = list_gradients(case, [upstream, 2 * upstream, -3 * upstream])
    assert max_error(grad_z, torch.zeros_like(one).double()) <= 1e-5 * float(one.abs().max())
    _, _, grad_z = list_gradients(case, [upstream, upstream, 2 * upstream])
    torch.testing.assert_close(grad_z, 4 * one)


def test_outputs_without_upstream_gradients(impl):
    case = make_list()
    weights, z = as_leaves(case)
    packed = case.call(weights, z)
    used = [1, 3, 5]
    upstreams = [torch.randn(packed[i].shape) for i in used]
    *grads, grad_z = torch.autograd.grad(
        [packed[i] for i in used], [*weights, z], upstreams, allow_unused=True
    )
    part = ListCase(
        [case.weights[i] for i in used],
        case.z,
        case.index,
        case.maps,
        [case.spans[i] for i in used],
        case.dtype,
    )
    _, expected, expected_z = list_gradients(part, upstreams)
    for i, grad in enumerate(grads):
        if i in used:
            assert torch.equal(grad, expected[used.index(i)])
        else:
            assert grad is None or bool((grad == 0).all())
    assert torch.equal(grad_z, expected_z)


@pytest.mark.parametrize("need_z", [False, True])
def test_weights_that_need_no_gradient(impl, need_z):
    case = make_list()
    _, expected, expected_z = list_gradients(case, [torch.ones_like(u) for u in case.upstreams()])
    needed = [i % 3 == 0 for i in range(len(case.weights))]
    weights, z = as_leaves(case, needed)
    z.requires_grad_(need_z)
    sum(one.float().sum() for one in case.call(weights, z)).backward()
    for weight, wanted, grad in zip(weights, needed, expected, strict=True):
        assert torch.equal(weight.grad, grad) if wanted else weight.grad is None
    assert torch.equal(z.grad, expected_z) if need_z else z.grad is None


def test_gates_of_weights_without_columns_get_zeros(impl):
    case = make_list()
    case.weights, case.spans = case.weights[5:7], case.spans[5:7]
    weights, z = as_leaves(case, [False, False])
    packed = case.call(weights, z)
    if impl == "reference":
        assert not packed[0].requires_grad
        return
    sum(one.sum() for one in packed).backward()
    assert torch.equal(z.grad, torch.zeros_like(z))
    assert weights[0].grad is None


def test_what_nobody_needs_is_not_computed(op_impl):
    case = make_list()
    grads = case.upstreams()
    arguments = (case.z, case.index, case.maps, case.flat)
    needed = [i == 1 for i in range(len(grads))]
    for need_z in (False, True):
        *weights, grad_z = chosen(op._LIST_BACKWARD)(
            grads, case.weights, *arguments, needed, need_z
        )
        assert [one.numel() > 0 for one in weights] == needed
        assert grad_z.shape == ((case.z.shape[0],) if need_z else (0,))


def test_list_upstream_gradients_of_any_strides(impl):
    case = make_list()
    shapes = [u.shape for u in case.upstreams()]
    for number in range(5):
        kinds = [list(upstreams(shape)) for shape in shapes]
        check_list(impl, case, [kind[number % len(kind)][1] for kind in kinds])


def test_closed_weights_of_lists_do_not_matter(impl):
    case = make_list(0.4)
    upstreams = case.upstreams()
    clean = list_gradients(case, upstreams)
    for single in case.singles():
        if single.row_map is not None:
            single.weight[scale_of(case.z, single.row_map) == 0] = math.nan
        if single.col_map is not None:
            single.weight[:, scale_of(case.z, single.col_map) == 0] = math.inf
    poisoned = list_gradients(case, upstreams)
    for mine, other in zip(poisoned[0] + poisoned[1], clean[0] + clean[1], strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(poisoned[2], clean[2])


@pytest.mark.parametrize("gate", [math.inf, math.nan, -2.0])
def test_closed_rows_are_zero_whatever_the_gates_of_columns(impl, gate):
    case = make_case((8, 8), 1.0)
    case.z[[1, 8 + 2, 8 + 3]] = torch.tensor([0.0, gate, 0.0])
    packed, grad, _ = gradients(case, call, torch.randn(8, 8))
    assert bool((packed[1] == 0).all()) and bool((grad[1] == 0).all())
    assert bool((packed[:, 3] == 0).all()) and bool((grad[:, 3] == 0).all())
    assert packed.isfinite().sum() >= 57


def test_lists_of_strided_arguments(impl):
    case = make_list()
    upstreams = case.upstreams()
    plain = list_gradients(case, upstreams)
    case.z = case.z.repeat_interleave(2)[::2]
    case.index = case.index.repeat_interleave(2)[::2]
    case.maps = case.maps.t().contiguous().t()
    strided = list_gradients(case, upstreams)
    for mine, other in zip(strided[0] + strided[1], plain[0] + plain[1], strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(strided[2], plain[2])


def test_lists_have_the_same_bits_twice(impl):
    case = make_list()
    upstreams = case.upstreams()
    first, second = (list_gradients(case, upstreams) for _ in range(2))
    assert torch.equal(first[2], second[2])
    assert all(map(torch.equal, first[0] + first[1], second[0] + second[1]))


# ---- CUDA kernels ----

on_harness = pytest.mark.parametrize("op_impl", ["harness"], indirect=True)


@on_harness
def test_launches_for_a_whole_model(op_impl):
    # As many layers as a 28-10 wide residual network has, and more than small launches take.
    case = make_list()
    case.weights = [case.weights[1].clone() for _ in range(28)] + [
        torch.randn(9) for _ in range(56)
    ]
    case.spans = [case.spans[1]] * 28 + [case.spans[6]] * 56
    weights, z = as_leaves(case)
    ops.launches(reset=True)
    packed = case.call(weights, z)
    assert ops.launches(reset=True)["pack_weight"] == 1
    torch.autograd.backward(packed, case.upstreams())
    assert ops.launches(reset=True)["pack_weight"] == 2


@on_harness
def test_launches_for_one_weight(op_impl):
    case = make_case((12, 10), 0.6)
    upstream = torch.randn(masked_dense(case).shape)
    weight = case.weight.requires_grad_()
    for need_z, backward in ((False, 1), (True, 2)):
        ops.launches(reset=True)
        packed = call(case, weight, case.z.requires_grad_(need_z))
        assert ops.launches(reset=True)["pack_weight"] == 1
        packed.backward(upstream)
        assert ops.launches(reset=True)["pack_weight"] == backward


@on_harness
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
def test_same_bits_as_the_cpu_kernels(op_impl, need_cpp, dtypes):
    case = make_list(dtypes=dtypes)
    upstreams = case.upstreams()
    arguments = (case.weights, case.z, case.index, case.maps, case.flat)
    cpu = torch.ops.l0kernels
    packed = chosen(op._LIST_FORWARD)(*arguments, dtypes[1])
    assert all(map(torch.equal, packed, cpu.pack_weights(*arguments, dtypes[1])))
    needed = [True] * len(case.weights)
    *grads, grad_z = chosen(op._LIST_BACKWARD)(upstreams, *arguments, needed, True)
    *expected, expected_z = cpu.pack_weights_backward(upstreams, *arguments, needed, True)
    assert all(map(torch.equal, grads, expected))
    torch.testing.assert_close(grad_z, expected_z)


@on_harness
def test_bits_do_not_depend_on_the_order_of_threads(op_impl):
    # In float64: sums that are rounded to float32 would hide the order of their terms.
    case = make_list(0.6, DTYPES[0], (40, 30, 7))
    upstreams = case.upstreams()
    results = []
    for seed in (-1, 1, 2):
        ops.set_schedule(seed)
        packed, grads, grad_z = list_gradients(case, upstreams)
        results.append([*packed, *grads, grad_z])
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@on_harness
@pytest.mark.parametrize("wrong", [-1, 12, 1 << 40, -(1 << 62)])
def test_kernels_take_indices_out_of_bounds_for_closed(op_impl, wrong):
    # Nobody waits for a GPU, so its kernels cannot raise.
    case = make_case((12, 10, 3, 3), 1.0)
    upstream = torch.randn(11, 9, 3, 3)
    case.rows, case.cols = case.rows[:-1], case.cols[:-1]
    clean = gradients(case, call, upstream)
    case.rows, case.cols = (torch.cat([x, torch.tensor([wrong])]) for x in (case.rows, case.cols))
    wider = torch.nn.functional.pad(upstream, (0, 0, 0, 0, 0, 1, 0, 1), value=math.nan)
    packed, grad, grad_z = gradients(case, call, wider)
    assert torch.equal(packed[:-1, :-1], clean[0])
    assert bool((packed[-1] == 0).all()) and bool((packed[:, -1] == 0).all())
    assert torch.equal(grad, clean[1]) and torch.equal(grad_z, clean[2])


@on_harness
@pytest.mark.parametrize("wrong", [-1, 23, 1 << 40])
def test_kernels_take_gates_out_of_bounds_for_closed(op_impl, wrong):
    case = make_case((12, 10), 1.0)
    upstream = torch.randn(12, 10)
    clean = gradients(case, call, upstream)
    case.row_map[1, 3] = case.col_map[0, 4] = case.col_map[1, 5] = wrong
    wrongs = gradients(case, call, upstream)
    for mine, other in zip(wrongs[:2], clean[:2], strict=True):
        assert bool((mine[3] == 0).all()) and bool((mine[:, 4:6] == 0).all())
        right = [i for i in range(12) if i != 3]
        kept = [0, 1, 2, 3, 6, 7, 8, 9]
        assert torch.equal(mine[right][:, kept], other[right][:, kept])
    assert wrongs[2].nonzero().flatten().tolist() == [12 + i for i in kept]


# ---- errors ----

BAD = {
    "weight dtype": (TypeError, "weight: expected a floating", {"weight": torch.ones(4, 3).int()}),
    "dtype": (TypeError, "dtype: expected torch.float32", {"dtype": torch.float64}),
    "weight dims": (ValueError, "1 to 5 dimensions", {"weight": torch.tensor(1.0)}),
    "cols of a vector": (ValueError, "1-D weight", {"weight": torch.ones(4)}),
    "z dtype": (TypeError, "z: expected torch.float32", {"z": torch.ones(8).double()}),
    "z shape": (ValueError, r"z: expected shape \[G", {"z": torch.ones(2, 4)}),
    "rows dtype": (TypeError, "rows: expected int64", {"rows": torch.tensor([1.0])}),
    "rows dims": (ValueError, "rows: expected 1 dimension", {"rows": torch.tensor([[1]])}),
    "row_map shape": (
        ValueError,
        r"row_map: expected shape \[2, 4\]",
        {"row_map": gates_of(3, 0, 7)},
    ),
    "col_map shape": (
        ValueError,
        r"col_map: expected shape \[2, 3\]",
        {"col_map": gates_of(4, 0, 7)},
    ),
    "maps without z": (ValueError, "expected z with them", {"z": None}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(impl, name):
    error, message, changes = BAD[name]
    case = make_case((4, 3), 1.0)
    for field, value in changes.items():
        setattr(case, field, value)
    with pytest.raises(error, match=message):
        call(case, case.weight, case.z)


BAD_LISTS = {
    "weight dtype": (TypeError, "weight: expected a floating", {"weights": [torch.ones(3).int()]}),
    "weight dtypes": (
        TypeError,
        r"weights\[1\]: expected torch.float32",
        {"weights": [torch.ones(9, 12), torch.ones(9, 12).double()]},
    ),
    "dtype": (TypeError, "dtype: expected torch.float32", {"dtype": torch.float64}),
    "dims": (
        ValueError,
        r"weights\[1\]: expected 1 to 5",
        {"weights": [torch.ones(9, 12), torch.tensor(1.0)]},
    ),
    "z dtype": (TypeError, "z: expected torch.float32", {"z": torch.ones(28).double()}),
    "index dtype": (TypeError, "index: expected int64", {"index": torch.ones(92)}),
    "index dims": (ValueError, "index: expected 1 dim", {"index": torch.ones(9, 2).long()}),
    "maps shape": (
        ValueError,
        r"maps: expected shape \[2, 92\]",
        {"maps": torch.ones(2, 3).long()},
    ),
    "spans": (ValueError, "spans: expected one for each of 2; got 1", {"spans": [(-1, 0, -1, 0)]}),
    "numbers": (ValueError, r"spans\[0\]: expected 4 numbers", {"spans": [(-1, 0)] * 2}),
    "cols of a vector": (
        ValueError,
        r"spans\[1\]: expected col_start -1",
        {"weights": [torch.ones(9, 12), torch.ones(9)]},
    ),
    "row_start": (ValueError, r"row_start from 0 to 83 or -1", {"spans": [(84, 1, -1, 0)] * 2}),
    "row_count": (
        ValueError,
        r"row_count from 0 to 9; got 0 and 10",
        {"spans": [(0, 10, -1, 0)] * 2},
    ),
    "col_start": (ValueError, r"col_start from 0 to 80 or -1", {"spans": [(-1, 0, -2, 1)] * 2}),
    "col_count": (ValueError, r"got 0 and -1", {"spans": [(-1, 0, 0, -1)] * 2}),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_are_refused(impl, name):
    error, message, changes = BAD_LISTS[name]
    case = make_list()
    case.weights, case.spans = [torch.ones(9, 12)] * 2, [case.spans[1]] * 2
    assert case.index.shape == (92,)
    for field, value in changes.items():
        setattr(case, field, value)
    with pytest.raises(error, match=message):
        case.call(case.weights, case.z)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": torch.tensor([0, 4])}, "rows: expected indices from 0 to 3"),
        ({"rows": torch.tensor([-1])}, "rows: expected indices from 0 to 3"),
        ({"cols": torch.tensor([3])}, "cols: expected indices from 0 to 2"),
        ({"row_map": gates_of(4, 5, 7)}, "row_map: expected gates from 0 to 7"),
        ({"col_map": gates_of(3, -1, 7)}, "col_map: expected gates from 0 to 7"),
    ],
)
def test_cpp_refuses_indices_out_of_bounds(need_cpp, changes, message):
    case = make_case((4, 3), 1.0)
    for field, value in changes.items():
        setattr(case, field, value)
    with pytest.raises(RuntimeError, match=message), l0.use_impl("cpp"):
        call(case, case.weight, case.z)


def test_cpp_refuses_lists_out_of_bounds(need_cpp):
    case = make_list()
    arguments = (case.weights, case.z, case.index, case.maps)
    with l0.use_impl("cpp"):
        with pytest.raises(RuntimeError, match="spans: expected 4 numbers for each of 10"):
            op._LIST_FORWARD(*arguments, case.flat[:-1], torch.float32)
        with pytest.raises(RuntimeError, match="spans: expected them inside"):
            op._LIST_FORWARD(*arguments, [90, *case.flat[1:]], torch.float32)
        with pytest.raises(RuntimeError, match="expected a gradient and a flag for each of 10"):
            op._LIST_BACKWARD([], *arguments, case.flat, [True] * 10, True)
        case.index[0] = 12
        with pytest.raises(RuntimeError, match="rows: expected indices from 0 to 11"):
            op._LIST_FORWARD(*arguments, case.flat, torch.float32)


@pytest.mark.parametrize("stored", ["[O, I]", "[I, O]"])
@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_cpp_refuses_repeated_indices_in_backward(need_cpp, axis, stored):
    case = make_case((4, 3), 1.0)
    case = transposed(case) if stored == "[I, O]" else case
    setattr(case, axis, torch.tensor([1, 1]))
    with pytest.raises(RuntimeError, match=f"{axis}: expected distinct"), l0.use_impl("cpp"):
        gradients(case, call, torch.ones(masked_dense(case).shape))


# ---- registration and compilation ----


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)], ids=str)
def test_opcheck(shape, requires_grad):
    case = make_case(shape, 0.7)
    if len(shape) == 4:
        case.weight = case.weight.to(memory_format=torch.channels_last)
    weight = case.weight.requires_grad_(requires_grad)
    z = case.z.requires_grad_(requires_grad)
    indices = (case.rows, case.row_map, case.cols, case.col_map)
    opcheck(op._FORWARD, (weight, z, *indices, torch.float32))
    opcheck(op._FORWARD, (weight, None, None, None, None, None, torch.bfloat16))
    grad = torch.randn(masked_dense(case).shape)
    opcheck(op._BACKWARD, (grad, weight, z, *indices, True, True))
    opcheck(op._BACKWARD, (grad, weight, z, *indices, False, False))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_lists(requires_grad):
    case = make_list()
    weights = [weight.requires_grad_(requires_grad) for weight in case.weights]
    arguments = (weights, case.z.requires_grad_(requires_grad), case.index, case.maps, case.flat)
    opcheck(op._LIST_FORWARD, (*arguments, torch.bfloat16))
    for wanted in (True, False):
        needed = [wanted] * len(weights)
        opcheck(op._LIST_BACKWARD, (case.upstreams(), *arguments, needed, wanted))


def test_python_stand_in_passes_opcheck():
    # The same checks as above, also where the C++ kernels own the operators.
    case = make_case((6, 5, 3, 3), 0.7)
    case.weight = case.weight.to(memory_format=torch.channels_last)
    arguments = (case.z, case.rows, case.row_map, case.cols, case.col_map)
    namespace = stand_ins("pack_weight")
    opcheck(namespace.pack_weight.default, (case.weight, *arguments, torch.bfloat16))
    grad = torch.randn(masked_dense(case).shape)
    for wanted in ((True, True), (False, False)):
        opcheck(namespace.pack_weight_backward.default, (grad, case.weight, *arguments, *wanted))
    many = make_list()
    arguments = (many.weights, many.z, many.index, many.maps, many.flat)
    opcheck(namespace.pack_weights.default, (*arguments, torch.float16))
    for wanted in (True, False):
        needed = [wanted] * len(many.weights)
        backward = (many.upstreams(), *arguments, needed, wanted)
        opcheck(namespace.pack_weights_backward.default, backward)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_graph_for_all_widths(name, channels_last):
    full = make_case((12, 10, 3, 3), 1.0)
    if channels_last:
        full.weight = full.weight.to(memory_format=torch.channels_last)

    def loss(weight, z, rows, cols):
        packed = pack_weight(weight, z, rows, full.row_map, cols, full.col_map)
        return (packed**2).sum() + packed.shape[0]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with l0.use_impl(name):
        for height, width in ((12, 10), (5, 3), (2, 2), (7, 9)):
            rows = torch.randperm(12)[:height].sort().values
            cols = torch.randperm(10)[:width].sort().values
            torch._dynamo.mark_dynamic(rows, 0)
            torch._dynamo.mark_dynamic(cols, 0)
            weight, z = full.weight.clone().requires_grad_(), full.z.clone().requires_grad_()
            value = compiled(weight, z, rows, cols)
            grads = torch.autograd.grad(value, (weight, z))
            plain = loss(weight, z, rows, cols)
            torch.testing.assert_close(value, plain)
            for mine, other in zip(grads, torch.autograd.grad(plain, (weight, z)), strict=True):
                torch.testing.assert_close(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_one_graph_for_lists_of_all_widths(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def loss(weights, z, index, maps, spans):
        packed = pack_weights(weights, z, index, maps, spans)
        return sum((one**2).sum() for one in packed)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    case = make_list(1.0)
    with l0.use_impl(name):
        for share in (1.0, 0.6, 0.3):
            other = make_list(share)
            weights, z = as_leaves(case)
            z.data.copy_(other.z)
            arguments = (weights, z, other.index, other.maps, other.spans)
            grads = torch.autograd.grad(compiled(*arguments), (*weights, z))
            for mine, plain in zip(
                grads, torch.autograd.grad(loss(*arguments), (*weights, z)), strict=True
            ):
                torch.testing.assert_close(mine, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lists_on_every_device(device):
    case = make_list()
    upstreams = case.upstreams()
    expected = list_gradients(case, upstreams)
    there = ListCase(
        [weight.to(device) for weight in case.weights],
        case.z.to(device),
        case.index.to(device),
        case.maps.to(device),
        case.spans,
        case.dtype,
    )
    actual = list_gradients(there, [upstream.to(device) for upstream in upstreams])
    for mine, other in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert torch.equal(mine.cpu(), other)
    torch.testing.assert_close(actual[2].cpu(), expected[2])


def test_same_result_on_every_device(device):
    case = make_case((12, 10, 3, 3), 0.6)
    upstream = torch.randn(masked_dense(case).shape)
    exact = gradients(case.exact(), dense_call, upstream)
    there = Case(*(None if v is None else v.to(device) for v in list(vars(case).values())[:6]))
    for mine, true in zip(gradients(there, call, upstream.to(device)), exact, strict=True):
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-5, atol=1e-5)
