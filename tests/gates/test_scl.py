# SPDX-License-Identifier: Apache-2.0
"""Sparse Connectivity Learning: steps, their straight-through gradients, what is left out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import l0kernels as l0
from l0kernels.gates import weights

SCL = l0.gates.StraightThrough
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def leave_out_whatever_is_closed(monkeypatch):
    """Networks here are so small that nothing would be left out."""
    monkeypatch.setattr(weights, "LEAST_SAVED", 0)


def make(**options) -> tuple[nn.Sequential, SCL]:
    """A network with a mask variable for each weight of two layers, in float64."""
    gates = SCL({"conv": (6, 4, 3, 3), "fc": (17, 24)}, **options)
    net = nn.Sequential(
        l0.nn.MaskedConv2d(4, 6, 3, gate=gates["conv"]),
        nn.Tanh(),
        nn.Flatten(),
        l0.nn.MaskedLinear(24, 17, gate=gates["fc"]),
        nn.Linear(17, 2),
    )
    return gates.attach(net).double(), gates


def batch():
    return torch.randn(5, 4, 4, 4, dtype=torch.float64)


def scattered(m):
    m.uniform_(-0.5, 0.5)


def all_open(m):
    m.uniform_(0.1, 0.5)


def all_closed(m):
    m.uniform_(-0.5, 0)


def with_closed_sides(m):
    """Half of the filters and of the neurons closed, and some inputs."""
    m.uniform_(-0.2, 0.5)
    conv, fc = m.split([216, 408])
    conv.view(6, 4, 9)[[0, 2, 3]] = -0.3
    conv.view(6, 4, 9)[:, 1] = -0.1
    fc.view(17, 24)[::2] = -0.3
    fc.view(17, 24)[:, 5:9] = 0.0


STATES = [scattered, all_open, all_closed, with_closed_sides]
states = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


def put(gates, state):
    with torch.no_grad():
        state(gates.log_alpha)


PROXIES = {
    "identity": lambda m: m,
    "leaky_relu": lambda m: F.leaky_relu(m, 0.2),
    "softplus": F.softplus,
}
NORMS = {
    "l2": lambda g: g.square().sum().sqrt(),
    "rms": lambda g: g.square().mean().sqrt(),
    "max": lambda g: g.abs().max(),
}


def step_of(m, proxy):
    """1[m > 0] with the proxy's gradient."""
    like = PROXIES[proxy](m)
    return (m > 0).double() + like - like.detach()


