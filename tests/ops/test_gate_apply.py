# SPDX-License-Identifier: Apache-2.0
"""Multiplying features by their gates against products in PyTorch."""

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
from l0kernels.functional import gate_apply
from l0kernels.ops.gate_apply import op

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
on_harness = pytest.mark.parametrize("op_impl", ["harness"], indirect=True)
either_gates = pytest.mark.parametrize("per_example", [False, True])


@dataclass
class Case:
    """Arguments of gate_apply."""

    x: torch.Tensor
    z: torch.Tensor
    gate_map: torch.Tensor
    dim: int = 1

    def exact(self):
        """The same numbers in float64."""
        return Case(self.x.detach().double(), self.z.double(), self.gate_map, self.dim)

    def scale(self, z):
        """Of every feature, shaped to broadcast with x."""
        z = torch.cat([z[..., :-1], z[..., -1:].detach()], -1)
        scale = z[..., self.gate_map[0]] * z[..., self.gate_map[1]]
        shape = [1] * self.x.dim()
        shape[self.dim] = self.x.shape[self.dim]
        if z.dim() == 2:
            shape[0] = len(z)
        return scale.reshape(shape)

    def closed(self):
        """Decided in z's own dtype, as it has to be."""
        return (self.scale(self.z) == 0).expand(self.x.shape)

    def dead_gates(self):
        """The gates that no open feature has; the last one is a constant."""
        rows = self.z.reshape(-1, self.z.shape[-1])
        dead = torch.ones_like(rows, dtype=torch.bool)
        for row, gates in enumerate(rows):
            is_open = gates[self.gate_map[0]] * gates[self.gate_map[1]] != 0
            dead[row, self.gate_map[:, is_open].flatten()] = False
        dead[:, -1] = True
        return dead.reshape(self.z.shape)


def some_map(kind, features, gates):
    """The gates of features; the last gate, `gates`, is the one that is always open."""
    own = torch.arange(features) % (gates + 1)
    last = torch.full((features,), gates)
    two = torch.randint(gates + 1, (2, features))
    return {
        "own": torch.stack([own, last]),
        "two": two,
        "few for many": two % min(3, gates + 1),
        "twice the same": torch.stack([own, own]),
        "none": torch.stack([last, last]),
    }[kind]


def make_case(
    shape, dim=1, share=0.7, dtype=torch.float32, per_example=False, gates=None, kind="two"
):
    """About a share of the gates is open, and at least 0.1."""
    features = shape[dim]
    gates = features if gates is None else gates
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = (shape[0], gates + 1) if per_example else (gates + 1,)
    z = torch.rand(drawn, dtype=compute) * 0.9 + 0.1
    z = torch.where(torch.rand(drawn) < share, z, 0)
    z[..., -1] = 1
    return Case(torch.randn(shape).to(dtype), z, some_map(kind, features, gates), dim)


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def call(case, x, z):
    return gate_apply(x, z, case.gate_map, case.dim)


def plain(closed):
    """The product in PyTorch, with what is closed given."""

    def run(case, x, z):
        scale = case.scale(z)
        return torch.where(closed, 0, x.to(scale.dtype) * scale).to(x.dtype)

    return run


def leaves_of(case):
    """x and z once more, as leaves."""
    x = torch.empty_strided(case.x.shape, case.x.stride(), dtype=case.x.dtype)
    x = case.x.detach() if 0 in case.x.stride() else x.copy_(case.x.detach())
    return x.requires_grad_(), case.z.detach().clone().requires_grad_()


def gradients(case, function, upstream):
    """The scaled activations and the gradients of x and z."""
    x, z = leaves_of(case)
    y = function(case, x, z)
    return y.detach(), *torch.autograd.grad(y, (x, z), upstream.to(y.dtype))


