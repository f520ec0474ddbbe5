# SPDX-License-Identifier: Apache-2.0
"""`convert` to Continuous Sparsification, with gates of units and of single weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import l0kernels as l0


class Net(nn.Module):
    """Convolutions, a grouped one and a depthwise one among them, a skip, two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.hidden = nn.Linear(8, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.depthwise(self.grouped(self.inner(x).relu()))
        return self.head(self.hidden(x.mean((2, 3))).relu())


LAYERS = ["stem", "inner", "grouped", "depthwise", "hidden", "head"]


def batch(size=4):
    return torch.randn(size, 3, 7, 6)


def converted(granularity="weight", **options):
    net = Net()
    plain = copy.deepcopy(net)
    same = l0.convert(
        net, "cs", example_inputs=(batch(2),), granularity=granularity, lam=1e-4, **options
    )
    assert same is net
    return net, plain


def masked_by_hand(plain, gates, gate):
    """The plain network with weights times these gate values."""
    masked = copy.deepcopy(plain)
    for name, where in gates.slices():
        weight = masked.get_submodule(name).weight
        weight.data.mul_(gate[where].view(weight.shape))
    return masked


def test_every_weight_has_a_gate():
    net, plain = converted()
    gates = net.l0
    assert gates.names == LAYERS
    assert gates.count == sum(plain.get_submodule(name).weight.numel() for name in LAYERS)
    assert all(isinstance(net.get_submodule(name), l0.nn.MaskedLayer) for name in LAYERS)
    assert [k for k in net.state_dict() if not k.startswith("l0.")] == list(plain.state_dict())
    x = batch()
    torch.testing.assert_close(net(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
def test_converted_and_masked_networks_are_equal(training):
    net, plain = converted(initial=0.05)
    net.double().train(training)
    plain.double().train(training)
    gates = net.l0
    nn.init.uniform_(gates.log_alpha, -0.5, 0.5)
    gates.set_progress(0.6)
    soft = torch.sigmoid(gates.beta * gates.log_alpha) if training else gates.log_alpha > 0
    masked = masked_by_hand(plain, gates, (soft.double() * (1 + math.exp(-0.05))).detach())
    x = batch().double().requires_grad_()
    results = net(x), masked(x)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(results[0])
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in results]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_units_by_scores():
    net, plain = converted("unit")
    gates = net.l0
    assert "hidden" in gates.names
    net.double()
    nn.init.uniform_(gates.log_alpha, -0.5, 0.5)
    x = batch().double()
    for t in (0.0, 1.0):
        gates.set_progress(t)
        results, grads = [], []
        for impl in ("auto", "reference"):
            with l0.use_impl(impl):
                y = net(x)
            results.append(y)
            loss = y.square().sum() + l0.penalty(net)
            grads.append(torch.autograd.grad(loss, list(net.parameters())))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    net.eval()
    small = l0.compact(net, (x,))
    torch.testing.assert_close(small(x), net(x))
    assert small.hidden.out_features == max(2, gates.open_now()["hidden"])


def test_training_prunes_and_the_ticket_is_plain():
    net, _ = converted(initial=0.02)
    x, y = torch.randn(64, 3, 7, 6), torch.randint(5, (64,))
    optimizer = torch.optim.SGD(
        l0.param_groups(net, lr=0.05, weight_decay=1e-3, gate_lr=0.2), momentum=0.9
    )

    def train(steps):
        for step in range(steps):
            if not net.l0.frozen:
                net.l0.set_progress(step / (steps - 1))
            loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    train(40)
    net.l0.next_round()
    train(40)
    left = sum(net.l0.open_now().values())
    assert 0 < left < net.l0.count
    net.l0.freeze()
    assert train(40) < math.log(5)
    net.eval()
    small = l0.compact(net, (x,))
    assert type(small.stem) is nn.Conv2d and not hasattr(small, "l0")
    assert "gate" not in vars(small.stem)
    torch.testing.assert_close(small(x), net(x))
    weights = [small.get_submodule(name).weight for name in LAYERS]
    assert sum(int((w != 0).sum()) for w in weights) == left


def test_revert():
    net, plain = converted()
    net(batch())
    l0.revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in net.modules()] == [vars(m).keys() for m in plain.modules()]
    x = batch()
    plain.load_state_dict(net.state_dict())  # the forward above changed statistics
    assert torch.equal(net.eval()(x), plain.eval()(x))


def test_report():
    net, _ = converted()
    gates = net.l0
    with torch.no_grad():
        gates.log_alpha.fill_(1.0)[: gates.sizes[0] // 2] = -1.0
    found = l0.report(net)
    row = found.groups[0]
    assert (row.name, row.producers, row.consumers) == ("stem", ("stem",), ())
    assert (row.units, row.test_open, row.path) == (216, 108, "masked weight by weight")
    assert found.weights_open() == {
        "expected": float(gates.count),
        "test": float(gates.count - 108),
        "total": float(gates.count),
    }
    gates.set_progress(1.0)
    assert l0.report(net).weights_open()["expected"] == gates.count - 108
    assert "| stem | stem | none | 216 |" in str(found)


def test_what_is_selected():
    net, _ = converted(select=["inner", "head"])
    assert net.l0.names == ["inner", "head"]
    assert net.l0.refused["stem"] == "not selected"
    net, _ = converted(select=lambda name, module: isinstance(module, nn.Linear))
    assert net.l0.names == ["hidden", "head"]


class Awkward(nn.Module):
    """Layers whose weights cannot be masked."""

    def __init__(self):
        super().__init__()
        self.good = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6)
        self.frozen.weight.requires_grad_(False)
        self.tied = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.outside = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        x = self.good(self.good(x))
        x = self.normed(self.other(self.tied(self.frozen(x))))
        return self.conv(F.linear(x, self.outside.weight).unsqueeze(1))


def test_reasons():
    net = l0.convert(Awkward(), "cs", example_inputs=(torch.randn(2, 6),), granularity="weight")
    assert net.l0.names == ["good"]
    assert net.l0.refused == {
        "frozen": "its weight is frozen (requires_grad is False)",
        "tied": "its weight is shared by ['tied', 'other']",
        "other": "its weight is shared by ['tied', 'other']",
        "normed": "its weight is parametrized",
        "outside": "its parameters are used outside its own forward (functionally)",
        "unused": "it is not called in the forward",
        "conv": "Conv1d has no masked layer",
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"method": "hard_concrete"},
            "granularity: expected one of .* for HardConcrete, got 'wei",
        ),
        ({"select": ["nothing"]}, r"select: expected 'inner', a predicate or names among .*noth"),
        ({"select": l0.select.heads}, "select: expected 'inner', names or a predicate for weights"),
        ({"select": lambda name, module: False}, "convert: nothing can be gated"),
        ({"final_beta": 0.5}, "final_beta: expected a number above 1"),
        ({"example_inputs": (torch.randn(2, 2),)}, "example_inputs: the model's"),
    ],
)
def test_bad_input_changes_nothing(options, message):
    net = Net()
    arguments = {"method": "cs", "example_inputs": (batch(2),), "granularity": "weight"} | options
    with pytest.raises(ValueError, match=message):
        l0.convert(net, **arguments)
    assert type(net.stem) is nn.Conv2d and not hasattr(net, "l0")


def test_checkpoints():
    net, plain = converted()
    nn.init.uniform_(net.l0.log_alpha, -0.5, 0.5)
    net.load_state_dict(plain.state_dict())  # from before conversion
    other, _ = converted()
    other.load_state_dict(net.state_dict())
    x = batch()
    assert torch.equal(other.eval()(x), net.eval()(x))
    with pytest.raises(ValueError, match="load_state_dict: expected gates"):
        converted(select=["head"])[0].load_state_dict(net.state_dict())


def test_encoder_layers_call_their_masked_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer)
    x = torch.randn(2, 5, 8)
    l0.convert(net, "cs", example_inputs=(x,), granularity="weight", initial=-0.5)
    net.eval()
    with torch.no_grad():  # where the fused function would run
        y = net(x)
    closed = copy.deepcopy(net)
    l0.revert(closed)
    for name, _ in net.l0.slices():
        closed.get_submodule(name).weight.data.zero_()
    assert {"0.linear1", "0.linear2"} <= set(net.l0.names)
    torch.testing.assert_close(y, closed(x))
