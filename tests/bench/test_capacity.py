# SPDX-License-Identifier: Apache-2.0
"""Recorded gates, and `l0kernels bench capacity`: tails, policies, and what it costs."""

import argparse
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from l0kernels.bench import capacity, models, trajectories
from l0kernels.bench.trajectories import Trajectory
from l0kernels.bench.work import operations
from l0kernels.cli import main
from l0kernels.gates.capacity import capacity as planned_for
from l0kernels.recipes import cli as train

RECORDED = sorted(capacity.RECORDED.glob("*.npz"))
NAMES = ["lenet5-arm", "lenet5-hc"]


def made(method: str = "hard_concrete", sizes: tuple[int, ...] = (3, 4)) -> Trajectory:
    """Gates of two layers, the second of which reads the first one's; nothing was trained."""
    count, rng = sum(sizes), np.random.default_rng(0)
    gates = np.arange(count)
    return Trajectory(
        method,
        "made up",
        ("a", "b"),
        np.array(sizes),
        np.array([0, 10, 30]),
        rng.integers(-64, 64, (3, count)) / trajectories.UNITS[method],
        np.stack((gates, np.full(count, count))),
        np.cumsum([0, *sizes]),
        np.array([(-1, 0, 5, sizes[0], 2), (0, 1, *sizes, 10), (1, -1, sizes[1], 2, 6)]),
    )


def test_tails_are_those_of_all_outcomes():
    p = np.array([[0.1, 0.5, 0.9, 0.3], [1.0, 0.0, 0.25, 0.5]])
    found = capacity.tails(p)
    for row, ps in enumerate(p):
        for k in range(5):
            outcomes = itertools.product((0, 1), repeat=4)
            above = sum(
                math.prod(q if z else 1 - q for z, q in zip(zs, ps, strict=True))
                for zs in outcomes
                if sum(zs) > k
            )
            assert found[row, k] == pytest.approx(above, abs=1e-15)


def test_small_tails_keep_their_digits():
    """Binomial: P(all of 40 open) = p^40, far below rounding of 1."""
    found = capacity.tails(np.full((1, 40), 0.1))
    assert found[0, 39] == pytest.approx(1e-40, rel=1e-12, abs=0)
    many = sum(math.comb(40, n) * 0.1**n * 0.9 ** (40 - n) for n in range(21, 41))
    assert found[0, 20] == pytest.approx(many, rel=1e-12, abs=0)
    assert many < 1e-10
    assert found[0, 38] == pytest.approx(1e-40 + 40 * 0.9e-39, rel=1e-12, abs=0)


def test_capacities_by_hand():
    """100 units, half open on average: mean 50, sigma 5."""
    p = np.full((1, 100), 0.5)
    room = {0.0: 64, 2.0: 64, 3.0: 80, 4.0: 80, 7.0: 96, 11.0: 100}
    assert {sigmas: capacity.planned(p, sigmas).item() for sigmas in room} == room
    assert planned_for(50.0, 25.0, 100) == room[4.0]
    assert planned_for(50.0, 25.0, 60) == 60  # not more than there are
    assert planned_for(0.0, 0.0, 100) == 16  # the least that is packed
    assert planned_for(16.0, 0.0, 100) == 16
    assert planned_for(16.1, 0.0, 100) == 32
    assert planned_for(math.nan, math.nan, 100) == 100
    assert planned_for(1.0, -1.0, 100) == 100


