# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU: a tape of operators, replayed without the Python that called them.

As a CUDA graph it runs nothing while it records, bakes in all that Python knew, and works on the
tensors that it has seen. Whatever the host would have to read from a GPU, and whatever it would
have to copy there, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from waits import waits

# What reads or makes tensors past the dispatcher.
FUNCTIONS = {
    Tensor.tolist,
    Tensor.item,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.pin_memory,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    torch.tensor,
    torch.as_tensor,
    torch.from_numpy,
}


def _refuse(name: str) -> None:
    raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


class NoHostReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FUNCTIONS:
            _refuse(func.__name__)
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records operators, and undoes what they have done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Any]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if waits(func, args) or "lift_fresh" in name:  # that copies from the host
            _refuse(name)
        for tensor in _written(func, args, kwargs):
            where = _memory(tensor)
            if where not in self._made and where not in self._before:
                self._before[where] = tensor.detach(), tensor.detach().clone()
        args, kwargs = tree_map_only(list, list, (args, kwargs))
        out = func(*args, **kwargs)
        outputs = tree_flatten(out)[0]
        given = {_memory(t) for t in tree_flatten((args, kwargs))[0] if _is_tensor(t)}
        self._made |= {_memory(t) for t in outputs if _is_tensor(t)} - given
        self.calls.append((func, args, kwargs, outputs))
        return out

    def undo(self) -> None:
        for tensor, before in self._before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            for mine, new in zip(outputs, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if _is_tensor(mine) and _memory(mine) != _memory(new):
                    mine.copy_(new)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    if "batch_norm" in str(func):  # it writes statistics and does not say so
        return [t for t in tree_flatten((args, kwargs))[0] if _is_tensor(t)]
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_flatten(value)[0] if _is_tensor(t)]
    return found


class _Here:
    def __init__(self, flag: Tensor) -> None:
        self._value = bool(flag)

    def is_here(self) -> bool:
        return True

    def is_raised(self) -> bool:
        return self._value


class _Late:
    def __init__(self, news: Any, here_after: int) -> None:
        self._news, self.left = news, here_after

    def is_here(self) -> bool:
        return self.left <= 0 and self._news.is_here()

    def is_raised(self) -> bool:
        return self._news.is_raised()


class TapeRecorder:
    """Recorder of a fake GPU, which is never ahead of the host."""

    def warm(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        tape, state = Tape(), torch.get_rng_state()
        try:
            with NoHostReads(), tape:
                run()
        finally:
            tape.undo()
            torch.set_rng_state(state)
        return tape.replay

    def send(self, flag: Tensor) -> _Here:
        return _Here(flag)


class Watched:
    """Any recorder, whose news come some steps late, with what it was asked for.

    Args:
        recorder: to watch.
        late: steps after which the host hears of one without waiting, at the earliest.
    """

    def __init__(self, recorder: Any, late: int) -> None:
        self._recorder, self._late = recorder, late
        self._sent: list[_Late] = []
        self.recorded = self.warmed = self.replayed = 0
        self._flags: list[Tensor] = []

    @property
    def raised(self) -> list[bool]:
        """Of every step under a plan, whether the flag was up after it."""
        return [bool(flag) for flag in self._flags]

    def warm(self, run: Callable[[], None]) -> None:
        self.warmed += 1
        self._recorder.warm(run)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        replay = self._recorder.record(run)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted

    def send(self, flag: Tensor) -> Any:
        self._flags.append(flag.clone())
        for news in self._sent:
            news.left -= 1
        self._sent.append(_Late(self._recorder.send(flag), self._late))
        return self._sent[-1]