def check(case, upstream=None):
    """Compares value and gradients with PyTorch's, exact and in the same dtype."""
    upstream = torch.randn(case.x.shape) if upstream is None else upstream
    upstream = upstream.to(case.x.dtype)
    closed = case.closed()
    actual = gradients(case, call, upstream)
    exact = gradients(case.exact(), plain(closed), upstream)
    other = gradients(case, plain(closed), upstream)
    for what, mine, true, its in zip(
        ("forward", "dgrad", "gates"), actual, exact, other, strict=True
    ):
        assert mine.dtype == its.dtype and mine.shape == its.shape
        if mine.dtype == torch.float64:  # PyTorch's is not exact either
            close("gate_apply", what, mine, true)
        else:
            within_budget("gate_apply", what, mine, true, its)
    y, grad_x, grad_z = actual
    # One product, rounded once: the same bits.
    same("gate_apply", y, other[0])
    same("gate_apply", grad_x, other[1])
    assert bool((y[closed] == 0).all()) and bool((grad_x[closed] == 0).all())
    assert bool((grad_z[case.dead_gates()] == 0).all())
    assert y.stride() == torch.empty_like(case.x).stride()
    return actual


# ---- values and gradients ----

SHAPES = [((1, 1), 1), ((1, 7), 1), ((7, 1), 1), ((5, 3), 1), ((31, 129), 1), ((64, 16), -1)]
SHAPES += [((513, 33), 1), ((3, 4, 7), 1), ((3, 4, 7), -1), ((3, 40, 136), 2), ((2, 17, 5, 7), 1)]
SHAPES += [((2, 8, 8, 8), 1), ((2, 1, 6, 6), 1), ((1, 8, 4, 4), 1), ((3, 5, 1, 1), 1)]
SHAPES += [((2, 5, 3, 4), 2), ((2, 5, 3, 11), -1), ((2, 3, 4, 5, 6), 1), ((2, 3, 2, 2, 2, 2), -5)]
EMPTY = [((0, 5), 1), ((5, 0), 1), ((3, 5, 0), 1), ((0, 5, 3, 3), 1), ((2, 0, 3, 3), 1)]
EMPTY += [((0, 4, 7), -1), ((0, 0), 1)]


@either_gates
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_shapes(impl, shape, dim, per_example):
    check(make_case(shape, dim, per_example=per_example))


@pytest.mark.parametrize("shape", [(9, 4), (1, 6), (6, 1), (5, 3, 7), (40, 50)], ids=str)
def test_features_first(impl, shape):
    check(make_case(shape, 0))


@either_gates
@pytest.mark.parametrize(("shape", "dim"), EMPTY, ids=str)
def test_nothing_to_scale(impl, shape, dim, per_example):
    case = make_case(shape, dim, per_example=per_example, gates=4)
    y, grad_x, grad_z = gradients(case, call, torch.randn(shape))
    assert y.shape == grad_x.shape == shape and grad_z.shape == case.z.shape
    assert bool((grad_z == 0).all())


@either_gates
@pytest.mark.parametrize("kind", ["own", "two", "few for many", "twice the same", "none"])
@pytest.mark.parametrize(("shape", "dim"), [((9, 70), 1), ((3, 6, 5, 5), 1), ((4, 9, 30), -1)])
def test_maps(impl, kind, shape, dim, per_example):
    check(make_case(shape, dim, kind=kind, per_example=per_example))


@either_gates
@pytest.mark.parametrize("gates", [0, 1, 5, 300, 1000])
def test_numbers_of_gates(impl, gates, per_example):
    check(make_case((6, 37), gates=gates, per_example=per_example))


@either_gates
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("shape", "dim"), [((9, 70), 1), ((3, 6, 5, 5), 1), ((4, 9, 30), -1)])
def test_shares_of_open_gates(impl, share, shape, dim, per_example):
    y, _, grad_z = check(make_case(shape, dim, share, kind="own", per_example=per_example))
    if share == 0:
        assert not y.any() and not grad_z.any()
    if share == 1:
        assert bool((y != 0).all())


