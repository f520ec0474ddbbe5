# SPDX-License-Identifier: Apache-2.0
"""What two passes have in common before the first layer whose gates differ, computed once.

The first pass records what every operator of PyTorch and of this package returns, up to the first
layer that reads or makes features whose gates differ in the other draw. The second pass runs all
of its Python again. Autograd records its operators as always, but below autograd those of the
common prefix get the recorded results instead of being computed: the same bits, as the operators
are the same and so is what they are given.

Computed in both passes are operators that write (norms count batches, activations work in place),
draw random numbers, give views, or pack weights. What is written to in the first pass is recorded
as it was before. An operator of the second pass that is not the recorded one, or has other
arguments, ends the prefix, and so does whatever else than a layer asks for the draw. Not noticed
is what a forward writes past autograd, through ``.data`` or numpy, into results of the prefix or
into what it reads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from l0kernels.gates.draw import Draw

# Autograd has these as it saves results, so that there are more of them with gradients.
UNSEEN = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Made(NamedTuple):
    """A tensor in what an operator returned.

    Args:
        number: of its storage.
    """

    number: int


class Call(NamedTuple):
    """One operator of the first pass.

    Args:
        operator: what was called.
        arguments: see `_Pass.describe`; None where it is not compared.
        results: what it returned, with `Made` for tensors.
        runs_again: whether the second pass computes it, too.
    """

    operator: Any
    arguments: Any
    results: Any
    runs_again: bool


class Prefix:
    """The operators of the common prefix, with their results.

    Args:
        differs: for each port, whether its gates or packed features differ between the draws.
        model: whose buffers are as they were when the second pass starts.
    """

    def __init__(self, differs: Sequence[bool], model: nn.Module) -> None:
        self._differs = differs
        self._mode: _Pass | None = None
        self.buffers = {_storage(buffer) for buffer in model.buffers()}
        self.calls: list[Call] = []
        # Results by the number of their storage, and their version when they were recorded.
        self.made: dict[int, tuple[Tensor, int]] = {}
        # Other arguments: the storage of one that is gone could come again with other contents.
        self.outside: list[Tensor] = []

    def reach(self, ports: Iterable[int] | None) -> None:
        """A layer with these ports is about to run, or, None, the draw is asked for otherwise."""
        differs = ports is None or any(port >= 0 and self._differs[port] for port in ports)
        if differs and self._mode is not None:
            self._mode.end()

    @contextmanager
    def recording(self, draw: Draw) -> Iterator[None]:
        """The first pass, under this draw."""
        with self._passing(_Recording(self, draw), draw):
            yield
        # What has been written to after the prefix cannot be handed out.
        self.made = {n: (t, v) for n, (t, v) in self.made.items() if t._version == v}

    @contextmanager
    def replaying(self, draw: Draw) -> Iterator[None]:
        """The second pass, under this draw."""
        with self._passing(_Replaying(self, draw), draw):
            yield

    @contextmanager
    def _passing(self, mode: _Pass, draw: Draw) -> Iterator[None]:
        self._mode, draw.prefix = mode, self
        mode.begin()
        try:
            yield
        finally:
            mode.end()
            self._mode = draw.prefix = None


class _Pass(TorchDispatchMode):
    """Sees the operators of one pass.

    Tensors are known by their storages. Those of the draw and of what operators return are numbered
    as they appear, so that numbers agree between the passes.
    """

    supports_higher_order_operators = True

    def __init__(self, prefix: Prefix, draw: Draw) -> None:
        super().__init__()
        self.prefix, self.over = prefix, False
        self._inside = False
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []
        for tensor in draw.tensors():
            self.number(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.over or func in UNSEEN:
            return func(*args, **kwargs)
        return self.see(func, args, kwargs)

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an operator of this pass, or do without."""
        raise NotImplementedError

    def begin(self) -> None:
        self.__enter__()
        self._inside = True

    def end(self) -> None:
        """See no more operators; not even their names, unless another mode is inside this one."""
        self.over = True
        if self._inside and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)
            self._inside = False
            self._numbers, self._alive = {}, []

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, a new one if it has none yet."""
        storage = _storage(tensor)
        if storage not in self._numbers:
            self._numbers[storage] = len(self._alive)
            self._alive.append(tensor)
        return self._numbers[storage]

    def known(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage, if it has one."""
        return self._numbers.get(_storage(tensor))

    def name_results(self, results: Any) -> Any:
        """What an operator returned, with `Made` for tensors."""
        return _map(results, lambda tensor: Made(self.number(tensor)))

    def describe(self, value: Any) -> Any:
        """An argument, in a form that is equal for equal ones of both passes."""
        return _map(value, self._describe_tensor)

    def _describe_tensor(self, tensor: Tensor) -> Any:
        form = (tensor.shape, tensor.dtype, *_strides(tensor))
        number = self.known(tensor)
        if number is not None:
            return number, form
        self.prefix.outside.append(tensor)
        storage = _storage(tensor)
        # Buffers are put back without a new version.
        version = 0 if storage in self.prefix.buffers else _version(tensor)
        return "outside", storage, version, form


