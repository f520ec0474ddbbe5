# SPDX-License-Identifier: Apache-2.0
"""Gates of their own for every example: laws, exactness, estimators, scopes, bad input."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels.gates.examples import ExampleGates, uniform
from l0kernels.gates.hard_concrete import BETA, GAMMA, ZETA
from l0kernels.ops.sample_gates.reference import noise_k

METHODS = ("hard_concrete", "dep", "arm")
X = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Net(nn.Module):
    """Convolutions, a norm, linear layers, one of which reads a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 9, 3)
        self.norm = nn.BatchNorm2d(9)
        self.conv2 = nn.Conv2d(9, 7, 2)
        self.fc1 = nn.Linear(28, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


def make(method: str = "hard_concrete", scope: str = "example", **options) -> nn.Module:
    torch.manual_seed(0)
    net = l0.convert(Net().double(), method, example_inputs=(X[:2],), scope=scope, **options)
    with torch.no_grad():  # gates of all kinds: mostly closed, mostly open, between
        if method == "dep":
            net.l0.log_alpha.mul_(0.3)
            spread = net.l0.log_alpha[-net.l0.count :]
        else:
            spread = net.l0.log_alpha
        ends = (-0.2, 0.2) if method == "arm" else (-3.0, 3.0)
        spread.copy_(torch.linspace(*ends, spread.numel(), dtype=torch.float64)[_shuffled(spread)])
    return net


def _shuffled(t: Tensor) -> Tensor:
    return torch.randperm(t.numel(), generator=torch.Generator().manual_seed(1))


def uniform_of(net: nn.Module, rows: Tensor) -> Tensor:
    """The numbers of some rows of the counter in the present step, row by row."""
    key = torch.stack((net.l0.seed, net.l0.step))
    k = torch.stack([noise_k(key, net.l0.count, row=int(row)) for row in rows])
    return (k.double() + 0.5) / (1 << 23)


def gates_of_rows(net: nn.Module, logits: Tensor, rows: Tensor) -> Tensor:
    """Training gates as published, for autograd to differentiate, [rows, gates]."""
    u = uniform_of(net, rows)
    if isinstance(net.l0, l0.gates.ARM):
        return (u < torch.sigmoid(7 * logits)).double() + 0 * logits
    s = torch.sigmoid((torch.logit(u) + logits) / BETA)
    return F.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def masked_by_hand(net: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """The network with every example's features multiplied by its own gates, in plain PyTorch."""
    by_name = {name: z[:, where] for name, where in net.l0.slices()}
    image = lambda name: by_name[name][:, :, None, None]  # noqa: E731
    y = F.conv2d(x, net.conv1.weight, net.conv1.bias)
    y = F.batch_norm(y, None, None, net.norm.weight, net.norm.bias, True, 0.1, net.norm.eps)
    y = F.conv2d(F.relu(y) * image("conv1"), net.conv2.weight, net.conv2.bias)
    y = (torch.tanh(y) * image("conv2")).flatten(1)
    y = torch.tanh(F.linear(y, net.fc1.weight, net.fc1.bias)) * by_name["fc1"]
    return F.linear(y, net.fc2.weight, net.fc2.bias)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# ---- exact values and gradients ----


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", METHODS)
def test_equal_to_plain_pytorch(method: str, layout: torch.memory_format, impl: str):
    net = make(method, **({"estimator": "ar"} if method == "arm" else {}))
    plain = make(method)
    x = X.clone(memory_format=layout).requires_grad_()
    with l0.use_impl(impl):
        loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), Y))
        loss.backward()
    twin = X.clone().requires_grad_()
    plain.l0.step.fill_(1)
    z = gates_of_rows(plain, plain.l0.alpha, 1 + torch.arange(6))
    assert 0.2 < float((z == 0).double().mean()) < 0.8
    expected = F.cross_entropy(masked_by_hand(plain, twin, z), Y)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(x.grad, twin.grad, atol=1e-12, rtol=1e-10)
    found = gradients(net)
    if method == "arm":  # its gates learn by another way
        assert bool(found.pop("l0.log_alpha").any())
        plain.l0.log_alpha.grad = None
    assert set(found) == set(gradients(plain))
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(found[name], grad, atol=1e-10, rtol=1e-10, msg=name)
    # The norm has seen all features of all examples.
    assert float((net.norm.running_mean - plain.norm.running_mean).abs().min()) > 0
    torch.testing.assert_close(
        net.norm.running_mean * 10,
        F.conv2d(X, plain.conv1.weight, plain.conv1.bias).mean((0, 2, 3)),
    )