def features_of(shape, feature, groups=1):
    """The indices of every feature of a weight, as boolean masks."""
    outputs, inputs = shape[0], shape[1]
    if feature == "layer":
        return [torch.ones(shape, dtype=torch.bool)]
    found = []
    if feature == "output":
        for o in range(outputs):
            found.append(torch.zeros(shape, dtype=torch.bool))
            found[-1][o] = True
        return found
    for group in range(groups):
        for i in range(inputs):
            found.append(torch.zeros(shape, dtype=torch.bool))
            found[-1][group * outputs // groups : (group + 1) * outputs // groups, i] = True
    return found


def normalise(grad, feature, norm, epsilon, groups=1):
    if norm == "none":
        return grad
    result = torch.full_like(grad, math.nan)
    for where in features_of(grad.shape, feature, groups):
        part = grad[where]
        result[where] = part / max(float(NORMS[norm](part)), epsilon)
    return result


def by_hand(net, x, masks):
    """The network with weights times these masks, flat."""
    conv, _, _, fc, last, _ = net
    in_conv, in_fc = masks.split([conv.weight.numel(), fc.weight.numel()])
    y = F.conv2d(x, conv.weight * in_conv.view_as(conv.weight), conv.bias)
    y = F.linear(y.tanh().flatten(1), fc.weight * in_fc.view_as(fc.weight), fc.bias)
    return F.linear(y, last.weight, last.bias)


def oracle(net, x, upstream, proxy="identity", feature="output", norm="l2", epsilon=1e-12):
    """Output, gradients of x and the weights, gradient of m, by PyTorch's autograd."""
    m = net.l0.log_alpha.detach().clone().requires_grad_()
    y = by_hand(net, x, step_of(m, proxy))
    leaves = [x, *(p for p in net.parameters() if p is not net.l0.log_alpha)]
    *grads, raw = torch.autograd.grad(y, [*leaves, m], upstream)
    parts = zip(net.l0.shapes.values(), raw.split(net.l0.sizes), strict=True)
    of_m = [normalise(g.view(s), feature, norm, epsilon).flatten() for s, g in parts]
    return y, grads, torch.cat(of_m)


def found_by(net, x, upstream):
    y = net(x)
    leaves = [x, *(p for p in net.parameters() if p is not net.l0.log_alpha)]
    *grads, of_m = torch.autograd.grad(y, [*leaves, net.l0.log_alpha], upstream)
    return y, grads, of_m


def compare(mine, right):
    torch.testing.assert_close(mine[0], right[0], **CLOSE)
    for one, other in zip(mine[1], right[1], strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(mine[2], right[2], **CLOSE)


# ---- formulas ----


@states
@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("norm", [*NORMS, "none"])
@pytest.mark.parametrize("feature", ["output", "input", "layer"])
def test_outputs_and_all_gradients(state, proxy, norm, feature):
    net, gates = make(proxy=proxy, norm=norm, feature=feature, slope=0.2)
    put(gates, state)
    x, upstream = batch().requires_grad_(), torch.randn(5, 2, dtype=torch.float64)
    mine = found_by(net, x, upstream)
    compare(mine, oracle(net, x, upstream, proxy, feature, norm))
    closed = gates.log_alpha <= 0
    of_weights = torch.cat([mine[1][i].flatten() for i in (1, 3)])
    assert bool((of_weights[closed] == 0).all())
    # Even with all closed, what reads nothing but biases learns what to open.
    assert bool((mine[2] != 0).any())


def test_defaults_are_what_is_documented():
    gates = SCL({"w": (2, 3)})
    assert torch.equal(gates.log_alpha, torch.ones(6))
    assert (gates.proxy.name, gates.feature, gates.norm) == ("identity", "output", "l2")
    assert (gates.epsilon, gates.refresh_every, gates.lam) == (1e-12, 1, {"w": 1.0})


@pytest.mark.parametrize("epsilon", [1e-12, 0.05, 10.0])
def test_epsilon_is_the_least_norm(epsilon):
    net, gates = make(epsilon=epsilon)
    put(gates, scattered)
    x, upstream = batch().requires_grad_(), torch.randn(5, 2, dtype=torch.float64)
    compare(found_by(net, x, upstream), oracle(net, x, upstream, epsilon=epsilon))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("feature", ["output", "input", "layer"])
def test_features_of_grouped_convolutions(groups, feature):
    shape = (8, 4 // groups, 3, 3)
    gates = SCL({"w": shape}, feature=feature)
    layer = l0.nn.MaskedConv2d(4, 8, 3, groups=groups, gate=gates["w"])
    net = gates.attach(nn.Sequential(layer)).double()
    put(gates, scattered)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    m = gates.log_alpha.detach().view(shape).clone().requires_grad_()
    y, expected = (
        net(x),
        F.conv2d(x, layer.weight * step_of(m, "identity"), layer.bias, groups=groups),
    )
    torch.testing.assert_close(y, expected, **CLOSE)
    upstream = torch.randn_like(y)
    (mine,) = torch.autograd.grad(y, gates.log_alpha, upstream)
    (raw,) = torch.autograd.grad(expected, m, upstream)
    right = normalise(raw, feature, "l2", 1e-12, groups)
    torch.testing.assert_close(mine.view(shape), right, **CLOSE)


@states
@pytest.mark.parametrize("proxy", PROXIES)
def test_penalty_is_the_number_of_connections(state, proxy):
    net, gates = make(proxy=proxy, slope=0.2, lam=0.3, n_train=7)
    put(gates, state)
    m = gates.log_alpha.detach().clone().requires_grad_()
    right = (0.3 / 7 * step_of(m, proxy)).sum()
    value = l0.penalty(net)
    torch.testing.assert_close(value, right, **CLOSE)
    assert value.item() == pytest.approx(0.3 / 7 * int((m > 0).sum()))
    (mine,), (other,) = torch.autograd.grad(value, gates.log_alpha), torch.autograd.grad(right, m)
    torch.testing.assert_close(mine, other, **CLOSE)
    assert bool((mine > 0).all())


def test_penalty_is_added_after_normalisation():
    net, gates = make(lam=0.3)
    put(gates, with_closed_sides)
    x, upstream = batch().requires_grad_(), torch.randn(5, 2, dtype=torch.float64)
    of_m = found_by(net, x, upstream)[2]
    loss = l0.expected_loss(net, lambda: (net(x) * upstream).sum()) + l0.penalty(net)
    (both,) = torch.autograd.grad(loss, gates.log_alpha)
    torch.testing.assert_close(both, of_m + 0.3, **CLOSE)


def test_penalty_by_group_and_by_work():
    gates = SCL({"conv": (6, 4, 3, 3), "fc": (17, 24)}, lam={"conv": 2.0, "fc": 0.5})
    net = nn.Sequential(
        l0.nn.MaskedConv2d(4, 6, 3, gate=gates["conv"]),
        nn.Flatten(),
        l0.nn.MaskedLinear(24, 17, gate=gates["fc"]),
    )
    gates.attach(net, {"0": 4, "2": 1})
    assert l0.penalty(net).item() == pytest.approx(2 * 216 + 0.5 * 408)
    assert l0.penalty(net, per="flop", lam=1.0).item() == pytest.approx(4 * 216 + 408)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("start", [-0.35, -0.055])
@pytest.mark.parametrize("lam, n_train", [(0.5, 1), (0.0, 1), (9.0, 10)])
def test_a_closed_connection_opens_when_the_formula_says(sign, start, lam, n_train):
    # Two connections to one output with gradients G theta of 3 sign and 4 sign: normalised to
    # .6 sign and .8 sign. Plain SGD subtracts lr (.6 sign + lam / n_train) from the first.
    gates = SCL({"w": (1, 2)}, lam=lam, n_train=n_train, initial=start)
    layer = l0.nn.MaskedLinear(2, 1, gate=gates["w"])
    net = gates.attach(nn.Sequential(layer)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.5, -2.0]]))
    x = torch.tensor([[2.0, -2.0]], dtype=torch.float64) * sign
    change = -0.1 * (0.6 * sign + lam / n_train)
    optimizer = torch.optim.SGD([gates.log_alpha], lr=0.1)
    for step in range(1, 20):
        optimizer.zero_grad()
        (net(x).sum() + l0.penalty(net)).backward()
        optimizer.step()
        expected = start + step * change
        assert abs(expected) > 1e-9
        assert bool(gates.log_alpha[0] > 0) is (expected > 0)
        if expected > 0:
            break
    opens = change > 0
    assert opens is (sign < 0 and lam / n_train < 0.6)
    assert (expected > 0) is (opens and start + 19 * change > 0)


