# SPDX-License-Identifier: Apache-2.0
"""AdamW on marked rows, and the steps that rows have missed, against torch.optim.AdamW."""

import math

import pytest
import torch
from error_table import close, within_budget
from torch.library import opcheck

from l0kernels.ops.adam_rows import op
from l0kernels.ops.adam_rows.op import adam_rows, adam_rows_catch_up

SHAPES = [(0, 3), (1, 1), (5, 0), (7, 3), (37, 1031), (300, 5), (6, 5, 3, 3)]
SETTINGS = {
    "usual": {},
    "decay": {"lr": 0.1, "weight_decay": 0.1},
    "betas": {"beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1},
    "zero betas": {"beta1": 0.0, "beta2": 0.0, "eps": 1e-2, "weight_decay": 0.1},
    "steady": {"beta1": 0.999, "beta2": 0.9, "eps": 1e-2},
    "decays to zero": {"lr": 0.1, "weight_decay": 10.0},
}
USUAL = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
LONG = {
    **{name: [SETTINGS[name]] * 1000 for name in ("usual", "betas", "steady", "zero betas")},
    # Steps that leave nothing come before such that do.
    "now and then": [{"lr": 0.01 * (i % 5 == 0)} for i in range(1000)],
    "warm-up": [{"lr": 1e-4 * (i % 500)} for i in range(1000)],
}
LATE = {
    # dtype, settings, bounds of the squares
    "eps falls": (torch.float32, [{"eps": 1.0}] * 230 + [{"eps": 1e-12}] * 70, 1e-26, 1e-26),
    "squares fall": (torch.float64, [{"beta2": 0.7, "eps": 1e-90}] * 800, 1e-6, math.inf),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float64]
BEFORE = 5
"""Steps that the weight has made before."""


def tensors(shape, dtype, device="cpu", layout=torch.contiguous_format):
    """Weight, exp_avg, exp_avg_sq and gradient; some moments are zero, some squares tiny."""
    if len(shape) != 4:
        layout = torch.contiguous_format
    weight, mean, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
    square = torch.randn(shape, dtype=dtype).square() * 10.0 ** torch.randint(-12, 1, shape)
    mean = mean * square.sqrt()
    dead = torch.rand(shape) < 0.1
    mean[dead] = square[dead] = grad[dead] = 0
    found = (weight, mean, square, grad)
    return [t.to(device=device, memory_format=layout) for t in found]


def torchs(state, grads, settings, before=BEFORE, maximize=False):
    """What torch.optim.AdamW makes of copies of weight and moments, a step for each setting."""
    weight, mean, square = (t.clone() for t in state)
    optimizer = torch.optim.AdamW([weight], maximize=maximize)
    step = torch.tensor(float(before))
    optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    for options in settings:
        options = {**USUAL, **options}
        betas = options.pop("beta1"), options.pop("beta2")
        optimizer.param_groups[0].update(betas=betas, **options)
        weight.grad = grads
        optimizer.step()
    return weight, mean, square


def as_table(settings):
    rows = [list({**USUAL, **options}.values()) for options in settings]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)


def compare(actual, exact, single):
    if actual.dtype == torch.float64:
        close("adam_rows", "forward", actual, exact)
    else:
        within_budget("adam_rows", "forward", actual, exact, single)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_marked_rows_make_one_step(impl, device, shape, setting, maximize, dtype, layout):
    options = SETTINGS[setting]
    *state, grad = tensors(shape, dtype, device, layout)
    exact = torchs([t.double() for t in state], grad.double(), [options], maximize=maximize)
    single = torchs(state, grad, [options], maximize=maximize)
    last = torch.randint(0, 5, shape[:1], device=device)
    before, counters, strides = [t.clone() for t in state], last.clone(), state[0].stride()
    options = {**USUAL, **options}
    adam_rows(*state, grad, last, 3, number=BEFORE + 1, maximize=maximize, **options)
    marked = last == 4
    for mine, old, right, plain in zip(state, before, exact, single, strict=True):
        assert torch.equal(mine[~marked], old[~marked])
        compare(mine[marked], right[marked], plain[marked])
    assert torch.equal(last, counters) and state[0].stride() == strides


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_much_smaller_than_their_mean(impl, device, betas, dtype):
    """Nothing is left of the mean, and nothing of its size may be lost with it."""
    small = torch.finfo(dtype).eps / 10
    ones = torch.ones(3, 5, dtype=dtype, device=device)
    state, grad = [0 * ones, ones.clone(), ones.clone()], small * ones
    options = {"lr": 0.1, "beta1": betas[0], "beta2": betas[1], "eps": small}
    exact = torchs([t.double() for t in state], grad.double(), [options])
    single = torchs(state, grad, [options])
    last = torch.ones(3, dtype=torch.int64, device=device)
    adam_rows(*state, grad, last, 0, number=BEFORE + 1, **{**USUAL, **options})
    for mine, right, plain in zip(state, exact, single, strict=True):
        compare(mine, right, plain)