class _Recording(_Pass):
    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, OpOverload) or _has_generator(args, kwargs):
            self.over = True
            return func(*args, **kwargs)
        arguments = None if _packs(func) else self.describe((args, kwargs))
        for place, name in _written(func):
            self._keep(args[place] if place < len(args) else kwargs.get(name))
        result = func(*args, **kwargs)
        tensors = _tensors(result)
        shares = len(set(map(_storage, tensors))) < len(tensors)
        again = _runs_again(func) or shares or not all(map(self._is_new, tensors))
        results = self.name_results(result)
        if not again:
            for tensor in tensors:
                self.prefix.made[self.number(tensor)] = (tensor, tensor._version)
        self.prefix.calls.append(Call(func, arguments, results, again))
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        return self.known(tensor) is None and not tensor.is_inference()

    def _keep(self, target: Any) -> None:
        """This is about to be written to: what is recorded of it stays as it is."""
        for tensor in _tensors(target):
            number = self.known(tensor)
            if number is None or number not in self.prefix.made:
                continue
            whole, version = self.prefix.made[number]
            if whole._version == version:
                copy = whole.clone()
                self.prefix.made[number] = (copy, copy._version)


class _Replaying(_Pass):
    def __init__(self, prefix: Prefix, draw: Draw) -> None:
        super().__init__(prefix, draw)
        self._calls = iter(prefix.calls)

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call = next(self._calls, None)
        if call is None or not self._can_follow(call, func, args, kwargs):
            self.over = True
            return func(*args, **kwargs)
        again = call.runs_again
        result = func(*args, **kwargs) if again else _map(call.results, self._take, Made)
        if self.name_results(result) != call.results:
            self.over = True
        return result

    def _can_follow(self, call: Call, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if call.operator is not func:
            return False
        if call.arguments is not None and self.describe((args, kwargs)) != call.arguments:
            return False
        return call.runs_again or all(m.number in self.prefix.made for m in _made(call.results))

    def _take(self, result: Made) -> Tensor:
        # An alias: autograd writes into what an operator returns.
        return self.prefix.made.pop(result.number)[0].detach()


def has_compiled() -> bool:
    """Whether ``torch.compile`` was called in this process.

    Compiled code and modes that see operators do not go together, and a closure does not say what
    it calls.
    """
    frames = sys.modules.get("torch._dynamo.eval_frame")
    # None stands for functions that are kept out of graphs.
    return frames is not None and any(b is not None for b in frames.cached_backends.values())


def _map(value: Any, function: Any, kind: type = Tensor) -> Any:
    """A nested structure with a function applied to all of one kind in it."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, function, kind) for v in value)
    if isinstance(value, dict):
        return {key: _map(v, function, kind) for key, v in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, found.append)
    return found


def _made(results: Any) -> list[Made]:
    found: list[Made] = []
    _map(results, found.append, Made)
    return found


def _has_generator(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether random numbers come from a generator of the user's, which is not put back."""
    found: list[Any] = []
    _map((args, kwargs), found.append, torch.Generator)
    return bool(found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _strides(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.stride(), tensor.storage_offset()) if tensor.layout == torch.strided else ()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@functools.cache
def _written(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operator writes to."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def _packs(func: OpOverload) -> bool:
    """Whether an operator packs weights, by gates and lists of which some may differ."""
    return func.name().startswith("l0kernels::") and "pack_weight" in func.name()


@functools.cache
def _runs_again(func: OpOverload) -> bool:
    returns = func._schema.returns
    is_view = any(result.alias_info is not None for result in returns)
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    # PyTorch's norms write to running statistics without saying so.
    is_norm = func.namespace == "aten" and _takes(func, "running_mean")
    again = bool(_written(func)) or is_view or is_random or is_norm
    return again or _packs(func) or not returns


def _takes(func: OpOverload, name: str) -> bool:
    return any(argument.name == name for argument in func._schema.arguments)
