# SPDX-License-Identifier: Apache-2.0
"""ARM's two passes with their common prefix computed once: the very same bits as without."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels.gates import prefix
from l0kernels.gates.arm import ARM

X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """A stem, two gated convolutions with norms, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 10, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 4)

    def start(self, x: Tensor) -> Tensor:
        return F.relu(self.stem_norm(self.stem(x)))

    def inner(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))

    def body(self, x: Tensor) -> Tensor:
        return x + self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.start(x)).mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(y)))


class InPlace(Plain):
    """Activations and the residual sum write over what they get."""

    def start(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        kept = y.sum()
        return self.stem_norm(y.relu_() + 0 * kept).mul_(1.5)

    def body(self, x: Tensor) -> Tensor:
        y = x * 2.0
        x += self.norm2(self.conv2(F.relu(self.norm1(self.conv1(y)), inplace=True)))
        return x


class WrittenLater(Plain):
    """What comes after the prefix writes over a tensor of it, and reads it before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.start(x))
        hidden = self.fc1(y.mean((2, 3)))
        with torch.no_grad():
            y *= 2
        return self.fc2(torch.tanh(hidden)) + y.mean((1, 2, 3)).view(-1, 1)


class Halves(Plain):
    """An operator that gives two results in one storage, and does not say so."""

    def start(self, x: Tensor) -> Tensor:
        left, right = torch.unsafe_chunk(x, 2, 3)
        return super().start(torch.cat([left, right.abs()], 3))


class Twice(Plain):
    """One layer runs twice, and views of one tensor are written to."""

    def start(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem_norm(self.stem(x)))
        y = torch.cat([y, y.flip(1)], 2)
        y[:, 1:3] += 1
        y.view(-1)[:7].zero_()
        return F.avg_pool2d(y, (2, 1))

    def body(self, x: Tensor) -> Tensor:
        return x + self.inner(x + self.inner(x))


class Noisy(Plain):
    """Dropout in the prefix and after it; a buffer that counts and one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(8))

    def start(self, x: Tensor) -> Tensor:
        y = F.dropout(super().start(x), 0.3, self.training)
        if self.training:
            self.calls.add_(1)
            self.seen = self.seen + y.detach().mean((0, 2, 3)) * torch.rand(())
        return y * (1 + self.seen.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout2d(self.body(self.start(x)), 0.2, self.training)
        return self.fc2(torch.tanh(self.fc1(y.mean((2, 3)))))


class Decides(Plain):
    """Numbers of the prefix decide what runs."""

    def start(self, x: Tensor) -> Tensor:
        y = super().start(x)
        return y * 2 if float(y.mean()) > 0.1 else y / 2


class Checkpointed(Plain):
    def body(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=False)


class Reentrant(Plain):
    def body(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=True)


class Hooked(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.stem.register_forward_hook(lambda module, x, y: y * 0.5)
        self.norm1.register_forward_pre_hook(lambda module, x: (x[0] + 1,))


NETS = [
    Plain,
    InPlace,
    WrittenLater,
    Halves,
    Twice,
    Noisy,
    Decides,
    Checkpointed,
    Reentrant,
    Hooked,
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Other tests in this process may have compiled something."""
    torch._dynamo.reset()


def make(net: type[nn.Module] = Plain, differs: str = "fc1", **options) -> nn.Module:
    """Gates of one group differ in most draws, those before it in none."""
    torch.manual_seed(0)
    model = l0.convert(net(), "arm", example_inputs=(X[:2],), **options)
    names = list(model.l0.names)
    with torch.no_grad():
        for name, where in model.l0.slices():
            far = torch.linspace(-9, 9, where.stop - where.start) + 0.1
            before = names.index(name) < names.index(differs)
            model.l0.log_alpha[where] = far.sign() * 9 if before else 0.02
    return model


def results(net: nn.Module, steps: int = 4, loss_of: Callable | None = None) -> list[Tensor]:
    """Everything that some training steps leave behind."""
    torch.manual_seed(7)
    found = []
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.05, gate_lr=0), momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = l0.expected_loss(net, loss_of or (lambda: net(X).square().mean()))
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in net.parameters())]
        optimizer.step()
        found += [b.clone() for b in net.buffers()] + [torch.get_rng_state()]
    return found


class Count:
    """How many operators got recorded results, and what ran without any prefix."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        take = prefix._Replaying._take

        def counted(mode: prefix._Replaying, result: prefix.Made) -> Tensor:
            self.taken += 1
            return take(mode, result)

        monkeypatch.setattr(prefix._Replaying, "_take", counted)


def compare(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, loss_of: Callable | None = None
) -> int:
    """Train a model and a copy that computes all twice; returns how many results were shared."""
    twin, count = copy.deepcopy(net), Count(monkeypatch)
    make_loss = loss_of or (lambda each: None)
    shared = results(net, loss_of=make_loss(net))
    taken = count.taken
    monkeypatch.setattr(ARM, "_common", lambda self, other, model: None)
    apart = results(twin, loss_of=make_loss(twin))
    assert count.taken == taken
    for i, (a, b) in enumerate(zip(shared, apart, strict=True)):
        assert a.equal(b), i
    return taken


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_as_two_whole_passes(
    net: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    model = make(net).to(dtype)
    x = X.to(dtype)
    loss_of = lambda each: lambda: each(x).square().mean()  # noqa: E731
    taken = compare(model, monkeypatch, loss_of)
    assert taken >= (4 if net is WrittenLater else 16)  # in four steps


@pytest.mark.parametrize("differs, at_least, at_most", [("conv1", 1, 6), ("fc1", 7, 14)])
def test_the_prefix_ends_at_the_first_layer_whose_gates_differ(
    differs: str, at_least: int, at_most: int, monkeypatch: pytest.MonkeyPatch
):
    net, count = make(differs=differs), Count(monkeypatch)
    convolutions = []
    for name in ("stem", "conv1", "conv2"):
        layer = getattr(net, name)
        compute = layer._conv_forward if name == "stem" else layer.compute
        kind = "_conv_forward" if name == "stem" else "compute"
        monkeypatch.setattr(
            layer, kind, lambda *a, f=compute, n=name: (convolutions.append(n), f(*a))[1]
        )
    l0.expected_loss(net, lambda: net(X).square().mean()).backward()
    assert at_least <= count.taken <= at_most
    assert convolutions == ["stem", "conv1", "conv2"] * 2  # Python runs twice, operators do not


@pytest.mark.parametrize("together", [False, True])
def test_however_weights_are_packed(together: bool, monkeypatch: pytest.MonkeyPatch):
    net = make()
    net.l0._together = together
    assert compare(net, monkeypatch) > 20


def test_gates_that_draws_leave_at_full_width(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0kernels.gates.dense.LEAST_WEIGHTS", 1)
    monkeypatch.setattr("l0kernels.gates.dense.ROWS_PER_PACKING", 10**9)
    assert compare(make(), monkeypatch) > 20


def test_autocast(monkeypatch: pytest.MonkeyPatch):
    def loss_of(each: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return each(X).float().square().mean() + each.stem(X).float().mean()

        return loss

    assert compare(make(), monkeypatch, loss_of) > 4


def test_samples_and_held_draws(monkeypatch: pytest.MonkeyPatch):
    assert compare(make(samples=2), monkeypatch) > 40
    monkeypatch.undo()
    nets = make(), make()
    for net, shares in zip(nets, (True, False), strict=True):
        if not shares:
            monkeypatch.setattr(ARM, "_common", lambda self, other, model: None)
        with l0.hold(net):
            for x in X.split(3):
                l0.expected_loss(net, lambda net=net, x=x: net(x).square().sum()).backward()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert a.grad.equal(b.grad)


# ---- what is not the same in both passes ----


def test_what_a_closure_takes_from_elsewhere_is_not_shared(monkeypatch: pytest.MonkeyPatch):
    """Numbers, tensors and state that differ from call to call."""

    def loss_of(each: nn.Module) -> Callable[[], Tensor]:
        calls, generator = [0.0], torch.Generator().manual_seed(3)
        state = torch.zeros(3, 1, 1)

        def scaled() -> Tensor:
            calls[0] += 1
            return each(X * calls[0]).square().mean()

        def fresh() -> Tensor:
            calls[0] += 1
            return each(X * torch.tensor([calls[0]])).square().mean()

        def stateful() -> Tensor:
            y = each(X + state).square().mean()
            state.add_(1)
            return y

        def noisy() -> Tensor:
            return each(X * torch.rand(X.shape, generator=generator)).square().mean()

        def listed() -> Tensor:
            calls.append(0.0)
            return each(torch.cat([X] * len(calls))).square().mean()

        kinds = [scaled, fresh, stateful, noisy, listed]
        turn = [0]

        def next_kind() -> Tensor:
            turn[0] += 1
            return kinds[(turn[0] - 1) // 2 % len(kinds)]()

        return next_kind

    twin_results = []
    for shares in (True, False):
        net = make(Plain)
        if not shares:
            monkeypatch.setattr(ARM, "_common", lambda self, other, model: None)
        twin_results.append(results(net, steps=10, loss_of=loss_of(net)))
    for i, (a, b) in enumerate(zip(*twin_results, strict=True)):
        assert a.equal(b), i


class ReadsGates(Plain):
    """Asks for the gates of a layer that it has not reached."""

    def body(self, x: Tensor) -> Tensor:
        open_units = self.l0["fc1"].z.sum() if hasattr(self, "l0") else 1.0
        return x * open_units + self.inner(x)


def test_whoever_asks_for_the_draw_ends_the_prefix(monkeypatch: pytest.MonkeyPatch):
    net, count = make(ReadsGates), Count(monkeypatch)
    l0.expected_loss(net, lambda: net(X).square().mean()).backward()
    assert 1 <= count.taken <= 6
    monkeypatch.undo()
    compare(make(ReadsGates), monkeypatch)


def test_nothing_is_seen_where_the_first_layer_differs(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))
    l0.convert(net, "arm", example_inputs=(torch.randn(2, 3),))
    monkeypatch.setattr(prefix.Prefix, "__init__", None)
    l0.expected_loss(net, lambda: net(torch.randn(4, 3)).square().mean()).backward()


def test_where_something_is_compiled_both_passes_are_whole(monkeypatch: pytest.MonkeyPatch):
    net, plain, count = make().double(), make().double(), Count(monkeypatch)
    x = X.double()
    l0.expected_loss(plain, lambda: plain(x).square().mean()).backward()
    assert count.taken > 0
    count.taken = 0
    compiled = torch.compile(net, backend="aot_eager")
    l0.expected_loss(net, lambda: compiled(x).square().mean()).backward()
    assert count.taken == 0
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-10)


def test_after_an_error_no_mode_is_left():
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    for fails_at in (1, 2):
        net, calls = make(), []

        def loss(net=net, calls=calls, fails_at=fails_at) -> Tensor:
            calls.append(1)
            net.start(X)
            if len(calls) == fails_at:
                raise ZeroDivisionError
            return net(X).mean()

        with pytest.raises(ZeroDivisionError):
            l0.expected_loss(net, loss)
        assert _get_current_dispatch_mode() is None and net.l0._draw.prefix is None
