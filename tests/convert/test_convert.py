# SPDX-License-Identifier: Apache-2.0
"""What convert gates, what it refuses and why, and how it leaves the model."""

import copy
import io
import sys
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models
from l0kernels.convert.check import worst_difference

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """A convolution, a function of its output, and a convolution that reads it."""

    def __init__(self, between: Callable[[Tensor], Tensor], reads: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(reads, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


def converted(net: nn.Module, **options) -> nn.Module:
    return l0.convert(net, "hard_concrete", example_inputs=(X,), **options)


EXACT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 8),
    "softplus": (F.softplus, 8),
    "add one": (lambda h: h + 1.0, 8),
    "max pool": (lambda h: F.max_pool2d(F.relu(h), 3, 1, 1), 8),
    "bilinear": (lambda h: F.interpolate(h, scale_factor=2.0, mode="bilinear"), 8),
    "flip channels": (lambda h: F.relu(h).flip(1), 8),
    "concat with itself": (lambda h: torch.cat((F.relu(h), F.relu(-h)), 1), 16),
    "pad channels": (lambda h: F.pad(F.relu(h), (0, 0, 0, 0, 2, 2)), 12),
    "softmax over columns": (lambda h: h.softmax(3), 8),
    "dropout": (lambda h: F.dropout(F.relu(h), 0.3), 8),
    "in place": (lambda h: F.relu_(h), 8),
}

MIXED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "softmax over channels": (lambda h: h.softmax(1), 8),
    "response norm": (lambda h: F.local_response_norm(F.relu(h), 3), 8),
    "channel mean": (lambda h: h - h.mean(1, keepdim=True), 8),
    "cumsum": (lambda h: F.relu(h).cumsum(1), 8),
    "group norm": (lambda h: F.group_norm(h, 2), 8),
}

# The probe cannot see these: their maps are right, but not their values or shapes when packed.
WIDTH_DEPENDENT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "divided by the width": (lambda h: F.relu(h) / h.size(1), 8),
    "hard-coded view": (lambda h: F.relu(h).view(-1, 8, 36).view(-1, 8, 6, 6), 8),
    "roll": (lambda h: F.relu(h).roll(1, 1), 8),
    "constant per channel": (lambda h: h * torch.arange(1.0, 9.0).view(1, 8, 1, 1).to(h), 8),
}


@pytest.mark.parametrize("name", EXACT)
def test_elementwise_and_shape_operations_are_followed(name: str):
    between, reads = EXACT[name]
    torch.manual_seed(0)
    net = converted(Pair(between, reads))
    assert net.l0.names == ["a", "b"]


@pytest.mark.parametrize("name", MIXED)
def test_mixing_is_refused_and_the_rest_is_gated(name: str):
    between, reads = MIXED[name]
    torch.manual_seed(0)
    net = converted(Pair(between, reads))
    assert net.l0.names == ["b"]
    assert net.l0.refused["a"] == "its units are mixed with one another before b"


@pytest.mark.parametrize("name", WIDTH_DEPENDENT)
def test_the_self_check_catches_what_the_probe_cannot(name: str):
    between, reads = WIDTH_DEPENDENT[name]
    torch.manual_seed(0)
    net = converted(Pair(between, reads))
    assert net.l0.names == ["b"]
    assert net.l0.refused["a"].startswith("the self-check found")


