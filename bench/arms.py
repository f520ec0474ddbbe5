# SPDX-License-Identifier: Apache-2.0
"""The variants of a training step, ready to run, and the check that they compute the same."""

import copy
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels import _capture
from l0kernels.graph import GraphStep
from l0kernels.training import gates_of

from . import peers
from .index_select import IndexSelect
from .masked import (
    AsWrittenBeforeNorm,
    AtBestBeforeNorm,
    FlatGated,
    MaskedAsWritten,
    MaskedAtBest,
    draw_noise,
    hard_concrete,
    log_alpha_for,
)
from .models import Network, full_widths

VARIANTS = (
    "dense",
    "masked-nchw",
    "masked-best",
    "index-select",
    "oracle",
    "oracle-onednn",
    "oracle-rounded",
    "ours",
)
OPTIONAL = ("masked-compiled", "torch-prune", "torch-pruning")
ALL_VARIANTS = (*VARIANTS, *OPTIONAL)
REBUILT = ("oracle", "oracle-onednn")
"""Built anew in every round, see `Oracle`."""
UNGATED = (*REBUILT, "dense", "oracle-rounded", "torch-prune", "torch-pruning")
"""Nothing to draw."""
CAPTURABLE = ("dense", "masked-nchw", "masked-best", "oracle", "oracle-rounded", "ours")
"""What a CUDA graph can record."""
IN_SINGLE = ("masked-compiled", "oracle-onednn")
"""Compared in float32: they do not run, or are compiled anew, in float64."""
IN_PLAIN_PYTORCH: dict[str, type[MaskedAsWritten] | type[FlatGated]] = {
    "masked-nchw": MaskedAsWritten,
    "masked-best": MaskedAtBest,
    "masked-compiled": MaskedAtBest,
    "index-select": IndexSelect,
}
BEFORE_NORM: dict[str, type[MaskedAsWritten] | type[FlatGated]] = {
    "masked-nchw": AsWrittenBeforeNorm,
    "masked-best": AtBestBeforeNorm,
}
"""Those whose gates can be before norms."""
N_TRAIN = 50_000
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
CHECK_BATCH = 4
TOLERANCE = 1e-8
# Of float32 networks against float64 ones: rounding flips some ReLUs, a wrong network is off by 1.
SINGLE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Task:
    """What every variant does in a step.

    Args:
        network: the network.
        batch: examples per step.
        device: where it runs.
        seed: of weights, data and gates.
        amp: dtype of autocast around forward and loss; None: no autocast.
        open_rows: ours has `l0.optim.SGD`, which updates open rows only.
        graph: steps are replayed from CUDA graphs, see `Arm.capture`.
        place: of the gates, as in `l0.convert`.
    """

    network: Network
    batch: int
    device: torch.device
    seed: int = 0
    amp: torch.dtype | None = None
    open_rows: bool = False
    graph: bool = False
    place: str = "after_act"


