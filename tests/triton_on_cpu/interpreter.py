# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter do what a GPU does, or refuse.

With TRITON_INTERPRET=1, read when a kernel is decorated, Triton runs kernels on CPU tensors with
NumPy. `install` repairs what that gets wrong and checks what it does not see (Triton 3.6 and 3.7):

- bfloat16: Triton computes with its bits as if they were integers. Here the numbers are held as
  float32 and rounded to the nearest, ties to even, after every operation.
- fma: rounds twice there, once here.
- Arguments that are Python floats: float64 there; here float32 unless the kernel says
  `tl.float64`, as when it is compiled.
- Lanes that a mask excludes from a load without `other`: 0 there, NaN or the largest integer here.
- Addresses outside of tensors, elements of another width, two stores to one address, and loads of
  what the same launch stores: an error here. All of them are silent there, where programs run
  one after the other.
- Not possible here: atomics on floating point (sums would depend on the order of programs),
  float32 products in TF32 (computed in float32 there), bfloat16 as float8.
"""

import ctypes
import ctypes.util
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as upstream
from triton.runtime.jit import _normalize_ty

Builder = upstream.InterpreterBuilder
Handle = upstream.TensorHandle


class OutOfBounds(Exception):
    """A kernel reads or writes where no tensor is."""


class Race(Exception):
    """The result depends on which program, or which thread, comes first."""


# ---- bfloat16 ----


def round_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, ties to even; stays float32."""
    numbers = np.asarray(numbers, np.float32)
    bits = numbers.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(numbers), np.float32(np.nan), rounded.view(np.float32))