def test_the_masked_reference_shares_the_noise_of_the_engine(monkeypatch):
    """A timing beside it compares layers only."""
    net = make()
    monkeypatch.delattr("l0kernels.ops.sample_gates.reference.example_noise")
    with l0.use_impl("reference"):
        assert bool(net(X).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_a_key_that_no_draw_has_makes_nan_on_a_gpu(method: str, monkeypatch):
    def as_on_a_gpu(key: Tensor, examples: int, gates: int, *rows: int) -> Tensor:
        return torch.full((examples, gates), -1, dtype=torch.int32)

    monkeypatch.setattr("l0kernels.gates.examples.example_noise", as_on_a_gpu)
    net = make(method)
    net(X)
    assert bool(net.l0["conv1"].z.isnan().all())
    assert bool(uniform(torch.tensor([-1])).isnan())


def test_tokens_share_the_gates_of_their_example():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    l0.convert(block, "hard_concrete", example_inputs=(x,), scope="example")
    y = block(x)
    z = block.l0["0"].z
    assert z.shape == (4, 12)
    expected = F.linear(torch.tanh(F.linear(x, block[0].weight, block[0].bias)) * z[:, None],
                        block[2].weight, block[2].bias)  # fmt: skip
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_takes_the_same_gates(dtype: torch.dtype):
    exact, net = make(), make().to(dtype)
    assert net.l0.log_alpha.dtype == torch.float32
    y, expected = net(X.to(dtype)), exact(X).detach()
    z, its = net.l0["conv1"].z, exact.l0["conv1"].z
    assert z.dtype == torch.float32 and (z == 0).equal(its == 0) and (z == 1).equal(its == 1)
    torch.testing.assert_close(z.double(), its, atol=1e-5, rtol=0)
    scale = float(expected.abs().max())
    assert float((y.detach().double() - expected).abs().max()) < 8 * torch.finfo(dtype).eps * scale
    y.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_autocast_and_weights_in_single_precision():
    net = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = l0.expected_loss(net, lambda: F.cross_entropy(net(X.float()), Y))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_layers_are_recomputed_under_their_draw(method: str, reentrant: bool):
    plain, net = make(method), make(method)

    def forward(x: Tensor) -> Tensor:
        inner = lambda y: torch.tanh(net.conv2(F.relu(net.norm(net.conv1(y)))))  # noqa: E731
        y = checkpoint(inner, x, use_reentrant=reentrant)
        return net.fc2(torch.tanh(net.fc1(y.flatten(1))))

    for each, run in ((plain, plain), (net, forward)):
        x = X.clone().requires_grad_()
        l0.expected_loss(each, lambda run=run, x=x: F.cross_entropy(run(x), Y)).backward()
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(net)[name], grad, atol=1e-12, rtol=1e-10, msg=name)


def test_forwards_of_two_sizes_are_recomputed_under_hold():
    found = []
    for checkpointed in (False, True):
        net = make()

        def run(x: Tensor, net: nn.Module = net, checkpointed: bool = checkpointed) -> Tensor:
            x = x.clone().requires_grad_()
            return checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)

        net.norm.eval()  # statistics would move twice
        with l0.hold(net):
            (run(X).square().sum() + run(X[:3]).square().sum()).backward()
        found.append(gradients(net))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-12, rtol=1e-10, msg=name)


