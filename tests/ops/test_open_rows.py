# SPDX-License-Identifier: Apache-2.0
"""Which rows have a gradient: each implementation against a loop over rows."""

import math

import pytest
import torch
from torch.library import opcheck

from l0kernels.ops.open_rows import op
from l0kernels.ops.open_rows.op import open_rows

SHAPES = [(0, 3), (1, 1), (5, 0), (7, 3), (13, 1031), (300, 5), (6, 4, 3, 3)]


def expected(grad, last, now):
    stale, marked = 0, last.clone()
    for row in range(grad.shape[0]):
        if last[row] <= now and bool((grad[row] != 0).any()):
            stale += int(last[row] < now)
            marked[row] = now + 1 if last[row] == now else last[row]
    return stale, marked


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_with_a_gradient_are_marked_or_counted(impl, device, shape, dtype, layout):
    if len(shape) != 4 and layout is torch.channels_last:
        layout = torch.contiguous_format
    rows = shape[0]
    for share in (0.0, 0.5, 1.0):
        grad = torch.randn(shape, dtype=dtype)
        grad[torch.rand(rows) >= share] = 0
        grad = grad.to(memory_format=layout)
        last = torch.randint(3, 7, (rows,))
        stale, marked = expected(grad, last, 5)
        last = last.to(device)
        assert open_rows(grad.to(device), last, 5) == stale
        assert torch.equal(last.cpu(), marked)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-45, -1.0])
@pytest.mark.parametrize("place", [0, 1023, 1024, 2050])
def test_one_number_that_is_not_zero(impl, device, value, place):
    grad = torch.zeros(3, 2051, device=device)
    grad[1, place] = value
    grad[2] = -0.0
    last = torch.full((3,), 4, device=device)
    assert open_rows(grad, last, 4) == 0
    assert last.tolist() == [4, 5, 4]
    last.fill_(2)
    assert open_rows(grad, last, 4) == 1
    assert last.tolist() == [2, 2, 2]


@pytest.mark.parametrize("change", [lambda g: g.t().contiguous().t(), lambda g: g[:1].expand(9, 8)])
def test_gradients_of_any_strides(impl, device, change):
    grad = change(torch.randn(9, 8, device=device))
    last = torch.zeros(9, dtype=torch.int64, device=device)
    assert open_rows(grad, last, 1) == 9
    assert not last.any()


def test_threads_do_not_matter(impl):
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        grad = torch.randn(400, 700)
        grad[torch.rand(400) < 0.5] = 0
        last = torch.randint(0, 3, (400,))
        found.append((open_rows(grad, last, 1), last.tolist()))
    assert found[0] == found[1] and found[0][0] > 0


def test_operator_is_registered_as_it_behaves(op_impl):
    if op_impl != "cpp":
        pytest.skip("opcheck is of the dispatcher's operator, the compiled one on a CPU")
    checks = ("test_schema", "test_autograd_registration")
    opcheck(op._ROWS, (torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), 1, None), test_utils=checks)


def test_bad_arguments(impl):
    with pytest.raises(TypeError, match="expected float32 or float64, got torch.float16"):
        open_rows(torch.zeros(2, 2, dtype=torch.float16), torch.zeros(2).long(), 0)
    for last in (torch.zeros(3).long(), torch.zeros(2), torch.zeros(2, 1).long()):
        with pytest.raises(
            ValueError, match=r"last: expected int64 of one entry per row of \[2, 2"
        ):
            open_rows(torch.zeros(2, 2), last, 0)


def test_rows_that_are_known_to_be_zero_are_not_read(impl, device):
    grad = torch.ones(4, 3, device=device)
    last = torch.tensor([5, 4, 5, 4], device=device)
    written = torch.tensor([True, True, False, False], device=device)
    assert open_rows(grad, last, 5, written) == 1
    assert last.tolist() == [6, 4, 5, 4]
    for wrong in (written.int(), written[:3]):
        with pytest.raises(ValueError, match=r"written: expected bool of shape \[4\], got"):
            open_rows(grad, last, 5, wrong)
