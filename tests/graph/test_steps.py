# SPDX-License-Identifier: Apache-2.0
"""Captured steps are eager steps: on a CPU from a tape of operators, on a GPU from CUDA graphs."""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph.recorder import TapeRecorder, Watched
from interop.nets import IMAGE, Net, batch, make
from torch import Tensor, nn

import l0kernels as l0
from l0kernels import _capture
from l0kernels.gates import capacity
from l0kernels.graph import GraphStep

LR = 0.125  # the same in float32


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths in multiples of 2: these networks are narrow."""
    monkeypatch.setattr(capacity, "GPU_MULTIPLE", 2)


@pytest.fixture
def watch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Has steps captured, with news that come some steps late."""

    def start(late: int = 3) -> Watched:
        real = _capture.recorder_for(device)
        if real is None:  # gates look for NaN on a CPU only
            monkeypatch.setattr(l0.gates.Gates, "_checked_deterministic", unchecked)
        watched = Watched(TapeRecorder() if real is None else real, late)
        monkeypatch.setattr(_capture, "recorder_for", lambda _: watched)
        return watched

    return start


@torch.no_grad()
def unchecked(gates: l0.gates.Gates) -> Tensor:
    return gates.deterministic()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units of every group are packed, which no draw fits."""
    monkeypatch.setattr(capacity, "capacity", lambda mean, variance, size: min(2, size))


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    groups = l0.param_groups(net, lr=LR, weight_decay=2**-10, gate_lr=1.0)
    return torch.optim.SGD(groups, **{"momentum": 0.75, "fused": True, **options})


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    groups = l0.param_groups(net, lr=2**-6, gate_lr=2**-4)
    return torch.optim.AdamW(groups, fused=True, capturable=True)


def adagrad(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(l0.param_groups(net, lr=2**-4, gate_lr=2**-3), fused=True)


def never_leaving_out(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As those of older versions of PyTorch, which do not look at ``found_inf``."""
    optimizer._step_supports_amp_scaling = False
    return optimizer


def plain_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)