class Grouped(nn.Module):
    """Layers that are refused for what they are or how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.tied = nn.Conv2d(3, 6, 1)
        self.tied_too = nn.Conv2d(3, 6, 1)
        self.tied_too.weight = self.tied.weight
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))
        self.unread = nn.Conv2d(6, 4, 1)
        self.free = nn.Conv2d(6, 7, 1)
        self.last = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.twice(F.relu(self.twice(x))))
        y = F.relu(self.tied(x)) * F.relu(self.tied_too(x))
        y = self.normed(F.relu(self.grouped(y)))
        self.unread(y)
        return self.last(F.relu(self.free(y))), y


def test_every_refusal_has_its_reason():
    torch.manual_seed(0)
    net = converted(Grouped())
    assert net.l0.names == ["free"]
    expected = {
        "twice": "it is called 2 times in one forward",
        "tied": "its weight is shared by ['tied', 'tied_too']",
        "tied_too": "its weight is shared by ['tied', 'tied_too']",
        "grouped": "it is a grouped convolution",
        "normed": "its weight is parametrized",
        "unread": "no convolution or linear layer reads it",
        "last": "its units reach an output of the model (output[0])",
    }
    assert net.l0.refused == expected
    for name, reason in expected.items():
        assert f"| {name} | {reason} |" in str(l0.report(net))


def test_residual_streams_and_stems_stay_ungated():
    network = models.network("wrn-16-4")
    net = network.build()
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(2, 3, 8, 8),))
    assert net.l0.names == [g.producer for g in network.groups]
    assert net.l0.refused["stem"] == "its units are the residual stream (a stem)"
    assert "(residual stream)" in net.l0.refused["stage1.0.conv2"]


def test_select_by_name_and_by_predicate():
    torch.manual_seed(0)
    names = converted(Pair(F.relu), select=["a"])
    assert names.l0.names == ["a"] and names.l0.refused["b"] == "not selected"
    chosen = converted(Pair(F.relu), select=lambda name, module: module.out_channels == 5)
    assert chosen.l0.names == ["b"]
    with pytest.raises(ValueError, match=r"names among \['a', 'b', 'head'\], got \['c'\]"):
        converted(Pair(F.relu), select=["a", "c"])
    with pytest.raises(ValueError, match="got 'outer'"):
        converted(Pair(F.relu), select="outer")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("lenet5", {"conv1": 20, "conv2": 50, "fc1.in": 800, "fc1": 500}),
        ("mlp-784-300-100", {"fc1.in": 784, "fc1": 300, "fc2": 100}),
    ],
)
def test_input_granularity(name: str, sizes: dict[str, int]):
    network = models.network(name)
    net = network.build()
    l0.convert(net, "hard_concrete", example_inputs=(network.example(2)[0],), granularity="input")
    assert dict(zip(net.l0.names, net.l0.sizes, strict=True)) == sizes


def test_convert_is_deterministic():
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        net = converted(Pair(F.relu), seed=5)
        found.append((net.l0.names, net.l0.refused, net.l0.log_alpha.detach().clone()))
    assert found[0][:2] == found[1][:2] and found[0][2].equal(found[1][2])


class Bar:
    """Stands for tqdm and counts."""

    made: ClassVar[list["Bar"]] = []

    def __init__(self, **options) -> None:
        self.options, self.count = options, 0
        self.made.append(self)

    def update(self) -> None:
        self.count += 1


@pytest.mark.parametrize("interactive", [True, False])
def test_progress_is_shown_to_people(interactive: bool, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["l0kernels.convert"]
    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: interactive)
    monkeypatch.setattr(Bar, "made", [])
    torch.manual_seed(0)
    converted(Pair(F.relu))
    titles = {bar.options["desc"] for bar in Bar.made}
    assert titles == {"finding groups", "checking packed against masked"}
    for bar in Bar.made:
        assert bar.options["disable"] is not interactive
        assert bar.count == bar.options["total"] > 0


def test_convert_leaves_parameters_modes_and_random_state_alone():
    torch.manual_seed(0)
    net = Pair(F.relu)
    net.b.eval()
    before = copy.deepcopy(net.state_dict())
    weight, state = net.a.weight, torch.get_rng_state()
    converted(net)
    assert net.a.weight is weight
    assert net.training and net.a.training and not net.b.training
    assert torch.get_rng_state().equal(state)
    for key, value in before.items():
        assert net.state_dict()[key].equal(value)


def test_revert_gives_the_plain_model_back():
    torch.manual_seed(0)
    net = Pair(F.relu)
    expected, keys = net(X), list(net.state_dict())
    converted(net)
    net(X)
    assert l0.revert(net) is net
    assert type(net.a) is nn.Conv2d and type(net.head) is nn.Linear
    assert list(net.state_dict()) == keys and not net._forward_pre_hooks
    torch.testing.assert_close(net(X), expected)
    assert converted(net).l0.names == ["a", "b"]


def test_hooks_and_sequential_roots_survive():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.Flatten()
    )
    seen = []
    net[2].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    converted(net)
    out = net(X)
    assert out.shape == (3, 8)
    assert seen[-1] == net.l0["0"].count


def test_unselected_parameters_get_gradients_too():
    net = converted(Pair(F.relu))
    loss = l0.expected_loss(net, lambda: net(X).square().mean()) + l0.penalty(net)
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, name
        assert p.grad.stride() == p.stride(), name


def bad_call(**changes):
    arguments = {
        "model": Pair(F.relu),
        "method": "hard_concrete",
        "example_inputs": (X,),
    } | changes
    model, method = arguments.pop("model"), arguments.pop("method")
    return lambda: l0.convert(model, method, **arguments)


def with_nan() -> nn.Module:
    net = Pair(F.relu)
    nn.init.constant_(net.b.weight, float("nan"))
    return net


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad_call(model="net"), TypeError, "expected a torch.nn.Module, got str"),
        (bad_call(method="l1"), ValueError, r"expected one of .*'hard_concrete'.*, got 'l1'"),
        (bad_call(granularity="row"), ValueError, "got 'row'"),
        (bad_call(example_inputs=X), TypeError, "expected a tuple .* got Tensor"),
        (bad_call(example_inputs=(X[:, :2],)), ValueError, "forward fails with them"),
        (bad_call(example_inputs=(X, X)), ValueError, "forward fails with them"),
        (bad_call(example_inputs=(X.to("meta"),)), ValueError, "one device, got"),
        (bad_call(model=nn.ReLU()), ValueError, "with parameters, got none"),
        (bad_call(model=with_nan()), ValueError, r"NaN or Inf in \['b.weight'\]"),
        (bad_call(lam={"a": 1.0}), ValueError, r"each of \['a', 'b'\], got \['a'\]"),
        (bad_call(model=nn.Linear(6, 2)), ValueError, "nothing can be gated"),
        (
            bad_call(
                model=nn.Sequential(
                    nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
                ),
                example_inputs=(X[:1],),
            ),
            ValueError,
            "training forward fails with them .*: Expected more than 1 value",
        ),
    ],
)
def test_bad_arguments_change_nothing(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


def test_a_failed_convert_leaves_the_model_plain():
    net = Pair(F.relu)
    for options in ({"droprate": 2.0}, {"lam": {"a": 1.0}}, {"temperature": 1.0}):
        with pytest.raises((ValueError, TypeError)):
            converted(net, **options)
        assert type(net.a) is nn.Conv2d and not hasattr(net, "l0")
        assert not net._forward_pre_hooks


def test_options_per_group_outlive_a_refused_group():
    torch.manual_seed(0)
    between, reads = WIDTH_DEPENDENT["divided by the width"]
    net = converted(Pair(between, reads), lam={"a": 1.0, "b": 2.0}, droprate={"a": 0.2, "b": 0.3})
    assert net.l0.lam == {"b": 2.0}


def test_convert_twice_and_revert_twice():
    net = converted(Pair(F.relu))
    with pytest.raises(ValueError, match="already|converted"):
        converted(net)
    l0.revert(net)
    with pytest.raises(ValueError, match="expected a model with gates"):
        l0.revert(net)


def test_revert_through_a_wrapper():
    net = converted(Pair(F.relu))
    wrapped = torch.compile(net, backend="eager")
    assert l0.revert(wrapped) is wrapped
    assert type(net.a) is nn.Conv2d and not hasattr(net, "l0") and not net._forward_pre_hooks


class Custom(l0.nn.GatedLinear):
    """A user's own gated layer."""


