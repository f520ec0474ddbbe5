# SPDX-License-Identifier: Apache-2.0
"""L0-ARM and AR: law, estimators by enumeration, what the other pass leaves alone, bad input."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels.functional import open_lists
from l0kernels.gates import arm
from l0kernels.ops.sample_gates import reference

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def normal_density(phi: Tensor) -> Tensor:
    return torch.exp(-phi.square() / 2) / math.sqrt(2 * math.pi)


GATES: dict[str, str | Pair] = {
    "sigmoid": "sigmoid",
    "hard sigmoid": "hard_sigmoid",
    "normal": (torch.special.ndtr, normal_density),
}


def slow_pi(gate: str, phi: Tensor) -> Tensor:
    """g as published, for PyTorch to differentiate."""
    if gate == "sigmoid":
        return torch.sigmoid(7 * phi)
    return (phi + 0.5).clamp(0, 1) if gate == "hard sigmoid" else torch.special.ndtr(phi)


def small(units: int = 5, norm: bool = False, **options) -> nn.Sequential:
    """Two linear layers, and a norm between them if asked for, in fp64."""
    torch.manual_seed(0)
    gates = l0.gates.ARM({"a": units}, **options)
    layers: list[nn.Module] = [l0.nn.GatedLinear(3, units, out_gate=gates["a"])]
    if norm:
        layers.append(l0.nn.GatedBatchNorm1d(units, out_gate=gates["a"]))
    layers += [nn.Tanh(), l0.nn.GatedLinear(units, 2, in_gate=gates["a"])]
    net = nn.Sequential(*layers)
    gates.attach(net)
    return net.double()


X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
Y = torch.tensor([0, 1, 1, 0, 1, 0])


def loss_of(net: nn.Module) -> Tensor:
    return F.cross_entropy(3 * net(X), Y)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def uniform(net: nn.Module) -> Tensor:
    """The numbers of the present step."""
    key = torch.stack((net.l0.seed, net.l0.step))
    return (reference.noise_k(key, net.l0.count).double() + 0.5) / (1 << 23)


class GivenNoise:
    """Numbers in place of the generator's, and the means that stand for theirs in gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.u = self.mean = torch.empty(0)
        monkeypatch.setattr(arm, "sample_gates", self.sample_gates)
        monkeypatch.setattr(arm, "arm_gradient", self.arm_gradient)

    def sample_gates(self, log_alpha, key, cost, layout, law):
        u = {"bernoulli": self.u, "antithetic": 1 - self.u}[law]
        z = torch.cat(((u < torch.sigmoid(log_alpha)).double(), torch.ones(1)))
        return z, None, open_lists(z, layout)

    def arm_gradient(self, difference, factor, key):
        return torch.where(factor == 0, 0, difference * factor * (self.mean - 0.5))


