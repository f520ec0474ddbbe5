# SPDX-License-Identifier: Apache-2.0
"""SGD on marked rows, and the steps that rows have missed, against torch.optim.SGD."""

import pytest
import torch
from error_table import close, within_budget
from torch.library import opcheck

from l0kernels.ops.sgd_rows import op
from l0kernels.ops.sgd_rows.op import sgd_rows, sgd_rows_catch_up
from l0kernels.optim.sgd import step_matrix

SHAPES = [(0, 3), (1, 1), (5, 0), (7, 3), (37, 1031), (300, 5), (6, 5, 3, 3)]
SETTINGS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
FULL = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


def tensors(shape, dtype, device, layout=torch.contiguous_format):
    """Weight, velocity and gradient."""
    if len(shape) != 4:
        layout = torch.contiguous_format
    return [
        torch.randn(shape, dtype=dtype).to(device=device, memory_format=layout) for _ in range(3)
    ]


def stepped(weight, velocity, grad, options, steps=1):
    """What torch.optim.SGD makes of copies."""
    weight, velocity = weight.clone(), velocity.clone()
    optimizer = torch.optim.SGD([weight], lr=0.1, **options)
    if options.get("momentum"):
        optimizer.state[weight]["momentum_buffer"] = velocity
    for _ in range(steps):
        weight.grad = grad
        optimizer.step()
    return weight, velocity


def compare(what, actual, exact, single):
    if actual.dtype == torch.float64:
        close("sgd_rows", what, actual, exact)
    else:
        within_budget("sgd_rows", what, actual, exact, single)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_marked_rows_make_one_step(impl, device, shape, setting, dtype, layout):
    options = SETTINGS[setting]
    weight, velocity, grad = tensors(shape, dtype, device, layout)
    exact = stepped(weight.double(), velocity.double(), grad.double(), options)
    single = stepped(weight, velocity, grad, options)
    last = torch.randint(0, 5, shape[:1], device=device)
    before, strides = (weight.clone(), velocity.clone()), weight.stride()
    counters = last.clone()
    found = velocity if "momentum" in options else None
    sgd_rows(weight, found, grad, last, 3, lr=0.1, **options)
    marked = last == 4
    for mine, old, right, torchs in zip((weight, velocity), before, exact, single, strict=True):
        assert torch.equal(mine[~marked], old[~marked])
        compare("forward", mine[marked], right[marked], torchs[marked])
    assert torch.equal(last, counters) and weight.stride() == strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("some", [True, False])