def test_revert_refuses_layers_it_did_not_make_and_changes_nothing():
    gates = l0.gates.HardConcrete({"a": 4})
    net = nn.Sequential(
        l0.nn.GatedLinear(3, 4, out_gate=gates["a"]), Custom(4, 2, in_gate=gates["a"])
    )
    gates.attach(net)
    with pytest.raises(ValueError, match=r"got \['Custom'\]"):
        l0.revert(net)
    assert type(net[0]) is l0.nn.GatedLinear and net.l0 is gates


class Noisy(Pair):
    """Noise and stochastic depth in training."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.training:
            h = h * torch.empty(len(h), 1, 1, 1).bernoulli_(0.5)
        y = F.relu(self.b(h))
        return self.head(y.mean((2, 3))) + 0.1 * torch.randn(len(x), 4).to(x)


def test_randomness_in_the_model_neither_confuses_convert_nor_is_used_up():
    torch.manual_seed(0)
    net = Noisy(F.relu)
    state = torch.get_rng_state()
    assert converted(net).l0.names == ["a", "b"]
    assert torch.get_rng_state().equal(state)


class ByKeyword(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(input=F.relu(self.a(input=x))))
        return self.head(input=y.mean((-2, -1)))


def test_layers_called_by_keyword_and_unbatched_inputs():
    torch.manual_seed(0)
    assert converted(ByKeyword(F.relu)).l0.names == ["a", "b"]
    net = ByKeyword(F.relu)
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(3, 7, 9),))
    assert net.l0.names == ["a", "b"]
    assert net(torch.randn(3, 7, 9)).shape == (4,)


def test_a_model_that_cannot_be_copied_says_so():
    net = Pair(F.relu)
    net.cached = net(X)
    with pytest.raises(ValueError, match="the model cannot be copied"):
        converted(net)
    del net.cached


def test_report_counts_groups_and_weights():
    net = converted(Pair(F.relu))
    with torch.no_grad():
        net.l0.log_alpha.fill_(5.0)
        net.l0.log_alpha[:6] = -5.0
    result = l0.report(net)
    total = 3 * 8 * 9 + 8 * 5 * 9 + 5 * 4
    # Two of eight units are left in a, all five in b.
    left = 3 * 2 * 9 + 2 * 5 * 9 + 5 * 4
    assert result.weights_open()["total"] == total
    assert result.weights_open()["test"] == left
    p = net.l0.open_probability()
    a, b = p[:8].sum(), p[8:].sum()
    expected = float(3 * a * 9 + a * b * 9 + b * 4)
    assert result.weights_open()["expected"] == pytest.approx(expected)
    rows = result.to_dict()["groups"]
    assert [(r["name"], r["producers"], r["consumers"], r["units"]) for r in rows] == [
        ("a", ("a",), ("b",), 8),
        ("b", ("b",), ("head",), 5),
    ]
    assert rows[0]["test_open"] == 2
    assert "| a | a | b | 8 |" in str(result)


def test_the_fused_path_of_transformer_encoders_does_not_skip_the_gates():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 16)
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    l0.convert(net, "hard_concrete", example_inputs=(x,))
    assert net.l0.names == ["0.layers.0.linear1", "0.layers.1.linear1"]
    with torch.no_grad():
        net.l0.log_alpha[::2] = -5.0
        packed = net(x)
        with l0.use_impl("reference"), torch.enable_grad():
            masked = net(x)
    torch.testing.assert_close(packed, masked)
    l0.revert(net)
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "got", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([-INF, 2.0, NAN], [-INF, 2.0, NAN], 0.0),
        ([-INF, 2.0, NAN], [-INF, 2.2, NAN], 0.1),
        ([True, False], [True, False], 0.0),
        ([True, False], [True, True], 1.0),
        ([1 + 1j, 2.0], [1 + 2j, 2.0], 0.5),
    ],
)
def test_what_is_not_finite_counts_as_a_difference(expected, got, difference: float):
    """Whichever tensor comes after it."""
    same = torch.ones(3)
    masked = {"a": same, "b": torch.tensor(expected), "c": same}
    packed = {"a": same, "b": torch.tensor(got), "c": same}
    worst, where = worst_difference(masked, packed)
    assert worst == pytest.approx(difference)
    assert where == ("b" if difference else "")
