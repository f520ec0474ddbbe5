# SPDX-License-Identifier: Apache-2.0
"""Training steps that are captured once and replayed, with fresh gates each time.

A captured step draws its gates on the device, at widths that are planned before (see
``gates.capacity``), so the host reads nothing. Rarely a draw does not fit. A flag on the device is
raised then, and as long as it is up, replays leave all as it is:

- optimizers of PyTorch with ``fused=True`` skip a step for a flag (``found_inf``) that lies on the
  device, as they do for ``torch.amp``,
- buffers of the model, among them the step that keys the draw, are put back.

The flag follows every step to the host, which looks at what has arrived before the next step, and
never waits for the newest ones. Where it finds the flag raised, it lowers it, makes the step that
did not fit at the widths that its gates need, as without capture and with the same draw, and after
it the steps that came later and did nothing. So the sequence of steps is that of eager training.
Batches and settings of the optimizer are kept until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from l0kernels import _capture
from l0kernels.gates.arm import ARM
from l0kernels.gates.base import Gates
from l0kernels.gates.capacity import Plan, capacities
from l0kernels.gates.weights import WeightGates
from l0kernels.optim.rows import FollowsDraws, guard
from l0kernels.training import gates_of, root_of

AHEAD = 8
"""So many steps may be under way of which the host does not know how they went."""


class _Step(NamedTuple):
    """A step under way: what is needed to make it again, and where its loss goes."""

    batch: list[Tensor]
    settings: list[dict[str, Any]]
    loss: Tensor
    news: _capture.News


class _Baked(NamedTuple):
    """What replays do not look at again: settings, modes, and which memory is whose."""

    settings: list[dict[str, Any]]
    modes: list[bool]
    tensors: list[tuple[int, int, bool]]
    frozen_at: int | None

    def parts(self) -> tuple[int, int, int]:
        """Groups of the optimizer, modules, parameters and buffers."""
        return len(self.settings), len(self.modes), len(self.tensors)


class GraphStep:
    """Makes training steps, see `graph`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        replan_every: int,
    ) -> None:
        self._gates = gates = gates_of(model)
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._replan_every, self._age = replan_every, 0
        self._device = gates.log_alpha.device
        self._under_way: deque[_Step] = deque()
        self._runs = False
        self._baked: _Baked | None = None
        self._forget()
        self._recorder = _capture.recorder_for(self._device)
        self._hooks: list[Any] = []
        if self._recorder is None:
            return
        self._flag = torch.zeros((), device=self._device)
        if gates.captured is not None:
            gates.captured.release()
        gates.captured = self
        for module in {model, root_of(model, gates)}:
            self._hooks += guard(module, self)
        self._hooks += [
            optimizer.register_state_dict_pre_hook(lambda _: self.flush()),
            optimizer.register_load_state_dict_pre_hook(self._restart),
        ]

    def __call__(self, *batch: Tensor) -> Tensor:
        """Make one training step.

        Args:
            batch: arguments of the loss, tensors on any device.

        Returns:
            The loss, 0-d. On a GPU it counts as soon as the step is known to be made, as it is
            after ``flush``: in one that has to be made again it is the loss without the units that
            did not fit, until the host knows and corrects it in place.

        Raises:
            TypeError: something else than tensors. RuntimeError: autocast or ``hold`` around the
            call, or a step that cannot be captured. ValueError: the loss is not a scalar.
        """
        self._check_call(batch)
        if self._recorder is None:
            return self._eager(batch)
        self._look(AHEAD)
        taken = [t.to(self._device, non_blocking=True, copy=True) for t in batch]
        baked = self._now()
        if self._baked != baked:
            self._restart()
            loss = self._eager(taken)  # makes the state of the optimizer
            self._bake(baked, taken, loss)
            return loss
        if [(t.shape, t.dtype) for t in taken] != [(t.shape, t.dtype) for t in self._batch]:
            self.flush()
            return self._eager(taken)
        if self._plan is None or self._age >= self._replan_every:
            self._plan_anew()
        return self._at_capacity(taken)

    def flush(self) -> None:
        """Wait for all steps, and make those again that did not fit.

        The functions of l0kernels, draws of the model, and state dictionaries do it by themselves.
        Call it before anything else reads parameters or losses, as averages (EMA) do, and before
        parameters move to another device or model or optimizer get other parts.
        """
        if not self._runs:
            self._look(1)

    def release(self) -> None:
        """Flush, and make plain eager steps from now on."""
        self.flush()
        self._forget()
        self._recorder = None
        if self._gates.captured is self:
            self._gates.captured = None
        for hook in self._hooks:
            hook.remove()

    # Steps.

    def _step(self, batch: Any) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(*batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"graph: expected a scalar tensor from the loss, got {got}")
        loss.backward()
        self._optimizer.step()
        return loss.detach().reshape(())

    def _eager(self, batch: Any) -> Tensor:
        with self._running():
            return self._step(batch)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._runs = True
        try:
            yield
        finally:
            self._runs = False

    def _guarded(self) -> None:
        """The step that is captured: while the flag is up it changes nothing."""
        assert self._plan is not None and self._kept is not None
        self._kept.keep()
        with self._gates.at_capacity(self._plan), self._flagged():
            loss = self._step(self._batch)
        self._kept.put_back(self._flag)
        self._value.copy_(loss)

    @contextmanager
    def _flagged(self) -> Iterator[None]:
        """Have the optimizer look at the flag, and read its learning rates from tensors."""
        optimizer: Any = self._optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.grad_scale, optimizer.found_inf = None, self._flag
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            del optimizer.grad_scale, optimizer.found_inf
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _at_capacity(self, batch: list[Tensor]) -> Tensor:
        assert self._recorder is not None
        for mine, given in zip(self._batch, batch, strict=True):
            mine.copy_(given)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            lr = group["lr"]
            rate.copy_(lr, non_blocking=True) if isinstance(lr, Tensor) else rate.fill_(lr)
        with self._running():
            if self._is_warm and self._replay is None:
                self._replay = self._recorder.record(self._guarded)
                self._prices = self._gates.prices()
            if self._replay is None:
                self._recorder.warm(self._guarded)
                self._is_warm = True
            else:
                self._replay()
        # Replays, as fused optimizers, write past autograd's counters.
        increment_version(_tensors(self._model))
        self._age += 1
        loss = self._value.clone()
        step = _Step(batch, self._settings(), loss, self._recorder.send(self._flag))
        self._under_way.append(step)
        return loss

    def _look(self, most: int) -> None:
        """Hear how steps went; wait until fewer than ``most`` are under way."""
        steps = self._under_way
        while steps and (len(steps) >= most or steps[0].news.is_here()):
            if steps[0].news.is_raised():
                self._make_again()
            else:
                steps.popleft()

    def _make_again(self) -> None:
        """Make all steps that are under way, of which the first did not fit.

        Raises:
            RuntimeError: the model or the optimizer is no longer that of the steps.
        """
        assert self._baked is not None
        then, now = self._baked.parts(), self._now().parts()
        if then != now:
            raise RuntimeError(
                f"graph: expected flush before parts are added or removed, got {now} instead of "
                f"{then} (groups of the optimizer, modules, parameters and buffers) while steps "
                "have to be made again"
            )
        steps = list(self._under_way)
        self._under_way.clear()
        self._flag.zero_()
        self._age = self._replan_every
        with self._as_recorded():
            for step in steps:
                self._set(step.settings)
                step.loss.copy_(self._eager(step.batch))

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """Modes, settings and grad mode of the steps, whatever they are now."""
        assert self._baked is not None
        now = self._now()
        # Themselves, not copies: others may write to learning rates in place.
        settings = [dict(group) for group in self._optimizer.param_groups]
        self._set_modes(self._baked)
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(self._device.type, enabled=False),
            ):
                yield
        finally:
            self._set_modes(now)
            self._set(settings)

    # Captures.

    def _restart(self, *_: Any) -> None:
        """Begin anew, with an eager step: what graphs have read and written may be replaced."""
        self.flush()
        self._forget()
        self._baked = None

    def _bake(self, baked: _Baked, batch: list[Tensor], loss: Tensor) -> None:
        """Make what stays as long as nothing of it changes."""
        self._baked, self._batch = baked, batch
        self._value = torch.empty_like(loss)
        # Graphs read the learning rates: schedulers change them.
        groups = self._optimizer.param_groups
        self._rates = [torch.zeros((), device=self._device) for _ in groups]

    def _forget(self) -> None:
        self._plan: Plan | None = None
        self._kept: _Kept | None = None
        self._replay: Callable[[], None] | None = None
        self._prices: list[Tensor] = []  # replays read them: they stay
        self._is_warm = False

    def _plan_anew(self) -> None:
        self.flush()
        if self._gates.training:
            self._gates._settle()  # the widths are those of the next draw, which does so too
        needs = capacities(self._gates)
        if self._plan is None or not self._plan.serves(needs):
            self._forget()
            self._plan = Plan(self._gates, needs, self._flag)
            self._kept = _Kept(self._model, self._device)
        self._age = 0

    # What steps depend on.

    def _check_call(self, batch: tuple[Any, ...]) -> None:
        if self._gates._held:
            raise RuntimeError("graph: expected hold inside the loss, got it around the step")
        for each in batch:
            if not isinstance(each, Tensor):
                raise TypeError(f"graph: expected a batch of tensors, got {type(each).__name__}")
        if torch.is_autocast_enabled(self._device.type):
            raise RuntimeError("graph: expected autocast inside the loss, got it around the step")

    def _settings(self) -> list[dict[str, Any]]:
        """Those of the optimizer, by group."""
        return [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items() if k != "params"}
            for g in self._optimizer.param_groups
        ]

    def _set(self, settings: list[dict[str, Any]]) -> None:
        for group, values in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(values)

    def _set_modes(self, baked: _Baked) -> None:
        for module, training in zip(self._model.modules(), baked.modes, strict=True):
            module.training = training
        for tensor, (_, _, learns) in zip(_tensors(self._model), baked.tensors, strict=True):
            tensor.requires_grad_(learns)

    def _now(self) -> _Baked:
        frozen_at, model = self._gates._frozen_at, self._model
        return _Baked(
            [
                {
                    k: v
                    for k, v in group.items()
                    if k not in ("params", "lr") and not isinstance(v, Tensor)
                }
                for group in self._optimizer.param_groups
            ],
            [module.training for module in model.modules()],
            [(id(t), t.data_ptr(), t.requires_grad) for t in _tensors(model)],
            None if frozen_at is None else frozen_at.data_ptr(),
        )


