# SPDX-License-Identifier: Apache-2.0
"""Weights whose closed rows an optimizer leaves behind, and brings up to date when they open.

The gradient of a gated weight is exactly zero in closed rows (output features; input features of
layers that store them first, and of linear layers of which only these have gates, whose weights are
stored so from then on). A step with gradient zero is a function of the element alone, so it
can wait until somebody reads the row. Each row counts the steps that it has seen:

- a draw makes up for the missed steps of its open rows and marks them,
- the optimizer updates the marked rows, with all their columns, from the gradient,
- ``flush`` makes up for the missed steps of all rows.

On a CPU the gradient lies in memory that is used again, in which closed rows are zero already
(`KeptGradient`).

Rows only: of the cache lines of a row, 16 floats each, 1 - .9^16 = 81 % hold something of the open
tenth of its columns, so that leaving closed columns out would save memory traffic of a fifth and
cost a counter for every element.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from l0kernels.gates.base import Captured, Gates
from l0kernels.gates.draw import Draw
from l0kernels.nn.base import GatedLayer
from l0kernels.ops.open_rows import open_rows
from l0kernels.ops.open_rows.op import DTYPES, rows_contiguous
from l0kernels.ops.pack_weight.reference import is_transposed
from l0kernels.ops.unpack_rows.kept import KeptGradient, is_distributed
from l0kernels.training import gates_of, root_of

LEAST = 1 << 18
"""Weights of fewer elements are updated whole, which takes no longer."""

LOOKED_AT = 16
"""Every so many steps gradients are read whole: writes through ``.data`` leave no trace."""

REMEMBERED = 1024
"""All rows are brought up to date when this many steps have passed since the last time."""


class Rows:
    """What is known of the rows of one weight.

    Args:
        name: of the weight in the model.
        weight: the parameter.
        layer: that reads it.
        port: of the gates that its rows have.
        of_inputs: whether rows are the second dimension of a matrix, stored [I, O].
    """

    def __init__(
        self, name: str, weight: nn.Parameter, layer: GatedLayer, port: int, of_inputs: bool
    ) -> None:
        self.name = name
        self.weight = weight
        self.layer = layer
        self.port = port
        self.of_inputs = of_inputs
        count = weight.shape[1 if of_inputs else 0]
        self.last = torch.zeros(count, dtype=torch.int64, device=weight.device)
        self.version = weight._version
        self.kept: KeptGradient | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The weight, or what is like it, with its rows first."""
        return tensor.t() if self.of_inputs else tensor

    def lies(self, tensor: Tensor) -> bool:
        """Whether rows of the weight, or of what is like it, lie one after the other."""
        return not self.of_inputs or tensor.t().is_contiguous()

    def store(self, of_inputs: bool, *tensors: Tensor) -> None:
        """Have a matrix and its state lie in memory as [I, O], or as [O, I]."""
        for tensor in tensors:
            data = tensor.data
            tensor.data = data.t().contiguous().t() if of_inputs else data.contiguous()

    def is_written(self) -> bool:
        """Whether the weight was written since the optimizer wrote it."""
        return self.weight._version != self.version

    def open_in(self, draw: Draw) -> Tensor:
        """The rows that a layer reads under a draw."""
        return draw.index[self.port]


