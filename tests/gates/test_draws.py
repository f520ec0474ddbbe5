# SPDX-License-Identifier: Apache-2.0
"""When gates are drawn, and how long a draw lives."""

import copy

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    gates = l0.gates.HardConcrete({"a": 12}, seed=seed)
    net = nn.Sequential(
        l0.nn.GatedLinear(5, 12, out_gate=gates["a"]),
        nn.ReLU(),
        l0.nn.GatedLinear(12, 3, in_gate=gates["a"]),
    )
    return gates.attach(net)


X = torch.linspace(-1, 1, 20).view(4, 5)


def open_set(net: nn.Module) -> list[int]:
    return net.l0["a"].index.tolist()


def test_every_training_forward_draws_anew():
    net = make()
    seen = set()
    for step in range(1, 6):
        net(X)
        assert int(net.l0.step) == step
        seen.add(tuple(net.l0["a"].z.tolist()))
    assert len(seen) == 5


def test_one_draw_per_expected_loss():
    net = make()
    draws = []

    def closure() -> Tensor:
        out = net(X) + net(X)
        draws.append(net.l0["a"].z)
        return out.sum()

    l0.expected_loss(net, closure)
    assert int(net.l0.step) == 1 and len(draws) == 1


def test_hold_keeps_the_draw_across_forwards_and_scopes():
    net = make()
    with l0.hold(net):
        first = net.l0["a"].z
        net(X)
        l0.expected_loss(net, lambda: net(X).sum())
        with l0.hold(net):
            net(X)
        assert net.l0["a"].z.equal(first)
        assert int(net.l0.step) == 1
    net(X)
    assert int(net.l0.step) == 2


def test_hold_ends_when_the_body_raises():
    net = make()
    with pytest.raises(ZeroDivisionError), l0.hold(net):
        _ = 1 / 0
    net(X)
    assert int(net.l0.step) == 2


def test_draws_depend_on_seed_and_step_only():
    first, second, other = make(3), make(3), make(4)
    torch.manual_seed(99)
    for net in (first, other):
        net(X)
    second.l0.step.fill_(0)
    torch.manual_seed(5)
    second(X)
    assert first.l0["a"].z.equal(second.l0["a"].z)
    assert not first.l0["a"].z.equal(other.l0["a"].z)


def test_eval_is_deterministic_and_follows_the_parameters():
    net = make().eval()
    with torch.no_grad():
        before = net(X)
        assert net(X).equal(before) and int(net.l0.step) == 0
        net[2].weight.mul_(2)
        torch.testing.assert_close(net(X) - net[2].bias, 2 * (before - net[2].bias))
        net.l0.log_alpha.fill_(-5.0)
        assert net(X).equal(net[2].bias.expand(4, 3))


def test_frozen_packs_once_and_ends():
    net = make().eval()
    with torch.no_grad():
        expected = net(X)
        with l0.frozen(net):
            assert net(X).equal(expected)
            packed = net.l0._draw.packed[net[2], torch.float32][0]
            net(X)
            assert net.l0._draw.packed[net[2], torch.float32][0] is packed
            with torch.autocast("cpu", torch.bfloat16):
                assert net(X).dtype == torch.bfloat16
        net[2].weight.zero_()
        assert net(X).equal(net[2].bias.expand(4, 3))


def test_frozen_refuses_training_and_held_draws():
    net = make()
    with pytest.raises(RuntimeError, match="expected a model in eval mode"), l0.frozen(net):
        pass
    net.eval()
    with (
        pytest.raises(RuntimeError, match="outside hold"),
        l0.hold(net),
        l0.frozen(net),
    ):
        pass


def test_masked_and_packed_share_the_draw():
    nets = [make(), make()]
    outs = []
    for net, impl in zip(nets, ("auto", "reference"), strict=True):
        with l0.use_impl(impl):
            outs.append(net(X))
    assert nets[0].l0["a"].z.equal(nets[1].l0["a"].z)
    torch.testing.assert_close(*outs)
    assert outs[0].shape == outs[1].shape


def test_layers_without_a_draw_say_what_to_do():
    net = make()
    with pytest.raises(RuntimeError, match="no gates are drawn"):
        net[0](X)
    gates = l0.gates.HardConcrete({"a": 12})
    with pytest.raises(RuntimeError, match="not attached"):
        l0.nn.GatedLinear(5, 12, out_gate=gates["a"])(X)


def test_two_forwards_in_one_loss_and_the_penalty_in_any_order():
    net = make()
    (net(X).sum() + net(2 * X).sum()).backward()
    assert int(net.l0.step) == 2
    for order in (slice(None), slice(None, None, -1)):
        net.zero_grad()
        terms = [lambda: l0.penalty(net), lambda: l0.expected_loss(net, lambda: net(X).sum())]
        sum(term() for term in terms[order]).backward()
        assert net.l0.log_alpha.grad is not None


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_a_held_draw_serves_several_backward_passes(impl: str, training: bool):
    net = make().train(training)
    found = []
    for _ in range(2):
        net.zero_grad()
        net.l0.step.zero_()
        with l0.use_impl(impl), l0.hold(net):
            for part in (X[:2], X[2:]) if not found else (X,):
                net(part).sum().backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == (5 if training else 4)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_parts_of_the_model_do_not_run_on_a_stale_draw():
    net = make()
    net(X)
    net[0](X)  # the same draw
    net.eval()
    with pytest.raises(RuntimeError, match="expected a draw of eval mode, got one of training"):
        net[0](X)
    net(X)
    with torch.no_grad():
        net.l0.log_alpha.add_(1.0)
    with pytest.raises(RuntimeError, match="expected a draw of the present parameters"):
        net[0](X)
    with pytest.raises(RuntimeError, match="expected a draw of training mode"), l0.frozen(net):
        net.train()
        net(X)