def test_recomputation_after_another_draw_is_noticed():
    net = make()

    def loss() -> Tensor:
        return checkpoint(lambda x: net(x), X.clone().requires_grad_(), use_reentrant=False).sum()

    first = l0.expected_loss(net, loss)
    second = l0.expected_loss(net, loss)
    with pytest.raises(RuntimeError, match="but the gates were drawn again"):
        first.backward()
    del second


def test_compiled_models_draw_the_same():
    plain, net = make(), make()
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        for each, model in ((plain, plain), (net, compiled)):
            each.zero_grad()
            l0.expected_loss(model, lambda model=model: F.cross_entropy(model(X), Y)).backward()
        for name, grad in gradients(plain).items():
            torch.testing.assert_close(gradients(net)[name], grad, atol=1e-12, rtol=1e-10)


# ---- scopes ----


def test_a_held_draw_gives_the_same_place_the_same_gates():
    net = make()
    with l0.hold(net):
        net(X)
        z = net.l0["conv1"].z
        assert net.l0["conv1"].z is not z and net.l0["conv1"].z.equal(z)
        assert not z[0].equal(z[1])
        net(X[:4])
        assert net.l0["conv1"].z.equal(z[:4])
        with torch.no_grad():
            net(X)
            assert net.l0["conv1"].z.equal(z) and not net.l0["conv1"].z.requires_grad
    net(X)
    assert not net.l0["conv1"].z.equal(z)


def test_losses_under_a_held_draw_add_up():
    whole, parts = make(), make()
    batches = [X, X.flip(0)]
    with l0.hold(whole):
        sum(whole(x).square().mean() for x in batches).backward()
    with l0.hold(parts):
        for x in batches:
            parts(x).square().mean().backward()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_eval_frozen_and_penalty_are_those_of_the_batch(method: str):
    net, batch = make(method, lam=0.1), make(method, "batch", lam=0.1)
    for each in (net, batch):
        l0.expected_loss(each, lambda each=each: each(X).square().mean())
        l0.penalty(each).backward()
    torch.testing.assert_close(gradients(net)["l0.log_alpha"], gradients(batch)["l0.log_alpha"])
    for each in (net, batch):
        each.norm.load_state_dict(make(method).norm.state_dict())
        each.eval()
    assert net(X).equal(batch(X))
    assert net.l0["conv1"].z.shape == (9,) and net.l0["conv1"].count < 9
    for each in (net, batch):
        each.train()
        each.l0.freeze()
    assert l0.expected_loss(net, lambda: net(X).square().mean()).equal(
        l0.expected_loss(batch, lambda: batch(X).square().mean())
    )
    assert net.l0["conv1"].count < 9


def test_copies_pickles_and_states_go_on_alike():
    net = make("arm")
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), make("arm")]
    twins[-1].load_state_dict(net.state_dict())
    for each in (net, *twins):
        losses = lambda each=each: F.cross_entropy(each(X), Y, reduction="none")  # noqa: E731
        l0.expected_loss(each, losses).backward()
    for each in twins:
        for name, grad in gradients(net).items():
            assert gradients(each)[name].equal(grad), name


def test_the_report_says_that_nothing_is_skipped():
    net = make()
    assert [row.path for row in l0.report(net).groups] == ["dense, gates per example"] * 3
    net.eval()
    assert l0.compact(net, (X,)).conv1.out_channels < 9
    with pytest.raises(ValueError, match="to time, got gates per example"):
        l0.report(net, (X,))
    net.l0.freeze()  # one test gate for all examples
    assert [row.path for row in l0.report(net).groups] == ["packed"] * 3


# ---- ARM and AR ----


def tiny(examples: int, units: int, norm: bool, **options) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    gates = l0.gates.ARM({"a": units}, scope="example", **options)
    layers: list[nn.Module] = [l0.nn.GatedLinear(3, units, out_gate=gates["a"])]
    layers += [nn.Tanh(), l0.nn.GatedLinear(units, 4, in_gate=gates["a"])]
    if norm:  # after the gates: every example's loss depends on the gates of all
        layers.append(nn.BatchNorm1d(4))
    net = nn.Sequential(*layers)
    gates.attach(net)
    x = torch.randn(examples, 3, dtype=torch.float64)
    return net.double(), x, torch.arange(examples) % 4


