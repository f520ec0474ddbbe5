# SPDX-License-Identifier: Apache-2.0
"""One network in training: packed, or the masked reference that computes everything."""

from __future__ import annotations

import copy
import math
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import use_impl
from l0kernels.convert import convert
from l0kernels.gates import Gates
from l0kernels.gates.base import makes_filters
from l0kernels.gates.ref import WeightRef
from l0kernels.nn import GatedLayer, MaskedLayer
from l0kernels.recipes import average
from l0kernels.recipes.average import averaged
from l0kernels.recipes.images import Batch
from l0kernels.recipes.models import build
from l0kernels.recipes.recipe import FOLLOW, MOMENTUM, Recipe, Settings
from l0kernels.report import report
from l0kernels.speed import synchronise
from l0kernels.training import expected_loss, frozen, gates_of, param_groups, penalty

PACKED = "packed"
MASKED = "masked"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EVAL_PIXELS = 1 << 20
# What an optimizer keeps for each parameter.
MOMENTS = {torch.optim.Adam: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}


class Step(NamedTuple):
    """What one training step gave.

    Args:
        seconds: draw, penalty, forward, backward, optimizer and averaging.
        data_loss: 0-d, mean cross-entropy of the batch.
        penalty: 0-d.
    """

    seconds: float
    data_loss: Tensor
    penalty: Tensor


def gated_network(
    recipe: Recipe, settings: Settings, n_train: int, seed: int, classes: int = 10
) -> nn.Module:
    """The recipe's network with fresh parameters and gates.

    Args:
        recipe: the network.
        settings: lam, droprate and what divides the penalty.
        n_train: size of the training set.
        seed: of parameters and gates.
        classes: outputs.
    """
    net = build(lambda: recipe.make(classes), seed, recipe.init)
    shape = recipe.probe or recipe.shape
    example = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    divisor = settings.penalty_n or n_train
    given = {
        "lam": _of_groups(recipe, settings.lam),
        "droprate": _of_groups(recipe, settings.droprate) if settings.droprate else None,
        "initial": settings.initial,
        "direction": settings.direction,
        "l2": settings.l2 * divisor if settings.l2 else None,
    }
    return convert(
        net,
        recipe.method,
        example_inputs=(example,),
        n_train=divisor,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
        **recipe.options,
    )


def _of_groups(recipe: Recipe, values: tuple[float, ...]) -> float | dict[str, float]:
    return dict(zip(recipe.groups, values, strict=True)) if recipe.groups else values[0]


def make_optimizers(net: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Optimizers of weights and gates, one or two.

    Args:
        net: converted network.
        settings: which, learning rates and weight decay.
    """
    decay = settings.weight_decay
    weights, gates = param_groups(net, lr=settings.lr, gate_lr=settings.gate_lr, weight_decay=decay)
    free = _with_coupled_l2(net, gates_of(net)) if settings.l2 else set()
    groups = [
        {**weights, "params": [p for p in weights["params"] if p not in free]},
        {**weights, "params": [p for p in weights["params"] if p in free], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.gate_optimizer == FOLLOW:
        return [make_optimizer(settings.optimizer, [*groups, gates])]
    return [
        make_optimizer(settings.optimizer, groups),
        make_optimizer(settings.gate_optimizer, [gates]),
    ]


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer by its name in `recipe.OPTIMIZERS`, for parameter groups."""
    if name == "adam":
        return torch.optim.Adam(groups, fused=True)
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=name == "nesterov", fused=True)


def _with_coupled_l2(net: nn.Module, gates: Gates) -> set[Tensor]:
    """Weights that the penalty decays."""
    return {
        layer.weight
        for layer in net.modules()
        if isinstance(layer, GatedLayer)
        and layer.gates is gates
        and layer.weight is not None
        and layer.weight.dim() > 1
        and (makes_filters(layer) or layer.has_columns)
    }


