# SPDX-License-Identifier: Apache-2.0
"""One case: a random network converted and compared with the oracle."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import l0kernels as l0
from fuzz.networks import FAMILIES, programs
from fuzz.oracle import (
    TOLERANCE,
    Masks,
    Scope,
    collect,
    difference,
    is_finite,
    masked,
    rounding,
    scale,
)
from fuzz.writer import Draw, Program, random_inputs
from l0kernels.gates.capacity import Plan, groups_of_ports

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
)
# Errors up to this multiple of what rounding noise does to the oracle itself are not judged.
ILL_CONDITIONED = 100.0
DRAWS = 6


class Wrong(AssertionError):
    """``convert`` accepted a network and it is not what the oracle says."""


OPTIONS = (
    'select="inner"',
    'select="inner", granularity="input"',
    "select=l0.select.inner | l0.select.heads",
    "select=l0.select.heads",
    "select=lambda name, module: True",
    'select=lambda name, module: True, granularity="input"',
    'select="inner", multiple=3',
    'select=lambda name, module: True, granularity="input", multiple=4',
    'select="inner", planned=True',
    'select=lambda name, module: True, granularity="input", planned=True',
)


@dataclass
class Case:
    """A network and how it is converted.

    Args:
        program: the network.
        training: its mode when it is converted.
        options: of ``convert``, as source.
    """

    program: Program
    training: bool
    options: str

    def __str__(self) -> str:
        return (
            f"{self.program}net.train({self.training})\nprint(check(net, inputs, {self.options}))\n"
        )

    def run(self) -> Outcome:
        """See :func:`check`."""
        net = self.program.build().train(self.training)
        options = eval(f"dict({self.options})", {"l0": l0})  # one of OPTIONS
        return check(net, random_inputs(self.program.shapes), **options)


@st.composite
def cases(draw: Draw, families: tuple[str, ...] = FAMILIES) -> Case:
    """Networks with options of ``convert``."""
    program = draw(programs(families))
    options = draw(st.sampled_from(OPTIONS))
    return Case(program, draw(st.booleans()), options)


@dataclass
class Outcome:
    """What a case came to.

    Args:
        groups: number of groups; 0 where the whole network was refused.
        gated: layers whose units are gated.
        ill: comparisons that rounding alone decides.
    """

    groups: int = 0
    gated: set[str] = field(default_factory=set)
    ill: int = 0


@dataclass
class Tally:
    """Totals over cases, and how often each operation met gated and ungated units."""

    cases: int = 0
    converted: int = 0
    groups: int = 0
    ill: int = 0
    gated: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count one case."""
        self.cases += 1
        self.converted += outcome.groups > 0
        self.groups += outcome.groups
        self.ill += outcome.ill
        for use in case.program.uses:
            for layer in use.layers:
                counter = self.gated if layer in outcome.gated else self.refused
                counter[use.operation] += 1

    def merge(self, other: Tally) -> None:
        """Add another tally."""
        self.cases += other.cases
        self.converted += other.converted
        self.groups += other.groups
        self.ill += other.ill
        self.gated += other.gated
        self.refused += other.refused

    def line(self, wrong: int) -> str:
        """Totals, with the number of cases that went wrong."""
        refused = self.cases - self.converted
        return (
            f"{self.cases + wrong} cases: {self.converted} converted ({self.groups} groups), "
            f"{refused} refused whole, {wrong} wrong; "
            f"{self.ill} of {DRAWS * self.converted} comparisons are decided by rounding"
        )

    def table(self) -> str:
        """Operations, most frequent first."""
        total = self.gated + self.refused
        rows = [f"{'operation':44} {'layers':>8} {'gated':>8} {'refused':>8}"]
        for name, count in total.most_common():
            rows.append(f"{name:44} {count:8} {self.gated[name]:8} {self.refused[name]:8}")
        return "\n".join(rows)


def check(
    plain: nn.Module,
    inputs: tuple[Tensor, ...],
    multiple: int | None = None,
    planned: bool = False,
    **options: Any,
) -> Outcome:
    """Convert a copy of a network and compare it with the oracle.

    Args:
        plain: the network; it ends in fp64, without dropout.
        inputs: for ``convert``; the comparison takes others.
        multiple: what widths are rounded up to multiples of; None: as on this device.
        planned: whether widths are those of a plan with some room.
        options: of ``convert``.

    Raises:
        Wrong: the copy differs.
        Exception: whatever else ``convert`` raises but a refusal of the whole network.
    """
    with mock.patch.object(l0.gates.Gates, "_multiple", multiple):
        return _check(plain, inputs, planned, options)


