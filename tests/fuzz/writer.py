# SPDX-License-Identifier: Apache-2.0
"""Writes the source of a random network, line by line.

Each line is run as soon as it is written, so that the next one is chosen for shapes that exist:
every drawn program is valid, and a failing one can be read, pasted and run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[[st.SearchStrategy[Any]], Any]

NAMES = {
    "torch": torch,
    "F": F,
    "nn": nn,
    "math": math,
    "weight_norm": nn.utils.parametrizations.weight_norm,
}
IMPORTS = """\
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import l0kernels as l0
from fuzz.cases import check
from fuzz.writer import enliven, random_inputs
"""


@dataclass(frozen=True)
class Use:
    """One operation of a program and the layers whose units it works on."""

    operation: str
    layers: frozenset[str]


@dataclass
class Program:
    """A network as source text.

    Args:
        source: a class ``Net``.
        seed: of ``torch`` when ``Net`` is made, and of the weights.
        dead: share of the channels that are dead (zero filters, zero gammas, very low biases).
        shapes: of the inputs.
        uses: what was written.
    """

    source: str
    seed: int
    dead: float
    shapes: list[tuple[int, ...]]
    uses: list[Use] = field(default_factory=list)

    def build(self) -> nn.Module:
        """A new instance, the same every time."""
        names = dict(NAMES)
        exec(self.source, names)  # written by this package only
        torch.manual_seed(self.seed)
        net = names["Net"]()
        enliven(net, self.seed, self.dead)
        return net

    def __str__(self) -> str:
        return (
            f"{IMPORTS}\n\n{self.source}\n\n"
            f"torch.manual_seed({self.seed})\nnet = Net()\n"
            f"enliven(net, {self.seed}, {self.dead})\ninputs = random_inputs({self.shapes})\n"
        )


def random_inputs(shapes: list[tuple[int, ...]], seed: int = 0) -> tuple[Tensor, ...]:
    """Normally distributed inputs, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@torch.no_grad()