class Arm:
    """One variant with its data and optimizer.

    Args:
        net: the network in its final device and memory format.
        loss: maps (input, label) to the whole loss, penalty included.
        gates: the gate parameters, empty for the oracle. They get gradients and go through the
            optimizer, but with learning rate 0: the open fraction stays where it was set.
        x: input.
        y: labels.
        amp: dtype of autocast around forward and loss in `step`; None: no autocast.
        named: the weights by their names in the plain network; None: as in `net`.
        open_rows: `net` is converted, and `l0.optim.SGD` updates open rows only.
        graph: its steps are going to be captured.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        gates: Iterable[nn.Parameter],
        x: Tensor,
        y: Tensor,
        amp: torch.dtype | None = None,
        named: dict[str, nn.Parameter] | None = None,
        open_rows: bool = False,
        graph: bool = False,
    ):
        self.net, self.loss, self.gates, self.x, self.y = net, loss, list(gates), x, y
        self.amp = amp
        self.named = dict(net.named_parameters()) if named is None else named
        own = set(self.gates)
        weights = [p for p in net.parameters() if p not in own]
        self.trained = [*weights, *self.gates]
        # torch's fused SGD copies every gradient that is not contiguous, for nothing: it gets
        # contiguous views of the same memory, in all variants alike. Ours takes care of that.
        # What is captured has parameters alone.
        own_memory = open_rows or graph
        self.views = [
            p if own_memory else nn.Parameter(contiguous_view(p.detach())) for p in self.trained
        ]
        groups: list[dict[str, object]] = [{"params": self.views[: len(weights)]}]
        if self.gates:
            fixed = {"params": self.views[len(weights) :], "lr": 0.0, "weight_decay": 0.0}
            groups.append(fixed)
        make = partial(l0.optim.SGD, model=net) if open_rows else torch.optim.SGD
        self.optimizer = make(
            groups,
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            nesterov=True,
            fused=True,
        )
        self.run: Callable[[], None] = self.eager_step

    def step(self) -> None:
        """Draw, forward, penalty, backward and optimizer: all that a training step does."""
        self.run()

    def capture(self) -> None:
        """Have steps replayed from a CUDA graph from now on; on a CPU they stay what they are."""
        recorder = _capture.recorder_for(self.x.device)
        if recorder is not None:
            self.eager_step()  # makes the optimizer's state
            recorder.warm(self.eager_step)
            self.run = recorder.record(self.eager_step)

    def cast_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss under autocast."""
        with torch.autocast(self.x.device.type, self.amp, enabled=self.amp is not None):
            return self.loss(x, y)

    def eager_step(self) -> None:
        """A step that is launched operator by operator."""
        loss = self.cast_loss(self.x, self.y)
        for parameter, view in zip(self.trained, self.views, strict=True):
            parameter.grad = view.grad = None
        loss.backward()
        for parameter, view in zip(self.trained, self.views, strict=True):
            if parameter.grad is not None and view is not parameter:
                view.grad = contiguous_view(parameter.grad)
        self.optimizer.step()

    def outcome(self, x: Tensor, y: Tensor) -> "Outcome":
        """Return loss and gradients of a batch; the arm has no gradients afterwards."""
        for parameter in self.trained:
            parameter.grad = None
        loss = self.loss(x, y)
        loss.backward()
        gates = [gradient(gate) for gate in self.gates] or [loss.new_zeros(1)]
        weights = {name: gradient(parameter) for name, parameter in self.named.items()}
        for parameter in self.trained:
            parameter.grad = None
        return Outcome(loss.detach(), weights, torch.cat(gates))

    @torch.no_grad()
    def set_open(self, keep: float) -> None:
        """Make every gate open with probability keep."""
        for gate in self.gates:
            gate.fill_(log_alpha_for(keep))


def contiguous_view(tensor: Tensor) -> Tensor:
    """Return the same memory as a contiguous tensor, channels_last ones as [N, H, W, C].

    Raises:
        RuntimeError: the tensor is strided in another way.
    """
    if tensor.is_contiguous():
        return tensor
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise RuntimeError(f"expected a contiguous or channels_last tensor, got {tensor.stride()}")
    return tensor.permute(0, 2, 3, 1)


def make_arm(task: Task, variant: str, keep: float = 1.0) -> Arm:
    """Return a variant; its gates are set to the open fraction keep, or it is built at it, rounded.

    Raises:
        ValueError: there is no such variant, or it is one that `Oracle` rebuilds.
        RuntimeError: convert gated other units than the network says.
    """
    if variant not in ALL_VARIANTS or variant in REBUILT:
        known = ", ".join(name for name in ALL_VARIANTS if name not in REBUILT)
        raise ValueError(f"expected one of {known}, got {variant!r}")
    torch.manual_seed(task.seed)
    net = task.network.build(keep if variant == "oracle-rounded" else 1.0)
    if variant == "torch-prune":
        peers.prune_by_masks(net, task.network, keep)
    if variant == "torch-pruning":
        peers.prune_by_torch_pruning(net, task.network, keep, task.network.example(2)[0])
    if variant in UNGATED:
        return ungated_arm(task, net)
    x, y = (t.to(task.device) for t in task.network.example(task.batch, task.seed))
    if variant != "masked-nchw":
        net, x = best_layout(net, x)
    net = net.to(task.device).train()
    arm = our_arm(task, net, x, y) if variant == "ours" else plain_arm(task, variant, net, x, y)
    arm.set_open(keep)
    return arm