class FollowsDraws(Optimizer):
    """Mix-in before a class of ``torch.optim``: follows the draws of a model's gates.

    A class says how rows are updated (``_update``) and how they make up for steps (``_catch_up``),
    and what a table per group keeps of each step until all rows have seen it (``_with_step``).
    """

    def _follow(self, model: nn.Module) -> None:
        """Find what can be followed; before the parameters are added."""
        self._gates: Gates | None = gates_of(model)
        root = root_of(model, self._gates)
        self._found = {rows.weight: rows for rows in _gated(root)}
        self._is_told = False  # of draws
        self._rows: dict[Tensor, Rows] = {}
        self._tables: list[Tensor] = []  # what rows that are behind need to know, per group
        self._now = 0  # steps since all rows were up to date
        self._drawn = False  # since the last step
        self._root = root

    def _begin(self) -> None:
        """Hear of draws from now on, and of who reads the weights of the model as a whole."""
        gates = self._gates
        assert gates is not None
        for other in list(gates.followers):
            if isinstance(other, FollowsDraws) and self._rows.keys() & other._rows.keys():
                other.release()
        gates.followers.append(self)
        self._is_told = True
        self._hooks = guard(self._root, self)
        for rows in self._rows.values():
            self._adopt(rows)

    def _adopt(self, rows: Rows) -> None:
        """Store a weight and its gradients so that rows are cheap."""
        assert self._gates is not None
        if rows.of_inputs:
            rows.store(True, rows.weight)
        if rows.weight.device.type == "cpu" and not rows.layer.stored_in_out:
            self._gates.kept[rows.weight] = rows.kept = KeptGradient(rows.weight)
        rows.version = rows.weight._version

    def _leave(self, rows: Rows) -> None:
        """Undo `_adopt`."""
        assert self._gates is not None
        self._gates.kept.pop(rows.weight, None)
        if rows.of_inputs:
            state = self.state.get(rows.weight, {}).values()
            like = [t for t in state if isinstance(t, Tensor) and t.shape == rows.weight.shape]
            if rows.weight.grad is not None and not rows.weight.grad.is_sparse:
                rows.weight.grad = rows.weight.grad.contiguous()
            rows.store(False, rows.weight, *like)

    @property
    def row_weights(self) -> list[str]:
        """Names of the weights of which only open rows are updated."""
        return [rows.name for rows in self._rows.values()]

    # What a class supplies.

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if a step cannot be made, as far as PyTorch's would notice too late."""

    def _update(self, rows: Rows, group: dict[str, Any]) -> None:
        """One step of the marked rows."""
        raise NotImplementedError

    def _update_whole(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """One step of PyTorch's."""
        raise NotImplementedError

    def _catch_up(self, rows: Rows, group: int, which: Tensor | None, mark: int) -> None:
        """Make up for the missed steps of some rows, or all, and set their counters."""
        raise NotImplementedError

    def _no_steps(self) -> Tensor:
        """The table of a group when all rows are up to date."""
        raise NotImplementedError

    def _with_step(self, table: Tensor, group: dict[str, Any]) -> Tensor:
        """The table and the step that has been made."""
        raise NotImplementedError

    def _has_state(self, weight: Tensor, group: dict[str, Any]) -> bool:
        """Whether PyTorch's optimizer has made its state of this weight."""
        raise NotImplementedError

    # Following.

    @torch.no_grad()
    def drawn(self, draw: Draw) -> None:
        """Bring the rows that are open in a draw up to date; all of them in eval mode."""
        if not draw.training:
            self.flush()
            return
        self._check_unwritten()
        self._store_again()
        self._drawn = True
        for group, rows in self._followed():
            self._catch_up(rows, group, rows.open_in(draw), self._now + 1)

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all weights and the optimizer's state up to date, as PyTorch's would be.

        Call it before anything but the gated layers reads or writes the weights: averaging them,
        clipping or copying them by hand, giving them to another optimizer.

        Raises:
            RuntimeError: a weight was written by somebody else while rows were behind.
        """
        if self._now == 0:
            return
        self._check_unwritten()
        self._store_again()
        for group, rows in self._followed():
            self._catch_up(rows, group, None, self._now)
            rows.last -= self._now
        self._now = 0
        self._tables = [self._no_steps() for _ in self.param_groups]

    def release(self) -> None:
        """Flush, and from now on do what PyTorch's optimizer does."""
        self.flush()
        if self._gates is not None:
            for rows in self._rows.values():
                self._leave(rows)
        self._rows.clear()
        self._found.clear()
        if self._gates is not None:
            self._gates.followers.remove(self)
            self._gates = None
            for hook in self._hooks:
                hook.remove()

    def _followed(self) -> Iterable[tuple[int, Rows]]:
        for number, group in enumerate(self.param_groups):
            for weight in group["params"]:
                if weight in self._rows:
                    yield number, self._rows[weight]

    def _check_unwritten(self) -> None:
        written = [rows.name for rows in self._rows.values() if rows.is_written()]
        if self._now and written:
            raise RuntimeError(
                f"expected that only their optimizer writes to weights while closed rows are "
                f"behind, got {', '.join(written)} written by somebody else; call flush() before"
            )

    def _store_again(self) -> None:
        """Turn weights that somebody gave other memory, in which they lie as in a plain layer."""
        for rows in self._rows.values():
            if not rows.lies(rows.weight):
                rows.store(True, rows.weight)

    # Steps.

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one step.

        Args:
            closure: computes the loss again and returns it; optional.

        Raises:
            RuntimeError: the gradient of a row that was closed is not zero, or a weight was
                written by somebody else; nothing is changed. What PyTorch's optimizer raises;
                weights of which only open rows are updated have not been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        draw = None if self._gates is None else self._gates._draw
        if not self._drawn and draw is not None and draw.training:
            # The forward ran under a draw that an earlier step knows too (``hold``).
            self.drawn(draw)
        self._check_unwritten()
        self._store_again()
        for rows in self._rows.values():
            self._check_gradient(rows)
        for group in self.param_groups:
            self._check_group(group)
        parts = [self._parts(number, group) for number, group in enumerate(self.param_groups)]
        for group, (whole, _) in zip(self.param_groups, parts, strict=True):
            followed = [self._rows[weight] for weight in whole if weight in self._rows]
            for rows in followed:
                grad = rows.weight.grad
                if grad is not None and not grad.is_sparse and not rows.lies(grad):
                    # PyTorch's fused updates go through memory, not through indices.
                    rows.weight.grad = torch.empty_like(rows.weight).copy_(grad)
            self._update_whole(group, whole)
            self._lay_out(followed)
        for group, (_, partly) in zip(self.param_groups, parts, strict=True):
            for rows in partly:
                self._update(rows, group)
                torch.autograd.graph.increment_version(rows.weight)
        for number, group in enumerate(self.param_groups):
            self._tables[number] = self._with_step(self._tables[number], group)
        self._now += 1
        self._drawn = False
        for rows in self._rows.values():
            rows.version = rows.weight._version
        if self._now >= REMEMBERED:
            self.flush()
        return loss

    def _check_gradient(self, rows: Rows) -> None:
        grad = rows.weight.grad
        if grad is None or grad.is_sparse:
            return
        written = None
        if rows.kept is not None and rows.kept.is_as_written(grad) and self._now % LOOKED_AT:
            written = rows.kept.written
        stale = open_rows(rows.view(grad), rows.last, self._now, written)
        if stale:
            raise RuntimeError(
                f"{rows.name}: expected gradients of zero in closed rows, got others in {stale} "
                f"rows that are behind; where a loss reads weights directly, call flush() of the "
                f"optimizer before each forward, or use PyTorch's optimizer"
            )

    def _parts(self, number: int, group: dict[str, Any]) -> tuple[list[Tensor], list[Rows]]:
        """The weights of a group that PyTorch updates, and those of which the marked rows are."""
        whole, partly = [], []
        for weight in group["params"]:
            rows = self._rows.get(weight)
            if rows is None:
                whole.append(weight)
            elif weight.grad is None or weight.grad.is_sparse or not self._has_state(weight, group):
                # No step for the weight, or PyTorch's: as it is, no row will have missed it.
                self._catch_up(rows, number, None, self._now)
                rows.last.fill_(self._now + 1)
                whole.append(weight)
            else:
                partly.append(rows)
        return [weight for weight in whole if weight.grad is not None], partly

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Flush and return the state, which is that of PyTorch's optimizer."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer or PyTorch's."""
        self.flush()
        super().load_state_dict(state_dict)
        self._lay_out(self._rows.values())

    def _lay_out(self, followed: Iterable[Rows]) -> None:
        """Have state lie as its weight does; PyTorch makes it as the gradient lies."""
        for rows in followed:
            state = self.state.get(rows.weight, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == rows.weight.shape:
                    state[name] = torch.empty_like(rows.weight).copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of an optimizer follow no draws; PyTorch calls it for ``load_state_dict`` too."""
        super().__setstate__(state)
        for name, value in (("_gates", None), ("_now", 0), ("_drawn", False), ("_is_told", False)):
            self.__dict__.setdefault(name, value)
        for name in ("_found", "_rows"):
            self.__dict__.setdefault(name, {})
        if "_tables" not in self.__dict__:
            self._tables = [self._no_steps() for _ in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; gated weights among them are followed from now on."""
        super().add_param_group(param_group)
        self._tables.append(self._no_steps())
        for weight in self.param_groups[-1]["params"]:
            if weight in self._found:
                self._rows[weight] = rows = self._found[weight]
                rows.last.fill_(self._now)
                rows.version = weight._version
                if self._is_told:
                    self._adopt(rows)


def guard(model: nn.Module, owner: FollowsDraws | Captured) -> list[RemovableHandle]:
    """Have somebody flush before the state of a model is taken or replaced, or it is copied.

    Returns:
        What removes the hooks that do so.
    """
    hook = _Guard(owner)
    # Copies and pickles take what a module has in the order of this: hooks before parameters.
    has = model.__dict__
    for name in [name for name in has if name != "_state_dict_pre_hooks"]:
        has[name] = has.pop(name)
    return [
        model.register_state_dict_pre_hook(hook),
        model.register_load_state_dict_pre_hook(hook),
    ]


class _Guard:
    """The hook; one in a copy or pickle does nothing."""

    def __init__(self, owner: FollowsDraws | Captured | None) -> None:
        self._owner = owner

    def __call__(self, *args: Any) -> None:
        if self._owner is not None:
            self._owner.flush()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        self()
        return _Guard(None)

    def __reduce__(self) -> tuple[type[_Guard], tuple[None]]:
        self()
        return _Guard, (None,)


def _gated(root: nn.Module) -> Iterable[Rows]:
    """The weights that can be followed.

    Each is read by one layer inside the root, has gates on its rows, and is large enough.
    """
    owners: dict[int, int] = {}
    for _, parameter in root.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, layer in root.named_modules():
        if layer is root or not isinstance(layer, GatedLayer) or layer.gates is not root.l0:
            continue
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        port = layer.in_port if layer.stored_in_out else layer.out_port
        of_inputs = port < 0 and _may_be_turned(layer, weight)
        if of_inputs:
            port = layer.in_port
        # Of a copy, or taken over from another optimizer, it is stored so already.
        stored = weight.t() if of_inputs and is_transposed(weight) else weight
        fits = weight.dtype in DTYPES and rows_contiguous(stored) and weight.numel() >= LEAST
        if port >= 0 and fits and owners[id(weight)] == 1:
            yield Rows(f"{name}.weight", weight, layer, port, of_inputs)


def _may_be_turned(layer: GatedLayer, weight: Tensor) -> bool:
    """Whether a weight may be stored with its input features first, which have gates of their own.

    A GPU packs matrices stored so by a copy; readers of constants learn from closed features; the
    buckets of DDP expect gradients that lie as weights did when it was made.
    """
    # A matrix of one row or column lies both ways.
    is_matrix = weight.device.type == "cpu" and weight.dim() == 2 and min(weight.shape) > 1
    plain = isinstance(layer, nn.Linear) and not layer.reads_constants
    return plain and is_matrix and not is_distributed()


def turned(*tensors: Tensor | None) -> bool:
    """Whether all are channels_last: PyTorch's fused update copies what is not contiguous."""
    return all(
        tensor is None
        or (
            tensor.dim() == 4
            and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        for tensor in tensors
    )


def in_order(tensors: Sequence[Any], turns: list[bool]) -> list[Any]:
    """The tensors, and None for None, as contiguous views where they are turned."""
    return [
        tensor.permute(0, 2, 3, 1) if turn and tensor is not None else tensor
        for tensor, turn in zip(tensors, turns, strict=True)
    ]
