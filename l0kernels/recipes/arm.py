# SPDX-License-Identifier: Apache-2.0
"""One network in training: packed, or the masked reference that computes everything."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import use_impl
from l0kernels.convert import convert
from l0kernels.nn import GatedLayer
from l0kernels.recipes.models import build
from l0kernels.recipes.published import Recipe, Settings
from l0kernels.report import report
from l0kernels.training import expected_loss, frozen, gates_of, param_groups, penalty

PACKED = "packed"
MASKED = "masked"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
EVAL_BATCH = 1000


class Step(NamedTuple):
    """What one training step gave.

    Args:
        seconds: draw, penalty, forward, backward and optimizer.
        data_loss: 0-d, mean cross-entropy of the batch.
        penalty: 0-d.
    """

    seconds: float
    data_loss: Tensor
    penalty: Tensor


def gated_network(recipe: Recipe, settings: Settings, n_train: int, seed: int) -> nn.Module:
    """The recipe's network with fresh parameters and gates.

    Args:
        recipe: the network.
        settings: lam, droprate and what divides the penalty.
        n_train: size of the training set.
        seed: of parameters and gates.
    """
    net = build(recipe.make, seed)
    example = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return convert(
        net,
        recipe.method,
        example_inputs=(example,),
        granularity="input",
        lam=dict(zip(recipe.groups, settings.lam, strict=True)),
        droprate=dict(zip(recipe.groups, settings.droprate, strict=True)),
        n_train=settings.penalty_n or n_train,
        seed=seed,
        **recipe.options,
    )


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
        groups = param_groups(net, lr=settings.lr, gate_lr=settings.gate_lr)
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def throwaway(self, layout: str | None = None) -> Arm:
        """A copy with a fresh optimizer, for steps that must leave no trace.

        Args:
            layout: another layout for the copy; None keeps this arm's.
        """
        return Arm(self.name, copy.deepcopy(self.net), self.settings, layout or self.layout)

    def _impl(self) -> AbstractContextManager[Any]:
        return use_impl("reference") if self.name == MASKED else nullcontext()

    def place(self, images: Tensor) -> Tensor:
        """Images in the layout of this arm, [N, 1, 28, 28]."""
        if self.layout is None:
            return images
        # With one channel .contiguous() sees nothing to do and keeps strides that mean NCHW.
        placed = torch.empty(images.shape, memory_format=LAYOUTS[self.layout])
        return placed.copy_(images)

    def step(self, images: Tensor, labels: Tensor) -> Step:
        """One training step.

        Args:
            images: [batch, 1, 28, 28], placed.
            labels: int64 [batch].
        """

        def data_loss() -> Tensor:
            # The gates are drawn by the engine in both arms; only the layers differ.
            with self._impl():
                return F.cross_entropy(self.net(images), labels)

        begin = time.perf_counter()
        self.optimizer.zero_grad()
        data = expected_loss(self.net, data_loss)
        price = penalty(self.net)
        (data + price).backward()
        self.optimizer.step()
        return Step(time.perf_counter() - begin, data.detach(), price.detach())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Deterministic gates, no gradients."""
        self.net.eval()
        try:
            with torch.no_grad(), frozen(self.net), self._impl():
                yield
        finally:
            self.net.train()

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images classified as labelled, in percent.

        Args:
            images: [N, 1, 28, 28].
            labels: int64 [N].
        """
        right = 0
        with self.evaluating():
            for x, y in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
                right += int((self.net(self.place(x)).argmax(1) == y).sum())
        return 100.0 * right / len(labels)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as plain dicts of tensors and numbers."""
        return {"model": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError: the state does not fit.
        """
        # Gates may be missing in checkpoints of other programs, not in ours.
        missing = set(self.net.state_dict()) - set(state["model"])
        if missing:
            raise ValueError(f"model: expected entries {sorted(missing)}, got none")
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter in self.net.parameters():
            _check_moments(parameter, self.optimizer.state[parameter])


def _check_moments(parameter: Tensor, moments: dict[str, Any]) -> None:
    # The optimizer takes whatever it is given; a wrong shape would fail in the middle of a step.
    for name in ("exp_avg", "exp_avg_sq"):
        if moments[name].shape != parameter.shape:
            raise ValueError(
                f"optimizer {name}: expected shape {tuple(parameter.shape)}, "
                f"got {tuple(moments[name].shape)}"
            )


def _set_layout(net: nn.Module, layout: torch.memory_format) -> None:
    for parameter in net.parameters():
        if parameter.dim() == 4:
            placed = torch.empty(parameter.shape, dtype=parameter.dtype, memory_format=layout)
            parameter.data = placed.copy_(parameter.data)


def open_units(net: nn.Module) -> list[int]:
    """Units of every group that the test gates leave open.

    A gate on a layer's inputs counts where the gate of the input's producer is open too.

    Args:
        net: converted network.
    """
    gates = gates_of(net)
    z = torch.cat((gates.deterministic().detach(), torch.ones(1)))
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
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            rows, columns = layer.weight.shape[:2]
            if isinstance(layer, GatedLayer):
                if layer.out_gate is not None:
                    rows = int((layer.out_gate.z != 0).sum())
                if layer.in_gate is not None:
                    columns = int((layer.in_gate.z != 0).sum())
            each = 1 if cost is None else cost[name]
            total += each * rows * columns * layer.weight[0, 0].numel()
    return total


def weights_left(net: nn.Module) -> dict[str, float]:
    """See ``Report.weights_open``."""
    return report(net).weights_open()
