# SPDX-License-Identifier: Apache-2.0
"""Rounds are paired and rotated, statistics are right, spinning threads are refused."""

import gc
import math
import os
from collections.abc import Callable

import pytest
import torch

from l0kernels.bench import timing


def test_spread_is_median_and_quartiles():
    got = timing.spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert got == timing.Spread(3.0, 2.0, 4.0)
    assert str(got) == "3.000 (2.000 - 4.000)"
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one value"):
        timing.spread([])


def test_ratios_are_paired_before_the_median():
    times = {"a": [1.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]}
    assert timing.paired(times, "a", "b") == timing.Spread(2.0, 1.5, 2.5)
    with pytest.raises(ValueError):
        timing.paired({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


def test_variants_take_turns_and_the_first_moves_on():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(steps, rounds=4, warmup=0)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(value >= 0 for ms in times.values() for value in ms)


def test_last_steps_end_every_round_and_are_prepared_outside_the_clock(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[str] = []
    seconds = [0]

    def takes(name: str, ticks: int) -> Callable[[], None]:
        def work() -> None:
            calls.append(name)
            seconds[0] += ticks

        return work

    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds[0])
    steps = {name: takes(name, 1) for name in "xabc"}
    last = {"c": takes("prepare c", 100), "x": takes("prepare x", 100)}
    times = timing.interleave(steps, rounds=2, warmup=1, last=last)
    end = ["prepare c", "c", "prepare x", "x"]
    # The untimed round has index -1: b is first.
    assert calls == ["b", "a", *end, "a", "b", *end, "b", "a", *end]
    assert times == {name: [1e3, 1e3] for name in "xabc"}
    assert list(times) == list("xabc")


def test_interval_of_a_median():
    """Of a normal sample it is as wide as theory says: 1.96 sqrt(pi / 2 / n) to each side."""
    assert timing.interval_of_median([2.0] * 7) == (2.0, 2.0)
    values = torch.randn(2001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = timing.interval_of_median(values.tolist())
    assert low < values.median() < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(math.pi / 2 / 2001), rel=0.25)
    with pytest.raises(ValueError, match="expected at least one value, got none"):
        timing.interval_of_median([])


@pytest.mark.parametrize(("ticks", "times"), [(100, 1), (50, 1), (49, 2), (10, 5), (1, 50)])
def test_short_steps_are_repeated_until_they_fill_a_turn(
    monkeypatch: pytest.MonkeyPatch, ticks: int, times: int
):
    seconds = [0]

    def step() -> None:
        seconds[0] += ticks

    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds[0])
    assert timing.often(step, torch.device("cpu"), 50) == times
    timing.repeated(step, times)
    assert seconds == [(2 + times) * ticks]


def test_last_names_a_step():
    with pytest.raises(ValueError, match="expected last among a, got b"):
        timing.interleave({"a": int}, rounds=1, last={"b": int})


def test_warmup_runs_but_does_not_count():
    calls: list[str] = []
    times = timing.interleave({"a": lambda: calls.append("a")}, rounds=2, warmup=3)
    assert len(calls) == 5
    assert len(times["a"]) == 2


def test_garbage_collection_is_back_after_an_error():
    def fail() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        timing.interleave({"a": fail}, rounds=1)
    assert gc.isenabled()


def test_rounds_are_checked():
    for rounds, warmup in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="expected rounds >= 1 and warmup >= 0"):
            timing.interleave({"a": int}, rounds=rounds, warmup=warmup)


@pytest.mark.parametrize("policy", [None, "active", ""])
def test_spinning_threads_are_refused(monkeypatch: pytest.MonkeyPatch, policy: str | None):
    if policy is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    got = "it is not set" if policy is None else f"got '{policy}'"
    with pytest.raises(RuntimeError, match=f"expected OMP_WAIT_POLICY=passive .*{got}"):
        timing.interleave({"a": int}, rounds=1)


@pytest.mark.parametrize("policy", ["passive", "PASSIVE", " Passive "])
def test_passive_threads_are_accepted(monkeypatch: pytest.MonkeyPatch, policy: str):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    times = timing.interleave({"a": int}, rounds=1, warmup=0)
    assert len(times["a"]) == 1


def test_environment_says_what_a_reader_needs():
    found = timing.environment()
    for key in ("cpu", "threads", "torch", "l0kernels", "git", "load_average", "time"):
        assert key in found
    assert found["device"] == "cpu"
    assert found["OMP_WAIT_POLICY"] == os.environ["OMP_WAIT_POLICY"]
    assert isinstance(found["cpu"], str) and found["cpu"]


def test_environment_says_how_memory_is_allocated(monkeypatch):
    for name in [name for name in os.environ if timing.is_of_allocator(name)]:
        monkeypatch.delenv(name)
    assert timing.environment()["allocator"] == ""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    expected = "MALLOC_MMAP_MAX_=0 THP_MEM_ALLOC_ENABLE=1"
    assert timing.environment()["allocator"] == expected


def test_commit_is_only_told_for_a_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "run_git", lambda *arguments, folder: None)
    assert timing.git_commit() is None
    answers = {"rev-parse": "/elsewhere", "status": ""}
    monkeypatch.setattr(timing, "run_git", lambda first, *rest, folder: answers[first])
    assert timing.git_commit() is None


def test_onednn_gets_room_unless_the_user_has_said_how_much(monkeypatch):
    monkeypatch.setenv(timing.ONEDNN_CACHE, "put back afterwards")
    monkeypatch.delenv(timing.ONEDNN_CACHE)
    timing.keep_what_onednn_prepares()
    assert timing.environment()[timing.ONEDNN_CACHE] == os.environ[timing.ONEDNN_CACHE] == "32768"
    monkeypatch.setenv(timing.ONEDNN_CACHE, "7")
    timing.keep_what_onednn_prepares()
    assert os.environ[timing.ONEDNN_CACHE] == "7"
