# SPDX-License-Identifier: Apache-2.0
"""Dep-L0: logits from a chain, the law, the penalty, gradients of a whole step."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.gates.hard_concrete import BETA, GAMMA, ZETA
from l0kernels.ops.sample_gates.reference import noise_k

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LN100 = math.log(100.0)
K = BETA * math.log(-GAMMA / ZETA)
SIZES = {"a": 12, "b": 9, "c": 7}
X = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def make(dtype=torch.float64, **options) -> nn.Sequential:
    """Two convolutions and two linear layers; gates between neighbours."""
    torch.manual_seed(0)
    gates = l0.gates.DependentHardConcrete(SIZES, **options)
    net = nn.Sequential(
        l0.nn.GatedConv2d(2, 12, 3, out_gate=gates["a"]),
        l0.nn.GatedBatchNorm2d(12, out_gate=gates["a"]),
        nn.ReLU(),
        l0.nn.GatedConv2d(12, 9, 2, in_gate=gates["a"], out_gate=gates["b"]),
        nn.Tanh(),
        nn.Flatten(),
        l0.nn.GatedLinear(36, 7, in_gate=gates["b"].expand(4), out_gate=gates["c"]),
        nn.Tanh(),
        l0.nn.GatedLinear(7, 3, in_gate=gates["c"]),
    )
    gates.attach(net, {"0": 9, "3": 4, "6": 1, "8": 1})
    return net.to(dtype)


def chain_of(gates, reverse: bool) -> tuple[list[nn.Linear], Tensor]:
    """The generator as published: linear layers in the order of the chain, and their ones."""
    sizes = [*SIZES.values()]
    shapes = list(zip(sizes, [sizes[0], *sizes[:-1]], strict=True))
    if reverse:
        shapes = list(zip(sizes, [*sizes[1:], sizes[-1]], strict=True))
    numbers = gates.log_alpha.detach().double()
    parts = numbers.split([*(n * m for n, m in shapes), *sizes])
    layers = []
    for (n, m), weight, bias in zip(shapes, parts[:3], parts[3:], strict=True):
        layer = nn.Linear(m, n).double()
        layer.weight.data, layer.bias.data = weight.view(n, m).clone(), bias.clone()
        layers.append(layer)
    ones = torch.ones(sizes[-1 if reverse else 0]).double()
    return layers, ones


def logits_of(layers: list[nn.Linear], h: Tensor, reverse: bool) -> Tensor:
    made = []
    for layer in reversed(layers) if reverse else layers:
        h = LN100 * torch.tanh(layer(h))
        made.append(h)
    return torch.cat(made[::-1] if reverse else made)


def spread(gates) -> None:
    """Logits of all sizes: gates that are closed, fully open and between."""
    with torch.no_grad():
        gates.log_alpha.mul_(0.5)
        biases = gates.log_alpha[-gates.count :]
        biases.copy_(torch.linspace(-0.8, 0.8, gates.count)[torch.randperm(gates.count)])


def gates_from_noise(logits: Tensor, seed: int, step: int) -> Tensor:
    u = (noise_k(torch.tensor([seed, step]), logits.shape[0]).double() + 0.5) / (1 << 23)
    s = torch.sigmoid((torch.logit(u) + logits) / BETA)
    return F.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def masked(net: nn.Sequential, z: Tensor, x: Tensor) -> Tensor:
    """The same network, computed densely with masks; the norm takes open channels only."""
    a, b, c = z.split([*SIZES.values()])
    norm = net[1]
    x = F.conv2d(x, net[0].weight, net[0].bias)
    x = F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    x = torch.tanh(F.conv2d(F.relu(x) * a[:, None, None], net[3].weight, net[3].bias))
    x = x.flatten(1) * b.repeat_interleave(4)
    x = torch.tanh(F.linear(x, net[6].weight, net[6].bias)) * c
    return F.linear(x, net[8].weight, net[8].bias)


def probabilities(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.sigmoid(logits - K).split([*SIZES.values()])


def brute_force(logits: Tensor, widths: str, lam: dict[str, float], per: str) -> Tensor:
    """The penalty weight by weight."""
    p = dict(zip(SIZES, probabilities(logits), strict=True))
    size = {"0": 9, "3": 4, "6": 4, "8": 1}  # weights per pair of units; a flatten repeats 4 times
    if per == "flop":
        size["0"] *= 9
        size["3"] *= 4
    ones = torch.ones(3).double()
    pairs = [("0", "a", None), ("3", "b", "a"), ("6", "c", "b"), ("8", None, "c")]
    if widths == "chain":
        size["6"] = 1
        pairs = pairs[:3]
    total = torch.zeros(()).double()
    for layer, out, read in pairs:
        made = ones if out is None else p[out]
        inputs = ones[:2] if read is None else p[read]
        rate = lam[out if out is not None else "c"]
        for one in made:
            for other in inputs:
                total = total + rate * size[layer] * one * other
    return total


# ---- logits ----


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_logits_are_those_of_the_published_generator(direction: str):
    reverse = direction == "backward"
    gates = l0.gates.DependentHardConcrete(SIZES, direction=direction).double()
    layers, ones = chain_of(gates, reverse)
    exact = logits_of(layers, ones, reverse)
    torch.testing.assert_close(gates.alpha, exact, atol=1e-10, rtol=0)
    torch.testing.assert_close(gates.open_probability(), torch.sigmoid(exact - K), **CLOSE)
    z = (torch.sigmoid(exact) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    torch.testing.assert_close(gates.deterministic(), z, **CLOSE)


def test_initial_chain_is_that_of_vgg_16():
    widths = (64, 64, 128, 128, 256, 256, 256, *[512] * 6)
    groups = {f"{i}": width for i, width in enumerate(widths)}
    gates = l0.gates.DependentHardConcrete(groups, seed=1)
    weights, biases = gates.log_alpha.detach().split([gates.log_alpha.numel() - 4224, 4224])
    assert abs(float(biases.mean()) - 3) < 1e-3 and 0.0095 < float(biases.std()) < 0.0105
    last = weights[-512 * 512 :]
    assert float(last.abs().max()) <= 512**-0.5
    assert float(last.std()) == pytest.approx((3 * 512) ** -0.5, rel=0.01)
    alpha = gates.alpha.detach()
    # What the published initialisation gives (mean over some seeds).
    assert float(alpha[:64].mean()) == pytest.approx(4.55, abs=0.03)
    assert float((alpha < 0).double().mean()) == pytest.approx(0.11, abs=0.03)
    assert float(gates.open_probability().mean()) == pytest.approx(0.917, abs=0.025)
    assert sum(gates.open_now().values()) / 4224 == pytest.approx(0.93, abs=0.025)


def test_own_means_of_biases():
    means = {"a": 0.5, "b": -2.0, "c": 4.0}
    gates = l0.gates.DependentHardConcrete(SIZES, bias=means)
    for part, mean in zip(gates.log_alpha[-28:].split([12, 9, 7]), means.values(), strict=True):
        assert abs(float(part.detach().mean()) - mean) < 0.02


# ---- a step ----


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_step_has_the_gradients_of_the_masked_network(direction: str, impl: str):
    net = make(direction=direction, lam=0.02, n_train=3, seed=5)
    gates = net.l0
    spread(gates)
    layers, ones = chain_of(gates, direction == "backward")
    with l0.use_impl(impl):
        data = l0.expected_loss(net, lambda: net(X.double()).square().mean())
        (data + l0.penalty(net)).backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    logits = logits_of(layers, ones, direction == "backward")
    z = gates_from_noise(logits, 5, 1)
    torch.testing.assert_close(gates.current_draw().z[:-1], z.detach())
    assert 0 < int((z == 0).sum()) < 28
    exact = masked(net, z, X.double()).square().mean()
    torch.testing.assert_close(data, exact)
    lam = dict.fromkeys(SIZES, 0.02 / 3)
    (exact + brute_force(logits, "connected", lam, "weight")).backward()
    for mine, parameter in zip(found, list(net.parameters())[:-1], strict=False):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-10, rtol=1e-10)
    chain = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    expected = torch.cat([p.grad.flatten() for p in chain])
    assert bool((expected != 0).all())
    torch.testing.assert_close(found[-1], expected, atol=1e-10, rtol=1e-10)


def test_one_chain_serves_draw_and_penalty(monkeypatch):
    from l0kernels.gates import dep

    calls = []
    monkeypatch.setattr(dep, "dep_chain", lambda *a: calls.append(a) or l0.functional.dep_chain(*a))
    net = make()
    loss = l0.expected_loss(net, lambda: net(X.double()).square().mean()) + l0.penalty(net)
    assert len(calls) == 1
    loss.backward()
    l0.penalty(net)
    assert len(calls) == 2  # parameters can change in ways that no version shows


def test_a_held_draw_serves_several_backward_passes():
    found = []
    for parts in ((X,), (X[:2], X[2:])):
        net = make()
        net[1].eval()  # statistics of parts are not those of the whole
        with l0.hold(net):
            for part in parts:
                net(part.double()).sum().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split)


def test_training_closes_gates_and_resumes_bit_for_bit():
    def start(seed=0):
        net = make(torch.float32, lam=0.05, seed=seed)
        return net, torch.optim.Adam(l0.param_groups(net, lr=1e-2, gate_lr=2e-2))

    def train(net, optimizer, steps):
        for _ in range(steps):
            loss = l0.expected_loss(net, lambda: net(X).square().mean()) + l0.penalty(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    straight, optimizer = start()
    before = sum(straight.l0.expected_open().values())
    train(straight, optimizer, 30)
    first, optimizer = start()
    train(first, optimizer, 11)
    resumed, resumed_optimizer = start(seed=7)
    resumed.load_state_dict(first.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    train(resumed, resumed_optimizer, 19)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert a.equal(b)
    assert sum(straight.l0.expected_open().values()) < 0.7 * before


def test_compiled_steps_are_one_graph():
    net = make(torch.float32, lam=0.1)
    spread(net.l0)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(twin, backend="aot_eager")
    widths = set()
    for _ in range(3):
        for model in (net, compiled):
            model.zero_grad()
            loss = l0.expected_loss(model, lambda: model(X).square().mean())  # noqa: B023
            (loss + l0.penalty(model)).backward()
        widths.add(tuple(net.l0.current_draw().counts))
        for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
    assert len(widths) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nothing_is_clamped():
    net = make()
    with torch.no_grad():
        net.l0.log_alpha.fill_(50.0)
    net(X.double())
    assert bool((net.l0.log_alpha == 50).all())
    assert float(net.l0.alpha.detach().max()) == pytest.approx(LN100)


# ---- penalty ----


@pytest.mark.parametrize("per", ["weight", "flop"])
@pytest.mark.parametrize("widths", ["connected", "chain"])
def test_penalty_counts_the_weights_between_open_units(widths: str, per: str):
    lam = {"a": 0.3, "b": 0.2, "c": 0.7}
    net = make(widths=widths, lam=lam, n_train=4)
    gates = net.l0
    spread(gates)
    logits = gates.alpha.detach().requires_grad_()
    exact = brute_force(logits, widths, lam, per) / 4
    for prepare in (lambda: None, lambda: net(X.double())):
        prepare()
        torch.testing.assert_close(l0.penalty(net, per=per), exact, **CLOSE)
    doubled = {name: 2 * value for name, value in lam.items()}
    torch.testing.assert_close(l0.penalty(net, per=per, lam=doubled), 2 * exact, **CLOSE)
    gates.zero_grad()
    l0.penalty(net, per=per).backward()
    layers, ones = chain_of(gates, False)
    brute_force(logits_of(layers, ones, False), widths, lam, per).div(4).backward()
    chain = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    grad = torch.cat([p.grad.flatten() for p in chain])
    torch.testing.assert_close(gates.log_alpha.grad, grad, **CLOSE)


def test_gradient_of_the_published_penalty():
    # lambda p (1 - p) (k_l^2 E_in + k_(l+1)^2 E_out,(l+1)) for the units of a middle layer.
    net = make(widths="chain", lam=1e-3)
    spread(net.l0)
    logits = net.l0.alpha.detach().requires_grad_()
    exact = brute_force(logits, "chain", dict.fromkeys(SIZES, 1e-3), "weight")
    (grad,) = torch.autograd.grad(exact, logits)
    p = probabilities(logits.detach())
    expected = 1e-3 * p[1] * (1 - p[1]) * (4 * p[0].sum() + 1 * p[2].sum())
    torch.testing.assert_close(grad[12:21], expected)


def test_products_depthwise_and_ungated_features_in_the_penalty():
    lam = {"a": 2.0, "b": 3.0, "c": 5.0}
    gates = l0.gates.DependentHardConcrete({"a": 4, "b": 4, "c": 6}, lam=lam)
    net = nn.ModuleList(
        [
            l0.nn.GatedConv2d(3, 4, 3, out_gate=gates["a"]),
            l0.nn.GatedConv2d(4, 4, 3, groups=4, out_gate=gates["a"]),
            l0.nn.GatedConv2d(9, 5, 1, in_gate=l0.cat(gates["a"], 5)),
            l0.nn.GatedLinear(4, 2, in_gate=gates["a"] * gates["b"]),
            l0.nn.GatedLinear(6, 7, in_gate=gates["c"]),  # of inputs that no layer makes
        ]
    )
    gates.attach(net)
    net.double()
    a, b, c = gates.open_probability().split([4, 4, 6])
    exact = 2 * 27 * a.sum() + 2 * 9 * a.sum() + 2 * 5 * a.sum() + 2 * 2 * (a * b).sum()
    exact += 5 * 7 * c.sum()
    torch.testing.assert_close(l0.penalty(net), exact, **CLOSE)


# ---- states of the gates ----


def test_frozen_gates_keep_their_values_and_get_zeros():
    net = make(lam=0.1)
    spread(net.l0)
    net(X.double())
    before, z = l0.penalty(net).detach(), net.l0.deterministic().detach()
    net.l0.freeze()
    with torch.no_grad():
        net.l0.log_alpha.add_(0.3)  # as momentum would
    net(X.double())
    penalty = l0.penalty(net)
    torch.testing.assert_close(penalty.detach(), before)
    assert penalty.requires_grad
    (net(X.double()).sum() * torch.inf + penalty * torch.nan).backward()
    assert bool((net.l0.log_alpha.grad == 0).all())
    assert net.l0.current_draw().z[:-1].equal(z)
    net.l0.unfreeze()
    torch.testing.assert_close(net.l0.deterministic(), z)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_after_a_step(how: str):
    net = make()
    net(X.double()).sum().backward()
    twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    for each in (net, twin):
        each(X.double())
    assert twin.l0.current_draw().z.equal(net.l0.current_draw().z)
    torch.testing.assert_close(l0.penalty(twin), l0.penalty(net))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_gates_in_fp32(dtype: torch.dtype):
    net = make(torch.float32)
    before, penalty = net.l0.log_alpha.detach().clone(), l0.penalty(net).detach()
    net.to(dtype)
    assert net.l0.log_alpha.dtype == torch.float32 and net.l0.log_alpha.equal(before)
    torch.testing.assert_close(l0.penalty(net).detach(), penalty)
    (net(X.to(dtype)).float().sum() + l0.penalty(net)).backward()
    assert net.l0.log_alpha.grad.dtype == torch.float32


def test_eval_and_inference_mode():
    net = make().eval()
    with torch.inference_mode():
        y, value = net(X.double()), l0.penalty(net)
        with l0.frozen(net):
            assert net(X.double()).equal(y)
    assert float(value) > 0


def test_nan_is_named():
    net = make()
    with torch.no_grad():
        net.l0.log_alpha[-1] = math.nan
    with pytest.raises(ValueError, match="expected no NaN; got 1 of 28, first at 27"):
        net(X.double())


# ---- convert ----


@pytest.mark.parametrize("options", [{}, {"direction": "backward", "widths": "chain"}])
def test_convert(options: dict):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    plain = copy.deepcopy(net)
    l0.convert(net, "dep", example_inputs=(X,), lam=1e-3, granularity="input", **options)
    assert isinstance(net.l0, l0.gates.DependentHardConcrete)
    assert net.l0.names == ["0", "3", "6"]
    (l0.expected_loss(net, lambda: net(X).square().mean()) + l0.penalty(net)).backward()
    assert bool((net.l0.log_alpha.grad != 0).any())
    assert "expected open" in str(l0.report(net))
    small = l0.compact(net.eval(), (X,))
    torch.testing.assert_close(small(X), net(X))
    l0.revert(net.train())
    torch.testing.assert_close(net(X), plain(X))


def test_groups_that_no_layer_makes_cost_nothing_in_the_published_penalty():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    options = {"granularity": "input", "widths": "chain", "lam": 1.0}
    l0.convert(net, "dep", example_inputs=(torch.randn(3, 4),), **options)
    assert net.l0.names == ["0.in", "0"]
    p = net.l0.open_probability()
    expected = p[:4].sum() * p[4:].sum()
    torch.testing.assert_close(l0.penalty(net).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, r"direction: expected one of \('forward', 'backward'\), got 'up'"),
        ({"widths": "all"}, r"widths: expected one of \('connected', 'chain'\), got 'all'"),
        ({"bias": {"a": 1.0}}, r"bias: expected one value for each of \['a', 'b', 'c'\]"),
        ({"bias": math.inf}, "bias: expected finite numbers, got inf"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        l0.gates.DependentHardConcrete(SIZES, **options)


def test_penalty_arguments():
    gates = l0.gates.DependentHardConcrete(SIZES)
    with pytest.raises(ValueError, match="expected gates that are attached to a model"):
        gates.penalty()
    net = make()
    with pytest.raises(ValueError, match="'weight' or 'flop', got 'byte'"):
        l0.penalty(net, per="byte")
    with pytest.raises(ValueError, match="lam: expected one value for each"):
        l0.penalty(net, lam={"a": 1.0})