def test_tiny_and_vanishing_gradients():
    gates = SCL({"w": (3, 4)}, epsilon=1e-40)
    layer = l0.nn.MaskedLinear(4, 3, gate=gates["w"])
    net = gates.attach(nn.Sequential(layer))
    x = torch.randn(5, 4)
    upstream = torch.randn(5, 3) * torch.tensor([1.0, 1e-25, 0.0])
    (grad,) = torch.autograd.grad(net(x), gates.log_alpha, upstream)
    rows = grad.view(3, 4)
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    assert bool((rows[2] == 0).all())


def test_uses_of_one_backward_pass_are_normalised_together():
    net, gates = make()
    put(gates, scattered)
    x = batch()
    (whole,) = torch.autograd.grad(net(x).square().sum(), gates.log_alpha)
    with l0.hold(net):
        parts = sum(net(part).square().sum() for part in x.split(2))
        (together,) = torch.autograd.grad(parts, gates.log_alpha)
        (scaled,) = torch.autograd.grad(8 * net(x).square().sum(), gates.log_alpha)
        for part in x.split(2):
            net(part).square().sum().backward()
    torch.testing.assert_close(together, whole, **CLOSE)
    torch.testing.assert_close(scaled, whole, **CLOSE)
    assert not torch.allclose(gates.log_alpha.grad, whole)  # three gradients of norm 1


# ---- what is left out ----


