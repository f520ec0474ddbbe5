# SPDX-License-Identifier: Apache-2.0
"""Random networks: what ``convert`` accepts equals the masked oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis.database import InMemoryExampleDatabase
from torch import Tensor, nn

import l0kernels as l0
from fuzz.cases import Case, Outcome, Tally, Wrong, check
from fuzz.search import Search
from fuzz.writer import enliven, random_inputs

CASES = {"2d": 500, "1d": 250, "tokens": 250}
# Operations that gated units pass in a good part of these cases; else the search is idle.
PASSED = {
    "2d": ("read by conv2d", "batch norm", "depthwise", "concat", "flatten", "GLU product"),
    "1d": ("read by conv1d", "batch norm", "depthwise", "concat", "flatten", "GLU product"),
    "tokens": ("read by linear, tokens", "GLU product", "attention o"),
}


@pytest.mark.parametrize("family", CASES)
def test_random_networks_equal_the_oracle_or_are_refused(family: str):
    torch.set_num_threads(1)
    search = Search((family,))
    search.run(CASES[family], start=0, most_failures=1)
    if search.failures:
        pytest.fail(f"{search.failures[0].source}\n{search.failures[0].error}", pytrace=False)
    tally = search.tally
    assert tally.cases == CASES[family]
    assert tally.converted >= 0.4 * tally.cases, tally.line(0)
    # A handful of kinks (a maximum of equal values, ReLU at zero) may fall to rounding.
    assert tally.ill <= 0.02 * tally.converted, tally.line(0)
    idle = [operation for operation in PASSED[family] if not tally.gated[operation]]
    assert not idle, idle


class Small(nn.Module):
    """Two convolutions with everything that the checks look at."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


def checked() -> None:
    net = Small()
    enliven(net, 0, 0.0)
    outcome = check(net, random_inputs([(3, 3, 5, 5)]), select="inner")
    assert outcome.groups == 2 and outcome.gated == {"a", "b"}


def shift_map(net: nn.Module) -> None:
    net.b.in_gate.maps = (net.b.in_gate.maps[0].roll(1),)
    net.l0.attach(net)


def drop_reader(net: nn.Module) -> None:
    net.head.connect(None, None)
    net.head.__class__ = nn.Linear
    net.l0.attach(net)


def update_closed_statistics(net: nn.Module) -> None:
    norm = net.norm
    run = norm._in_one

    def in_one(x, draw):
        y = run(x, draw)
        closed = torch.ones(norm.num_features, dtype=torch.bool)
        closed[draw.index[norm.out_port]] = False
        if norm.training:
            norm.running_mean[closed] *= 0.9
            norm.running_var[closed] *= 0.9
        return y

    norm._in_one = in_one


def change_parameter(net: nn.Module) -> None:
    with torch.no_grad():
        net.a.weight[0, 0, 0, 0] += 1e-6


def lose_gate_gradient(net: nn.Module) -> None:
    using = net.l0.using
    net.l0.using = lambda z: using(z.detach())


def leak_into_closed(net: nn.Module) -> None:
    net.a.weight.register_hook(lambda grad: grad + 1e-15)


def forget_reason(net: nn.Module) -> None:
    net.l0.refused.clear()


def add_key(net: nn.Module) -> None:
    net.register_buffer("extra", torch.zeros(1))


def spread_nan(net: nn.Module) -> None:
    net.register_forward_hook(lambda module, args, out: out * float("nan"))


BREAKS = {
    spread_nan: "output 0 differs by inf",
    shift_map: "differs by|packed network fails",
    drop_reader: "packed network fails",
    update_closed_statistics: r"buffer norm\.running_(mean|var) differs by",
    change_parameter: r"convert changed a\.weight",
    lose_gate_gradient: "only in one of the two: .*grad gates",
    leak_into_closed: r"grad a\.weight where closed",
    forget_reason: r"neither gated nor refused with a reason: \['head'\]",
    add_key: "keys .*extra.* changed",
}


def test_a_right_network_passes():
    checked()


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__)
def test_what_is_wrong_is_found(break_it, monkeypatch: pytest.MonkeyPatch):
    convert = l0.convert

    def broken(net: nn.Module, *args, **options) -> nn.Module:
        convert(net, *args, **options)
        break_it(net)
        return net

    monkeypatch.setattr(l0, "convert", broken)
    with pytest.raises(Wrong, match=BREAKS[break_it]):
        checked()


def test_a_refused_network_must_stay_as_it_was(monkeypatch: pytest.MonkeyPatch):
    def refuse(net: nn.Module, *args, **options) -> nn.Module:
        net.a.__class__ = l0.nn.GatedConv2d
        raise ValueError("convert: nothing can be gated: {}")

    monkeypatch.setattr(l0, "convert", refuse)
    with pytest.raises(Wrong, match="a refused network was changed"):
        checked()


def test_a_failing_case_is_made_small_and_can_be_run(monkeypatch: pytest.MonkeyPatch):
    """The first network with a batch normalisation fails: one of them is left."""
    search = Search(("2d",))

    def run(case: Case) -> Outcome:
        if "BatchNorm2d" in case.program.source and not search.failures:
            raise Wrong("planted")
        return Outcome()

    monkeypatch.setattr(Case, "run", run)
    search.run(60, start=2)
    assert len(search.failures) == 1 and search.count == 60
    assert "Wrong: planted" in search.failures[0].error
    source = search.failures[0].source
    assert source.count("nn.BatchNorm2d") == 1
    assert source.count("\n        h") <= 5, source
    scope: dict[str, object] = {}
    exec(source, scope)
    assert isinstance(scope["net"], nn.Module)


def test_the_database_keeps_failing_cases(monkeypatch: pytest.MonkeyPatch):
    database = InMemoryExampleDatabase()
    first = Search(("2d",), database)
    planted = "BatchNorm2d"

    def run(case: Case) -> Outcome:
        if planted in case.program.source:
            raise Wrong("planted")
        return Outcome()

    monkeypatch.setattr(Case, "run", run)
    monkeypatch.setattr("fuzz.search.SHRINK_RUNS", 5)
    while not first.failures:
        first.run(first.count + 1, start=first.count)
    second = Search(("2d",), database)
    second.run(1, start=999)
    # The simplest case, which comes first otherwise, does not fail.
    assert second.failures and second.count == 1


def test_a_search_can_be_stopped():
    search = Search(("1d",), tick=lambda count: search.stop() if count == 3 else None)
    search.run(10, start=0)
    assert search.tally.cases == 3


def test_tallies_add_up():
    first, second = Search(("1d",)), Search(("1d",))
    first.run(4, start=0)
    second.run(6, start=7)
    total = Tally()
    total.merge(first.tally)
    total.merge(second.tally)
    assert total.cases == 10
    assert total.line(2).startswith("12 cases: ") and "2 wrong" in total.line(2)
    assert total.gated == first.tally.gated + second.tally.gated
    rows = total.table().splitlines()[1:]
    assert rows and all(int(n) == int(g) + int(r) for *_, n, g, r in map(str.split, rows))
