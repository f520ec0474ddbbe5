# SPDX-License-Identifier: Apache-2.0
"""Gradients in memory that is used again: those of `pack_weights`, whatever was there before."""

import pytest
import torch
from ops.test_pack_weight import as_leaves, list_gradients, make_list
from torch.library import opcheck

from l0kernels.functional import pack_weights
from l0kernels.ops.unpack_rows import KeptGradient, op, unpack_rows
from l0kernels.ops.unpack_rows.reference import stored_rows

DTYPES = [(torch.float32, torch.float32), (torch.float64, torch.float64)]
HALF = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def draws(shares, dtypes=DTYPES[0]):
    """The same weights, packed by other gates each time."""
    first = make_list(shares[0], dtypes)
    yield first
    for share in shares[1:]:
        case = make_list(share, dtypes)
        case.weights = first.weights
        yield case


def memory_of(case):
    into = [torch.zeros_like(weight) for weight in case.weights]
    return into, [torch.zeros(stored_rows(memory).shape[0], dtype=torch.bool) for memory in into]


def call(case, upstreams, into, written, need_z=True):
    return unpack_rows(
        upstreams, case.weights, case.z, case.index, case.maps, case.flat, into, written, need_z
    )


@pytest.mark.parametrize("dtypes", [*DTYPES, *HALF], ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
def test_draw_after_draw_gradients_are_those_of_pack_weights(impl, dtypes):
    memory = None
    for case in draws((0.5, 0.3, 0.0, 1.0, 0.1, 0.6), dtypes):
        memory = memory or memory_of(case)
        upstreams = case.upstreams()
        _, grads, grad_z = list_gradients(case, upstreams)
        found = call(case, upstreams, *memory)
        # The reference of pack_weights differentiates its own forward: other roundings.
        tolerance = 0.0 if impl != "reference" else 1e-2 if dtypes in HALF else 1e-5
        torch.testing.assert_close(found, grad_z, rtol=tolerance, atol=tolerance)
        for gradient, into, written in zip(grads, *memory, strict=True):
            torch.testing.assert_close(into, gradient, rtol=tolerance, atol=tolerance)
            assert not stored_rows(into)[~written].any()


def test_closed_rows_are_not_touched(need_cpp):
    case = make_list(0.4)
    into, written = memory_of(case)
    call(case, case.upstreams(), into, written)
    for memory in into:
        stored_rows(memory).fill_(7.0)
    before = [rows.clone() for rows in written]
    call(case, case.upstreams(), into, written)
    closed = 0
    for memory, rows, then in zip(into, written, before, strict=True):
        assert torch.equal(rows, then)
        assert bool((stored_rows(memory)[~rows] == 7).all())
        closed += int((~rows).sum())
    assert closed > 10


def test_what_was_written_is_cleared_when_it_closes(impl):
    opened, closed = draws((1.0, 0.0))
    into, written = memory_of(opened)
    call(opened, opened.upstreams(), into, written)
    weight = opened.weights[1]
    assert bool(written[1].all()) and bool(stored_rows(into[1]).any())
    call(closed, closed.upstreams(), into, written)
    assert not into[1].any() and into[1].stride() == weight.stride()


def test_gradients_of_gates_only_if_wanted(impl):
    case = make_list()
    assert call(case, case.upstreams(), *memory_of(case), need_z=False) is None


def test_operator_is_registered_as_it_behaves(op_impl):
    if op_impl != "cpp":
        pytest.skip("opcheck is of the dispatcher's operator, the compiled one on a CPU")
    case = make_list()
    arguments = (case.upstreams(), case.weights, case.z, case.index, case.maps, case.flat)
    checks = ("test_schema", "test_autograd_registration")
    opcheck(op._UNPACK, (*arguments, *memory_of(case), True), test_utils=checks)


def test_bad_arguments(impl):
    case = make_list()
    into, written = memory_of(case)
    with pytest.raises(ValueError, match=r"written: expected 10 each .* got \(10, 10.0, 9, 10\)"):
        call(case, case.upstreams(), into[:-1], written)
    turned = [into[0].double(), *into[1:]]
    with pytest.raises(ValueError, match=r"into\[0\]: expected torch.float32 of shape"):
        call(case, case.upstreams(), turned, written)
    turned = [into[0], into[1].contiguous(), *into[2:]]
    with pytest.raises(ValueError, match=r"into\[1\]: expected .* strides"):
        call(case, case.upstreams(), turned, written)
    with pytest.raises(ValueError, match=r"written\[0\]: expected bool of shape \[12\]; got"):
        call(case, case.upstreams(), into, [written[1], *written[1:]])


# Memory that is lent and given back.


def kept_of(case):
    return [KeptGradient(weight) for weight in case.weights]


def backward(case, kept, leaves, upstreams):
    weights, z = leaves
    packed = pack_weights(weights, z, case.index, case.maps, case.spans, case.dtype, kept)
    torch.autograd.backward(packed, upstreams)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: str(pair[0])[6:])