@either_gates
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim", "last"),
    [((19, 23), 1, False), ((64, 128), 1, False), ((5, 9, 4), -1, False), ((3, 8, 4, 4), 1, False),
     ((3, 23, 3, 5), 1, False), ((3, 8, 4, 4), 1, True), ((3, 23, 3, 5), 1, True)],
)  # fmt: skip
def test_dtypes(impl, dtype, shape, dim, last, per_example):
    case = make_case(shape, dim, dtype=dtype, per_example=per_example)
    if last:
        case.x = channels_last(case.x)
    for result in check(case)[: 1 if impl == "reference" else 2]:  # else autograd's layout
        assert not last or result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "dim", "per_example"),
    [((700, 129), 1, False), ((2100, 40), 1, False), ((33, 2200), 1, False), ((33, 2200), 1, True),
     ((3, 2, 121, 119), 1, False), ((3, 2, 121, 119), 1, True), ((2, 300, 130), -1, True)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_one_block(impl, shape, dim, dtype, per_example):
    check(make_case(shape, dim, dtype=dtype, per_example=per_example, gates=50))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize(("shape", "dim"), [((12, 40), 1), ((2, 5, 4, 4), 1), ((3, 4, 11), 2)])
@either_gates
def test_only_the_gradient_asked_for(impl, needs, shape, dim, per_example):
    case = make_case(shape, dim, per_example=per_example)
    upstream = torch.randn(shape)
    _, *both = gradients(case, call, upstream)
    leaves = [
        leaf.detach().requires_grad_(n) for leaf, n in zip(leaves_of(case), needs, strict=True)
    ]
    call(case, *leaves).backward(upstream)
    for leaf, needed, expected in zip(leaves, needs, both, strict=True):
        assert (leaf.grad is not None) == needed
        assert not needed or torch.equal(leaf.grad, expected)


def test_what_nobody_needs_is_not_computed(op_impl):
    case = make_case((12, 10))
    found = chosen(op._BACKWARD)(case.x, case.x, case.z, case.gate_map, 1, False)
    assert found[0].numel() == 0 and found[1].shape == case.z.shape


@pytest.mark.parametrize("need_z", [False, True])
def test_activations_are_kept_for_gradients_of_gates_alone(op_impl, need_z):
    case, kept = make_case((12, 10)), []
    x, z = leaves_of(case)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(case, x, z.requires_grad_(need_z))
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept) == need_z


@either_gates
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(impl, last, per_example):
    case = make_case((3, 4, 3, 2), share=1.0, dtype=torch.float64, per_example=per_example)
    x = channels_last(case.x) if last else case.x
    one = case.z[..., -1:]

    def run(x, z):
        return call(case, x, torch.cat([z, one], -1))

    leaves = x.requires_grad_(), case.z[..., :-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(run, leaves)


def test_inference_mode(impl):
    case = make_case((12, 10, 3, 3))
    expected = call(case, case.x, case.z)
    with torch.inference_mode():
        inferred = call(case, case.x.clone(), case.z.clone())
    assert torch.equal(inferred, expected)


def test_dim_counts_from_either_end(impl):
    case = make_case((6, 5, 4), -2)
    expected = call(case, case.x, case.z)
    assert torch.equal(call(replace(case, dim=1), case.x, case.z), expected)


# ---- strides ----


def strided(shape):
    """Numbers of a shape in memory of every kind, by name."""
    reverse = list(reversed(range(len(shape))))
    twice = [2 * n for n in shape]
    return {
        "one number": torch.randn(()).expand(shape),
        "one example": torch.randn(1, *shape[1:]).expand(shape),
        "one pixel": torch.randn(*shape[:2], 1, 1).expand(shape),
        "reversed": torch.randn(shape[::-1]).permute(*reverse),
        "examples last": torch.randn(*shape[1:], shape[0]).movedim(-1, 0),
        "every second": torch.randn(twice)[tuple(slice(0, None, 2) for _ in shape)],
        "channels_last": channels_last(torch.randn(shape)),
        "some of channels_last": channels_last(torch.randn(shape[0], 20, *shape[2:]))[:, 3:14],
        "off by one": torch.randn(math.prod(shape) + 1)[1:].view(shape),
        "permuted": torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2),
    }