def check_catching_up(state, last, rows, settings, mark):
    """All rows, or those of a list, against torch's steps with gradients of zero."""
    now, count = len(settings), state[0].shape[0]
    chosen = torch.zeros(count, dtype=torch.bool, device=last.device)
    chosen[slice(None) if rows is None else rows] = True
    exact, single = [t.double().clone() for t in state], [t.clone() for t in state]
    for seen in last[chosen].unique().tolist():
        if seen >= now:
            continue
        part = chosen & (last == seen)
        for results in (exact, single):
            before = [t[part].contiguous() for t in results]
            zero = torch.zeros_like(before[0])
            new = torchs(before, zero, settings[seen:], BEFORE + seen)
            for mine, value in zip(results, new, strict=True):
                mine[part] = value
    expected = torch.where(chosen & (last <= now), mark, last)
    old = [t.clone() for t in state]
    untouched = ~chosen | (last >= now)
    table = as_table(settings)
    adam_rows_catch_up(*state, last, rows, table, now, number=BEFORE + now, mark=mark)
    assert torch.equal(last, expected)
    for mine, before, right, plain in zip(state, old, exact, single, strict=True):
        assert torch.equal(mine[untouched], before[untouched])
        compare(mine, right, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("some", [True, False])
def test_missed_steps_are_made_up_for(impl, device, shape, setting, dtype, layout, some):
    *state, _ = tensors(shape, dtype, device, layout)
    last = torch.tensor([20, 0, 39, 41, 40, 3, 40])[torch.arange(shape[0]) % 7].to(device)
    rows = torch.randperm(shape[0])[: (shape[0] + 1) // 2].to(device) if some else None
    check_catching_up(state, last, rows, [SETTINGS[setting]] * 40, mark=41)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_step_has_its_own_settings(impl, device, dtype):
    *state, _ = tensors((12, 70), dtype, device)
    names = [name for name in SETTINGS if name != "zero betas"]  # these would end all the others
    settings = [
        {**SETTINGS[names[i % len(names)]], "lr": 0.01 * (1 + i % 5), "eps": 10.0 ** -(3 + i % 4)}
        for i in range(30)
    ]
    last = torch.arange(12, device=device) * 3
    check_catching_up(state, last, None, settings, mark=30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [0, 303, 1000, 1001], ids=str)
@pytest.mark.parametrize("setting", LONG)
def test_rows_that_have_been_closed_for_long(impl, device, dtype, last, setting):
    """Steps that leave nothing but rounding are left out, and no others."""
    *state, _ = tensors((3, 80), dtype, device)
    check_catching_up(state, torch.full((3,), last, device=device), None, LONG[setting], mark=1000)


@pytest.mark.parametrize("case", LATE)
def test_late_steps_with_small_divisors_are_not_left_out(impl, device, case):
    """What the first step left is small beside them, in spite of its larger numerator."""
    dtype, settings, least, most = LATE[case]
    *state, _ = tensors((3, 80), dtype, device)
    state[2].clamp_(least, most)
    last = torch.zeros(3, dtype=torch.int64, device=device)
    check_catching_up(state, last, None, settings, mark=len(settings))


def test_steps_that_move_nothing_divide_by_zero_too(impl, device):
    """Without eps and square torch's quotients are NaN, whatever the rate."""
    for settings in ([{"eps": 0.0, "lr": 0.0}] * 3, [{"eps": 0.0, "beta1": 0.0}] * 3):
        *state, _ = tensors((3, 80), torch.float32, device)
        assert bool((state[2] == 0).any())
        last = torch.zeros(3, dtype=torch.int64, device=device)
        check_catching_up(state, last, None, settings, mark=3)
        assert torch.equal(state[0].isnan(), state[2] == 0)


@pytest.mark.parametrize("square", [math.inf, 1e30])
def test_squares_that_overflowed(impl, device, square):
    """Infinity stays, though what multiplies it is below the least float32; others vanish."""
    *state, _ = tensors((3, 80), torch.float32, device)
    state[2].fill_(square)
    last = torch.zeros(3, dtype=torch.int64, device=device)
    check_catching_up(state, last, None, [{"beta2": 0.5}] * 300, mark=300)
    assert state[0].isfinite().all() and not state[2].isnan().any()


@pytest.mark.parametrize("change", [lambda g: g[:1].expand(9, 8), lambda g: g.t().contiguous().t()])
def test_gradients_of_any_strides(impl, device, change):
    *state, grad = tensors((9, 8), torch.float64, device)
    grad = change(grad)
    exact = torchs(state, grad, [USUAL])
    last = torch.ones(9, dtype=torch.int64, device=device)
    adam_rows(*state, grad, last, 0, number=BEFORE + 1, **USUAL)
    for mine, right in zip(state, exact, strict=True):
        close("adam_rows", "forward", mine, right)


def test_rows_that_take_no_part_may_hold_anything(impl, device):
    *state, grad = tensors((4, 5), torch.float32, device)
    for t in (*state, grad):
        t[1] = float("nan")
    last = torch.tensor([1, 2, 1, 0], device=device)
    adam_rows_catch_up(*state, last, None, as_table([{}]), 1, number=7, mark=1)
    assert last.tolist() == [1, 2, 1, 1]
    last = torch.tensor([2, 0, 2, 2], device=device)
    adam_rows(*state, grad, last, 1, number=8, **USUAL)
    for t in state:
        assert t[1].isnan().all() and t[[0, 2, 3]].isfinite().all()


def test_threads_do_not_matter(impl):
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        *state, grad = tensors((400, 700), torch.float32)
        last = torch.randint(0, 4, (400,))
        table = as_table([{"lr": 0.1}, {"beta1": 0.5}, {}])
        adam_rows_catch_up(*state, last, None, table, 3, number=9, mark=4)
        adam_rows(*state, grad, last, 3, number=10, **USUAL)
        found.append(state)
    assert all(map(torch.equal, *found))


@pytest.mark.usefixtures("need_cpp")
def test_operators_are_registered_as_they_behave():
    *state, grad = tensors((4, 3), torch.float32)
    last, checks = torch.tensor([0, 1, 2, 1]), ("test_schema", "test_faketensor")
    step = (*state, grad, last, 1, 6, 0.1, 0.9, 0.999, 1e-8, 0.1, True)
    opcheck(op._STEP, step, test_utils=checks)
    opcheck(op._CATCH_UP, (*state, last, None, as_table([{}] * 2), 2, 7, 3), test_utils=checks)


def test_bad_arguments(impl):
    *state, grad = tensors((4, 3), torch.float32)
    last = torch.zeros(4, dtype=torch.int64)
    weight, mean, square = state

    def refused(
        error, match, weight=weight, mean=mean, square=square, grad=grad, last=last, number=1
    ):
        with pytest.raises(error, match=match):
            adam_rows(weight, mean, square, grad, last, 0, number=number, lr=0.1)

    refused(TypeError, "expected float32 or float64", weight=weight.half())
    refused(ValueError, r"grad: expected torch.float32 of shape \[4, 3\]", grad=grad.double())
    refused(ValueError, r"exp_avg: expected .* strides \(3, 1\)", mean=mean[:, :2])
    refused(ValueError, r"exp_avg_sq: expected", square=square.t().contiguous().t())
    refused(ValueError, "weight: expected it contiguous", weight=weight.t().contiguous().t())
    refused(ValueError, "last: expected int64", last=last[:3])
    refused(ValueError, "number: expected at least 1, got 0", number=0)


CATCHES_UP = {"rows": None, "table": as_table([{}, {}]), "now": 2, "number": 2}
BAD_ROWS = [
    (torch.tensor([0, 1], dtype=torch.int32), r"got torch.int32 of shape \[2\]"),
    (torch.tensor([True, False, False, True]), r"got torch.bool of shape \[4\]"),
    (torch.tensor([[0, 1]]), r"got torch.int64 of shape \[1, 2\]"),
    (torch.tensor(1), r"got torch.int64 of shape \[\]"),
]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        *[({"rows": r}, ValueError, f"rows: expected int64 of one .*{m}") for r, m in BAD_ROWS],
        ({"rows": torch.tensor([1, 4])}, (RuntimeError, IndexError), "of 4 rows; got 4"),
        ({"rows": torch.tensor([1, -1])}, (RuntimeError, IndexError), "of 4 rows; got -1"),
        ({"now": 3, "number": 3}, (RuntimeError, IndexError), "at most 2 missed steps; got 3"),
        ({"number": 1}, (RuntimeError, IndexError), "at most 1 missed steps; got 2"),
        ({"table": as_table([{}]).float()}, ValueError, r"table: .*steps, 5\], got torch.float32"),
        ({"table": torch.ones(2, 4).double()}, ValueError, r"table: .*got .* shape \[2, 4\]"),
        ({"table": torch.ones(5).double()}, ValueError, r"table: .*got .* shape \[5\]"),
    ],
)
def test_bad_arguments_of_catching_up_change_nothing(impl, change, error, match):
    *state, _ = tensors((4, 3), torch.float32)
    last = torch.tensor([0, 0, 1, 2])
    before, arguments = [t.clone() for t in (*state, last)], {**CATCHES_UP, **change}
    with pytest.raises(error, match=match):
        adam_rows_catch_up(*state, last, **arguments, mark=arguments["now"])
    assert all(map(torch.equal, (*state, last), before))


@pytest.mark.parametrize("rows", [rows for rows, _ in BAD_ROWS], ids=str)
@pytest.mark.usefixtures("need_cpp")
def test_the_compiled_operator_reads_no_other_list(rows):
    *state, _ = tensors((4, 3), torch.float32)
    last = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="rows: expected int64 of one dimension; got"):
        op._CATCH_UP(*state, last, rows, as_table([{}]), 1, 1, 1)
    assert not last.any()
