# SPDX-License-Identifier: Apache-2.0
"""What convert refuses: with the right reason, the rest of the model gated and exact."""

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import oracle

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SELF_CHECK = "the self-check found"
MIXED = "its units are mixed with one another before b"


class Chain(nn.Module):
    """first -> a -> what is tested -> b -> c -> head; first, b and c can always be gated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 5, 3, padding=1)
        self.c = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(4, 3)

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h)

    def into_a(self, x: Tensor) -> Tensor:
        return self.a(x)

    def into_b(self, h: Tensor) -> Tensor:
        return self.b(h)

    def forward(self, x: Tensor):
        h = self.between(self.into_a(F.relu(self.first(x))))
        return self.head(F.relu(self.c(F.relu(self.into_b(h)))).mean((2, 3)))


def through(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Chain()
        net.between = function  # pyright: ignore[reportAttributeAccessIssue]
        return net

    return build


class Normed(Chain):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def between(self, h: Tensor) -> Tensor:
        return F.relu(self.norm(h))


class TokensNormed(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def between(self, h: Tensor) -> Tensor:
        return F.relu(self.norm(h.movedim(1, -1)).movedim(-1, 1))


class Scaled(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h) * self.gamma


class FunctionalMaker(Chain):
    def into_a(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a.weight, self.a.bias, padding=1)


class FunctionalReader(Chain):
    def into_b(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.b.weight, self.b.bias, padding=1)


class AlsoFunctional(Chain):
    """The weight of a is used once more, in a penalty that the model returns."""

    def forward(self, x: Tensor):
        return super().forward(x), self.a.weight.square().sum()


class Leaves(Chain):
    def forward(self, x: Tensor):
        h = F.relu(self.a(F.relu(self.first(x))))
        y = self.head(F.relu(self.c(F.relu(self.b(h)))).mean((2, 3)))
        return {"logits": y, "features": {"a": h}}


@dataclass
class Result:
    """A result that pytree does not know."""

    logits: Tensor
    features: Tensor


class LeavesInDataclass(Leaves):
    def forward(self, x: Tensor):
        out = super().forward(x)
        return Result(out["logits"], out["features"]["a"])


class Keeps(Leaves):
    """Keeps features on itself for a loss that is computed later."""

    def forward(self, x: Tensor):
        out = super().forward(x)
        self.kept = [out["features"]["a"]]
        return out["logits"]


class Twice(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 5, 3, padding=1)

    def into_a(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.a(x)))


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 3, padding=1)
        self.a2 = nn.Conv2d(6, 6, 3, padding=1)
        self.a2.weight = self.a.weight
        self.b = nn.Conv2d(6, 5, 3, padding=1)

    def into_a(self, x: Tensor) -> Tensor:
        return self.a2(F.relu(self.a(x)))


class Residual(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.a2 = nn.Conv2d(8, 8, 1)

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h + self.a2(F.relu(h)))


def changed(change: Callable[[Chain], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Chain()
        change(net)
        return net

    return build


def freeze(net: Chain) -> None:
    net.a.weight.requires_grad_(False)


def parametrize(net: Chain) -> None:
    nn.utils.parametrizations.weight_norm(net.a)


def spectral(net: Chain) -> None:
    nn.utils.parametrizations.spectral_norm(net.a)


def group(net: Chain) -> None:
    net.a = nn.Conv2d(6, 8, 3, padding=1, groups=2)


def subclass(net: Chain) -> None:
    class Own(nn.Conv2d):
        pass

    net.a = Own(6, 8, 3, padding=1)


def shuffle(h: Tensor) -> Tensor:
    n, _, height, width = h.shape
    return F.relu(h).view(n, 2, 4, height, width).transpose(1, 2).reshape(n, 8, height, width)


@dataclass
class Refusal:
    """A network, the layers it must refuse with their reasons, and the groups that remain."""

    build: Callable[[], nn.Module]
    refused: dict[str, str]
    groups: tuple[str, ...] = ("first", "b", "c")


REFUSALS: dict[str, Refusal] = {
    "softmax over channels": Refusal(through(lambda h: h.softmax(1)), {"a": MIXED}),
    "normalisation over channels": Refusal(through(lambda h: F.normalize(h, dim=1)), {"a": MIXED}),
    "response normalisation": Refusal(
        through(lambda h: F.local_response_norm(F.relu(h), 3)), {"a": MIXED}
    ),
    "cumsum": Refusal(through(lambda h: F.relu(h).cumsum(1)), {"a": MIXED}),
    "mean over channels": Refusal(through(lambda h: h - h.mean(1, keepdim=True)), {"a": MIXED}),
    "maximum over channels": Refusal(
        through(lambda h: h * torch.sigmoid(h.amax(1, keepdim=True))), {"a": MIXED}
    ),
    "roll": Refusal(through(lambda h: F.relu(h).roll(1, 1)), {"a": SELF_CHECK}),
    "channel shuffle": Refusal(through(shuffle), {"a": SELF_CHECK}),
    "hard-coded view": Refusal(
        through(lambda h: F.relu(h).view(-1, 8, 36).view(-1, 8, 6, 6)),
        {"a": f"{SELF_CHECK} that the packed forward fails: shape .* is invalid"},
    ),
    "divided by the width": Refusal(through(lambda h: F.relu(h) / h.size(1)), {"a": SELF_CHECK}),
    "halves apart": Refusal(
        through(lambda h: torch.cat((F.relu(h[:, :4]), torch.tanh(h[:, 4:])), 1)),
        {"a": SELF_CHECK},
    ),
    "layer norm": Refusal(TokensNormed, {"a": rf"{MIXED} \(they pass through LayerNorm norm\)"}),
    "group norm": Refusal(
        lambda: Normed(nn.GroupNorm(2, 8)),
        {"a": rf"{MIXED} \(they pass through GroupNorm norm\)"},
    ),
    "instance norm with parameters": Refusal(
        lambda: Normed(nn.InstanceNorm2d(8, affine=True)),
        {"a": rf"{SELF_CHECK} that the packed forward fails: .*norm\.weight \(8,\)"},
    ),
    "parameter of shape C": Refusal(
        Scaled, {"a": rf"{SELF_CHECK} that the packed forward fails: .*gamma \(8, 1, 1\)"}
    ),
    "weight norm": Refusal(changed(parametrize), {"a": "its weight is parametrized"}, ("b", "c")),
    "spectral norm": Refusal(changed(spectral), {"a": "its weight is parametrized"}, ("b", "c")),
    "grouped": Refusal(changed(group), {"a": "it is a grouped convolution"}, ("b", "c")),
    "own subclass": Refusal(changed(subclass), {"a": "Own has no gated layer"}, ("b", "c")),
    "frozen": Refusal(changed(freeze), {"a": "its weight is frozen"}),
    "functional maker": Refusal(
        FunctionalMaker,
        {"a": "used outside its own forward", "first": "mixed with one another before b"},
        ("b", "c"),
    ),
    "functional reader": Refusal(
        FunctionalReader,
        {"b": "used outside its own forward", "a": "mixed with one another before c"},
        ("first", "c"),
    ),
    "also functional": Refusal(
        AlsoFunctional,
        {"a": "used outside its own forward", "first": "read by a: .* used outside"},
        ("b", "c"),
    ),
    "output": Refusal(Leaves, {"a": r"reach an output of the model \(output\.features\.a\)"}),
    "output in a dataclass": Refusal(
        LeavesInDataclass, {"a": r"reach an output of the model \(output\.features\)"}
    ),
    "kept on the module": Refusal(Keeps, {"a": r"reach an output .*\(attribute kept\[0\]\)"}),
    "called twice": Refusal(
        Twice,
        {"a": "called 2 times", "first": "read by a: it is called 2 times"},
        ("b", "c"),
    ),
    "tied": Refusal(
        Tied,
        {"a": r"shared by \['a', 'a2'\]", "a2": "shared by", "first": "read by a: its weight"},
        ("b", "c"),
    ),
    "residual stream": Refusal(
        Residual, {"a": "joined with those of a2 before b", "a2": "joined with those of a"}
    ),
}


def converted(net: nn.Module, **options) -> oracle.Twins:
    plain = copy.deepcopy(net)
    packed = l0.convert(net, "hard_concrete", example_inputs=(X,), **options)
    return oracle.twins(packed, plain, (X,))


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_reason_and_the_rest_is_exact(name: str):
    torch.manual_seed(0)
    case = REFUSALS[name]
    twins = converted(case.build())
    gates = twins.packed.l0
    assert tuple(gates.names) == case.groups
    for layer, reason in case.refused.items():
        assert re.search(reason, gates.refused[layer]), gates.refused[layer]
        assert f"| {layer} | " in str(l0.report(twins.packed))
    assert "head" in gates.refused
    exact = twins.to(torch.float64)
    for training in (True, False):
        exact.train(training)
        for seed in range(6):
            z = oracle.gate_values(gates.sizes, seed)
            masked, packed = exact.run_masked(z), exact.run_packed(z)
            assert max(oracle.relative_errors(masked, packed).values()) <= 1e-9
            assert exact.open_where_closed(z, packed) == []


PLANTED = ("response normalisation", "softmax over channels", "hard-coded view", "layer norm")


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_group_is_caught_by_the_self_check(name: str, monkeypatch: pytest.MonkeyPatch):
    """The probe is made to say that every layer's units reach their readers one to one."""
    module = sys.modules["l0kernels.convert"]
    real = module.survey

    def wrong(*args):
        found = real(*args)
        for units in found.units:
            if units.problem is not None:
                units.problem = None
                for reader in units.readers:
                    units.readers[reader] = torch.arange(units.size)
        return found

    monkeypatch.setattr(module, "survey", wrong)
    torch.manual_seed(0)
    twins = converted(REFUSALS[name].build())
    assert "a" not in twins.packed.l0.names
    assert twins.packed.l0.refused["a"].startswith(SELF_CHECK)


def test_a_model_that_cannot_be_copied_is_refused_with_one_clear_error():
    net = Chain()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.a)
    with pytest.raises(ValueError, match="convert: the model cannot be copied: Only Tensors"):
        l0.convert(net, "hard_concrete", example_inputs=(X,))