def test_closed_outputs_and_inputs_are_left_out():
    net, gates = make()
    put(gates, with_closed_sides)
    x = batch().requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = net(x)
    some = {name: gates.current_draw().blocks[name] for name in gates.names}
    assert some["conv"].rows.tolist() == [1, 4, 5] and some["conv"].columns.tolist() == [0, 2, 3]
    assert some["fc"].rows.tolist() == list(range(1, 17, 2))
    assert some["fc"].columns.tolist() == [*range(5), *range(9, 24)]
    assert all(block.dense for block in some.values())
    part = {"conv": 3 * 3 * 9 * 4, "fc": 8 * 20}
    whole = {"conv": 6 * 4 * 9 * 4, "fc": 17 * 24}
    last = 17 * 2
    assert forward.get_total_flops() == 2 * 5 * (sum(part.values()) + last)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    expected = sum(part.values()) + sum(whole.values()) + 2 * last
    assert backward.get_total_flops() == 2 * 5 * expected


@states
def test_with_and_without_leaving_out(state):
    net, gates = make()
    put(gates, state)
    x, upstream = batch().requires_grad_(), torch.randn(5, 2, dtype=torch.float64)
    mine = found_by(net, x, upstream)
    with l0.use_impl("reference"):
        whole = found_by(net, x, upstream)
    compare(mine, whole)
    net.eval()
    with l0.use_impl("reference"):
        whole = net(x)
    torch.testing.assert_close(net(x), whole, **CLOSE)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_refreshing_every_third_step(impl):
    nets = [make(refresh_every=3, norm="none")[0], make(norm="none")[0]]
    nets[1].load_state_dict(nets[0].state_dict())
    x = batch().requires_grad_()
    open_ones = torch.zeros(624, dtype=torch.bool)
    with torch.no_grad():
        with_closed_sides(nets[0].l0.log_alpha)
        nets[1].l0.log_alpha.copy_(nets[0].l0.log_alpha)
        m = nets[0].l0.log_alpha
        for where, shape in zip(
            (slice(0, 216), slice(216, 624)), ((6, 4, 9), (17, 24, 1)), strict=True
        ):
            pairs = (m[where].view(shape) > 0).any(2)
            seen = pairs.any(1)[:, None] & pairs.any(0)
            open_ones[where] = seen[..., None].expand(shape).flatten()
    assert 0 < int(open_ones.sum()) < 624
    for step in range(1, 8):
        upstream = torch.randn(5, 2, dtype=torch.float64)
        with l0.use_impl(impl):
            mine = found_by(nets[0], x, upstream)
        right = found_by(nets[1], x, upstream)
        assert nets[0].l0.current_draw().blocks["fc"].dense is (step % 3 == 1)
        expected = right[2] if step % 3 == 1 else torch.where(open_ones, right[2], 0)
        compare(mine, (right[0], right[1], expected))
        assert int(nets[0].l0.step) == step