def plain_losses(net: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(x, net[0].weight, net[0].bias)) * z
    out = F.linear(hidden, net[2].weight, net[2].bias)
    if isinstance(net[-2], nn.BatchNorm1d):
        out = F.batch_norm(out, None, None, net[-2].weight, net[-2].bias, True)
    return F.cross_entropy(3 * out, y, reduction="none")


def exact_gradients(net: nn.Module, x: Tensor, y: Tensor, pi_of: Callable) -> dict[str, Tensor]:
    """Of the expected mean loss, summed over all masks of all examples."""
    phi = net.l0.log_alpha.detach().clone().requires_grad_()
    pi, total = pi_of(phi), phi.new_zeros(())
    shape = (len(x), len(phi))
    for mask in itertools.product((0.0, 1.0), repeat=shape[0] * shape[1]):
        z = torch.tensor(mask, dtype=torch.float64).view(shape)
        total = total + torch.where(z == 1, pi, 1 - pi).prod() * plain_losses(net, x, y, z).mean()
    net.zero_grad()
    total.backward()
    return gradients(net) | {"l0.log_alpha": phi.grad}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "normal"])
@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_estimators_are_unbiased(
    estimator: str, gate: str, norm: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
):
    density = lambda phi: torch.exp(-phi.square() / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    laws = {
        "sigmoid": ("sigmoid", lambda phi: torch.sigmoid(7 * phi)),
        "hard_sigmoid": ("hard_sigmoid", lambda phi: (phi + 0.5).clamp(0, 1)),
        "normal": ((torch.special.ndtr, density), torch.special.ndtr),
    }
    chosen, pi_of = laws[gate]
    net, x, y = tiny(3, 2, norm, estimator=estimator, gate=chosen)
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.tensor([-0.1, 0.2]))
    exact = exact_gradients(net, x, y, pi_of)
    assert float(exact["l0.log_alpha"].abs().min()) > 1e-3
    # The noise of all gates of all examples, by the cells within which no draw changes.
    cells = []
    for p in pi_of(net.l0.log_alpha.detach()).tolist() * 3:
        m = min(p, 1 - p)
        ends = ((0.0, m), (m, 1 - m), (1 - m, 1.0))
        cells.append([((a + b) / 2, b - a) for a, b in ends])
    mean = {name: torch.zeros_like(g) for name, g in exact.items()}
    for chosen_cells in itertools.product(*cells):
        u = torch.tensor([middle for middle, _ in chosen_cells], dtype=torch.float64)
        k = u.view(3, 2) * 2**23 - 0.5
        monkeypatch.setattr(ExampleGates, "noise", lambda self, examples, k=k: k)
        net.zero_grad()
        losses = lambda: F.cross_entropy(3 * net(x), y, reduction=reduction)  # noqa: E731
        l0.expected_loss(net, losses).backward()
        weight = math.prod(weight for _, weight in chosen_cells)
        for name, grad in gradients(net).items():
            mean[name] += weight * grad
    for name, grad in exact.items():
        torch.testing.assert_close(mean[name], grad, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_gradients_are_the_formulas_of_the_paper(estimator: str):
    net, x, y = tiny(5, 6, False, estimator=estimator)
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.linspace(-0.1, 0.1, 6))
    value = l0.expected_loss(net, lambda: F.cross_entropy(3 * net(x), y, reduction="none"))
    value.backward()
    u, pi = uniform_of(net, 1 + torch.arange(5)), torch.sigmoid(7 * net.l0.log_alpha.detach())
    f1, f2 = (plain_losses(net, x, y, (v < pi).double()).detach() for v in (u, 1 - u))
    difference = f2 - f1 if estimator == "arm" else -2 * f1
    expected = 7 * (difference[:, None] * (u - 0.5)).mean(0)
    torch.testing.assert_close(net.l0.log_alpha.grad, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(value.detach(), f1.mean(), atol=1e-12, rtol=1e-12)
    assert not f1.equal(f2)


def test_saturated_gates_get_exactly_zero_and_all_saturated_need_one_pass():
    net, x, y = tiny(4, 3, False)
    calls = []

    def losses() -> Tensor:
        calls.append(1)
        return F.cross_entropy(net(x), y, reduction="none")

    for values, passes in (([-4.0, 0.1, 4.0], 2), ([-4.0, 4.0, 4.0], 1)):
        with torch.no_grad():
            net.l0.log_alpha.copy_(torch.tensor(values))
        net.zero_grad()
        calls.clear()
        l0.expected_loss(net, losses).backward()
        assert len(calls) == passes
        assert (net.l0.log_alpha.grad == 0).tolist() == [True, passes == 1, True]


# ---- bad input ----


@pytest.mark.parametrize("method", METHODS)
def test_unknown_scopes_are_named(method: str):
    with pytest.raises(ValueError, match=r"scope: expected one of \('batch', 'example'\), got 'a'"):
        l0.gates.METHODS[method]({"a": 3}, scope="a")


class Flattened(nn.Module):
    """Tokens become rows of their own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x))).flatten(0, 1)))


def test_layers_that_see_another_first_dimension():
    x = torch.randn(3, 4, 5)
    net = l0.convert(Flattened(), "hard_concrete", example_inputs=(x,), scope="example")
    with pytest.raises(ValueError, match="expected 3 examples in the first dimension, got 12"):
        net(x)


def test_inputs_without_examples():
    net = make()
    net.l0.draw()
    with pytest.raises(ValueError, match=r"GatedConv2d: expected a batch, .* shape \[9, 3, 3\]"):
        net.conv2(torch.randn(9, 3, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected a forward first, got none in this draw"):
        net.l0["conv1"].z  # noqa: B018


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_one_loss_of_forwards_of_two_sizes(estimator: str):
    """The noise of all examples counts, whichever forward runs last."""
    found = []
    for first, last in ((X, X[:2]), (X[:2], X)):
        net = make("arm", estimator=estimator)
        net.norm.eval()
        loss = lambda x, net=net: net(x).square().sum() * (len(x) == len(X))  # noqa: E731
        l0.expected_loss(net, lambda f=first, t=last, loss=loss: loss(f) + loss(t)).backward()
        found.append(net.l0.log_alpha.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-10)
    net = make("arm")
    net.norm.eval()  # or all losses depend on all gates
    losses = lambda: net(X).square().sum(1) + net(X[:2]).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"of which there were \[2, 6\], got 6"):
        l0.expected_loss(net, losses)


def test_losses_of_other_examples():
    net, x, y = tiny(4, 3, False)
    with pytest.raises(
        ValueError, match=r"expected one loss or one for each example .* were \[4\], got 3"
    ):
        l0.expected_loss(net, lambda: F.cross_entropy(net(x), y, reduction="none")[:3])
    with pytest.raises(ValueError, match=r"or one of losses of all examples, got \(4, 4\)"):
        l0.expected_loss(net, lambda: net(x))
    batch = make("arm", "batch")
    with pytest.raises(ValueError, match=r"expected a scalar tensor from the closure, got \(6,\)"):
        l0.expected_loss(batch, lambda: batch(X).sum(1))


def test_parameters_that_change_under_hold():
    net = make()
    with l0.hold(net):
        with torch.no_grad():
            net.l0.log_alpha.add_(0.1)
        with pytest.raises(RuntimeError, match="modified in place since"):
            net(X)


def test_nan_is_named():
    net = make()
    with torch.no_grad():
        net.l0.log_alpha[2] = math.nan
    with pytest.raises(ValueError, match="log_alpha: expected no NaN; got 1 of 24, first at 2"):
        net(X)
