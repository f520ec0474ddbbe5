# SPDX-License-Identifier: Apache-2.0
"""All weights of a model packed by one call, and norms as one operator: steps as on a GPU.

On a GPU this is how layers run; on a CPU the tests ask for it.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from interop.nets import batch, gradients, make, objective
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from waits import waits
from wired import wired

import l0kernels as l0
from l0kernels.bench.models import network
from l0kernels.nn import packing

IN_ONE_CALL = [("mlp", 5), ("lenet", 7)]  # how many weights and biases have gates


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0.gates.Gates, "_together", True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights that each call of ``pack_weights`` packed."""
    made: list[int] = []

    def counted(weights, *args):
        made.append(len(weights))
        return l0.functional.pack_weights(weights, *args)

    monkeypatch.setattr(packing, "pack_weights", counted)
    return made


def with_closed_units(net: nn.Module) -> nn.Module:
    """Closes the first unit of every group, so that layers have something to pack."""
    with torch.no_grad():
        for _, where in net.l0.slices():
            net.l0.log_alpha[where.start] = -9.0
    return net


@contextmanager
def layer_by_layer(net: nn.Module) -> Iterator[None]:
    net.l0._together = False
    yield
    del net.l0._together


def results(net: nn.Module, run: Callable[[nn.Module], None], apart: bool) -> dict[str, Tensor]:
    twin = copy.deepcopy(net)
    if apart:
        with layer_by_layer(twin):
            run(twin)
    else:
        run(twin)
    return {**gradients(twin), **{n: t.detach() for n, t in twin.named_buffers()}}


def assert_same_bits(net: nn.Module, run: Callable[[nn.Module], None]) -> None:
    expected, got = (results(net, run, apart) for apart in (True, False))
    assert set(expected) == set(got)
    for name, value in expected.items():
        assert got[name].equal(value), name


def one_step(net: nn.Module) -> None:
    objective(net, *batch()).backward()