class _Kept:
    """The buffers of a model on a device, to be put back there."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            if buffer.device == device and not _is_expanded(buffer):
                self._buffers.setdefault(buffer.dtype, []).append(buffer)
        self._before: list[Tensor] = []

    def keep(self) -> None:
        """Remember what they hold."""
        self._before = [_joined(buffers) for buffers in self._buffers.values()]

    @torch.no_grad()
    def put_back(self, flag: Tensor) -> None:
        """Undo all changes since if the flag is up."""
        for buffers, before in zip(self._buffers.values(), self._before, strict=True):
            chosen = torch.where(flag > 0, before, _joined(buffers))
            parts = chosen.split([buffer.numel() for buffer in buffers])
            shaped = [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)]
            torch._foreach_copy_(buffers, shaped)  # pyright: ignore[reportPrivateImportUsage]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _joined(buffers: list[Tensor]) -> Tensor:
    """One tensor, of which a step has a few launches instead of some for every buffer."""
    return torch.cat([buffer.detach().flatten() for buffer in buffers])


def _is_expanded(buffer: Tensor) -> bool:
    """Whether several elements are one in memory: nobody writes those."""
    return any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))


def graph(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    *,
    replan_every: int = 100,
) -> GraphStep:
    """Makes training steps that a GPU replays from a CUDA graph: gates are fresh, the host idle.

    ``step = l0.graph(net, optimizer, loss)``, and ``step(x, y)`` is

        optimizer.zero_grad(); loss(x, y).backward(); optimizer.step()

    with the same draws, in the same order. On a CPU, where nothing is captured, it is just that. On
    a GPU the first step is made eagerly and the second one warms up; the third is captured, as is
    another one when widths have to change, which the host looks at every ``replan_every`` steps. In
    between it reads nothing from the GPU; where it is more than eight steps ahead, it waits for
    the oldest of these. Widths are a little larger than what is open (see ``gates.capacity``), and
    learning rates have float32. A batch whose shapes or dtypes are not those of the first one is
    made eagerly, which suits the last one of an epoch.

    What the loss, and hooks, compute is recorded, and their Python does not run again: what changes
    from step to step has to be in tensors: given as a part of the batch, as those that are written
    in place are as they are then where a step is made again. Another learning rate, other settings
    of the optimizer, other modes of modules and ``requires_grad`` are noticed; all but the first
    cost an eager step and a new capture, so a momentum that changes at every step leaves all eager.
    No loss with its graph, as ``l0.penalty(net)``, may be kept from before a capture.

    Args:
        model: a converted model on its device, or a module around it that has the buffers of all
            that the loss writes to, as ``nn.ModuleList([net, budget])``.
        optimizer: of PyTorch, with ``fused=True``; ``Adam`` and ``AdamW`` with
            ``capturable=True``, too.
        loss: of a batch, a scalar, with autocast inside: ``lambda x, y: expected_loss(...) +
            penalty(...)``.
        replan_every: steps, at least 1.

    Returns:
        The step, a `GraphStep`.

    Raises:
        ValueError: gates for each example or of single weights, DDP or SyncBatchNorm, norms with
            ``momentum=None``, ARM's two passes with dropout, or another optimizer: these cannot be
            captured, or their steps not be made again.
    """
    _check_model(model, gates_of(model))
    _check_optimizer(optimizer)
    if not isinstance(replan_every, int) or replan_every < 1:
        raise ValueError(f"replan_every: expected a positive integer, got {replan_every!r}")
    return GraphStep(model, optimizer, loss, replan_every)


def _check_model(model: nn.Module, gates: Gates) -> None:
    if gates.scope == "example":
        raise ValueError("graph: expected scope='batch', got gates for each example")
    if isinstance(gates, WeightGates) and gates.shapes:
        raise ValueError("graph: expected gates of units, got gates of single weights")
    two_passes = isinstance(gates, ARM) and gates.estimator == "arm"
    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, nn.SyncBatchNorm)):
            raise ValueError(f"graph: expected one process, got {type(module).__name__} {name}")
        if isinstance(module, _BatchNorm) and module.momentum is None:
            raise ValueError(f"graph: {name}: expected a norm with a momentum, got momentum=None")
        if two_passes and isinstance(module, _DropoutNd) and module.p > 0:
            raise ValueError(
                f"graph: {name}: expected no dropout with ARM, whose two passes share it, "
                f"got p={module.p}; estimator='ar' has one pass"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, FollowsDraws):
        raise ValueError(f"graph: expected an optimizer of PyTorch, got l0kernels.optim.{name}")
    for group in optimizer.param_groups:
        if not group.get("fused") or not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"graph: expected SGD, Adam or AdamW with fused=True (or Adagrad, in versions of "
                f"PyTorch where it can leave out a step), got {name} with "
                f"fused={group.get('fused')}"
            )
        if not group.get("capturable", True):
            raise ValueError(f"graph: expected {name} with capturable=True, got capturable=False")


__all__ = ["GraphStep", "graph"]