def why_not(task: Task, variant: str) -> str:
    """Return why a variant is left out, "" if it can run."""
    if task.graph and variant not in CAPTURABLE:
        return "its steps cannot be captured, or nobody would capture them"
    masks = variant in IN_PLAIN_PYTORCH or variant in ("torch-prune", "torch-pruning")
    if task.place == "before_norm" and masks and variant not in BEFORE_NORM:
        return "it has no gates before norms"
    if variant == "torch-pruning":
        return peers.why_no_torch_pruning()
    if variant != "oracle-onednn":
        return ""
    if (
        task.device.type != "cpu"
        or task.amp is not None
        or not torch.backends.mkldnn.is_available()
    ):
        return "linear layers run in oneDNN on a CPU in float32 only"
    with torch.device("meta"):
        layers = list(task.network.build().modules())
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    linear = sum(isinstance(layer, nn.Linear) for layer in layers)
    return "it is the oracle but for the classifier" if convolutions and linear < 2 else ""


def best_layout(net: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return net, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def ungated_arm(task: Task, net: nn.Module) -> Arm:
    x, y = (t.to(task.device) for t in task.network.example(task.batch, task.seed))
    net, x = best_layout(net, x)
    net = net.to(task.device).train()
    return Arm(net, lambda x, y: F.cross_entropy(net(x), y), [], x, y, task.amp, graph=task.graph)


class GraphArm(Arm):
    """Ours with steps that `l0.graph` captures."""

    captured: GraphStep | None = None

    def capture(self) -> None:
        """Plan widths for the gates as they are, and capture."""
        if self.captured is not None:
            self.captured.release()
        self.captured = step = l0.graph(self.net, self.optimizer, self.cast_loss)

        def run() -> None:
            step(self.x, self.y)

        self.run = run
        for _ in range(3):  # eager, warm, captured
            self.step()


class Oracle:
    """The network rebuilt, outside the clock, at the widths that each round's draw leaves open.

    It stands for a network that is built once and trained for long, so it is warmed up. Rebuild it
    after ours has taken its step at these widths: oneDNN keeps what it prepares for a shape for the
    whole process, and the warm-up would prepare everything for ours.

    Args:
        task: the network and device.
        keep: open fraction.
        step: the draw before the first one, that is the `step` of ours before its first round.
        steps: of ours in a round, of which the last one's draw counts.
        onednn: run linear layers in oneDNN.
    """

    WARMUP = 2  # steps after a rebuild: oneDNN prepares its convolutions for the new widths

    def __init__(
        self, task: Task, keep: float, step: int = 0, steps: int = 1, onednn: bool = False
    ):
        self.task, self.drawn, self.steps, self.onednn = task, step, steps, onednn
        self.widths: list[int] = []
        self.sizes = full_widths(task.network.build(), task.network.groups)
        self.log_alpha = torch.full((sum(self.sizes),), log_alpha_for(keep))
        self.arm: Arm | None = None

    def next_widths(self) -> list[int]:
        """Open units per group in the last draw of the next round.

        It depends on seed and step only, so ours need not run.
        """
        self.drawn += self.steps
        ends = torch.tensor([0, *self.sizes]).cumsum(0)
        units = torch.arange(len(self.log_alpha))
        ports = torch.stack((units, torch.full_like(units, len(units))))
        layout = l0.functional.GateLayout(ends, ports, ends)
        key = torch.tensor([self.task.seed, self.drawn])
        cost = torch.zeros_like(self.log_alpha)
        drawn = l0.functional.sample_gates(self.log_alpha, key, cost, layout, "hard_concrete")
        return drawn[2].counts.tolist()

    def rebuild(self) -> None:
        """Build the network of the next round's draw and warm it up."""
        self.arm = None
        gc.collect()
        # Variants that draw from PyTorch's generators must not get the same noise every round: they
        # would run at widths that libraries have planned for already.
        with torch.random.fork_rng():
            torch.manual_seed(self.task.seed)
            self.widths = self.next_widths()
            net = self.task.network.build_at(self.widths)
            if self.onednn:
                peers.with_onednn(net)
            self.arm = ungated_arm(self.task, net)
        for _ in range(self.WARMUP):
            self.arm.step()
        if self.task.graph:
            self.arm.capture()

    def step(self) -> None:
        """One whole step.

        Raises:
            RuntimeError: nothing was built yet.
        """
        if self.arm is None:
            raise RuntimeError("expected rebuild() before step()")
        self.arm.step()


def require_variants(names: Sequence[str]) -> None:
    """Refuse names of no variant, and none at all.

    Raises:
        ValueError: there are such names.
    """
    unknown = [name for name in names if name not in ALL_VARIANTS]
    if unknown or not names:
        known = ", ".join(ALL_VARIANTS)
        raise ValueError(f"expected variants among {known}, got {unknown or 'none'}")


def ready_arm(task: Task, variant: str, keep: float) -> Arm | Oracle:
    """Return any variant ready to step by itself, an oracle at the widths of a first draw."""
    if variant not in REBUILT:
        return make_arm(task, variant, keep)
    oracle = Oracle(task, keep, onednn=variant == "oracle-onednn")
    oracle.rebuild()
    return oracle


def plain_arm(task: Task, variant: str, net: nn.Module, x: Tensor, y: Tensor) -> Arm:
    named = dict(net.named_parameters())  # before wrapping renames them
    masked = (BEFORE_NORM if task.place == "before_norm" else IN_PLAIN_PYTORCH)[variant]
    gated = masked(net, task.network.groups, N_TRAIN).to(task.device)
    run = torch.compile(gated) if variant == "masked-compiled" else gated
    return Arm(
        gated,
        lambda x, y: F.cross_entropy(run(x), y) + gated.penalty(),
        gated.gate_parameters(),
        x,
        y,
        task.amp,
        named,
        graph=task.graph,
    )


def our_arm(
    task: Task,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str = "hard_concrete",
    **options: Any,
) -> Arm:
    widths = full_widths(net, task.network.groups)
    given = {"example_inputs": (x[:2],), "n_train": N_TRAIN, "seed": task.seed, "place": task.place}
    net = l0.convert(net, method, **given, **options)
    gates = gates_of(net)
    got = dict(zip(gates.names, gates.sizes, strict=True))
    expected = {g.producer: w for g, w in zip(task.network.groups, widths, strict=True)}
    if list(got.items()) != list(expected.items()):  # draws are in the order of the gates
        raise RuntimeError(f"expected convert to gate {expected}, got {got}")
    kind = GraphArm if task.graph else Arm
    return kind(
        net,
        lambda x, y: our_loss(net, x, y),
        [gates.log_alpha],
        x,
        y,
        task.amp,
        open_rows=task.open_rows,
        graph=task.graph,
    )


def our_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)


