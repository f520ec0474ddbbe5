# SPDX-License-Identifier: Apache-2.0
"""Random networks as a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

from fuzz.pieces import add_layer, add_piece, kind
from fuzz.writer import Draw, Program, Writer

FAMILIES = ("2d", "2d", "1d", "tokens")


@st.composite
def programs(draw: Draw, families: tuple[str, ...] = FAMILIES) -> Program:
    """Networks of 1 to 8 pieces and an ending; every one of them runs."""
    family = draw(st.sampled_from(families))
    w = Writer(draw, _shapes(draw, family), family == "tokens")
    for _ in range(draw(st.integers(1, 8))):
        add_piece(w)
    ending = _ending(w)
    dead = draw(st.sampled_from((0.0, 0.0, 0.2)))
    return w.program(ending, draw(st.integers(0, 999)), dead)


def _shapes(draw: Draw, family: str) -> list[tuple[int, ...]]:
    batch, width = draw(st.integers(3, 4)), draw(st.integers(2, 4))
    size = draw(st.integers(4, 6))
    shape = {"2d": (width, size, size), "1d": (width, size), "tokens": (size - 2, width)}[family]
    count = 2 if draw(st.integers(0, 7)) == 7 else 1
    return [(batch, *shape)] * count


def _ending(w: Writer) -> list[str]:
    """The head and the return statement."""
    if w.number(0, 5) < 5 or not list(w.module.parameters()):
        _head(w)
    result, *others = w.now, *_earlier(w)
    form = w.of("tensor", "tensor", "tensor", "tuple", "dict", "auxiliary head")
    if form == "tensor" or not others:
        return [f"return {result}"]
    other = w.of(*others)
    if form == "auxiliary head":
        return _auxiliary(w, result, other)
    w.note("second output", *w.makers[other])
    pair = f"({result}, {other})" if form == "tuple" else f"{{'out': {result}, 'more': {other}}}"
    return [f"return {pair}"]


def _earlier(w: Writer) -> list[str]:
    """Values that could leave the model too: floating, not the inputs."""
    return [n for n in w.values if n not in ("x", "y", w.now)]


def _head(w: Writer) -> None:
    """Pool or flatten, then a linear layer, as classifiers end."""
    if w.layout != "flat" and w.flag():
        w.let(f"{{h}}.mean({w.space_dims})", "mean over space")
    if w.layout in ("2d", "1d"):
        w.let("{h}.flatten(1)", "flatten")
    add_layer(w, w.number(2, 5))


def _auxiliary(w: Writer, result: str, other: str) -> list[str]:
    """A second head that runs in training mode only."""
    features = w.values[other].flatten(1).shape[1]
    name = w.member("aux", f"nn.Linear({features}, 2)")
    w.note("read by a head in training only", *w.makers[other])
    w.note(kind(w), name)
    return [
        "if self.training:",
        f"    return {result}, self.{name}({other}.flatten(1))",
        f"return {result}",
    ]