def test_refreshing_costs_less_in_between():
    net, gates = make(refresh_every=2)
    put(gates, with_closed_sides)
    x, found = batch(), []
    for _ in range(4):
        y = net(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        found.append(backward.get_total_flops())
    assert found[0] == found[2] > found[1] == found[3]


def test_closed_filters_that_are_computed_get_no_gradient_in_between_either(monkeypatch):
    monkeypatch.setattr(weights, "LEAST_SAVED", 200)
    net, gates = make(refresh_every=2, norm="none")
    put(gates, all_open)
    with torch.no_grad():
        gates.log_alpha[216:].view(17, 24)[3] = -1.0
    x = batch()
    for step in range(1, 5):
        (grad,) = torch.autograd.grad(net(x).square().sum(), gates.log_alpha)
        assert not gates.current_draw().blocks
        assert bool((grad[216:].view(17, 24)[3] == 0).all()) is (step % 2 == 0)
        assert bool((grad[216:].view(17, 24)[4] != 0).all())


# ---- frozen, evaluated ----


def test_test_gates_are_the_steps():
    net, gates = make()
    put(gates, with_closed_sides)
    x = batch()
    expected = by_hand(net, x, (gates.log_alpha > 0).double())
    torch.testing.assert_close(net(x), expected, **CLOSE)
    net.eval()
    y = net(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert torch.autograd.grad(y.sum(), gates.log_alpha, allow_unused=True) == (None,)
    with l0.frozen(net):
        torch.testing.assert_close(net(x), expected, **CLOSE)
    assert gates.open_now() == {k: int(v) for k, v in gates.expected_open().items()}
    assert sum(gates.open_now().values()) == int((gates.log_alpha > 0).sum())


def test_frozen_gates_are_constants():
    net, gates = make(lam=0.3)
    put(gates, with_closed_sides)
    gates.freeze()
    x, upstream = batch().requires_grad_(), torch.randn(5, 2, dtype=torch.float64)
    y, grads, of_m = found_by(net, x, upstream)
    expected, right, _ = oracle(net, x, upstream)
    compare((y, grads, of_m), (expected, right, torch.zeros_like(of_m)))
    value = l0.penalty(net)
    assert value.item() == pytest.approx(0.3 * int((gates.log_alpha > 0).sum()))
    (grad,) = torch.autograd.grad(value, gates.log_alpha)
    assert torch.equal(grad, torch.zeros_like(grad))
    step = int(gates.step)
    net(x)
    assert int(gates.step) == step
    gates.unfreeze()
    compare(found_by(net, x, upstream), oracle(net, x, upstream))


# ---- training ----


@pytest.mark.parametrize("proxy", PROXIES)
def test_training_finds_what_matters(proxy):
    truth = torch.zeros(1, 20)
    truth[0, [2, 5, 11]] = torch.tensor([1.0, -2.0, 1.5])
    x = torch.randn(256, 20)
    gates = SCL({"fc": (1, 20)}, lam=0.02, initial=0.05, proxy=proxy)
    net = gates.attach(nn.Sequential(l0.nn.MaskedLinear(20, 1, gate=gates["fc"])))
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.05, gate_lr=0.02))
    losses = []
    for _ in range(300):
        loss = F.mse_loss(net(x), x @ truth.t())
        optimizer.zero_grad()
        (loss + l0.penalty(net)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
    assert bool((gates.log_alpha > 0)[truth[0] != 0].all())
    assert int((gates.log_alpha > 0).sum()) < 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect")
        self.grouped = nn.Conv2d(12, 8, 1, groups=2)
        self.hidden = nn.Linear(8, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.grouped(self.inner(x).relu())
        return self.head(self.hidden(x.mean((2, 3))).relu())


def converted(**options):
    torch.manual_seed(0)
    example = (torch.randn(2, 3, 7, 6),)
    return l0.convert(Net(), "scl", example_inputs=example, granularity="weight", **options)


@pytest.mark.parametrize("refresh_every", [1, 4])
def test_convert_train_compact(refresh_every):
    net = converted(lam=0.05, initial=0.2, refresh_every=refresh_every)
    gates = net.l0
    x, y = torch.randn(64, 3, 7, 6), torch.randint(5, (64,))
    optimizer = torch.optim.SGD(
        l0.param_groups(net, lr=0.1, weight_decay=1e-3, gate_lr=0.05), momentum=0.9
    )

    def train(steps):
        losses = []
        for _ in range(steps):
            loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), y))
            optimizer.zero_grad()
            (loss + l0.penalty(net)).backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    losses = train(60)
    left = sum(gates.open_now().values())
    assert 0 < left < gates.count
    assert losses[-1] < 0.9 * losses[0]
    row = l0.report(net).groups[0]
    assert (row.name, row.units, row.path) == ("stem", 216, "masked weight by weight")
    assert row.test_open == row.expected_open == gates.open_now()["stem"]
    gates.freeze()
    assert train(20)[-1] < losses[0]
    assert sum(gates.open_now().values()) == left
    net.eval()
    small = l0.compact(net, (x,))
    assert not hasattr(small, "l0") and type(small.inner) is nn.Conv2d
    torch.testing.assert_close(small(x), net(x))
    kept = [small.get_submodule(name).weight for name in gates.names]
    assert sum(int((w != 0).sum()) for w in kept) == left
    l0.revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in Net().modules()]


def test_conversion_changes_nothing_at_first():
    torch.manual_seed(0)
    plain = Net().double()
    net = converted().double()
    assert net.l0.names == ["stem", "inner", "grouped", "hidden", "head"]
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("l0.")})
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x), **CLOSE)


# ---- tools of training ----