@dataclass(frozen=True)
class Outcome:
    """Loss and gradients of one step, by parameter name."""

    loss: Tensor
    weights: dict[str, Tensor]
    gates: Tensor

    def error(self, truth: "Outcome") -> float:
        """Return the largest difference, each tensor against its largest true entry."""
        pairs = [(self.loss, truth.loss), (self.gates, truth.gates)]
        pairs += [(self.weights[name], exact) for name, exact in truth.weights.items()]
        errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in pairs]
        return float(torch.stack([e.detach() for e in errors]).max())

    def distance(self, truth: "Outcome") -> float:
        """Return the larger of two relative differences: of the losses, of all gradients in L2."""
        own, exact = (
            torch.cat([one.gates.double(), *(one.weights[n].double().flatten() for n in names)])
            for one, names in ((self, truth.weights), (truth, truth.weights))
        )
        losses = (self.loss.double() - truth.loss).abs() / truth.loss.abs()
        return float(torch.stack([(own - exact).norm() / exact.norm(), losses]).max())


def disagreement(task: Task, net: nn.Module, variants: Iterable[str]) -> dict[str, float]:
    """Return how far variants are from the masked network in fp64 under one draw of ours.

    Loss, every weight gradient and the gate gradients are compared on copies, with the weights
    and gates that `net` has now.

    Args:
        task: the network and device.
        net: the converted network of the arm "ours".
        variants: names to compare; those without gates and compiled ones are left out.
    """
    exact = copy.deepcopy(net).double().train()
    exact.zero_grad()
    gates = gates_of(exact)
    x, y = task.network.example(CHECK_BATCH, task.seed + 1)
    x, y = x.double().to(task.device), y.to(task.device)
    with l0.hold(exact):
        loss = our_loss(exact, x, y)
        draw = [gates[group.producer].z.detach() for group in task.network.groups]
    loss.backward()
    own = gates.log_alpha
    ours = Outcome(loss.detach(), weight_gradients(exact), gradient(own))
    state = {name: t for name, t in exact.state_dict().items() if not name.startswith("l0.")}
    truth = plain_outcome(task, "masked-best", state, own, draw, x, y)
    errors = {}
    for variant in variants:
        if variant == "ours":
            errors[variant] = ours.error(truth)
        elif variant in ("masked-nchw", "index-select"):
            other = plain_outcome(task, variant, state, own, draw, x, y)
            errors[variant] = other.error(truth)
    return errors