def _check(
    plain: nn.Module, inputs: tuple[Tensor, ...], planned: bool, options: dict[str, Any]
) -> Outcome:
    packed = copy.deepcopy(plain)
    before = {n: t.clone() for n, t in packed.state_dict().items()}
    try:
        l0.convert(packed, "hard_concrete", example_inputs=inputs, **options)
    except ValueError as error:
        if "nothing can be gated" not in str(error):
            raise
        _check_untouched(packed, plain, before)
        return Outcome()
    _check_state(packed, before)
    _check_report(packed, plain, inputs)
    masks = Masks.of(packed)
    gates: Any = packed.l0
    outcome = Outcome(len(gates.names), _gated(packed, masks))
    for net in (plain, packed):
        _without_dropout(net).double()
    others = tuple(x.double() for x in random_inputs([tuple(x.shape) for x in inputs], seed=1))
    scope = partial(at_capacity, gates) if planned else gates.using
    outcome.ill = _compare(plain, packed, scope, masks, others)
    _check_compact(plain, packed, masks, others)
    _check_revert(plain, packed, others)
    return outcome


def _without_dropout(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return net


def _gated(packed: nn.Module, masks: Masks) -> set[str]:
    modules = dict(packed.named_modules())
    return {name for name in masks.made if isinstance(modules[name], LAYERS)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def _check_untouched(net: nn.Module, plain: nn.Module, before: dict[str, Tensor]) -> None:
    """A refused network is as it was."""
    _check_state(net, before)
    types = [type(m) for m in net.modules()]
    _require(types == [type(m) for m in plain.modules()], "a refused network was changed")
    _require(not net._forward_pre_hooks, "a refused network has a hook")


def _check_state(net: nn.Module, before: dict[str, Tensor]) -> None:
    state = net.state_dict()
    own = [name for name in state if not name.startswith("l0.")]
    _require(own == list(before), f"keys {sorted(set(own) ^ set(before))} changed")
    for name, value in before.items():
        _require(torch.equal(state[name], value), f"convert changed {name}")


def _check_report(packed: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Every called layer is in a group or has a reason."""
    report = l0.report(packed)
    _require(str(report).startswith("| group"), "the report cannot be printed")
    made = {name for row in report.groups for name in row.producers}
    silent = _called_layers(plain, inputs) - made - set(report.ungated)
    _require(not silent, f"neither gated nor refused with a reason: {sorted(silent)}")


def _called_layers(plain: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """Convolutions (not depthwise) and linear layers that run in training or eval mode."""
    called: set[str] = set()
    net = copy.deepcopy(plain)
    for name, module in net.named_modules():
        depthwise = 1 < getattr(module, "groups", 1) == module.in_channels  # pyright: ignore
        if isinstance(module, LAYERS) and not depthwise:
            module.register_forward_hook(lambda m, a, o, name=name: called.add(name))
    with torch.no_grad():
        net.train()(*inputs)
        net.eval()(*inputs)
    return called


def draws(gates: Any) -> Iterator[tuple[bool, Tensor]]:
    """Mode and gate values: random ones, none open, one open per group, all open."""
    generator = torch.Generator().manual_seed(int(gates.count))
    zeros = torch.zeros(gates.count, dtype=torch.float64)
    one = zeros.clone()
    for _, where in gates.slices():
        size = where.stop - where.start
        one[where.start + int(torch.randint(size, (1,), generator=generator))] = 0.7

    def some(fraction: float) -> Tensor:
        u = torch.rand(2, gates.count, generator=generator, dtype=torch.float64)
        return torch.where(u[0] < fraction, 0.05 + 0.95 * u[1], 0.0)

    yield from ((True, z) for z in (some(0.5), zeros, one, some(0.8)))
    yield from ((False, z) for z in (some(0.5), some(0.2)))


@contextmanager
def at_capacity(gates: Any, z: Tensor) -> Iterator[None]:
    """In the scope these gates are drawn, and up to two closed units of each group are packed."""
    whole = groups_of_ports(gates)[1]
    rooms = []
    for group, (_, where) in enumerate(gates.slices()):
        size, count = where.stop - where.start, int((z[where] != 0).sum())
        fits = min(size, max(2, count + (size + count) % 3))
        rooms.append(size if group in whole else fits)
    plan = Plan(gates, rooms, torch.zeros(()))
    with gates.at_capacity(plan), gates.using(z):
        yield
    _require(float(plan.flag) == 0, f"a plan of {rooms} does not fit")


def _compare(
    plain: nn.Module,
    packed: nn.Module,
    scope: Scope,
    masks: Masks,
    inputs: tuple[Tensor, ...],
) -> int:
    """Packed against masked over all draws; returns how many could not be judged."""
    gates: Any = packed.l0
    run_masked = partial(masked, plain, masks)
    ill = 0
    for number, (training, z) in enumerate(draws(gates)):
        plain.train(training)
        packed.train(training)

        place = f"draw {number}, {'training' if training else 'eval'} mode"
        exact = collect(plain, run_masked, inputs, z)
        assert is_finite(exact), f"{place}: the masked network is not finite"
        try:
            got = collect(packed, scope, inputs, z)
        except Exception as error:
            raise Wrong(f"{place}: the packed network fails: {error!r}") from error
        error, where = difference(exact, got)
        if not error <= TOLERANCE:
            noise = _sensitivity(plain, run_masked, inputs, z, exact)
            if not error <= ILL_CONDITIONED * noise:
                raise Wrong(f"{place}: {where} differs by {error:.1e} (noise {noise:.1e})")
            ill += 1
        _check_closed(packed, masks, z, exact, got, place)
    return ill


def _sensitivity(
    plain: nn.Module, run: Scope, inputs: tuple[Tensor, ...], z: Tensor, exact: dict[str, Tensor]
) -> float:
    """How much rounding noise alone changes the masked network, at most of five times."""
    worst = 0.0
    for seed in range(5):
        with rounding(plain, seed):
            worst = max(worst, difference(exact, collect(plain, run, inputs, z))[0])
    return worst


def _check_closed(
    packed: nn.Module,
    masks: Masks,
    z: Tensor,
    exact: dict[str, Tensor],
    got: dict[str, Tensor],
    place: str,
) -> None:
    """Gradients of closed rows and columns are exactly zero, where the oracle's are.

    They are not where the weight is used outside its layer too.
    """
    modules = dict(packed.named_modules())
    for side, maps_of in ((0, masks.made), (1, masks.read)):
        for name, maps in maps_of.items():
            closed = scale(maps, z) == 0
            for kind in ("weight", "bias") if side == 0 else ("weight",):
                key = f"grad {name}.{kind}"
                if key not in got:
                    continue
                turned = isinstance(modules[name], nn.modules.conv._ConvTransposeNd)
                dim = 1 - side if turned and kind == "weight" else side
                theirs, ours = (t[key].movedim(dim, 0)[closed] for t in (exact, got))
                _require(bool((ours[theirs == 0] == 0).all()), f"{place}: {key} where closed")


@torch.no_grad()
def _check_compact(
    plain: nn.Module, packed: nn.Module, masks: Masks, inputs: tuple[Tensor, ...]
) -> None:
    """The compact network, plain layers only, is the masked one in eval mode."""
    gates: Any = packed.l0
    generator = torch.Generator().manual_seed(int(gates.count))
    u = torch.rand(gates.count, generator=generator, dtype=torch.float64)
    gates.log_alpha.copy_(8.0 * u - 5.0)
    plain.eval()
    try:
        small = l0.compact(packed, inputs).eval()
    except Exception as error:
        raise Wrong(f"compact fails: {error!r}") from error
    _require(not hasattr(small, "l0"), "the compact network has gates")
    with masked(plain, masks, gates.deterministic()):
        exact = {"output": _flat(plain(*inputs))}
    error, _ = difference(exact, {"output": _flat(small(*inputs))})
    _require(error <= TOLERANCE, f"compact: outputs differ by {error:.1e}")


def _check_revert(plain: nn.Module, packed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    l0.revert(packed)
    types = [type(m) for m in packed.modules()]
    _require(types == [type(m) for m in plain.modules()], "revert: classes differ")
    _require(list(packed.state_dict()) == list(plain.state_dict()), "revert: keys differ")
    with torch.no_grad():
        outputs = (net.eval()(*inputs) for net in (plain, packed))
        exact, got = ({"output": _flat(value)} for value in outputs)
    error, _ = difference(exact, got)
    _require(error <= 1e-12, f"revert: outputs differ by {error:.1e}")


def _flat(value: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tree_leaves(value)])