KINDS = list(strided((2, 11, 2, 2)))


@either_gates
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients_of_any_strides(impl, kind, last, per_example):
    case = make_case((4, 11, 3, 5), per_example=per_example)
    if last:
        case.x = channels_last(case.x)
    check(case, strided((4, 11, 3, 5))[kind])


@either_gates
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_any_strides(impl, kind, dim, per_example):
    case = make_case((4, 11, 3, 5), dim, per_example=per_example)
    case.x = strided((4, 11, 3, 5))[kind]
    if per_example and kind in ("reversed", "examples last", "one number", "one example"):
        actual = gradients(case, call, torch.ones(4, 11, 3, 5))
        expected = gradients(replace(case, x=case.x.contiguous()), call, torch.ones(4, 11, 3, 5))
        assert all(map(torch.equal, actual, expected)) and actual[0].is_contiguous()
    else:
        check(case)


@pytest.mark.parametrize("needs", [(True, False), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_example_of_any_strides(impl, kind, needs):
    """Without z's gradient x is not there to say how gradients lie in memory."""
    case, upstream = make_case((4, 11, 3, 5), per_example=True), strided((4, 11, 3, 5))[kind]
    expected = gradients(case, plain(case.closed()), upstream)[1]
    x, z = leaves_of(case)
    (grad,) = torch.autograd.grad(call(case, x, z.requires_grad_(needs[1])), x, upstream)
    assert torch.equal(grad, expected)


@either_gates
def test_gates_and_maps_of_any_strides(impl, per_example):
    case = make_case((6, 7), per_example=per_example)
    y, grad_x, grad_z = gradients(case, call, torch.ones(6, 7))
    wide = torch.stack([torch.full_like(case.z, 9), case.z], -1).requires_grad_()
    case.gate_map = case.gate_map.t().contiguous().t()
    x, _ = leaves_of(case)
    result = call(case, x, wide[..., 1])
    result.backward(torch.ones(6, 7))
    assert torch.equal(result, y) and torch.equal(x.grad, grad_x)
    assert torch.equal(wide.grad[..., 1], grad_z) and not wide.grad[..., 0].any()


def test_gradients_after_cat_and_sum(impl):
    case = make_case((13, 11))
    x, z = leaves_of(case)
    torch.cat([call(case, x, z), call(case, 2 * x, z)], 1).sum().backward()
    _, grad, grad_z = gradients(case, plain(case.closed()), torch.ones(13, 11))
    torch.testing.assert_close(x.grad, 3 * grad)
    torch.testing.assert_close(z.grad, 3 * grad_z)


# ---- Inf and NaN ----


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(9, 40), (4, 9, 3, 3), (3, 6, 5, 7)], ids=str)
@either_gates
def test_closed_features_do_not_matter(impl, bad, last, shape, per_example):
    case = make_case(shape, share=0.6, per_example=per_example)
    if last and len(shape) == 4:
        case.x = channels_last(case.x)
    upstream = torch.randn(shape)
    clean = gradients(case, call, upstream)
    assert 0 < int(case.closed().sum()) < case.x.numel()
    case.x[case.closed()] = upstream[case.closed()] = bad
    for mine, other in zip(gradients(case, call, upstream), clean, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("shape", [(9, 40), (4, 9, 3, 3)], ids=str)
def test_open_features_keep_inf_and_nan(impl, bad, shape):
    case = make_case(shape, share=1.0, kind="own")
    case.x[2, 4] = bad
    y, grad_x, grad_z = gradients(case, call, torch.ones(shape))
    assert not y[2, 4].isfinite().any() and bool(grad_x.isfinite().all())
    assert not grad_z[4].isfinite() and int(grad_z.isfinite().sum()) == shape[1]
    y[2, 4] = 0
    assert bool(y.isfinite().all())


@either_gates
def test_nan_in_gates_shows(impl, per_example):
    case = make_case((4, 6), share=1.0, kind="own", per_example=per_example)
    case.z[..., 3] = math.nan
    y, grad_x, grad_z = gradients(case, call, torch.ones(4, 6))
    for result in (y, grad_x):
        assert result[:, 3].isnan().all() and int(result.isfinite().sum()) == 20
    assert bool(grad_z.isfinite().all())  # a gate's own value is not in its gradient


def test_results_are_written_completely(impl):
    # conftest fills uninitialised memory with NaN; check here that it does.
    assert torch.empty(3).isnan().all()
    for per_example in (False, True):
        case = make_case((8, 31, 3, 3), share=0.3, per_example=per_example)
        for result in gradients(case, call, torch.randn(case.x.shape)):
            assert bool(result.isfinite().all())


# ---- bits ----


@either_gates
@pytest.mark.parametrize(
    ("shape", "last"), [((700, 1000), False), ((48, 64, 9, 9), False), ((48, 64, 9, 9), True)]
)
def test_bits_do_not_depend_on_threads(need_cpp, shape, last, per_example):
    case = make_case(shape, per_example=per_example)
    if last:
        case.x = channels_last(case.x)
    upstream = torch.randn(shape)
    assert_threads_do_not_matter(lambda: gradients(case, call, upstream), (1, 2, 3))


@either_gates
def test_same_bits_twice(impl, per_example):
    case = make_case((33, 31, 2, 2), per_example=per_example)
    upstream = torch.randn(33, 31, 2, 2)
    assert all(map(torch.equal, gradients(case, call, upstream), gradients(case, call, upstream)))


@on_harness
@pytest.mark.parametrize("last", [False, True])
def test_launches(op_impl, last):
    case = make_case((6, 10, 3, 3))
    x, z = leaves_of(case)
    x = channels_last(x.detach()).requires_grad_() if last else x
    ops.launches(reset=True)
    y = call(case, x, z)
    assert ops.launches(reset=True)["gate_apply"] == 1
    y.sum().backward()
    assert ops.launches(reset=True)["gate_apply"] == 2


# ---- bad input ----

BAD = {
    "x dtype": (
        TypeError,
        "x: expected a floating dtype; got torch.int32",
        {"x": torch.ones(4, 3).int()},
    ),
    "x dimensions": (
        ValueError,
        "x: expected at least 2 dimensions; got 1",
        {"x": torch.ones(3), "dim": 0},
    ),
    "dim too large": (ValueError, "dim: expected a number from -2 to 1; got 2", {"dim": 2}),
    "dim too small": (ValueError, "dim: expected a number from -2 to 1; got -3", {"dim": -3}),
    "z dtype": (
        TypeError,
        "z: expected torch.float32 with torch.float32 x; got torch.float64",
        {"z": torch.ones(4).double()},
    ),
    "z of another batch": (
        ValueError,
        r"z: expected shape \[G \+ 1\] or \[4, G \+ 1\]; got \[5, 4\]",
        {"z": torch.ones(5, 4)},
    ),
    "no gates": (ValueError, r"z: expected shape \[G \+ 1\].*; got \[0\]", {"z": torch.ones(0)}),
    "z dimensions": (ValueError, r"z: .*; got \[4, 1, 4\]", {"z": torch.ones(4, 1, 4)}),
    "examples and features": (
        ValueError,
        "dim: expected another one than 0",
        {"z": torch.ones(4, 4), "dim": 0, "gate_map": torch.zeros(2, 4).long()},
    ),
    "gate_map dtype": (
        TypeError,
        "gate_map: expected int64; got torch.int32",
        {"gate_map": torch.zeros(2, 3).int()},
    ),
    "gate_map shape": (
        ValueError,
        r"gate_map: expected shape \[2, 3\]; got \[2, 4\]",
        {"gate_map": torch.zeros(2, 4).long()},
    ),
    "gate_map dimensions": (
        ValueError,
        r"gate_map: expected shape \[2, 3\]; got \[3\]",
        {"gate_map": torch.zeros(3).long()},
    ),
    "z device": (
        ValueError,
        "z: expected x's device cpu; got meta",
        {"z": torch.ones(4, device="meta")},
    ),
    "gate_map device": (
        ValueError,
        "gate_map: expected x's device cpu; got meta",
        {"gate_map": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(impl, name):
    error, message, changes = BAD[name]
    case = replace(make_case((4, 3)), **changes)
    with pytest.raises(error, match=message):
        call(case, case.x, case.z)


@pytest.mark.parametrize("gate", [-1, 4])
def test_gates_out_of_bounds_are_refused(need_cpp, gate):
    case = make_case((4, 3))
    case.gate_map[1, 2] = gate
    with (
        l0.use_impl("cpp"),
        pytest.raises(RuntimeError, match=f"gate_map: expected gates from 0 to 3; got {gate}"),
    ):
        call(case, case.x, case.z)


@on_harness
@either_gates
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("gate", [-1, 4, 2**40])
def test_gates_out_of_bounds_count_as_closed_on_a_gpu(op_impl, gate, shape, per_example):
    case = make_case(shape, share=1.0, kind="own", per_example=per_example)
    without = case.x.clone()
    without[:, 2] = 0
    expected = gradients(replace(case, x=without), call, torch.ones(shape))
    case.gate_map[1, 2] = gate
    y, grad_x, grad_z = gradients(case, call, torch.ones(shape))
    assert torch.equal(y, expected[0]) and torch.equal(grad_z, expected[2])
    assert not grad_x[:, 2].any() and bool((grad_x[:, :2] != 0).all())


@pytest.mark.parametrize("op_impl", ["cpp", "harness"], indirect=True)
def test_kernels_want_examples_apart(op_impl):
    """What `_ordered` sees to."""
    case = make_case((5, 3), per_example=True)
    x = case.x.t().contiguous().t()
    with pytest.raises(RuntimeError, match="expected examples one after the other"):
        chosen(op._FORWARD)(x, case.z, case.gate_map, 1)


# ---- registration and compilation ----


def check_raw_operators(forward, backward, requires_grad):
    for shape, dim, last, per_example in (
        ((6, 5, 3, 3), 1, True, False),
        ((6, 5, 3, 3), 1, False, True),
        ((4, 3, 7), 2, False, True),
    ):
        case = make_case(shape, dim, per_example=per_example)
        x = channels_last(case.x) if last else case.x
        x, z = x.requires_grad_(requires_grad), case.z.requires_grad_(requires_grad)
        opcheck(forward, (x, z, case.gate_map, dim))
        grad = torch.randn(shape)
        opcheck(backward, (grad, x, z, case.gate_map, dim, True))
        opcheck(backward, (grad, x, z, case.gate_map, dim, False))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    check_raw_operators(op._FORWARD, op._BACKWARD, requires_grad)


def test_python_stand_in_passes_opcheck():
    # The same checks as above, also where the C++ kernels own the operators.
    namespace = stand_ins("gate_apply")
    raw = namespace.gate_apply.default, namespace.gate_apply_backward.default
    check_raw_operators(*raw, requires_grad=False)


@either_gates
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_one_graph_for_all_sizes(name, per_example):
    def loss(x, z, gate_map):
        return (gate_apply(x, z, gate_map) ** 2).sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with l0.use_impl(name):
        for shape in ((12, 10), (5, 7), (3, 4)):
            case = make_case(shape, per_example=per_example)
            x, z = leaves_of(case)
            value, expected = compiled(x, z, case.gate_map), loss(x, z, case.gate_map)
            torch.testing.assert_close(value, expected)
            grads = torch.autograd.grad(value, (x, z))
            for mine, other in zip(grads, torch.autograd.grad(expected, (x, z)), strict=True):
                torch.testing.assert_close(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