def plain_outcome(
    task: Task,
    variant: str,
    state: dict[str, Tensor],
    log_alpha: Tensor,
    draw: list[Tensor],
    x: Tensor,
    y: Tensor,
) -> Outcome:
    """Return what a plain variant computes with these weights, gates and draw."""
    plain = task.network.build().double().to(task.device).train()
    plain.load_state_dict(state, strict=False)  # training mode reads no running statistics
    arm = plain_arm(task, variant, plain.double(), x, y)
    arm.net.double()
    gated = arm.net
    assert isinstance(gated, MaskedAsWritten | FlatGated)
    start = 0
    with torch.no_grad():
        for gate in arm.gates:
            gate.copy_(log_alpha[start : start + len(gate)])
            start += len(gate)
    gated.pin(draw)
    return arm.outcome(x, y)


def weight_gradients(net: nn.Module) -> dict[str, Tensor]:
    named = net.named_parameters()
    return {name: gradient(p) for name, p in named if not name.startswith("l0.")}


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def require_agreement(task: Task, net: nn.Module, variants: Iterable[str]) -> dict[str, float]:
    """Return `disagreement`, or refuse to go on where it is above `TOLERANCE`.

    Raises:
        RuntimeError: a variant computes something else than the masked network.
    """
    return require("the masked network", TOLERANCE, disagreement(task, net, variants))