def _to_bits(numbers: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(value: Any) -> bool:
    return value.dtype.scalar == tl.bfloat16


def _raw(ptrs: Handle) -> Handle:
    """The same addresses, of 16-bit integers."""
    return Handle(ptrs.data, tl.pointer_type(tl.uint16))


def _install_bf16() -> None:
    """The invariant: a handle of bfloat16 holds float32 numbers that bfloat16 can represent."""
    numpy_dtype, fits = upstream._get_np_dtype, upstream._validate_np_data_size
    cast, bitcast, convert = Builder.cast_impl, Builder.create_bitcast, Builder.create_fp_to_fp
    magnitude, check = Builder.create_fabs, Handle.__post_init__

    scalar_dtype = functools.cache(numpy_dtype)  # it builds its table at every call

    def new_numpy_dtype(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return np.dtype(np.uint64)
        return np.dtype(np.float32) if scalar == tl.bfloat16 else scalar_dtype(scalar)

    def new_check(handle):
        if not _is_bf16(handle) or handle.data.dtype == np.bool_:  # comparisons give booleans
            check(handle)
        elif handle.data.dtype == np.float32:
            handle.data = round_to_bf16(handle.data)
        else:
            raise TypeError(f"bfloat16: expected float32 numbers; got {handle.data.dtype}")

    def new_cast(builder, value, dtype):
        if _is_bf16(value) or dtype.scalar == tl.bfloat16:
            return Handle(value.data.astype(new_numpy_dtype(dtype)), dtype.scalar)
        return cast(builder, value, dtype)

    def new_bitcast(builder, value, dtype):
        if _is_bf16(value):
            value = Handle(_to_bits(value.data), tl.uint16)
        if dtype.scalar == tl.bfloat16:
            return Handle(_from_bits(value.data.view(np.uint16)), tl.bfloat16)
        return bitcast(builder, value, dtype)

    def new_convert(builder, value, dtype, rounding):
        if not _is_bf16(value) and dtype.scalar != tl.bfloat16:
            return convert(builder, value, dtype, rounding)
        if value.dtype.scalar != tl.float32 or rounding != ir.ROUNDING_MODE.RTNE:
            raise NotImplementedError(f"{value.dtype} to {dtype}, rounded by {rounding}")
        return Handle(value.data, tl.bfloat16)

    def new_magnitude(builder, value):
        return (
            Handle(np.abs(value.data), tl.bfloat16)
            if _is_bf16(value)
            else magnitude(builder, value)
        )

    upstream._get_np_dtype = new_numpy_dtype
    upstream._validate_np_data_size = lambda data, dtype: (
        dtype.scalar == tl.bfloat16 or fits(data, dtype)
    )
    Handle.__post_init__ = new_check
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", new_cast)
    Builder.get_bf16 = lambda builder, value: Handle(np.array([value], np.float32), tl.bfloat16)
    Builder.cast_impl = new_cast
    Builder.create_bitcast = new_bitcast
    Builder.create_fp_to_fp = new_convert
    Builder.create_fabs = new_magnitude


# ---- arithmetic ----


def _c_function(name: str, number: Any) -> Callable:
    """A function of three numbers from C's mathematics library, for arrays."""
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.argtypes, function.restype = [number] * 3, number
    return np.frompyfunc(function, 3, 1)


def _install_arithmetic() -> None:
    fused = {
        tl.float64: _c_function("fma", ctypes.c_double),
        tl.float32: _c_function("fmaf", ctypes.c_float),
    }
    dot = Builder.create_dot

    def new_fma(builder, x, y, z):
        dtype = z.dtype.scalar
        if dtype not in fused:
            raise NotImplementedError(f"fma: expected float32 or float64; got {dtype}")
        result = fused[dtype](x.data, y.data, z.data)
        return Handle(np.asarray(result, upstream._get_np_dtype(dtype)), dtype)

    def new_dot(builder, a, b, total, precision, *rest):
        if a.dtype.scalar == tl.float32 and precision != ir.INPUT_PRECISION.IEEE:
            raise NotImplementedError('dot of float32: expected input_precision="ieee"')
        return dot(builder, a, b, total, precision, *rest)

    Builder.create_fma = new_fma
    Builder.create_dot = new_dot


# ---- memory ----

_SEVERAL = -1


class _Storage:
    """Which program read and stored each byte of a storage: 0 none, n number n - 1, or several."""

    def __init__(self, storage: Any) -> None:
        self.start = storage.data_ptr()
        self.readers = np.zeros(storage.nbytes(), np.int32)
        self.writers = np.zeros(storage.nbytes(), np.int32)


class _Region:
    """The addresses of a tensor from its first element to its last."""

    def __init__(self, tensor: torch.Tensor, storage: _Storage) -> None:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        self.storage = storage
        self.width = tensor.element_size()
        self.begin = tensor.data_ptr()
        self.end = self.begin + (last + 1) * self.width
        self.name = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    def distance(self, address: int) -> int:
        return min(abs(address - self.begin), abs(address - self.end))


class Memory:
    """The tensors of the running launch, and what its programs have done to them."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.running = False
        # Tensors whose addresses the caller of a kernel has taken, to put them in a table.
        self.exposed: dict[int, weakref.ref] = {}

    @contextmanager
    def launch(self) -> Iterator[None]:
        self.running = True
        try:
            yield
        finally:
            self.running = False
            self.regions = []

    def expose(self, tensor: torch.Tensor) -> None:
        if not self.running:
            self.exposed[id(tensor)] = weakref.ref(tensor)

    def begin(self, tensors: Iterable[torch.Tensor]) -> None:
        alive = {key: tensor for key, ref in self.exposed.items() if (tensor := ref()) is not None}
        self.exposed = {key: self.exposed[key] for key in alive}
        storages: dict[int, _Storage] = {}
        for tensor in [*tensors, *alive.values()]:
            if tensor.numel() > 0:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in storages:
                    storages[storage.data_ptr()] = _Storage(storage)
                shared = storages[storage.data_ptr()]
                self.regions.append(_Region(tensor, shared))

    def touch(self, what: str, program: int, ptrs: Handle, mask: Handle, width: int) -> None:
        """Checks one load, store or atomic of a program and takes note of it."""
        where = np.broadcast_to(np.asarray(mask.data).astype(bool), ptrs.data.shape)
        addresses = ptrs.data[where].astype(np.int64)
        if addresses.size == 0:
            return
        for region in self.regions:
            inside = (addresses >= region.begin) & (addresses + width <= region.end)
            if inside.any():
                if width != region.width:
                    expected = f"expected {region.width}"
                    raise OutOfBounds(
                        f"{what} of {width} bytes at once in {region.name}; {expected}"
                    )
                _note(what, program, region, addresses[inside] - region.storage.start)
                addresses = addresses[~inside]
        if addresses.size:
            self.complain(what, program, addresses)

    def complain(self, what: str, program: int, addresses: np.ndarray) -> None:
        address = int(addresses[0])
        text = f"{what} of program {program} is out of bounds at {addresses.size} addresses"
        if self.regions:
            near = min(self.regions, key=lambda region: region.distance(address))
            text += f", the first {address - near.begin} bytes from the start of {near.name}"
        raise OutOfBounds(text)


def _note(what: str, program: int, region: _Region, places: np.ndarray) -> None:
    readers, writers = region.storage.readers, region.storage.writers
    me = program + 1
    if what == "atomic":
        others = writers[places]
        if np.any((others != 0) & (others != _SEVERAL)) or readers[places].any():
            raise Race(f"atomic and other accesses to the same numbers of {region.name}")
        writers[places] = _SEVERAL
        return
    stored = writers[places][writers[places] != 0]
    if stored.size:
        raise Race(
            f"{what} of program {program} in {region.name}: program {stored[0] - 1} of the same "
            "launch has stored there"
        )
    seen = readers[places]
    if what == "load":
        readers[places] = np.where((seen == 0) | (seen == me), me, _SEVERAL)
        return
    if np.unique(places).size != places.size:
        raise Race(f"two lanes of program {program} store to one number of {region.name}")
    if np.any((seen != 0) & (seen != me)):
        raise Race(
            f"store of program {program} in {region.name}: another program of the same launch "
            "reads there"
        )
    writers[places] = me


def _tensors_in(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        argument = getattr(argument, "base", argument)  # of a descriptor
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors_in(argument)


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    return (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z


def _width(ptrs: Handle) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _anything(ptrs: Handle) -> Handle:
    """What lanes have that a load leaves out: NaN or the largest integer."""
    element = ptrs.get_element_ty()
    dtype = upstream._get_np_dtype(element)
    values = {"f": np.nan, "b": True}
    value = values[dtype.kind] if dtype.kind in values else np.iinfo(dtype).max
    return Handle(np.full_like(ptrs.data, value, dtype=dtype), element)


def _install_memory(memory: Memory) -> None:
    load, store = Builder.create_masked_load, Builder.create_masked_store
    rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas
    call, data_ptr = upstream.GridExecutor.__call__, torch.Tensor.data_ptr

    def new_load(builder, ptrs, mask, other, *rest, **options):
        memory.touch("load", _program(builder), ptrs, mask, _width(ptrs))
        other = _anything(ptrs) if other is None else other
        if ptrs.get_element_ty() != tl.bfloat16:
            return load(builder, ptrs, mask, other, *rest, **options)
        other = Handle(_to_bits(other.data), tl.uint16)
        bits = load(builder, _raw(ptrs), mask, other, *rest, **options)
        return Handle(_from_bits(bits.data), tl.bfloat16)

    def new_store(builder, ptrs, value, mask, *rest):
        memory.touch("store", _program(builder), ptrs, mask, _width(ptrs))
        if ptrs.get_element_ty() == tl.bfloat16:
            ptrs, value = _raw(ptrs), Handle(_to_bits(value.data), tl.uint16)
        if value.data.itemsize != _width(ptrs):
            raise TypeError(f"store of {value.data.dtype} to {ptrs.dtype}")
        return store(builder, ptrs, value, mask, *rest)

    def new_rmw(builder, op, ptr, value, mask, *rest):
        if value.dtype.scalar.is_floating():
            raise Race("an atomic on floating point: the result depends on the order of programs")
        memory.touch("atomic", _program(builder), ptr, mask, _width(ptr))
        return rmw(builder, op, ptr, value, mask, *rest)

    def new_cas(builder, ptr, *rest):
        everywhere = Handle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        memory.touch("atomic", _program(builder), ptr, everywhere, _width(ptr))
        return cas(builder, ptr, *rest)

    def new_call(executor, *args, **kwargs):
        with memory.launch(), np.errstate(all="ignore"):  # no GPU warns of infinities
            return call(executor, *args, **kwargs)

    def new_data_ptr(tensor):
        memory.expose(tensor)
        return data_ptr(tensor)

    Builder.create_masked_load, Builder.create_masked_store = new_load, new_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = new_rmw, new_cas
    upstream.GridExecutor.__call__ = new_call
    torch.Tensor.data_ptr = new_data_ptr


# ---- launches ----


def _typed(value: Any, annotation: Any) -> Any:
    """A number of the type that it has for a compiled kernel."""
    types = {"fp64": tl.float64, "i64": tl.int64}
    dtype = types.get(_normalize_ty(annotation)) if annotation is not None else None
    if dtype is None and isinstance(value, float):
        dtype = tl.float32
    if dtype is None or not isinstance(value, (int, float)):
        return value
    return tl.tensor(Handle(np.array([value], upstream._get_np_dtype(dtype)), dtype), dtype)


def _install_launches(memory: Memory) -> None:
    to_host = upstream.GridExecutor._init_args_hst
    patch_language, patch_tensor = upstream._patch_lang, upstream._patch_lang_tensor
    patched = set()

    def new_to_host(executor, args, kwargs):
        args, kwargs = to_host(executor, args, kwargs)
        memory.begin(_tensors_in([*args, *kwargs.values()]))

        def typed(name, value):
            annotation = executor.fn.__annotations__.get(name)
            return value if name in executor.constexprs else _typed(value, annotation)

        named = zip(executor.arg_names, args, strict=False)
        return (
            [typed(name, value) for name, value in named],
            {name: typed(name, value) for name, value in kwargs.items()},
        )

    def new_patch_language(function):
        # Triton does this at every call of a function, which takes most of a small kernel's time.
        if function not in patched:
            patch_language(function)
            patched.add(function)
        return upstream._LangPatchScope()

    def new_patch_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        # Triton 3.6 asks NumPy to turn a vector into an integer, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    upstream.GridExecutor._init_args_hst = new_to_host
    upstream._patch_lang, upstream._patch_lang_tensor = new_patch_language, new_patch_tensor


def install() -> None:
    """Repairs the interpreter of this process, which must do nothing else with Triton."""
    memory = Memory()
    _install_bf16()
    _install_arithmetic()
    _install_memory(memory)
    _install_launches(memory)