def test_missed_steps_are_made_up_for(impl, device, shape, setting, dtype, layout, some):
    options, now = SETTINGS[setting], 40
    weight, velocity, grad = tensors(shape, dtype, device, layout)
    grad.zero_()
    last = torch.tensor([20, 0, 39, 41, 40, 3, 40])[torch.arange(shape[0]) % 7].to(device)
    matrix = step_matrix({**FULL, "lr": 0.1, **options})
    powers = [torch.linalg.matrix_power(matrix, n) for n in range(now + 1)]
    table = torch.stack(powers)
    rows = torch.randperm(shape[0])[: (shape[0] + 1) // 2].to(device) if some else None
    chosen = torch.zeros(shape[0], dtype=torch.bool, device=device)
    chosen[slice(None) if rows is None else rows] = True
    exact = [t.double().clone() for t in (weight, velocity)]
    single = [weight.clone(), velocity.clone()]
    for row in range(shape[0]):
        missed = int(now - last[row])
        if chosen[row] and missed > 0:
            for results in (exact, single):
                one = [t[row : row + 1] for t in results]
                zero = torch.zeros_like(one[0])
                for mine, new in zip(one, stepped(*one, zero, options, missed), strict=True):
                    mine.copy_(new)
    expected = torch.where(chosen & (last <= now), 41, last)
    found = velocity if "momentum" in options else None
    sgd_rows_catch_up(weight, found, last, rows, table, now, now + 1)
    assert torch.equal(last, expected)
    for mine, right, torchs in zip((weight, velocity), exact, single, strict=True):
        compare("forward", mine, right, torchs)


@pytest.mark.parametrize("change", [lambda g: g[:1].expand(9, 8), lambda g: g.t().contiguous().t()])
def test_gradients_of_any_strides(impl, device, change):
    weight, velocity, grad = tensors((9, 8), torch.float64, device)
    grad = change(grad)
    exact = stepped(weight, velocity, grad, SETTINGS["nesterov"])
    last = torch.ones(9, dtype=torch.int64, device=device)
    sgd_rows(weight, velocity, grad, last, 0, lr=0.1, **SETTINGS["nesterov"])
    close("sgd_rows", "forward", weight, exact[0])
    close("sgd_rows", "forward", velocity, exact[1])


def test_rows_that_take_no_part_may_hold_anything(impl, device):
    weight, velocity, grad = tensors((4, 5), torch.float32, device)
    for t in (weight, velocity, grad):
        t[1] = float("nan")
    last = torch.tensor([1, 0, 1, 1], device=device)
    sgd_rows(weight, velocity, grad, last, 0, lr=0.1, momentum=0.9)
    assert weight[1].isnan().all() and weight[[0, 2, 3]].isfinite().all()


def test_threads_do_not_matter(impl):
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        weight, velocity, grad = tensors((400, 700), torch.float32, "cpu")
        last = torch.randint(0, 4, (400,))
        table = torch.randn(4, 2, 2, dtype=torch.float64)
        sgd_rows_catch_up(weight, velocity, last, None, table, 3, 4)
        sgd_rows(weight, velocity, grad, last, 3, lr=0.1, momentum=0.9)
        found.append((weight, velocity))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.usefixtures("need_cpp")
def test_operators_are_registered_as_they_behave():
    weight, velocity, grad = tensors((4, 3), torch.float32, "cpu")
    last, checks = torch.tensor([0, 1, 2, 1]), ("test_schema", "test_faketensor")
    step = (weight, velocity, grad, last, 1, 0.1, 0.9, 0.0, 0.1, True, False)
    table = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    opcheck(op._STEP, step, test_utils=checks)
    opcheck(op._CATCH_UP, (weight, velocity, last, None, table, 2, 3), test_utils=checks)


def test_bad_arguments(impl):
    weight, velocity, grad = tensors((4, 3), torch.float32, "cpu")
    last = torch.zeros(4, dtype=torch.int64)

    def refused(error, match, weight=weight, velocity=velocity, grad=grad, last=last):
        with pytest.raises(error, match=match):
            sgd_rows(weight, velocity, grad, last, 0, lr=0.1, momentum=0.9)

    refused(TypeError, "expected float32 or float64", weight=weight.half())
    refused(ValueError, r"grad: expected torch.float32 of shape \[4, 3\]", grad=grad.double())
    refused(ValueError, r"velocity: expected .* strides \(3, 1\)", velocity=velocity[:, :2])
    refused(ValueError, "velocity", velocity=velocity.t().contiguous().t())
    refused(ValueError, "weight: expected it contiguous", weight=weight.t().contiguous().t())
    refused(ValueError, "last: expected int64", last=last[:3])


TABLE = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)


@pytest.mark.parametrize(
    ("rows", "table", "now", "error", "match"),
    [
        (torch.tensor([0]).int(), TABLE, 2, ValueError, "rows: expected int64 .*got torch.int32"),
        (torch.ones(4).bool(), TABLE, 2, ValueError, "rows: expected int64 .*got torch.bool"),
        (torch.tensor([[0]]), TABLE, 2, ValueError, r"rows: expected int64 .*got .* \[1, 1\]"),
        (torch.tensor([1, 4]), TABLE, 2, (RuntimeError, IndexError), "of 4 rows; got 4"),
        (torch.tensor([-1]), TABLE, 2, (RuntimeError, IndexError), "of 4 rows; got -1"),
        (None, TABLE, 3, (RuntimeError, IndexError), "at most 2 missed steps; got 3"),
        (None, TABLE.float(), 2, ValueError, r"\[steps, 2, 2\], got torch.float32"),
        (None, TABLE[0], 2, ValueError, r"\[steps, 2, 2\], got .* shape \[2, 2\]"),
    ],
)
def test_bad_arguments_of_catching_up_change_nothing(impl, rows, table, now, error, match):
    weight, velocity, _ = tensors((4, 3), torch.float32, "cpu")
    last = torch.tensor([0, 0, 1, 2])
    before = [t.clone() for t in (weight, velocity, last)]
    with pytest.raises(error, match=match):
        sgd_rows_catch_up(weight, velocity, last, rows, table, now, now)
    assert all(map(torch.equal, (weight, velocity, last), before))