def require_the_reference(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return how far a step of a converted network is from the masked reference, in fp64.

    Loss and all gradients are compared on copies, under the next draw.

    Raises:
        RuntimeError: it computes something else.
    """
    found = []
    for impl in ("auto", "reference"):
        exact = copy.deepcopy(net).double().train()
        exact.zero_grad()
        with l0.use_impl(impl):
            loss = our_loss(exact, x.double(), y)
            loss.backward()
        gates = gradient(gates_of(exact).log_alpha)
        found.append(Outcome(loss.detach(), weight_gradients(exact), gates))
    errors = {"ours": found[0].error(found[1])}
    return require("the masked reference", TOLERANCE, errors)["ours"]


def distances(task: Task, arms: Mapping[str, Arm | Oracle]) -> dict[str, float]:
    """Return how far variants are from other networks with their weights in float64, by name.

    All are compared in float64, but those of `IN_SINGLE` as they are timed. Ours, which is compared
    by `disagreement`, is left out.
    """
    found = {}
    for name, arm in arms.items():
        if isinstance(arm, Oracle):
            if arm.arm is not None:
                twin = task.network.build_at(arm.widths)
                found[name] = distance_of_plain(task, name, arm.arm, twin)
        elif name in IN_PLAIN_PYTORCH:
            found[name] = distance_of_masked(task, name, arm)
        elif name in UNGATED:
            named = {key.removesuffix("_orig"): p for key, p in arm.named.items()}
            widths = [len(named[f"{group.producer}.weight"]) for group in task.network.groups]
            found[name] = distance_of_plain(task, name, arm, task.network.build_at(widths))
    return found


def check_batch(task: Task) -> tuple[Tensor, Tensor]:
    x, y = task.network.example(CHECK_BATCH, task.seed + 1)
    return x.to(task.device), y.to(task.device)


def distance_of_plain(task: Task, variant: str, arm: Arm, twin: nn.Module) -> float:
    """Compare an arm without gates with the same network in float64.

    `torch.nn.utils.prune` calls a masked parameter NAME_orig; its mask is multiplied in here.
    """
    masks = {n.removesuffix("_mask"): m for n, m in arm.net.named_buffers() if n.endswith("_mask")}
    named = {name.removesuffix("_orig"): p.detach() for name, p in arm.named.items()}
    state = {name: p * masks[name] if name in masks else p for name, p in named.items()}
    twin = twin.double().to(task.device).train()
    twin.load_state_dict(state, strict=False)  # training mode reads no running statistics
    x, y = check_batch(task)
    loss = F.cross_entropy(twin(x.double()), y)
    loss.backward()
    weights = {
        name: gradient(p) * masks[name] if name in masks else gradient(p)
        for name, p in twin.named_parameters()
    }
    got = arm.outcome(x, y) if variant in IN_SINGLE else outcome_in_double(arm, x, y)
    own = {name.removesuffix("_orig"): g for name, g in got.weights.items()}
    return Outcome(got.loss, own, got.gates).distance(
        Outcome(loss.detach(), weights, torch.zeros_like(got.gates))
    )


def outcome_in_double(arm: Arm, x: Tensor, y: Tensor) -> Outcome:
    """Return what an arm without gates computes with its weights in float64."""
    weights = {n: p.detach().double().requires_grad_() for n, p in arm.net.named_parameters()}
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in arm.net.named_buffers()}
    output = torch.func.functional_call(arm.net, {**weights, **buffers}, (x.double(),))
    loss = F.cross_entropy(output, y)
    loss.backward()
    gradients = {name: gradient(p) for name, p in weights.items()}
    return Outcome(loss.detach(), gradients, loss.new_zeros(1))


def distance_of_masked(task: Task, variant: str, arm: Arm) -> float:
    """Compare an arm in plain PyTorch with another one in float64 under one draw."""
    assert isinstance(arm.net, MaskedAsWritten | FlatGated)
    x, y = check_batch(task)
    log_alpha = torch.cat([gate.detach() for gate in arm.gates])
    with torch.device("meta"):
        sizes = full_widths(task.network.build(), task.network.groups)
    draw = list(hard_concrete(log_alpha, draw_noise(log_alpha)).split(sizes))
    state = {name: p.detach() for name, p in arm.named.items()}
    if variant in IN_SINGLE:
        arm.net.pin(draw)
        got = arm.outcome(x, y)
        arm.net.pin(None)
    else:
        got = plain_outcome(task, variant, state, log_alpha, draw, x.double(), y)
    other = "masked-nchw" if variant == "masked-best" else "masked-best"
    return got.distance(plain_outcome(task, other, state, log_alpha, draw, x.double(), y))


def require_closeness(task: Task, arms: Mapping[str, Arm | Oracle]) -> dict[str, float]:
    """Return `distances`, or refuse to go on where one is too large.

    Raises:
        RuntimeError: a variant computes something else than its twin.
    """
    found = distances(task, arms)
    single = {name: error for name, error in found.items() if name in IN_SINGLE}
    require("its twin", TOLERANCE, {n: error for n, error in found.items() if n not in single})
    require("its twin", SINGLE_TOLERANCE, single)
    return found


def require(whom: str, most: float, errors: dict[str, float]) -> dict[str, float]:
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= most}
    if wrong:
        raise RuntimeError(
            f"expected all variants within {most:.0e} of {whom}, got {wrong}; "
            "no figures for different computations"
        )
    return errors