def closing_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gates close within some steps."""
    return plain_loss(net, x, y) + 19 * l0.penalty(net)


Optimizer = Callable[[nn.Module], torch.optim.Optimizer]
Change = Callable[[nn.Module, torch.optim.Optimizer, int], None]


class Both:
    """The same training, captured and eager.

    Args:
        net: is trained by captured steps, a copy of it by eager ones.
        loss: of a network and a batch.
        change: what happens before each step.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        optimizer: Optimizer = sgd,
        loss: Callable[..., Tensor] = plain_loss,
        change: Change = lambda *_: None,
        replan_every: int = 10,
    ) -> None:
        self.net = net.double().to(device)
        self.twin = copy.deepcopy(self.net)
        self.device, self._loss, self.change = device, loss, change
        self.mine, self.theirs = optimizer(self.net), optimizer(self.twin)
        of_mine = functools.partial(loss, self.net)
        self.step = l0.graph(self.net, self.mine, of_mine, replan_every=replan_every)
        self.losses: list[tuple[Tensor, Tensor]] = []

    def run(self, steps: int, size: Callable[[int], int] = lambda _: 8) -> "Both":
        for _ in range(steps):
            number = len(self.losses)
            x, y = (t.to(self.device) for t in batch(size(number), seed=number))
            self.change(self.net, self.mine, number)
            self.change(self.twin, self.theirs, number)
            mine = self.step(x.double(), y)
            self.theirs.zero_grad()
            theirs = self._loss(self.twin, x.double(), y)
            theirs.backward()
            self.theirs.step()
            self.losses.append((mine, theirs.detach()))
        return self

    def assert_equal(self) -> None:
        self.step.flush()
        for number, (mine, theirs) in enumerate(self.losses):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=f"step {number}")
        mine, theirs = (everything(*each) for each in self.pairs())
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert int(self.net.l0.step) == int(self.twin.l0.step)

    def pairs(self) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
        yield self.net, self.mine
        yield self.twin, self.theirs


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and state of the optimizer; looks past whatever would flush."""
    found = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = value
    return {name: t.detach().clone() for name, t in found.items()}


def opened(net: nn.Module, log_alpha: float = 1.0) -> nn.Module:
    nn.init.normal_(net.l0.log_alpha, log_alpha, 1.0)
    return net


def skipping(net: nn.Module) -> nn.Module:
    net.l0.skip_below = 0.5
    return net


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: opened(make("mlp")),
    "noisy": lambda: opened(make("norm"), -1.0),
    "lenet": lambda: opened(make("lenet")),
    "norm": lambda: opened(make("norm")),
    "residual": lambda: opened(make("residual")),
    "inputs": lambda: opened(make("lenet", granularity="input"), -1.0),
    "arm": lambda: make("lenet", method="arm"),
    "dep": lambda: make("norm", method="dep"),
    "cs": lambda: skipping(opened(make("norm", method="cs"), 1.0)),
}


@pytest.mark.parametrize("kind", NETS)
def test_captured_steps_are_eager_steps(
    kind: str, device: torch.device, watch: Callable[..., Watched]
):
    recorder = watch()
    both = Both(NETS[kind](), device, loss=closing_loss).run(60)
    both.assert_equal()
    assert recorder.replayed >= 40 and recorder.recorded >= 2
    assert sum(capacity.capacities(both.net.l0)) < sum(both.net.l0.sizes)


@pytest.mark.parametrize("optimizer", [adamw, adagrad])
def test_other_optimizers(
    optimizer: Optimizer, device: torch.device, watch: Callable[..., Watched]
):
    recorder, net = watch(), NETS["mlp"]()
    leaves_out = getattr(optimizer(net), "_step_supports_amp_scaling", False)
    if optimizer is adagrad and not leaves_out:  # as in torch 2.11
        with pytest.raises(ValueError, match="versions of PyTorch where it can leave out a step"):
            Both(net, device, optimizer, closing_loss)
        return
    Both(net, device, optimizer, closing_loss).run(60).assert_equal()
    assert recorder.replayed >= 40


class Concat(nn.Module):
    """Ports that several groups and ungated features meet in, and gates before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 10, 3, padding=1)
        self.c = nn.Conv2d(25, 14, 3, padding=1)
        self.norm = nn.BatchNorm2d(14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        y = torch.cat((F.relu(self.b(a)), x, a), 1)
        return self.head(F.relu(self.norm(self.c(y))).mean((2, 3)))


@pytest.mark.parametrize("place", ["after_act", "before_norm"])
def test_features_of_several_groups(
    place: str, device: torch.device, watch: Callable[..., Watched]
):
    recorder = watch()
    torch.manual_seed(0)
    example = (torch.randn(2, *IMAGE),)
    kind = {"after_act": Concat, "before_norm": Net}[place]
    net = l0.convert(kind(), "hard_concrete", example_inputs=example, lam=1e-3, place=place)
    both = Both(opened(net), device, loss=closing_loss).run(40)
    both.assert_equal()
    assert recorder.replayed >= 20 and recorder.recorded >= 2
    plan = both.step._plan
    assert plan is not None and plan.capacities != both.net.l0.sizes


def test_widths_are_those_of_gates_within_their_range(
    device: torch.device, watch: Callable[..., Watched]
):
    """An optimizer may have left them outside, until the next draw."""
    watch()
    both = Both(NETS["norm"](), device, replan_every=1).run(3)
    both.step.flush()
    for net, _ in both.pairs():
        net.l0.log_alpha.data.fill_(-12.0)
    wanted = capacity.capacities(both.net.l0)
    both.run(1)
    plan = both.step._plan
    assert plan is not None and sum(plan.capacities) > sum(wanted)
    both.assert_equal()


@pytest.mark.parametrize("kind", ["norm", "arm", "dep"])
def test_no_graph_of_an_earlier_step_is_alive_in_a_capture(
    kind: str, device: torch.device, watch: Callable[..., Watched]
):
    """Its node that accumulates the gradient belongs to the stream of that step."""
    recorder, numbers = watch(), iter(range(100))
    begun: list[bool] = []

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        node = net.l0.log_alpha.view_as(net.l0.log_alpha).grad_fn.next_functions[0][0]
        if net.l0._plan is not None:
            begun.append("step" in node.metadata)
        node.metadata["step"] = next(numbers)
        return plain_loss(net, x, y)

    # An eager step comes between the one that warms up and the capture.
    Both(NETS[kind](), device, loss=loss).run(6, size=lambda number: 5 if number == 2 else 8)
    assert recorder.recorded == 1 and begun == [False, False]


# Draws that do not fit.


@pytest.mark.parametrize("late", [0, 2, 100])
@pytest.mark.parametrize("kind", ["noisy", "inputs", "arm"])
def test_draws_that_do_not_fit(
    kind: str,
    late: int,
    device: torch.device,
    watch: Callable[..., Watched],
    monkeypatch: pytest.MonkeyPatch,
):
    """With the mean as capacity every other draw does not, in the first steps and in a row."""
    monkeypatch.setattr(capacity, "SIGMAS", 0)
    recorder = watch(late)
    both = Both(NETS[kind](), device).run(60)
    both.assert_equal()
    raised = recorder.raised
    assert sum(raised) >= 3 and not all(raised)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_no_draw_fits(
    optimizer: Optimizer, device: torch.device, watch: Callable[..., Watched], narrow: None
):
    """From the first step under a plan on."""
    recorder = watch()
    Both(opened(make("norm"), 3.0), device, optimizer).run(30).assert_equal()
    assert all(recorder.raised) and len(recorder.raised) > 20


def test_while_the_flag_is_up_nothing_changes(device: torch.device, watch: Callable[..., Watched]):
    recorder = watch(late=100)
    both = Both(opened(make("norm"), -4.0), device, replan_every=100).run(6)
    both.step.flush()
    for net, _ in both.pairs():
        net.l0.log_alpha.data.fill_(4.0)
    before = everything(both.net, both.mine)
    both.run(5)
    after = everything(both.net, both.mine)
    for name, value in before.items():
        assert after[name].equal(value), name
    assert recorder.raised == [False] * 5 + [True] * 5
    assert int(both.twin.l0.step) == int(before["l0.step"]) + 5
    both.assert_equal()


def test_no_step_is_lost_to_a_part_that_is_added(
    device: torch.device, watch: Callable[..., Watched], narrow: None
):
    watch(late=100)
    both = Both(opened(make("norm"), 3.0), device).run(5)
    both.net.register_buffer("another", torch.zeros(1, device=device))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected flush before parts are added or removed"):
            both.step.flush()
    del both.net.another
    both.assert_equal()


def test_losses_are_corrected_in_place(
    device: torch.device, watch: Callable[..., Watched], narrow: None
):
    watch(late=100)
    both = Both(opened(make("norm"), 3.0), device).run(4)
    mine, theirs = both.losses[-1]
    assert float((mine - theirs).abs()) > 1e-6
    both.step.flush()
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


# T13 and T14: gates are fresh, and the host reads nothing.


def test_gates_of_a_thousand_replays(device: torch.device, watch: Callable[..., Watched]):
    recorder = watch()
    net = opened(make("mlp"), -1.6).to(device)
    kept, rows = torch.zeros(1100, net.l0.count + 1, device=device), 1003

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(net(x), y)
        at = net.l0.step.reshape(1)
        kept.index_copy_(0, at, net.l0.current_draw().z.detach().reshape(1, -1))
        return value

    optimizer = torch.optim.SGD(l0.param_groups(net, lr=LR, gate_lr=0.0), fused=True)
    step = l0.graph(net, optimizer, loss)
    x, y = (t.to(device) for t in batch())
    for _ in range(rows):
        step(x, y)
    step.flush()
    assert recorder.replayed > 1000 and recorder.recorded == 1
    assert int(net.l0.step) == rows
    net.l0.step.zero_()
    for number in range(1, rows + 1):
        net.l0.draw()
        assert net.l0.current_draw().z.equal(kept[number]), number
    assert len({tuple(row) for row in (kept[1 : rows + 1] != 0).tolist()}) == rows


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("kind", NETS)
def test_replays_on_a_gpu_wait_for_nothing(kind: str):
    net = NETS[kind]().cuda()
    step = l0.graph(net, sgd(net), functools.partial(plain_loss, net))
    x, y = (t.cuda() for t in batch())
    for _ in range(4):
        step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.flush()
    assert int(net.l0.step) == 54


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda loss: loss.item(),
    "if": lambda loss: bool(loss > 0),
    "tolist": lambda loss: loss.reshape(1).tolist(),
    "nonzero": lambda loss: loss.reshape(1).nonzero(),
    "masks": lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
}