def cells(pi: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Where u of every gate may lie as far as both draws see: a point, the mean, the weight."""
    per_gate = []
    for p in pi.tolist():
        m = min(p, 1 - p)
        ends = ((0.0, m), (m, 1 - m), (1 - m, 1.0))
        per_gate.append([((a + b) / 2, b - a) for a, b in ends if b > a])
    for chosen in itertools.product(*per_gate):
        u = torch.tensor([middle for middle, _ in chosen], dtype=torch.float64)
        yield u, u, math.prod(weight for _, weight in chosen)


def exact_gradients(net: nn.Module, gate: str) -> dict[str, Tensor]:
    """Of the expected loss, summed over all masks, by the masked network."""
    phi = net.l0.log_alpha.detach().clone().requires_grad_()
    pi = slow_pi(gate, phi)
    total = phi.new_zeros(())
    for mask in itertools.product((0.0, 1.0), repeat=len(phi)):
        z = torch.tensor(mask, dtype=torch.float64)
        probability = torch.where(z == 1, pi, 1 - pi).prod()
        with l0.use_impl("reference"), net.l0.using(z):
            total = total + probability * loss_of(net)
    net.zero_grad()
    total.backward()
    found = gradients(net)
    net.zero_grad()
    return found | {"l0.log_alpha": phi.grad}


# ---- initial and test gates, penalty ----


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.8])
@pytest.mark.parametrize("gate", GATES)
def test_initial_gates_are_closed_as_often_as_asked(gate: str, rate: float):
    gates = l0.gates.ARM({"a": 2000, "b": 1000}, gate=GATES[gate], droprate={"a": rate, "b": 0.5})
    phi = gates.log_alpha.detach().double()
    assert abs(float(slow_pi(gate, phi[:2000].mean())) - (1 - rate)) < 1e-3
    assert abs(float(phi[2000:].mean())) < 1e-4
    assert 0.009 / 7 < float(phi[:2000].std()) < 0.011 / 7


@pytest.mark.parametrize("gate", GATES)
def test_test_gates_are_the_published_ones(gate: str):
    phi = torch.arange(-150, 151, dtype=torch.float64) / 100
    pi = slow_pi(gate, phi)
    for test_gate, kept in (("soft", pi), ("binary", torch.ones(301, dtype=torch.float64))):
        gates = l0.gates.ARM({"a": 301}, gate=GATES[gate], test_gate=test_gate).double()
        with torch.no_grad():
            gates.log_alpha.copy_(phi)
        expected = torch.where(pi >= 0.5, kept, 0.0)
        torch.testing.assert_close(gates.deterministic(), expected, atol=1e-12, rtol=0)
        assert gates.deterministic()[150] == expected[150] > 0  # pi = 1/2 is open
        torch.testing.assert_close(gates.open_probability(), pi, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", GATES)
def test_penalty_and_its_gradient(gate: str):
    net = small(lam=0.3, n_train=4, gate=GATES[gate])
    phi = torch.tensor([-2.0, -0.3, 0.0, 0.2, 2.0], dtype=torch.float64)
    with torch.no_grad():
        net.l0.log_alpha.copy_(phi)
    phi.requires_grad_()
    expected = 0.3 / 4 * (slow_pi(gate, phi) * 2).sum()  # two columns' weights read each unit
    expected.backward()
    for prepare in (lambda: None, lambda: l0.expected_loss(net, lambda: loss_of(net))):
        net.zero_grad()
        prepare()
        value = l0.penalty(net)
        value.backward()
        torch.testing.assert_close(value, expected, atol=0, rtol=1e-10)
        torch.testing.assert_close(net.l0.log_alpha.grad, phi.grad, atol=1e-12, rtol=1e-10)
    if gate == "hard sigmoid":
        assert bool((net.l0.log_alpha.grad[[0, 4]] == 0).all())


# ---- estimators ----


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_estimators_are_unbiased(
    estimator: str, gate: str, norm: bool, monkeypatch: pytest.MonkeyPatch
):
    net = small(5, norm, estimator=estimator, gate=GATES[gate])
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.tensor([-0.15, 0.05, 0.0, 0.2, -0.05]))
    exact = exact_gradients(net, gate)
    noise = GivenNoise(monkeypatch)
    mean = {name: torch.zeros_like(g) for name, g in exact.items()}
    total = 0.0
    for u, middle, weight in cells(net.l0.open_probability()):
        noise.u, noise.mean = u, middle
        net.zero_grad()
        l0.expected_loss(net, lambda: loss_of(net)).backward()
        for name, grad in gradients(net).items():
            mean[name] += weight * grad
        total += weight
    assert total == pytest.approx(1, abs=1e-12)
    assert float(exact["l0.log_alpha"].abs().min()) > 1e-3
    for name, grad in exact.items():
        torch.testing.assert_close(mean[name], grad, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_gradients_are_the_published_formulas(estimator: str, device: torch.device):
    net = small(estimator=estimator).to(device)
    x, y = X.to(device), Y.to(device)
    for _ in range(5):
        losses = []

        def closure(losses: list[Tensor] = losses) -> Tensor:
            losses.append(F.cross_entropy(3 * net(x), y))
            return losses[-1]

        net.zero_grad()
        value = l0.expected_loss(net, closure)
        value.backward()
        u, other, its = uniform(net), losses[0], losses[-1].detach()
        assert value.equal(its)
        expected = 7 * (other - its) * (u - 0.5) if estimator == "arm" else 7 * its * (1 - 2 * u)
        torch.testing.assert_close(net.l0.log_alpha.grad, expected.detach(), atol=1e-12, rtol=1e-10)
        assert net.l0["a"].z.equal((u < net.l0.open_probability()).double())
        assert len(losses) == (2 if estimator == "arm" else 1)


def test_weights_learn_from_one_pass_alone():
    net, single = small(), small(estimator="ar")
    for each in (net, single):
        l0.expected_loss(each, lambda each=each: loss_of(each)).backward()
    found, expected = gradients(net), gradients(single)
    assert not found.pop("l0.log_alpha").equal(expected.pop("l0.log_alpha"))
    for name, grad in expected.items():
        assert found[name].equal(grad)


@pytest.mark.parametrize("estimator", ["arm", "ar"])
@pytest.mark.parametrize("gate, far", [("sigmoid", 3.0), ("hard_sigmoid", 0.6)])
def test_saturated_gates_get_exactly_zero(gate: str, far: float, estimator: str):
    net = small(estimator=estimator, gate=gate)
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.tensor([-far, 0.1, far, -0.1, 50.0]))
    for scale in (1.0, math.inf):
        net.zero_grad()
        l0.expected_loss(net, lambda scale=scale: loss_of(net) * scale).backward()
        grad = net.l0.log_alpha.grad
        assert bool((grad[[0, 2, 4]] == 0).all())
        assert bool((grad[[1, 3]] != 0).all())


def test_one_pass_where_no_gate_differs():
    net = small()
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.tensor([-4.0, 4.0, 4.0, -4.0, 4.0]))
    calls = []
    l0.expected_loss(net, lambda: (calls.append(1), loss_of(net))[1]).backward()
    assert len(calls) == 1
    assert bool((net.l0.log_alpha.grad == 0).all())


def test_samples_are_averaged():
    net, single = small(samples=3), small()
    mean: dict[str, Tensor] = {}
    values = []
    for _ in range(3):
        single.zero_grad()
        value = l0.expected_loss(single, lambda: loss_of(single))
        value.backward()
        values.append(float(value.detach()))
        for name, grad in gradients(single).items():
            mean[name] = mean.get(name, 0) + grad / 3
    value = l0.expected_loss(net, lambda: loss_of(net))
    value.backward()
    assert float(value.detach()) == pytest.approx(sum(values) / 3)
    assert int(net.l0.step) == 3
    for name, grad in gradients(net).items():
        torch.testing.assert_close(grad, mean[name], atol=1e-12, rtol=1e-10)
    with pytest.raises(RuntimeError, match="expected samples=1, got 3"), l0.hold(net):
        l0.expected_loss(net, lambda: loss_of(net))


def test_parts_of_a_batch_add_up_under_hold():
    whole, parts = small(), small()
    l0.expected_loss(whole, lambda: whole(X).square().mean()).backward()
    with l0.hold(parts):
        for part in X.chunk(2):
            l0.expected_loss(parts, lambda x=part: parts(x).square().mean() / 2).backward()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, atol=1e-12, rtol=1e-10)


def test_hold_notices_that_parameters_have_changed():
    net = small()
    with l0.hold(net):
        l0.expected_loss(net, lambda: loss_of(net)).backward()
        with torch.no_grad():
            net.l0.log_alpha.add_(0.1)
        with pytest.raises(RuntimeError, match="modified in place"):
            l0.expected_loss(net, lambda: loss_of(net))


# ---- what the pass without gradients leaves alone ----


SEEN: list[Tensor] = []
"""What the forwards of `Noisy` drew; not an attribute, which convert would take for an output."""


class Noisy(nn.Module):
    """A norm, dropout, a buffer that it replaces, and one that backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 9, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.second = nn.Conv2d(9, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
        y = self.second(F.relu(self.norm(self.first(x))))
        y = F.dropout(y, 0.5, self.training)
        SEEN.append(torch.rand(2))
        return self.head(y.mean((2, 3))) * self.scale


def noisy(**options) -> nn.Module:
    torch.manual_seed(0)
    net = Noisy().double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    return l0.convert(net, "arm", example_inputs=(x,), **options)


def images(size: int = 6) -> Tensor:
    return torch.randn(
        size, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_only_the_pass_that_learns_leaves_traces(impl: str):
    net, single = noisy(), noisy(estimator="ar")
    for each in (net, single):
        SEEN.clear()
        torch.manual_seed(3)
        passes = []

        def closure(each: nn.Module = each, passes: list[Tensor] = passes) -> Tensor:
            passes.append(each(images()))
            return passes[-1].square().mean()

        with l0.use_impl(impl):
            loss = l0.expected_loss(each, closure)
        each.draws = each.l0._draw.z.detach().clone()
        each.after, each.seen = torch.rand(3), list(SEEN)
        (loss + l0.penalty(each)).backward()
    assert len(net.seen) == 2 and net.seen[1].equal(single.seen[0])
    if impl == "reference":  # packed, dropout draws as many numbers as are open
        assert net.seen[0].equal(net.seen[1])
    assert net.after.equal(single.after) and net.draws.equal(single.draws)
    assert int(net.l0.step) == int(single.l0.step) == 1
    for (name, buffer), expected in zip(net.named_buffers(), single.buffers(), strict=True):
        assert buffer.equal(expected), name
    for name, grad in gradients(single).items():
        if name != "l0.log_alpha":
            assert gradients(net)[name].equal(grad), name


def test_both_passes_normalise_by_their_own_batch():
    net = noisy(droprate=0.5)
    outputs: list[Tensor] = []
    net.norm.register_forward_hook(lambda module, x, y: outputs.append(y))
    with l0.use_impl("reference"):
        l0.expected_loss(net, lambda: net(images()).square().mean())
    other, its = outputs
    assert its.requires_grad and not other.requires_grad
    for y in outputs:
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(9).double(), atol=1e-10, rtol=0)


def test_everything_comes_back_when_the_other_pass_fails():
    net = noisy()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    state = torch.get_rng_state()

    def closure() -> Tensor:
        net(images())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        l0.expected_loss(net, closure)
    for name, buffer in net.named_buffers():
        assert name == "l0.step" or buffer.equal(before[name]), name
    assert torch.get_rng_state().equal(state)
    z = (uniform(net) < net.l0.open_probability()).double()
    assert net.l0._draw.z[:-1].equal(z) and net.l0._held == 0


def test_weights_that_autocast_keeps_have_gradients():
    net = nn.Sequential(small().float(), nn.Linear(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = l0.expected_loss(net, lambda: net(X.float()).square().mean())
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_losses_that_share_a_held_draw_keep_their_graphs():
    net, single = noisy(), noisy(estimator="ar")
    for each in (net, single):
        torch.manual_seed(0)
        with l0.hold(each):
            losses = [
                l0.expected_loss(each, lambda each=each: each(images()).square().mean())
                for _ in range(2)
            ]
        sum(losses).backward()
    for name, grad in gradients(single).items():
        if name != "l0.log_alpha":
            assert gradients(net)[name].equal(grad), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recomputed_under_their_draw(reentrant: bool):
    plain, net = small(), small()
    inside = nn.Sequential(*list(net.children())[:-1])  # without the gates

    def loss(x: Tensor) -> Tensor:
        y = checkpoint(inside, x, use_reentrant=reentrant)
        return F.cross_entropy(3 * y, Y)

    for step in range(3):
        plain.zero_grad()
        net.zero_grad()
        l0.expected_loss(plain, lambda: loss_of(plain)).backward()
        l0.expected_loss(net, lambda: loss(X.clone().requires_grad_())).backward()
        for name, grad in gradients(plain).items():
            assert gradients(net)[name].equal(grad), (step, name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_losses_that_share_a_held_draw(reentrant: bool):
    net = small()
    inside = nn.Sequential(*list(net.children())[:-1])

    def loss(scale: float) -> Tensor:
        x = (scale * X).requires_grad_()
        return checkpoint(inside, x, use_reentrant=reentrant).square().mean()

    with l0.hold(net):
        losses = [l0.expected_loss(net, lambda s=s: loss(s)) for s in (1.0, 2.0)]
        sum(losses).backward()
    found = gradients(net)
    net.zero_grad()
    net.l0.step.zero_()
    both = lambda: net(X).square().mean() + net(2 * X).square().mean()  # noqa: E731
    l0.expected_loss(net, both).backward()
    for name, grad in gradients(net).items():
        torch.testing.assert_close(found[name], grad, atol=1e-12, rtol=1e-10)


def test_without_gradients_there_is_one_pass():
    net = small()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return loss_of(net)

    with torch.no_grad():
        l0.expected_loss(net, closure)
    net.l0.log_alpha.requires_grad_(False)
    l0.expected_loss(net, closure).backward()
    net.l0.log_alpha.requires_grad_(True)
    net.eval()
    l0.expected_loss(net, closure)
    assert len(calls) == 3 and net.l0.log_alpha.grad is None


# ---- packed and masked, and the rest of the package ----


@pytest.mark.parametrize("place", ["conv", "input"])
@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_packed_equals_masked(estimator: str, place: str):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(),
        nn.Conv2d(9, 7, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 11), nn.ReLU(),
        nn.Linear(11, 3),
    ).double()  # fmt: skip
    granularity = "input" if place == "input" else "unit"
    l0.convert(
        net, "arm", example_inputs=(images(2),), granularity=granularity, estimator=estimator
    )
    twin = copy.deepcopy(net)
    nets = {"auto": net, "reference": twin}
    optimizers = [torch.optim.SGD(l0.param_groups(n, lr=0.1), momentum=0.9) for n in nets.values()]
    for _ in range(8):
        values = []
        for (impl, each), optimizer in zip(nets.items(), optimizers, strict=True):
            optimizer.zero_grad()
            with l0.use_impl(impl):
                loss = l0.expected_loss(each, lambda each=each: each(images()).square().mean())
                values.append(loss + l0.penalty(each, lam=1e-3))
            values[-1].backward()
        torch.testing.assert_close(*values, atol=1e-10, rtol=1e-10)
        for name, grad in gradients(twin).items():
            found = gradients(net)[name]
            torch.testing.assert_close(found, grad, atol=1e-10, rtol=1e-10, msg=name)
        for optimizer in optimizers:
            optimizer.step()


def test_convert_report_compact_and_freeze():
    net = noisy(lam=0.1, droprate=0.3, test_gate="binary")
    with torch.no_grad():
        net.l0.log_alpha[::2] = -1.0
    net.eval()
    rows = l0.report(net).groups
    assert [row.units for row in rows] == [9, 8]
    assert [row.test_open for row in rows] == [4, 4]
    expected = net(images())
    small_net = l0.compact(net, (images(),))
    assert small_net.first.out_channels == 4
    torch.testing.assert_close(small_net(images()), expected, atol=1e-10, rtol=1e-10)
    net.train()
    net.l0.freeze()
    calls = []
    loss = l0.expected_loss(net, lambda: (calls.append(1), net(images()).sum())[1])
    (loss + l0.penalty(net)).backward()
    assert len(calls) == 1 and bool((net.l0.log_alpha.grad == 0).all())


def test_soft_test_gates_are_folded_by_compact():
    net = noisy(droprate=0.3)
    net.eval()
    assert 0.6 < float(net.l0.deterministic().min()) < 1
    small_net = l0.compact(net, (images(),))
    torch.testing.assert_close(small_net(images()), net(images()), atol=1e-10, rtol=1e-10)


def test_copies_and_pickles_go_on_alike():
    net = small(gate="hard_sigmoid")
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    l0.expected_loss(net, lambda: loss_of(net)).backward()
    for each in copies:
        l0.expected_loss(each, lambda each=each: loss_of(each)).backward()
        assert each.l0.log_alpha.grad.equal(net.l0.log_alpha.grad)


def test_optimizers_that_follow_draws_take_both_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0kernels.optim.rows.LEAST", 1)
    net, plain = small(12), small(12)
    followed = l0.optim.SGD(l0.param_groups(net, lr=0.1), model=net, momentum=0.9)
    ordinary = torch.optim.SGD(l0.param_groups(plain, lr=0.1), momentum=0.9)
    for _ in range(12):
        for each, optimizer in ((net, followed), (plain, ordinary)):
            optimizer.zero_grad()
            l0.expected_loss(each, lambda each=each: loss_of(each)).backward()
            optimizer.step()
    assert followed.row_weights
    followed.flush()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_scaled_losses_scale_the_estimate():
    net = small()
    grads = []
    for scale in (1.0, 1024.0):
        net.zero_grad()
        net.l0.step.zero_()
        (l0.expected_loss(net, lambda: loss_of(net)) * scale).backward()
        grads.append(net.l0.log_alpha.grad / scale)
    torch.testing.assert_close(*grads, atol=0, rtol=1e-12)


def test_gates_in_single_precision_estimate_alike():
    exact, net = small(), small()
    net.float()
    l0.expected_loss(exact, lambda: loss_of(exact)).backward()
    l0.expected_loss(net, lambda: F.cross_entropy(3 * net(X.float()), Y)).backward()
    assert net.l0.log_alpha.grad.dtype == torch.float32
    torch.testing.assert_close(
        net.l0.log_alpha.grad.double(), exact.l0.log_alpha.grad, atol=1e-5, rtol=1e-4
    )


def test_a_compiled_model_takes_both_passes():
    plain, net = small(), small()
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(3):
        for each, model in ((plain, plain), (net, compiled)):
            each.zero_grad()
            l0.expected_loss(model, lambda model=model: loss_of(model)).backward()
        for name, grad in gradients(plain).items():
            torch.testing.assert_close(gradients(net)[name], grad, atol=1e-12, rtol=1e-10)


# ---- bad input ----


def identity(phi: Tensor) -> Tensor:
    return phi


def falling(phi: Tensor) -> Tensor:
    return torch.sigmoid(-phi)


def number(phi: Tensor) -> Tensor:
    return phi.sum()


def low(phi: Tensor) -> Tensor:
    return 0.4 * torch.sigmoid(phi)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"droprate": 1.0}, r"droprate: expected values in \(0, 1\), got \{'a': 1.0\}"),
        ({"estimator": "reinforce"}, r"estimator: expected one of .*'ar'\), got 'reinforce'"),
        ({"test_gate": "hard"}, "test_gate: expected one of .*, got 'hard'"),
        ({"samples": 0}, "samples: expected a positive integer, got 0"),
        ({"k": 0.0}, "k: expected a positive number, got 0.0"),
        ({"k": math.nan}, "k: expected a positive number, got nan"),
        ({"gate": "relu"}, "gate: expected one of .* or a pair .*, got 'relu'"),
        ({"gate": (torch.sigmoid,)}, "gate: expected one of .* or a pair"),
        ({"gate": (identity, torch.ones_like)}, r"g nondecreasing within \[0, 1\]"),
        ({"gate": (falling, torch.ones_like)}, r"g nondecreasing within \[0, 1\]"),
        ({"gate": (number, torch.ones_like)}, "elementwise functions"),
        ({"gate": (torch.sigmoid, identity)}, "g' finite and not negative"),
        ({"gate": (low, torch.ones_like)}, "expected g to take the values 1 - droprate"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        l0.gates.ARM({"a": 3}, **options)


def test_nan_is_named_in_training_and_eval():
    net = small()
    with torch.no_grad():
        net.l0.log_alpha[2] = math.nan
    for training in (True, False):
        with pytest.raises(ValueError, match="log_alpha: expected no NaN; got 1 of 5, first at 2"):
            net.train(training)(X)


def test_the_closure_must_return_a_scalar():
    net = small()
    with pytest.raises(ValueError, match="scalar tensor from the closure, got"):
        l0.expected_loss(net, lambda: net(X))