@pytest.mark.parametrize("kind", [kind for kind, _ in IN_ONE_CALL])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_same_bits_as_layer_by_layer(
    kind: str, autocast: bool, multiple: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(l0.gates.Gates, "_multiple", multiple)
    x, y = (t.to(device) for t in batch())

    def run(net: nn.Module) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            objective(net, x, y).backward()

    for seed in range(3):
        assert_same_bits(make(kind, seed).to(device), run)


@pytest.mark.parametrize("kind", ["norm", "residual"])
@pytest.mark.parametrize("mode", ["train", "eval", "norms in eval"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_norms_as_one_operator(
    kind: str, mode: str, multiple: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(l0.gates.Gates, "_multiple", multiple)
    net = make(kind).double().to(device).train(mode == "train")
    net.l0.train(mode != "eval")
    for buffer in net.buffers():
        if buffer.dtype == torch.float64:
            buffer.uniform_(0.5, 1.5)
    x, y = (t.to(device) for t in batch())

    def run(net: nn.Module) -> None:
        for _ in range(2):
            F.cross_entropy(net(x.double()), y).backward()

    packed = results(net, run, apart=False)
    with l0.use_impl("reference"):
        masked = results(net, run, apart=False)
    assert set(packed) == set(masked)
    for name, value in masked.items():
        torch.testing.assert_close(packed[name], value, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_norm_options(affine: bool, options: dict, training: bool, device: torch.device):
    gates = l0.gates.HardConcrete({"a": 6})
    layers = [
        l0.nn.GatedLinear(3, 6, out_gate=gates["a"]),
        l0.nn.GatedBatchNorm1d(6, affine=affine, out_gate=gates["a"], **options),
        l0.nn.GatedLinear(6, 2, in_gate=gates["a"]),
    ]
    net = gates.attach(nn.Sequential(*layers)).double().to(device).train(training)
    z = torch.tensor([0.5, 0.0, 1.0, 0.2, 0.0, 0.9], dtype=torch.float64, device=device)
    x = torch.randn(5, 3, dtype=torch.float64).to(device)

    def run(net: nn.Module) -> None:
        for _ in range(3):
            with net.l0.using(z):
                net(x).square().sum().backward()

    packed = results(net, run, apart=False)
    with l0.use_impl("reference"):
        masked = results(net, run, apart=False)
    for name, value in masked.items():
        torch.testing.assert_close(packed[name], value, atol=1e-10, rtol=1e-10, msg=name)


def test_a_norm_says_what_width_it_expects():
    gates = l0.gates.HardConcrete({"a": 6})
    norm = l0.nn.GatedBatchNorm1d(6, out_gate=gates["a"])
    net = gates.attach(nn.Sequential(norm))
    z = torch.tensor([0.5, 0, 1, 0.2, 0, 0.9])
    with (
        gates.using(z),
        pytest.raises(ValueError, match="GatedBatchNorm1d: expected 4 features, got 6"),
    ):
        net(torch.randn(3, 6))


@pytest.mark.parametrize(("kind", "parts"), IN_ONE_CALL)
@pytest.mark.parametrize("mode", ["train", "eval", "no grad", "autocast", "half", "pickled"])
def test_one_call_per_forward(kind: str, parts: int, mode: str, calls: list[int]):
    net = with_closed_units(make(kind)).train(mode != "eval")
    x, y = batch()
    if mode == "half":
        net, x = net.bfloat16(), x.bfloat16()
    if mode == "pickled":
        net = pickle.loads(pickle.dumps(net))
    calls.clear()  # of convert
    expected = []
    for _ in range(3):
        with (
            torch.set_grad_enabled(mode != "no grad"),
            torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
        ):
            loss = F.cross_entropy(net(x).float(), y)
        if mode != "no grad":
            loss.backward()
        expected.append(parts)
        assert calls == expected


def test_what_is_whole_is_not_packed(calls: list[int]):
    net = make("lenet").eval()
    x, y = batch()
    calls.clear()
    F.cross_entropy(net(x), y).backward()
    assert calls == [3]  # weights whose columns have gates
    assert net.l0.open_now() == dict(zip(net.l0.names, net.l0.sizes, strict=True))
    got = gradients(net)
    net.zero_grad()
    with l0.use_impl("reference"):
        F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(got, gradients(net))


def test_two_units_say_nothing_of_their_gates(calls: list[int]):
    gates = l0.gates.HardConcrete({"a": 2, "b": 3})
    layers = [
        l0.nn.GatedLinear(4, 2, out_gate=gates["a"]),
        l0.nn.GatedLinear(2, 3, in_gate=gates["a"], out_gate=gates["b"]),
        l0.nn.GatedLinear(3, 2, in_gate=gates["b"]),
    ]
    net = gates.attach(nn.Sequential(*layers))
    with torch.no_grad():
        layers[0].weight[0] = torch.inf
    with gates.using(torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0])):
        assert bool(net(torch.ones(1, 4)).isfinite().all())
    assert calls == [4]  # the first weight and bias, columns of the others


def test_every_forward_under_one_draw_packs_anew(calls: list[int]):
    net = make("mlp")
    calls.clear()
    x, _ = batch()
    with torch.no_grad(), l0.hold(net):
        first = net(x)
        assert net(x).equal(first)
        net.fc3.weight.data.mul_(2)  # no version tells
        torch.testing.assert_close(net(x) - net.fc3.bias, 2 * (first - net.fc3.bias))
    assert len(calls) == 3


def test_a_frozen_scope_packs_once(calls: list[int]):
    net = make("lenet").eval()
    x, _ = batch()
    with torch.no_grad():
        expected = net(x)
        calls.clear()
        with l0.frozen(net):
            assert net(x).equal(expected) and net(x).equal(expected)
    assert len(calls) == 1


class Recurrent(nn.Module):
    """One layer used several times, one not always."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = l0.gates.HardConcrete({"a": 12})
        a = self.l0["a"]
        self.first = l0.nn.GatedLinear(5, 12, out_gate=a)
        self.inner = l0.nn.GatedLinear(12, 12, in_gate=a, out_gate=a)
        self.other = l0.nn.GatedLinear(12, 12, in_gate=a, out_gate=a)
        self.last = l0.nn.GatedLinear(12, 3, in_gate=a)
        self.times, self.use_other = 3, True
        self.l0.attach(self)
        with_closed_units(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        if self.use_other:
            x = self.other(x)
        return self.last(x)


X = torch.linspace(-1, 1, 20).view(4, 5)


def close(net: nn.Module, run: Callable[[nn.Module], None]) -> None:
    """Gates that several layers read add up in another order."""
    expected, got = (results(net, run, apart) for apart in (True, False))
    assert set(expected) == set(got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_layers_used_several_times_pack_for_themselves(calls: list[int]):
    close(Recurrent(), lambda net: net(X).square().sum().backward())
    assert calls == [7, 2, 2]


def test_layers_that_are_not_used_are_left_out_next_time(calls: list[int]):
    net = Recurrent()
    net.times, net.use_other = 1, False
    net(X).sum().backward()
    assert net.other.weight.grad is None
    net(X)
    net.use_other = True
    net(X)
    net(X)
    assert calls == [7, 5, 5, 2, 7]


def test_parts_of_a_model_run_backward_one_by_one(calls: list[int]):
    """Without a forward of the root between: each part takes what one call packed."""

    def run(net: nn.Module) -> None:
        net.times = 1
        with l0.hold(net):
            net(X)
            for _ in range(2):
                hidden = net.first(X)
                hidden.sum().backward()
                net.last(hidden.detach()).square().sum().backward()

    close(Recurrent(), run)


def test_two_losses_of_one_forward():
    def run(net: nn.Module) -> None:
        out = net(X)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()

    close(Recurrent(), run)


def test_gradients_of_inputs_alone():
    net = Recurrent()
    x = X.clone().requires_grad_()
    with l0.hold(net):
        (got,) = torch.autograd.grad(net(x).sum(), x)
        with layer_by_layer(net):
            (expected,) = torch.autograd.grad(net(x).sum(), x)
    assert got.equal(expected)


@pytest.mark.parametrize("frozen", ["fc1", "fc2", "weights", "gates"])
def test_parameters_without_gradients(frozen: str):
    net = make("mlp")
    for name, parameter in net.named_parameters():
        gate = name.startswith("l0.")
        if name.startswith(frozen) or (frozen == "weights" and not gate):
            parameter.requires_grad_(False)
        if frozen == "gates" and gate:
            parameter.requires_grad_(False)
    assert_same_bits(net, one_step)
    assert set(results(net, one_step, apart=False)) >= {
        n for n, p in net.named_parameters() if p.requires_grad
    }


def test_a_weight_that_two_layers_share():
    def shared(net: nn.Module) -> nn.Module:
        net.other.weight = net.inner.weight
        return net

    net = shared(Recurrent())
    expected, got = (
        results(shared(copy.deepcopy(net)), lambda n: n(X).square().sum().backward(), apart)
        for apart in (True, False)
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_parameters_that_change_during_a_forward(how: str):
    net = make("mlp")

    def change(*_) -> None:
        with torch.no_grad():
            if how == "in place":
                net.fc3.weight.mul_(2)
            else:
                net.fc3.weight = nn.Parameter(2 * net.fc3.weight)

    x, _ = batch()
    with torch.no_grad(), l0.hold(net):
        first = net(x)
        net.fc1.register_forward_hook(change)
        torch.testing.assert_close(net(x) - net.fc3.bias, 2 * (first - net.fc3.bias))


@pytest.mark.parametrize("what", ["fc2.weight", "fc1.bias"])
def test_backward_after_a_change_is_an_error(what: str):
    net = make("mlp")
    loss = objective(net, *batch())
    with torch.no_grad():
        net.get_parameter(what).add_(1)
    with pytest.raises(RuntimeError, match="pack_weights: .* modified in place since"):
        loss.backward()


class Mixed(nn.Module):
    """Its head runs outside of autocast, its first layer in float64 if asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = l0.gates.HardConcrete({"a": 12, "b": 10})
        self.first = l0.nn.GatedLinear(5, 12, out_gate=self.l0["a"])
        self.second = l0.nn.GatedLinear(12, 10, in_gate=self.l0["a"], out_gate=self.l0["b"])
        self.head = l0.nn.GatedLinear(10, 3, in_gate=self.l0["b"])
        self.l0.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_a_head_outside_autocast(calls: list[int]):
    net = with_closed_units(Mixed())

    def run(net: nn.Module) -> None:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                net(X).square().sum().backward()

    assert_same_bits(net, run)
    # What the head packs to is known from the second forward on.
    assert calls == [5, 1, 4, 1]
    run(net)
    calls.clear()
    with torch.no_grad():  # without autocast, of which training takes no notice
        net(X)
        net(X)
    assert calls == [5, 5]
    run(net)
    assert calls == [5, 5, 4, 1, 4, 1]


def test_weights_of_several_dtypes(calls: list[int]):
    net = with_closed_units(Mixed())
    net.second.half()
    net.head.bfloat16()

    def run(net: nn.Module) -> None:
        hidden = net.second(torch.relu(net.first(X)).half())
        net.head(hidden.bfloat16()).square().sum().backward()

    def in_forward(net: nn.Module) -> None:
        net.forward = lambda x: run(net)
        net(X)

    assert_same_bits(net, in_forward)
    assert calls == [2, 2, 1]


def test_a_layer_that_is_compiled_packs_in_its_graph(calls: list[int]):
    net = Recurrent()
    net.times = 1
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(net.last, backend="eager", fullgraph=True)
    net.forward = lambda x: compiled(net.other(torch.tanh(net.inner(net.first(x)))))
    for each in (net, twin):
        for _ in range(2):
            each.zero_grad()
            each(X).square().sum().backward()
    torch.testing.assert_close(gradients(net), gradients(twin))
    assert calls == [7, 6, 7, 7]  # the second forward knows that one is left


def test_copies_pack_their_own_weights():
    net = make("mlp")
    x, _ = batch()
    net(x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.fc3.weight.zero_()
        twin.fc3.bias.zero_()
        assert not twin(x).any() and net(x).any()


class Waits(TorchDispatchMode):
    """Operators for which the host would wait on a GPU, and copies between host and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def waits_of(run: Callable[[], object]) -> list[str]:
    with Waits() as found:
        run()
    return found.seen


def training(net: nn.Module, device: torch.device | str = "cpu", **penalty) -> Callable[[], None]:
    """A step with expected loss, penalty and optimizer."""
    x, y = (t.to(device) for t in batch())
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.01), momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), y))
        (loss + l0.penalty(net, **penalty)).backward()
        optimizer.step()

    return step


def small_wrn() -> nn.Module:
    return wired(network("wrn-10-1")).to(memory_format=torch.channels_last)


def few_inputs() -> nn.Module:
    """Closed inputs fill up to two."""
    net = make("mlp", granularity="input")
    with torch.no_grad():
        net.l0.log_alpha.fill_(-4.0)
    return net


STEPS = {
    "all": (small_wrn, {}, False),
    "frozen": (small_wrn, {}, True),
    "another lam": (small_wrn, {"lam": 2.0}, False),
    "frozen, another lam": (small_wrn, {"lam": 2.0}, True),
    "inputs": (few_inputs, {}, False),
}


def test_a_budget_does_not_wait():
    for method in ("hard_concrete", "arm", "dep", "cs"):
        net = make("lenet", method=method)
        budget = l0.Budget(net, 0.3, lr=1.0, warmup=3)
        budget()  # the first call computes what each gate has of all work
        assert not waits_of(lambda budget=budget: budget().backward())


def test_the_coupled_l2_does_not_wait():
    net = make("lenet")
    net.l0.l2 = 1.0
    assert not waits_of(lambda: l0.penalty(net).backward())
    assert bool(net.conv1.weight.grad.any())


def test_what_waits_is_seen():
    x = torch.arange(4.0)
    assert waits_of(lambda: (x.sum().item(), x[x > 1], x.nonzero(), x.equal(x)))[0] != ""
    assert len(waits_of(lambda: (x.sum().item(), x[x > 1], x.nonzero(), x.equal(x)))) >= 4
    assert not waits_of(lambda: x[torch.tensor([1, 2])])


@pytest.mark.parametrize("case", STEPS)
def test_nothing_in_a_step_would_wait_for_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(l0.gates.Gates, "_multiple", 16)
    build, penalty, frozen = STEPS[case]
    net = build()
    step = training(net, **penalty)
    step()
    if frozen:
        net.l0.freeze()
        # It looks for NaN on a CPU only.
        monkeypatch.setattr(net.l0, "_checked_deterministic", net.l0.deterministic)
    assert waits_of(step) == []
    assert waits_of(step) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_on_a_gpu_waits_for_the_counts_only(
    case: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
):
    """They are copied into pinned memory, with an event that PyTorch's alarm does not mind."""
    monkeypatch.setattr(l0.gates.Gates, "_together", None)
    build, penalty, frozen = STEPS[case]
    net = build().cuda()
    assert net.l0.together
    step = training(net, "cuda", **penalty)
    if frozen:
        net.l0.freeze()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        step()
        before = int(net.l0.step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(net.l0.step) == (0 if frozen else before + 3)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_250_repeats_of_a_step_on_a_gpu_are_bit_equal():
    net = small_wrn().cuda()
    start = copy.deepcopy(net.state_dict())
    x, y = torch.randn(256, 3, 32, 32, device="cuda"), torch.arange(256, device="cuda") % 10
    x = x.contiguous(memory_format=torch.channels_last)
    found: list[dict[str, Tensor]] = []
    for _ in range(250):
        net.load_state_dict(start)
        net.zero_grad()
        loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)
        loss.backward()
        buffers = {n: t.clone() for n, t in net.named_buffers()}
        found.append({"loss": loss.detach(), **gradients(net), **buffers})
        if len(found) > 1:
            for name, value in found[0].items():
                assert found[-1][name].equal(value), name
            found.pop()