@pytest.mark.parametrize("read", READS)
def test_what_reads_cannot_be_captured(
    read: str, device: torch.device, watch: Callable[..., Watched]
):
    watch()

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = plain_loss(net, x, y)
        READS[read](value.detach())
        return value

    both = Both(NETS["mlp"](), device, loss=loss).run(2)
    both.step.flush()
    before = everything(both.net, both.mine)
    with pytest.raises(RuntimeError, match="CUDA graph can record|stream is capturing"):
        both.run(1)
    after = everything(both.net, both.mine)
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize(
    "make_it", [lambda x: x + torch.tensor([1.0]), lambda x: x + torch.as_tensor([1.0])]
)
def test_numbers_of_the_host_cannot_be_captured(make_it: Callable[[Tensor], Tensor]):
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match="not permitted"):
        TapeRecorder().record(lambda: make_it(x))


def test_the_tape_runs_nothing_while_it_records():
    x, y = torch.ones(3), torch.zeros(3)

    def run() -> None:
        x.add_(1)
        y.copy_((x * 2).view(3, 1).sum(1))

    replay = TapeRecorder().record(run)
    assert x.tolist() == [1, 1, 1] and y.tolist() == [0, 0, 0]
    replay()
    replay()
    assert x.tolist() == [3, 3, 3] and y.tolist() == [6, 6, 6]