def enliven(net: nn.Module, seed: int, dead: float) -> None:
    """Weights and statistics away from their usual starting values, some channels dead.

    Args:
        net: changed in place.
        seed: of the values.
        dead: share of channels with zero filters, zero gammas or very low biases.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    for name, p in net.named_parameters():
        if p.dim() > 1:
            p.copy_(normal(p) * 1.5 / max(1, p[0].numel()) ** 0.5)
        else:
            p.copy_(normal(p) * 0.5 + (0.0 if name.endswith("bias") else 0.8))
        # A parametrized weight of zero length has no direction.
        share = 0.0 if "parametrizations" in name else dead
        chosen = torch.rand(p.shape[:1], generator=generator) < share
        p[chosen] = -4.0 if name.endswith("bias") else 0.0
    for name, b in net.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(normal(b) * 0.3)
        elif name.endswith("running_var"):
            b.copy_(0.3 + normal(b).abs())


class Writer:
    """A program being written.

    Args:
        draw: hypothesis' draw.
        shapes: of the inputs ``x`` (and ``y``).
        tokens: whether 3-d values are [B, T, C] rather than [B, C, L].
    """

    def __init__(self, draw: Draw, shapes: list[tuple[int, ...]], tokens: bool) -> None:
        self.draw = draw
        self.shapes = shapes
        self.tokens = tokens
        self.module = nn.Module()
        self.values = {name: torch.randn(shape) for name, shape in zip("xy", shapes, strict=False)}
        self.makers: dict[str, frozenset[str]] = {name: frozenset() for name in self.values}
        self.init: list[str] = []
        self.body: list[str] = []
        self.uses: list[Use] = []
        self.now = "x"
        self.count = 0
        # Whether nothing has read the current value and its making saved nothing of it.
        self.fresh = False

    # Choices.

    def of(self, *options: Any) -> Any:
        """One of these, the first being the simplest."""
        return self.draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        """An integer from low to high."""
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        """Yes or no; no is simpler."""
        return self.draw(st.booleans())

    # The current value.

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.values[self.now].shape)

    @property
    def layout(self) -> str:
        """One of 2d, 1d, tokens, flat."""
        return {4: "2d", 2: "flat", 3: "tokens" if self.tokens else "1d"}[len(self.shape)]

    @property
    def dim(self) -> int:
        """Its dimension of channels."""
        return 2 if self.layout == "tokens" else 1

    @property
    def width(self) -> int:
        """Its number of channels."""
        return self.shape[self.dim]

    @property
    def space(self) -> tuple[int, ...]:
        """Its other dimensions, without the batch."""
        return tuple(n for i, n in enumerate(self.shape) if i not in (0, self.dim))

    @property
    def space_dims(self) -> str:
        """These dimensions, as source."""
        return {"2d": "(2, 3)", "1d": "(2,)", "tokens": "(1,)"}[self.layout]

    @property
    def per_channel(self) -> str:
        """Arguments of ``view`` that align a vector of channels with the value."""
        return {"2d": "-1, 1, 1", "1d": "-1, 1", "tokens": "-1", "flat": "-1"}[self.layout]

    def space_of(self, name: str) -> tuple[int, ...]:
        """Dimensions of a value of channels first, without batch and channels."""
        return self._shape(name)[2:]

    def draw_order(self, count: int) -> list[int]:
        """Some channel numbers in some order, repeats allowed."""
        return self.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count))

    def like_now(self) -> list[str]:
        """Other values of the same shape, latest first."""
        return [n for n in reversed(self.values) if n != self.now and self._shape(n) == self.shape]

    def beside_now(self) -> list[str]:
        """Other values that may be concatenated with the current one, latest first."""
        return [
            n
            for n in reversed(self.values)
            if n != self.now and self._rest(self._shape(n)) == self._rest(self.shape)
        ]

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def _rest(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return () if len(shape) <= self.dim else shape[: self.dim] + shape[self.dim + 1 :]

    # Lines.

    def new(self, stem: str) -> str:
        """A name that is not used yet."""
        self.count += 1
        return f"{stem}{self.count}"

    def member(self, stem: str, code: str) -> str:
        """Write ``self.<stem><number> = code``; returns the name."""
        name = self.new(stem)
        self.setup(f"self.{name} = {code}")
        return name

    def setup(self, line: str) -> None:
        """Write a line of ``__init__``."""
        exec(line, NAMES | {"self": self.module})
        self.init.append(line)

    def note(self, operation: str, *layers: str) -> None:
        """Note an operation on the current value's units, or on those of these layers."""
        made = frozenset(layers) if layers else self.makers[self.now]
        self.uses.append(Use(operation, made))

    def let(self, code: str, operation: str = "", layer: str = "", fresh: bool = False) -> str:
        """Write ``h<number> = code`` and make it the current value.

        Args:
            code: ``{h}`` stands for the current value.
            operation: what it is, for the tables.
            layer: name of the layer that makes the value's units; else they are those that the
                code reads.
            fresh: whether an in-place operation may follow.

        Returns:
            The value's name.
        """
        if operation:
            self.note(operation)
        code = code.replace("{h}", self.now)
        name = self.new("h")
        scope = {"self": self.module, **self.values}
        with torch.no_grad():
            value = eval(code, NAMES | scope)
        read = [self.makers[n] for n in re.findall(r"\b[hxy]\d*\b", code) if n in self.makers]
        self.makers[name] = frozenset({layer}) if layer else frozenset().union(*read)
        self.values[name] = value
        self.body.append(f"{name} = {code}")
        self.now, self.fresh = name, fresh
        return name

    def let_if_small(self, code: str, most: int, operation: str) -> None:
        """Write a line that widens the value, unless it is wide enough."""
        if math.prod(self.shape[1:]) * 2 <= most:
            self.let(code, operation)

    def apply(self, name: str, operation: str, code: str = "self.{m}({h})") -> str:
        """Write the call of a layer that makes new units."""
        self.note(f"read by {operation}")
        made = self.let(code.replace("{m}", name), layer=name, fresh=True)
        self.note(operation, name)
        return made

    def program(self, ending: list[str], seed: int, dead: float) -> Program:
        """The finished program; ``ending`` are the last lines of the forward."""
        arguments = ", ".join(["self", *"xy"[: len(self.shapes)]])
        lines = ["class Net(nn.Module):", "    def __init__(self):"]
        lines += [f"        {line}" for line in ["super().__init__()", *self.init]]
        lines += ["", f"    def forward({arguments}):"]
        lines += [f"        {line}" for line in [*self.body, *ending]]
        return Program("\n".join(lines) + "\n", seed, dead, self.shapes, self.uses)