class Arm:
    """A gated network, its optimizer and the way it is run.

    Args:
        name: ``PACKED`` or ``MASKED``.
        net: converted network; the arm owns it.
        settings: learning rates.
        layout: memory format of inputs and filters, a key of ``LAYOUTS``; None leaves them as
            ``convert`` made them.
    """

    def __init__(self, name: str, net: nn.Module, settings: Settings, layout: str | None) -> None:
        self.name = name
        self.net = net
        self.settings = settings
        self.layout = layout
        if layout is not None:
            _set_layout(net, LAYOUTS[layout])
        self.optimizers = make_optimizers(net, settings)
        self.average = None if settings.ema is None else averaged(net, settings.ema)
        self.kept: dict[str, Tensor] | None = None

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated: the average, where there is one."""
        return self.net if self.average is None else self.average.module

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return gates_of(self.net).log_alpha.device

    def throwaway(self, layout: str | None = None) -> Arm:
        """A copy with a fresh optimizer, for steps that must leave no trace.

        Args:
            layout: another layout for the copy; None keeps this arm's.
        """
        return Arm(self.name, copy.deepcopy(self.net), self.settings, layout or self.layout)

    def set_learning_rates(self, epochs: int) -> None:
        """Set the learning rates of an epoch.

        Args:
            epochs: of the schedule that are over.
        """
        drops = bisect_right(self.settings.milestones, epochs)
        gates = set(gates_of(self.net).parameters())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if group["params"][0] in gates:
                    group["lr"] = self.settings.gate_lr * self.settings.gate_decay**drops
                else:
                    group["lr"] = self.settings.lr * self.settings.decay**drops

    def keep(self) -> None:
        """Keep parameters and buffers, all but the gates, to rewind to."""
        self.kept = {key: value.clone() for key, value in self._own_state().items()}

    def _own_state(self) -> dict[str, Tensor]:
        state = self.net.state_dict()
        return {key: value for key, value in state.items() if not key.startswith("l0.")}

    def rewind(self) -> None:
        """Go back to what was kept, with new optimizers; gates stay.

        Raises:
            RuntimeError: nothing was kept.
        """
        if self.kept is None:
            raise RuntimeError("rewind: expected kept weights, got none")
        self.net.load_state_dict(self.kept, strict=False)
        self.optimizers = make_optimizers(self.net, self.settings)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _impl(self) -> AbstractContextManager[Any]:
        return use_impl("reference") if self.name == MASKED else nullcontext()

    def place(self, images: Tensor) -> Tensor:
        """Images in the layout and on the device of this arm, [N, C, H, W]."""
        if self.layout is None:
            return images.to(self.device)
        # With one channel .contiguous() sees nothing to do and keeps strides that mean NCHW.
        form = LAYOUTS[self.layout]
        return torch.empty(images.shape, device=self.device, memory_format=form).copy_(images)

    def step(self, images: Tensor, labels: Tensor) -> Step:
        """One training step.

        Args:
            images: [batch, C, H, W], placed.
            labels: int64 [batch], on any device.
        """
        labels = labels.to(self.device)

        def data_loss() -> Tensor:
            # The gates are drawn by the engine in both arms; only the layers differ.
            with self._impl():
                return F.cross_entropy(self.net(images), labels)

        synchronise(self.device)
        begin = time.perf_counter()
        self.zero_grad()
        data = expected_loss(self.net, data_loss)
        price = penalty(self.net)
        (data + price).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            average.update(self.average, self.net)
        synchronise(self.device)
        return Step(time.perf_counter() - begin, data.detach(), price.detach())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Deterministic gates of the tested network, no gradients."""
        self.tested.eval()
        try:
            with torch.no_grad(), frozen(self.tested), self._impl():
                yield
        finally:
            self.tested.train()

    def accuracy(self, batches: Iterable[Batch]) -> float:
        """Share of images classified as labelled, in percent.

        Args:
            batches: images [N, C, H, W] and labels int64 [N].
        """
        right = count = 0
        with self.evaluating():
            for x, y in batches:
                guessed = self.tested(self.place(x)).argmax(1)
                right += int((guessed == y.to(self.device)).sum())
                count += len(y)
        return 100.0 * right / count

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as plain dicts of tensors and numbers."""
        return {
            "model": dict(self.net.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "kept": self.kept,
            "average": None if self.average is None else dict(self.average.state_dict()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError: the state does not fit.
        """
        # Gates may be missing in checkpoints of other programs, not in ours.
        missing = set(self.net.state_dict()) - set(state["model"])
        if missing:
            raise ValueError(f"model: expected entries {sorted(missing)}, got none")
        self.kept = state["kept"]
        if self.kept is not None and _shapes(self.kept) != _shapes(self._own_state()):
            raise ValueError("kept weights: expected those of the network, got others")
        self.net.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            _check_moments(optimizer)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    # The optimizer takes whatever it is given; a wrong shape would fail in the middle of a step.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name in MOMENTS[type(optimizer)]:
                moment = optimizer.state[parameter][name]
                if moment.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer {name}: expected shape {tuple(parameter.shape)}, "
                        f"got {tuple(moment.shape)}"
                    )


def _set_layout(net: nn.Module, layout: torch.memory_format) -> None:
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = torch.empty_like(parameter, memory_format=layout).copy_(parameter.data)


def open_units(net: nn.Module) -> list[int]:
    """Units of every group that the test gates leave open.

    A gate on a layer's inputs counts where the gate of the input's producer is open too.

    Args:
        net: converted network.
    """
    gates = gates_of(net)
    z = torch.cat((gates.deterministic().detach().cpu(), torch.ones(1)))
    counts = gates.open_now()
    for name, layer in net.named_modules():
        if isinstance(layer, GatedLayer) and layer.in_gate is not None and f"{name}.in" in counts:
            is_open = torch.ones(layer.in_gate.features, dtype=torch.bool)
            for gate_map in layer.in_gate.maps:
                is_open &= z[gate_map] != 0
            counts[f"{name}.in"] = int(is_open.sum())
    return [counts[name] for name in gates.names]


@torch.no_grad()
def drawn_weights(net: nn.Module, cost: Mapping[str, int] | None = None) -> int:
    """Weights of convolutions and linear layers (no biases) that the current draw left open.

    Args:
        net: converted network after a training step.
        cost: layer -> what each of its weights counts; None: 1.
    """
    total = 0
    for name, layer in net.named_modules():
        each = 1 if cost is None else cost.get(name, 0)
        if isinstance(layer, MaskedLayer) and layer.gate is not None:
            total += each * _open_in_draw(layer.gate)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            rows, columns = layer.weight.shape[:2]
            if isinstance(layer, GatedLayer):
                if layer.out_gate is not None:
                    rows = int((layer.out_gate.z != 0).sum())
                if layer.in_gate is not None:
                    columns = int((layer.in_gate.z != 0).sum())
            total += each * rows * columns * layer.weight[0, 0].numel()
    return total


def _open_in_draw(gate: WeightRef) -> int:
    start = gate.gates.starts[gate.name]
    size = math.prod(gate.shape)
    # Gates of single weights are not random.
    return int(gate.gates.open_probability()[start : start + size].sum())


def weights_left(net: nn.Module) -> dict[str, float]:
    """See ``Report.weights_open``."""
    return report(net).weights_open()