# What changes between steps.


def rate(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.5 ** (3 + number % 4)


def rate_tensor(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    rate(net, optimizer, number)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=net.l0.log_alpha.device)


def decay(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    if number in (10, 20):
        optimizer.param_groups[0]["weight_decay"] += 2**-8


def freeze(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    if number == 15:
        net.l0.freeze()
    if number == 25:
        net.l0.unfreeze()


def evaluate(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    if number % 7 == 6:
        net.eval()
        with torch.no_grad():
            net(batch()[0].to(net.l0.log_alpha))
        net.train()


def layers_in_eval(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    net.norm.train(not 10 <= number < 20)


def stop_a_layer(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    net.stem.weight.requires_grad_(not 10 <= number < 20)


def reload(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    if number == 12:
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def progress(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    net.l0.set_progress(number / 30)


CHANGES = [
    rate,
    rate_tensor,
    decay,
    freeze,
    evaluate,
    layers_in_eval,
    stop_a_layer,
    reload,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("late", [0, 100])
def test_what_changes_between_steps(
    change: Change,
    late: int,
    device: torch.device,
    watch: Callable[..., Watched],
    monkeypatch: pytest.MonkeyPatch,
):
    """Also where steps are made again after the change."""
    monkeypatch.setattr(capacity, "SIGMAS", 0)
    recorder = watch(late)
    Both(NETS["noisy"](), device, change=change).run(30).assert_equal()
    assert any(recorder.raised) and recorder.replayed > 0


@pytest.mark.parametrize("method", ["hard_concrete", "cs"])
def test_progress(method: str, device: torch.device, watch: Callable[..., Watched]):
    recorder = watch(100)
    options = {"lam_warmup": 1.0} if method == "hard_concrete" else {}
    example = (torch.randn(2, *IMAGE),)
    net = l0.convert(Net(), method, example_inputs=example, lam=1e-3, **options)
    Both(opened(net, 0.1), device, change=progress).run(30).assert_equal()
    assert recorder.replayed > 10


def test_batches_of_another_size(device: torch.device, watch: Callable[..., Watched]):
    recorder = watch(100)
    both = Both(NETS["norm"](), device, replan_every=100)
    both.run(30, size=lambda number: 5 if number % 6 == 5 else 8).assert_equal()
    assert recorder.recorded == 1 and recorder.replayed == 30 - 5 - 2


def other_prices(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with l0.hold(net):
        loss = l0.expected_loss(net, lambda: F.cross_entropy(net(x), y))
        loss = loss + F.cross_entropy(net(x.flip(0)), y.flip(0))
    return loss + l0.penalty(net, lam=2e-2) + l0.penalty(net, per="flop", lam=2e-4)


def in_bfloat16(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def closure() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return F.cross_entropy(net(x).float(), y)

    return l0.expected_loss(net, closure) + l0.penalty(net)


def test_other_prices_and_one_draw_for_two_forwards(
    device: torch.device, watch: Callable[..., Watched]
):
    for kind in ("norm", "dep"):
        recorder = watch()
        Both(NETS[kind](), device, loss=other_prices).run(20).assert_equal()
        assert recorder.replayed > 10


def test_coupled_l2(device: torch.device, watch: Callable[..., Watched]):
    recorder = watch()
    net = NETS["norm"]()
    net.l0.l2 = 1.0
    Both(net, device).run(20).assert_equal()
    assert recorder.replayed > 10


def test_autocast_inside_the_loss(device: torch.device, watch: Callable[..., Watched]):
    """Steps are equal as far as bfloat16 goes, whose sums depend on widths."""
    recorder = watch()
    net = NETS["norm"]().to(device)
    step = l0.graph(net, sgd(net), functools.partial(in_bfloat16, net))
    x, y = (t.to(device) for t in batch())
    losses = [step(x, y) for _ in range(20)]
    step.flush()
    assert recorder.replayed > 10 and bool(torch.stack(losses).isfinite().all())
    with (
        torch.autocast(device.type, torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast inside the loss"),
    ):
        step(x, y)


def test_a_budget(
    device: torch.device, watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(capacity, "SIGMAS", 0)
    recorder = watch(100)
    net = NETS["noisy"]().double().to(device)
    twin = copy.deepcopy(net)
    budgets = [l0.Budget(n, 0.3, lr=0.01, warmup=10) for n in (net, twin)]

    def loss(net: nn.Module, budget: l0.Budget, x: Tensor, y: Tensor) -> Tensor:
        return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + budget()

    mine, theirs = sgd(net), sgd(twin)
    both = nn.ModuleList([net, budgets[0]])
    step = l0.graph(both, mine, functools.partial(loss, net, budgets[0]))
    for number in range(30):
        x, y = (t.to(device) for t in batch(seed=number))
        step(x.double(), y)
        theirs.zero_grad()
        loss(twin, budgets[1], x.double(), y).backward()
        theirs.step()
    step.flush()
    assert any(recorder.raised) and float(budgets[1].multiplier) > 0
    torch.testing.assert_close(
        everything(net, mine), everything(twin, theirs), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(budgets[0].state_dict(), budgets[1].state_dict())


def test_tensors_of_learning_rates_stay_those_of_others(
    device: torch.device, watch: Callable[..., Watched], narrow: None
):
    watch(late=100)
    both = Both(opened(make("norm"), 3.0), device)
    rates = [[torch.tensor(LR, device=device) for _ in range(2)] for _ in range(2)]
    for (_, optimizer), mine in zip(both.pairs(), rates, strict=True):
        for group, lr in zip(optimizer.param_groups, mine, strict=True):
            group["lr"] = lr
    both.run(5).step.flush()
    for lr in (*rates[0], *rates[1]):
        lr.fill_(LR / 4)
    both.run(5).assert_equal()


def test_prices_that_replays_read_stay(device: torch.device, watch: Callable[..., Watched]):
    watch(late=0)
    both = Both(NETS["norm"](), device, loss=other_prices).run(5)
    read = [weakref.ref(prices) for prices in both.net.l0.prices()]
    both.step._replay = lambda: None  # without the tape, which keeps all that it has seen
    for lam in range(20):
        l0.penalty(both.net, lam=float(lam))
    both.net.to(device)
    assert len(read) == 3 and all(prices() is not None for prices in read)


# Who reads parameters.


READERS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "state_dict": lambda net, _: net.state_dict(),
    "optimizer": lambda _, optimizer: optimizer.state_dict(),
    "copy": lambda net, _: copy.deepcopy(net),
    "report": lambda net, _: l0.report(net),
    "draw": lambda net, _: net.l0.set_progress(0.0),
    "forward": lambda net, _: net.eval()(batch()[0].to(net.l0.log_alpha)),
    "penalty": lambda net, _: l0.penalty(net),
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_parameters_finds_them_up_to_date(
    reader: str, device: torch.device, watch: Callable[..., Watched], narrow: None
):
    watch(100)
    both = Both(opened(make("norm"), 3.0), device).run(5)
    with torch.no_grad():
        found = READERS[reader](both.net, both.mine)
    mine, theirs = (everything(*each) for each in both.pairs())
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    if reader == "copy":
        assert found.l0.captured is None
        assert int(found.l0.step) == 5


class Around(nn.Module):
    """A module with a buffer and a parameter of its own, before a network in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(IMAGE))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.head, self.net = nn.Linear(5, 5), net

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.head(self.net(x + self.shift))


@pytest.mark.parametrize("is_root", [True, False])
def test_copies_are_up_to_date_in_all_parts(
    is_root: bool, device: torch.device, watch: Callable[..., Watched], narrow: None
):
    watch(100)
    if is_root:
        net = l0.convert(Around(Net()), "hard_concrete", example_inputs=(torch.randn(2, *IMAGE),))
        opened(net, 3.0)
    else:
        net = Around(opened(make("norm"), 3.0))
    net = net.double().to(device)
    optimizer = sgd(net)
    step = l0.graph(net, optimizer, functools.partial(plain_loss, net))
    for number in range(5):
        x, y = (t.to(device) for t in batch(seed=number))
        step(x.double(), y)
    twin = copy.deepcopy(net)
    assert int(twin.seen) == 5
    for (name, mine), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert mine.equal(theirs), name


def test_revert_and_another_graph_release(device: torch.device, watch: Callable[..., Watched]):
    recorder = watch()
    both = Both(NETS["norm"](), device).run(5)
    first = both.step
    both.step = l0.graph(both.net, both.mine, functools.partial(plain_loss, both.net))
    replayed = recorder.replayed
    x, y = (t.to(device) for t in batch())
    twin = copy.deepcopy(both.net)
    assert first(x.double(), y).isfinite() and recorder.replayed == replayed
    assert not twin.fc1.weight.equal(both.net.fc1.weight)
    l0.revert(both.net)
    assert not both.net._state_dict_pre_hooks and not both.mine._optimizer_state_dict_pre_hooks


# On a CPU, and errors.


def test_on_a_cpu_it_is_the_plain_loop():
    both = Both(NETS["norm"](), torch.device("cpu")).run(5)
    mine, theirs = (everything(*each) for each in both.pairs())
    assert all(mine[name].equal(value) for name, value in theirs.items())
    assert both.net.l0.captured is None


def refusing(change: Callable[[nn.Module], Any]) -> Callable[[], Any]:
    def run() -> Any:
        net = make("norm")
        change(net)
        return l0.graph(net, sgd(net), lambda x: x)

    return run


def with_dropout(**options: Any) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    return l0.convert(net, "arm", example_inputs=(torch.randn(2, 6),), **options)


def of_weights() -> Any:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    example = (torch.randn(2, 6),)
    net = l0.convert(net, "cs", example_inputs=example, granularity="weight")
    return l0.graph(net, sgd(net), lambda x: x)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "example": (refusing(lambda net: setattr(net.l0, "scope", "example")), "scope='batch'"),
    "momentum": (refusing(lambda net: setattr(net.norm, "momentum", None)), "norm: .* momentum"),
    "weights": (of_weights, "gates of single weights"),
    "sync": (
        refusing(lambda net: net.add_module("other", nn.SyncBatchNorm(3))),
        "one process, got SyncBatchNorm other",
    ),
    "dropout": (lambda: l0.graph(n := with_dropout(), sgd(n), lambda x: x), "no dropout with ARM"),
    "a step that is never left out": (
        lambda: l0.graph(n := make("norm"), never_leaving_out(adagrad(n)), lambda x: x),
        "Adagrad, in versions of PyTorch where it can leave out a step.*, got Adagrad",
    ),
    "fused": (
        lambda: l0.graph(n := make("norm"), sgd(n, fused=None), lambda x: x),
        "expected SGD, Adam or AdamW with fused=True .*, got SGD with fused=None",
    ),
    "RMSprop": (
        lambda: l0.graph(n := make("norm"), torch.optim.RMSprop(n.parameters()), lambda x: x),
        "got RMSprop",
    ),
    "capturable": (
        lambda: l0.graph(
            n := make("norm"), torch.optim.Adam(n.parameters(), fused=True), lambda x: x
        ),
        "Adam with capturable=True",
    ),
    "rows": (
        lambda: l0.graph(
            n := make("norm"), l0.optim.SGD(l0.param_groups(n, lr=1.0), model=n), lambda x: x
        ),
        "got l0kernels.optim.SGD",
    ),
    "replan": (
        lambda: l0.graph(n := make("norm"), sgd(n), lambda x: x, replan_every=0),
        "replan_every: expected a positive integer, got 0",
    ),
    "no gates": (
        lambda: l0.graph(n := Net(), torch.optim.SGD(n.parameters()), lambda x: x),
        "expected a model with gates",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    run, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run()


def test_ar_takes_dropout():
    net = with_dropout(estimator="ar")
    assert isinstance(l0.graph(net, sgd(net), lambda x: x), GraphStep)


def test_batches_and_losses_that_are_refused():
    net = make("norm")
    step = l0.graph(net, sgd(net), lambda x: net(x))
    with pytest.raises(TypeError, match="batch of tensors, got str"):
        step("x")
    with l0.hold(net), pytest.raises(RuntimeError, match="hold inside the loss"):
        step(batch()[0])
    with pytest.raises(ValueError, match=r"scalar tensor from the loss, got \(8, 5\)"):
        step(batch()[0])


def cross_entropy(run: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(run(x), y)


COMPILED = {"cpu": {"backend": "aot_eager"}, "cuda": {"mode": "reduce-overhead"}}


@pytest.mark.parametrize("kind", ["mlp", "lenet", "norm", "residual"])
@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_eager_captured_and_compiled_steps_are_the_same(
    kind: str, on: str, monkeypatch: pytest.MonkeyPatch
):
    torch._dynamo.reset()
    if on == "cpu":
        monkeypatch.setattr("l0kernels._capture.recorder_for", lambda device: TapeRecorder())
    nets = [NETS[kind]().to(on, torch.float64)]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    optimizers = [sgd(net) for net in nets]
    runs = [nets[0], torch.compile(nets[1], **COMPILED[on])]
    captured = l0.graph(nets[2], optimizers[2], functools.partial(plain_loss, nets[2]))
    for seed in range(12):
        x, y = (t.to(on) for t in batch(seed=seed))
        x = x.double()
        for net, run, optimizer in zip(nets, runs, optimizers, strict=False):
            optimizer.zero_grad()
            given = functools.partial(cross_entropy, run, x, y)
            (l0.expected_loss(net, given) + l0.penalty(net)).backward()
            optimizer.step()
        captured(x, y)
    captured.flush()
    eager, *others = ([net.l0.step, *net.parameters()] for net in nets)
    for other in others:
        torch.testing.assert_close(other, eager, rtol=1e-10, atol=1e-10)