def test_gradients_of_parameters_lie_in_it(dtypes):
    kept = leaves = None
    for case in draws((0.5, 0.2, 0.9), dtypes):
        kept = kept or kept_of(case)
        leaves = (leaves or as_leaves(case))[0], case.z.clone().requires_grad_()
        upstreams = case.upstreams()
        _, grads, grad_z = list_gradients(case, upstreams)
        for weight in leaves[0]:
            weight.grad = None
        backward(case, kept, leaves, upstreams)
        for weight, gradient, memory in zip(leaves[0], grads, kept, strict=True):
            assert torch.equal(weight.grad, gradient) and weight.grad.stride() == weight.stride()
            assert memory.is_as_written(weight.grad)
        torch.testing.assert_close(leaves[1].grad, grad_z, rtol=1e-6, atol=1e-6)


def test_gradients_accumulate(impl):
    first, second = draws((0.5, 0.3))
    kept, (weights, _) = kept_of(first), as_leaves(first)
    expected = [torch.zeros_like(weight) for weight in first.weights]
    for case in (first, second):
        upstreams = case.upstreams()
        for total, gradient in zip(expected, list_gradients(case, upstreams)[1], strict=True):
            total += gradient
        backward(case, kept, (weights, case.z), upstreams)
    for weight, total, memory in zip(weights, expected, kept, strict=True):
        torch.testing.assert_close(weight.grad, total)
        assert not memory.is_as_written(weight.grad)


def test_one_backward_through_two_packings(impl):
    first, second = draws((0.5, 0.3))
    kept, (weights, _) = kept_of(first), as_leaves(first)
    expected = [torch.zeros_like(weight) for weight in first.weights]
    packed, upstreams = [], []
    for case in (first, second):
        upstreams += case.upstreams()
        given = upstreams[-len(first.weights) :]
        for total, gradient in zip(expected, list_gradients(case, given)[1], strict=True):
            total += gradient
        packed += pack_weights(weights, case.z, case.index, case.maps, case.spans, kept=kept)
    torch.autograd.backward(packed, upstreams)
    for weight, total, memory in zip(weights, expected, kept, strict=True):
        torch.testing.assert_close(weight.grad, total)
        assert not memory.is_as_written(weight.grad)


def test_it_is_lent_to_one_at_a_time():
    weight = torch.randn(6, 4)
    kept = KeptGradient(weight)
    lent = kept.lend(weight)
    assert lent is not None and kept.lend(weight) is None
    row = lent[2]
    del lent
    assert kept.lend(weight) is None
    del row
    assert kept.lend(weight) is not None


def test_it_is_lent_to_weights_that_it_fits():
    weight = torch.randn(6, 4)
    kept = KeptGradient(weight)
    assert kept.lend(weight.double()) is None
    assert kept.lend(weight.t().contiguous().t()) is None
    assert kept.lend(weight) is not None


def unchanged(gradient):
    return None


CHANGES = [unchanged, lambda g: g.add_(1), lambda g: g[0].fill_(3), lambda g: g.detach().mul_(2)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("looked_at", ["before", "after", "never"])
def test_rows_are_known_if_nobody_has_changed_them(change, looked_at):
    weight = torch.randn(6, 4)
    kept = KeptGradient(weight)
    lent = kept.lend(weight)
    lent[1:3] = 1.0
    kept.written[1:3] = True
    kept.has_written(lent)
    if looked_at == "before":
        assert kept.is_as_written(lent)
    change(lent)
    if looked_at == "after":
        assert kept.is_as_written(lent) == (change is unchanged)
    assert not kept.is_as_written(weight)
    del lent
    kept.lend(weight)
    known = [False, True, True, *[False] * 3]
    assert kept.written.tolist() == (known if change is unchanged else [True] * 6)


def test_nothing_is_known_of_what_was_not_written_to_the_end():
    weight = torch.randn(6, 4)
    kept = KeptGradient(weight)
    kept.lend(weight)
    kept.lend(weight)
    assert kept.written.all()


def test_nothing_is_lent_where_collectives_may_write(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    weight = torch.randn(6, 4)
    assert KeptGradient(weight).lend(weight) is None


def test_cpp_refuses_gradients_of_another_shape(need_cpp):
    case = make_list()
    upstreams = case.upstreams()
    upstreams[1] = upstreams[1][:, :1]
    with pytest.raises(RuntimeError, match="grads: expected the shape of what was packed"):
        call(case, upstreams, *memory_of(case))
