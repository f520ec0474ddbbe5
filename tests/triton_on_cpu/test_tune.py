# SPDX-License-Identifier: Apache-2.0
"""Tuning in Triton's interpreter: real kernels, times that are made up."""

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from l0kernels.bench import tune
from l0kernels.ops.gated_linear import tiles, triton
from l0kernels.ops.gated_linear.tiles import HEURISTICS, Place, Tiles

CPU = torch.device("cpu")
ROWS = triton.IN_PLACE_ROWS + 1
SMALL: tune.Problems = {
    ("layer", "float32"): (("gated_linear", f"8x16x{ROWS}", "f32"),),
    ("layer", "in place"): (("gated_linear", "8x16x5", "bf16"),),
    ("layer", "uneven"): (("gated_linear", f"9x17x{ROWS}", "bf16"),),
    ("layer", "narrow"): (("gated_linear", f"8x16x{ROWS}", "bf16"),),
    ("layer", "wide"): (("gated_linear", f"8x72x{ROWS}", "bf16"),),
    ("weight", "float32"): (("gated_linear", "8x16x20", "f32"),),
    ("weight", "uneven"): (("gated_linear", "9x17x20", "bf16"),),
    ("weight", "narrow"): (("gated_linear", "8x16x20", "bf16"),),
    ("weight", "wide"): (("gated_linear", "72x72x20", "bf16"),),
}
LAYER: Place = ("layer", "narrow")
DEFAULT = HEURISTICS[LAYER]


def timed(times: dict[Tiles, float], calls: list | None = None) -> tune.Time:
    """Milliseconds by the sizes that are being tried; 10 for all others. Every step runs once."""

    def time(step) -> float:
        step()
        (now,) = tiles._tried.values()
        if calls is not None:
            calls.append(now)
        return times.get(now, 10.0)

    return time


def tuned(times: dict[Tiles, float], place: Place = LAYER, **given) -> tune.Found:
    (found,) = tune.tune(CPU, "quick", timed(times, **given), {place: SMALL[place]})
    assert not tiles._tried
    return found


@pytest.mark.parametrize("problems", ["small", "full"])
def test_problems_are_at_their_places(problems: str, monkeypatch):
    """What is timed asks for the sizes that are tried."""
    chosen = SMALL if problems == "small" else tune.PROBLEMS
    assert set(chosen) == set(HEURISTICS)
    for (kernel, kind), shapes in chosen.items():
        for name, shape, dtype in shapes:
            sizes = [int(n) for n in shape.split("x")]
            rows = sizes[2] if name == "gated_linear" else sizes[4] * sizes[3] ** 2
            kinds = {"dtype": tune.DTYPES[dtype], "device": "meta"}
            x, y = (torch.empty(rows, n, **kinds) for n in sizes[:2])
            asked: list[Place] = []
            monkeypatch.setattr(triton, "tiles_at", lambda at, _, asked=asked: asked.append(at))
            if kernel == "layer":
                triton.layer_tiles(x, y.shape[1], rows <= triton.IN_PLACE_ROWS)
            else:
                triton.weight_tiles(y, x)
            assert asked == [(kernel, kind)]


@pytest.mark.parametrize("place", SMALL, ids=" ".join)
def test_the_fastest_wins(place: Place):
    tried = tune.candidates(place, "quick")
    found = tuned({tried[0]: 5.0, tried[-1]: 4.0, tried[-2]: 4.5}, place)
    assert (found.best, found.ms, found.default_ms) == (tried[-1], 4.0, 5.0)
    assert (found.tried, found.wrong, found.refused) == (len(tried), 0, 0)


def test_what_is_hardly_faster_does_not_replace_the_default():
    other = tune.candidates(LAYER, "quick")[1]
    found = tuned({DEFAULT: 5.0, other: 5.0 * tune.GAIN + 0.01})
    assert (found.best, found.ms) == (DEFAULT, 5.0)


def test_a_default_that_was_slow_once_is_timed_again():
    seen: list[Tiles] = []

    def time(step) -> float:
        (now,) = tiles._tried.values()
        seen.append(now)
        return 10.0 if len(seen) > 1 else 20.0  # the first is the default's

    (found,) = tune.tune(CPU, "quick", time, {LAYER: SMALL[LAYER]})
    assert (found.best, found.ms) == (DEFAULT, 10.0)
    assert seen.count(DEFAULT) == 2 and len(seen) == found.tried + 2


def test_what_is_wrong_never_wins(monkeypatch):
    wrong = tune.candidates(LAYER, "quick")[2]
    run = triton.Layer.run

    def broken(self, a, bias, relu, out, backward):
        run(self, a, bias, relu, out, backward)
        if tiles._tried.get(LAYER) == wrong and not backward:
            out[0, 0] += 1.0

    monkeypatch.setattr(triton.Layer, "run", broken)
    calls: list = []
    found = tuned({wrong: 0.1}, calls=calls)
    assert (found.best, found.wrong) == (DEFAULT, 1)
    assert wrong not in calls  # it is not even timed
    assert len(calls) == found.tried - 1


@pytest.mark.parametrize(
    "error", [OutOfResources(300_000, 232_448, "shared memory"), PTXASError("too many registers")]
)
def test_what_does_not_fit_is_left_out(monkeypatch, error: Exception):
    large = tune.candidates(LAYER, "quick")[1]
    run = triton.Layer.run

    def refuse(self, *arguments):
        if tiles._tried.get(LAYER) == large:
            raise error
        run(self, *arguments)

    monkeypatch.setattr(triton.Layer, "run", refuse)
    found = tuned({large: 0.1})
    assert (found.best, found.refused, found.wrong) == (DEFAULT, 1, 0)


def test_a_wrong_default_is_an_error(monkeypatch):
    run = triton.Layer.run

    def broken(self, a, bias, relu, out, backward):
        run(self, a, bias, relu, out, backward)
        out[0, 0] += 1.0

    monkeypatch.setattr(triton.Layer, "run", broken)
    with pytest.raises(RuntimeError, match="expected the default"):
        tuned({})