def test_inference_mode():
    net = make()
    with torch.inference_mode():
        net(X)
        net.eval()
        expected, value = net(X), l0.penalty(net)
        with l0.frozen(net):
            assert net(X).equal(expected)
            with torch.inference_mode(False):
                net(X.clone().requires_grad_()).sum().backward()
    assert float(value) > 0


def test_nan_is_named_in_eval_too():
    net = make().eval()
    with torch.no_grad():
        net.l0.log_alpha[3] = float("nan")
    with pytest.raises(ValueError, match="expected no NaN; got 1 of 12, first at 3"):
        net(X)


@pytest.mark.parametrize("scope", ["batch", "example"])
@pytest.mark.parametrize("method", ["hard_concrete", "arm"])
def test_expected_loss_has_no_dimension(method: str, scope: str):
    gates = l0.gates.METHODS[method]({"a": 5}, scope=scope)
    net = gates.attach(torch.nn.Sequential(l0.nn.GatedLinear(5, 3, in_gate=gates["a"])))
    assert l0.expected_loss(net, lambda: net(torch.ones(1, 5)).sum(1)).shape == ()


def test_expected_loss_wants_a_scalar():
    net = make()
    with pytest.raises(ValueError, match=r"scalar tensor from the closure, got \(4, 3\)"):
        l0.expected_loss(net, lambda: net(X))
    assert net.l0._held == 0


def test_param_groups_split_weights_and_gates():
    net = make()
    weights, gates = l0.param_groups(net, lr=0.1, weight_decay=5e-4, gate_lr=2.0)
    assert gates["params"] == [net.l0.log_alpha]
    assert gates["lr"] == 2.0 and gates["weight_decay"] == 0.0
    assert len(weights["params"]) == 4 and weights["weight_decay"] == 5e-4
    assert l0.param_groups(net, lr=0.1)[1]["lr"] == 0.1


def test_training_resumes_bit_for_bit():
    def train(net: nn.Module, optimizer, steps: int) -> None:
        for _ in range(steps):
            loss = l0.expected_loss(net, lambda: net(X).square().mean()) + l0.penalty(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def start(seed: int = 0):
        net = make(seed)
        return net, torch.optim.Adam(l0.param_groups(net, lr=1e-2))

    straight, optimizer = start()
    train(straight, optimizer, 8)
    first, optimizer = start()
    train(first, optimizer, 3)
    resumed, resumed_optimizer = start(seed=7)
    resumed.load_state_dict(first.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    train(resumed, resumed_optimizer, 5)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert a.equal(b)


class Owner(nn.Module):
    """Keeps its gates itself, as hand-wired models do."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = l0.gates.HardConcrete({"a": 12})
        self.first = l0.nn.GatedLinear(5, 12, out_gate=self.l0["a"])
        self.second = l0.nn.GatedLinear(12, 3, in_gate=self.l0["a"])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_model_that_owns_its_gates_draws_once_per_forward():
    net = Owner()
    net.l0.attach(net)
    net.l0.attach(net)
    net(X)
    net(X)
    assert int(net.l0.step) == 2
    assert "l0.log_alpha" in net.state_dict()


def test_gates_are_found_inside_a_larger_model():
    larger = nn.Sequential(make(), nn.Tanh())
    loss = l0.expected_loss(larger, lambda: larger(X).sum()) + l0.penalty(larger)
    loss.backward()
    assert int(larger[0].l0.step) == 1
    with pytest.raises(ValueError, match="expected one set of gates, got 2"):
        l0.penalty(nn.Sequential(make(), make()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_gates_in_fp32(dtype: torch.dtype):
    net = make()
    before = net.l0.log_alpha.detach().clone()
    net.double().to(dtype)
    assert net.l0.log_alpha.dtype == torch.float32 and net.l0.log_alpha.equal(before)
    (net(X.to(dtype)).float().sum() + l0.penalty(net)).backward()
    assert net[0].weight.grad.dtype == dtype
    assert net.l0.log_alpha.grad.dtype == torch.float32


@pytest.mark.parametrize("step", [2**32, -1])
def test_a_step_that_does_not_fit_the_counter_is_an_error(step: int):
    net = make()
    net.l0.step.fill_(step - 1)
    with pytest.raises(ValueError, match=f"got {step}"):
        net(X)


def loaded(net: nn.Module, assign: bool) -> nn.Module:
    state = {name: copy.deepcopy(value) for name, value in make(seed=4).state_dict().items()}
    net.load_state_dict(state, assign=assign)
    return net


@pytest.mark.parametrize("assign", [False, True])
def test_a_draw_of_before_loading_is_not_used(assign: bool):
    net = make()
    net(X)
    loaded(net, assign)
    with pytest.raises(RuntimeError, match="no gates are drawn"):
        net[0](X)


@pytest.mark.parametrize("how", ["deepcopy", "assign"])
def test_new_parameters_are_clamped_though_their_version_is_the_old_ones(how: str):
    net = make()
    with torch.no_grad():
        for _ in range(9):
            net.l0.log_alpha.add_(0.1)
    net(X)
    version = net.l0.log_alpha._version
    new = copy.deepcopy(net) if how == "deepcopy" else loaded(net, assign=True)
    assert new.l0.log_alpha._version < version
    with torch.no_grad():
        while new.l0.log_alpha._version < version:
            new.l0.log_alpha.fill_(-50.0)
    new(X)
    assert float(new.l0.log_alpha.detach().min()) > -5