def test_state_is_saved_and_loaded_and_copies_are_apart():
    net, gates = make()
    put(gates, with_closed_sides)
    x = batch()
    expected = net(x)
    other, _ = make()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected) and int(other.l0.step) == int(gates.step) + 1
    copied = copy.deepcopy(net)
    put(copied.l0, all_open)
    assert torch.equal(net(x), expected) and not torch.equal(copied(x), expected)
    gates.freeze()
    other.load_state_dict(net.state_dict())
    assert other.l0.frozen and torch.equal(other(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    net, gates = make()
    put(gates, with_closed_sides)
    x, upstream = batch().requires_grad_(), torch.randn(5, 2, dtype=torch.float64)

    def run(function):
        with l0.hold(net):
            net.zero_grad()
            function(x).backward(upstream)
            return [p.grad.clone() for p in net.parameters()]

    plain = run(net)
    again = run(lambda x: checkpoint(net, x, use_reentrant=reentrant))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_one_graph_whatever_is_open(refresh_every):
    gates = SCL({"w": (6, 7)}, proxy="softplus", refresh_every=refresh_every)
    layer = l0.nn.MaskedLinear(7, 6, gate=gates["w"])
    net = gates.attach(nn.Sequential(layer))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 7)
    for closed in range(1, 5):
        with torch.no_grad():
            gates.log_alpha.view(6, 7)[:closed] = -1.0
        results = []
        for run in (compiled, net):
            gates.step.fill_(closed)
            loss = l0.expected_loss(net, lambda run=run: run(x).square().sum())
            grads = torch.autograd.grad(loss, (layer.weight, gates.log_alpha))
            results.append((loss, *grads))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == refresh_every


@states
def test_autocast(state):
    net, gates = make()
    put(gates, state)
    net.float()
    x = batch().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = by_hand(net, x, (gates.log_alpha > 0).float())
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)
    # Normalised in float32.
    for part, shape in zip(
        gates.log_alpha.grad.split(gates.sizes), ((6, -1), (17, -1)), strict=True
    ):
        norms = part.view(shape).norm(dim=1)
        torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]))


def test_gates_of_half_models_stay_precise():
    net, gates = make()
    put(gates, with_closed_sides)
    net.float().bfloat16()
    assert gates.log_alpha.dtype == torch.float32
    y = net(batch().bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and gates.log_alpha.grad.dtype == torch.float32


# ---- bad input ----


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"proxy": "relu"},
            "proxy: expected one of .*'identity', 'leaky_relu', 'softplus'.*'relu'",
        ),
        ({"feature": "row"}, "feature: expected one of .*'output', 'input', 'layer'.*'row'"),
        ({"norm": "l1"}, "norm: expected one of .*'l2', 'rms', 'max', 'none'.*'l1'"),
        ({"slope": 0.0}, "slope: expected a positive number, got 0.0"),
        ({"epsilon": math.inf}, "epsilon: expected a positive number, got inf"),
        ({"initial": math.nan}, "initial: expected a finite number, got nan"),
        ({"refresh_every": 0}, "refresh_every: expected a positive integer, got 0"),
        ({"refresh_every": 1.5}, "refresh_every: expected a positive integer, got 1.5"),
        ({"groups": {"w": 6}}, "groups: expected shapes of weights, got {'w': 6}"),
        ({"groups": {"w": 6, "v": (2, 3)}}, "groups: expected numbers of units or shapes"),
        ({"groups": {}}, "groups: expected at least one, got none"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SCL(**{"groups": {"w": (2, 3)}} | options)


def test_convert_gates_single_weights_only():
    net = Net()
    with pytest.raises(
        ValueError, match=r"granularity: expected one of \('weight',\) for StraightThrough, got"
    ):
        l0.convert(net, "scl", example_inputs=(torch.randn(2, 3, 7, 6),))
    assert not hasattr(net, "l0")


@pytest.mark.parametrize("training", [True, False])
def test_nan_in_mask_variables_is_noticed(training):
    net, gates = make()
    net.train(training)
    with torch.no_grad():
        gates.log_alpha[3] = math.nan
    with pytest.raises(ValueError, match="log_alpha: expected no NaN; got 1 of 624, first at 3"):
        net(batch())