def test_between_records_gates_move_linearly():
    one = made()
    at = one.at(np.array([0, 5, 10, 15, 30]))
    a, b, c = one.log_alpha
    for got, wanted in zip(at, (a, (a + b) / 2, b, 0.75 * b + 0.25 * c, c), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", list(trajectories.METHODS))
def test_what_is_saved_is_loaded(tmp_path: Path, method: str):
    one = made(method)
    one.save(tmp_path / "gates.npz")
    found = Trajectory.load(tmp_path / "gates.npz")
    for field in ("method", "command", "names"):
        assert getattr(found, field) == getattr(one, field)
    for field in ("sizes", "steps", "log_alpha", "maps", "ports", "layers"):
        np.testing.assert_array_equal(getattr(found, field), getattr(one, field))


@pytest.mark.parametrize("content", ["nothing", "archive", "part"])
def test_what_is_no_recorded_run_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "gates.npz"
    if content == "part":
        np.savez(path, method=np.array("arm"), command=np.array(""))
    else:
        path.write_bytes(b"PK\x03\x04 cut off" if content == "archive" else b"")
    assert main(["bench", "capacity", "--recorded", str(path)]) == 2
    assert "gates.npz: expected a file of l0kernels bench record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "nowhere/a.npz"], "--to: expected a file in a folder that exists"),
        (["--to", "a.npz", "--seeds", "0,1"], "expected one run from the start"),
        (["--to", "a.npz", "--initial=0,1"], "expected one run from the start"),
    ],
)
def test_refuses_before_it_trains(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trajectories, "record", lambda *_: pytest.fail("it trains"))
    assert main(["bench", "record", "lenet5-hc", "--subset", "100,50", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_short_run_is_recorded(tmp_path: Path, monkeypatch):
    """LeNet-5 on digits: steps, gates, ports and layers are those of the network."""
    monkeypatch.setattr(trajectories, "EVERY", 2)
    words = ["lenet5-hc", "--epochs", "1", "--subset", "500,50", "--to", str(tmp_path / "a.npz")]
    assert main(["bench", "record", *words, "--out", str(tmp_path)]) == 0
    one = Trajectory.load(tmp_path / "a.npz")
    assert one.command == "l0kernels bench record lenet5-hc --subset 500,50 --epochs 1"
    assert one.steps.tolist() == [0, 2, 4, 5]
    assert one.names == ("conv1", "conv2", "fc1.in", "fc1")
    assert one.sizes.tolist() == [20, 50, 800, 500]
    assert np.abs(one.log_alpha[-1] - one.log_alpha[0]).max() > 0
    # LeNet-5 has 20 x 25 + 50 x 20 x 25 + 800 x 500 + 500 x 10 weights.
    assert one.layers[:, 2:4].tolist() == [[1, 20], [20, 50], [800, 500], [500, 10]]
    passes = (2, 3, 3, 3)  # nobody wants the gradient of the pictures
    uses = (24 * 24 * 25, 8 * 8 * 25, 1, 1)
    assert one.layers[:, 4].tolist() == [2 * n * m for n, m in zip(passes, uses, strict=True)]
    walk = capacity.Walk(one, 1)
    assert walk.planned == [0, 1, 3]  # gates on fc1's inputs only multiply
    p = walk.p[0]
    unit, own = p[20:70].repeat(16), p[70:870]
    assert walk._drawn_width(one.layers[2, 0])[0] == pytest.approx((unit * own).sum())
    fits = {0: np.full(5, 16), 1: np.full(5, 48), 3: np.full(5, 400)}
    assert walk._planned_width(one.layers[2, 0], fits).tolist() == [768] * 5
    assert walk._planned_width(one.layers[2, 1], fits).tolist() == [400] * 5


def test_only_methods_that_can_be_drawn_again_are_recorded(tmp_path: Path):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    (plan,) = train.plans(parser.parse_args(["lenet5-hc", "--out", str(tmp_path)]))
    other = replace(plan, recipe=replace(plan.recipe, method="cs"))
    with pytest.raises(ValueError, match="a recipe of hard_concrete, arm, got lenet5-hc"):
        trajectories.record(other, "")


def test_a_policy_by_hand():
    """Every unit is open half of the time: sizes 3 and 4 are below any multiple of 16."""
    one = replace(made(), log_alpha=np.zeros((3, 7)))
    walk = capacity.Walk(one, 10)
    assert walk.steps.tolist() == [9, 19, 29]
    row = walk.policy("made", 1, 4.0)
    p = float(torch.sigmoid(torch.tensor(2 / 3 * math.log(11), dtype=torch.float64)))
    assert row.overflow == row.worst == 0  # all units fit
    assert row.width == pytest.approx(1 / p)
    drawn = 2 * 5 * 3 * p + 10 * 12 * p**2 + 6 * 4 * p * 2
    dense = 2 * 5 * 3 + 10 * 12 + 6 * 4 * 2
    assert row.work == pytest.approx(dense / drawn)
    assert row.saved == 1
    fits = {0: np.array([2, 3, 3]), 1: np.array([4, 3, 4])}
    np.testing.assert_allclose(walk.overflow(fits), [p**3, p**4, 0], atol=1e-15)
    twice = capacity.Walk(replace(one, method="arm"), 10)
    np.testing.assert_allclose(twice.overflow(fits), [2 / 8, 2 / 16, 0], atol=1e-15)


def test_a_plan_is_of_the_step_at_which_it_was_made():
    """All gates open up in 30 steps; a plan of step 0 does not know."""
    closed, opened = np.full(40, -4.0), np.full(40, 4.0)
    one = made(sizes=(20, 20))
    one = replace(one, log_alpha=np.stack((closed, closed, opened)))
    walk = capacity.Walk(one, 10)
    late, early = walk.policy("", 30, 4.0), walk.policy("", 1, 4.0)
    assert late.worst > 0.9
    assert early.worst < 1e-3
    assert early.width < 16 / 20 / 0.05


def test_gates_of_a_larger_network():
    one = made()
    large = capacity.enlarged(one, "wrn-28-10", 0)
    assert large.sizes.tolist() == [160] * 4 + [320] * 4 + [640] * 4
    assert large.log_alpha.shape == (3, 4480)
    columns = {tuple(column) for column in one.log_alpha.T}
    assert {tuple(column) for column in large.log_alpha.T} == columns
    walk = capacity.Walk(large, 10)
    assert walk.planned == list(range(12))
    assert walk._dense() == operations(models.network("wrn-28-10"), 1.0)
    same = capacity.enlarged(one, "wrn-28-10", 0)
    np.testing.assert_array_equal(same.log_alpha, large.log_alpha)


def test_both_methods_are_recorded():
    if not capacity.RECORDED.is_dir():
        pytest.skip("bench/results is not part of a source distribution")
    assert [path.stem for path in RECORDED] == NAMES
    for path in RECORDED:
        one = Trajectory.load(path)
        assert path.stat().st_size < 300_000
        assert one.method == {"lenet5-hc": "hard_concrete", "lenet5-arm": "arm"}[path.stem]
        assert one.steps[0] == 0
        assert one.steps[-1] > 3000
        first, last = capacity.probabilities(one, one.steps[[0, -1]]).sum(1)
        assert last < 0.8 * first  # gates have closed


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
@pytest.mark.parametrize("large", [False, True])
def test_the_policy_fits(path: Path, large: bool):
    """Mean + 4 sigma, planned every 100 steps: below 1e-4 overflows a step; and it can fail."""
    one = Trajectory.load(path)
    if large:
        one = capacity.enlarged(one, "wrn-28-10", 0)
    walk = capacity.Walk(one, 100)
    found = walk.policy(path.stem, 100, 4.0)
    assert 0 < found.overflow < 1e-4
    assert 1 < found.width < 1.6
    assert found.work > 1
    assert found.saved < 1
    assert walk.policy(path.stem, 100, 1.0).overflow > 1e-3
    check = walk.check(path.stem, 0)
    assert check.draws == len(walk.steps) * capacity.SAMPLES
    assert abs(check.drawn - check.computed) < 4.5 * check.error


def test_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(capacity, "LARGE", "wrn-10-1")
    made().save(tmp_path / "mine.npz")
    given = ["--recorded", str(tmp_path / "mine.npz"), "--every", "1,30", "--sigmas", "3,4"]
    assert main(["bench", "capacity", *given, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "capacity.md").read_text() == text
    assert "| wrn-10-1 of mine's gates | 30 steps | 4 |" in text
    written = json.loads((tmp_path / "capacity.json").read_text())
    assert len(written["rows"]) == 2 * 4
    assert written["sources"] == {"mine": "made up"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--every", "15"], "multiples of --stride 10"),
        (["--every", "one"], "expected integers"),
        (["--every", "0"], "expected steps"),
        (["--stride", "0"], "expected steps"),
        (["--sigmas=-1"], "sigmas"),
        (["--recorded", "nowhere.npz"], "no file nowhere.npz"),
    ],
)
def test_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = main(["bench", "capacity", *options])
    except SystemExit as error:
        code = error.code
    assert code != 0
    assert message in capsys.readouterr().err
