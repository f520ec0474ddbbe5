# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not there, and reads what they need.

The operators themselves are called, with small tensors, so that alignment, options and tiles are
those of a real launch; only the launch is left out. `CASES` has calls that make every choice which
the operators can make.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from kernels import gated_cases, sass
from kernels.cuda_aot import ROOT, Resources
from kernels.table import Row, Skipped

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90a": ("cuda", 90, 32),
    "sm_100a": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
AMD_KEY = {
    "MFMA": r"v_mfma_\w+",
    "FMA64": r"v_fmac?_f64\w*",
    "LOAD": r"global_load_(?:u?byte|[us]?short|dword)\b",
    "LOAD.128": r"global_load_dwordx4",
    "ATOM": r"(?:global|flat|ds)_atomic\w*",
}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90a": "HGMMA", "sm_100a": "UTCMMA", "gfx942": "MFMA"}

Case = tuple[str, Callable[[], Any]]  # what it is, the call


# ---- calls ----


def sample_gates_cases() -> Iterator[Case]:
    from l0kernels.ops.sample_gates import triton as kernels

    key, offsets = torch.tensor([1, 2]), torch.tensor([0, 8])
    yield "noise of examples", _call(kernels.example_noise, key, 3, 8, 1, 1)
    for dtype in (torch.float32, torch.float64):
        gates = torch.zeros(8, dtype=dtype)
        yield (
            f"{_name(dtype)} ARM",
            _call(kernels.arm_gradient, torch.zeros((), dtype=dtype), gates, key),
        )
        grad_z, grad_expected = torch.zeros(9, dtype=dtype), torch.zeros((), dtype=dtype)
        for features in (8, kernels.LIST_BLOCKS[0][0] + 1):
            ports = (offsets, torch.zeros(2, features, dtype=torch.int64), offsets)
            for law in (0, 1, 2):
                arguments = (gates, key, gates, *ports, law, 0.5, -0.1, 1.1)
                yield f"{_name(dtype)} law {law}", _call(kernels.sample_gates, *arguments)
            yield f"{_name(dtype)} alone", _call(kernels.open_lists, grad_z, *ports)
        for law in (0, 1):
            for which, grads in {
                "z, expected": (grad_z, grad_expected),
                "z": (grad_z, None),
                "expected": (None, grad_expected),
            }.items():
                arguments = (gates, key, gates, *grads, law, 0.5, -0.1, 1.1)
                config = f"{_name(dtype)} law {law} from {which}"
                yield config, _call(kernels.sample_gates_backward, *arguments)


def pack_weight_cases() -> Iterator[Case]:
    from l0kernels.ops.pack_weight import op
    from l0kernels.ops.pack_weight import triton as kernels

    pairs = [(weight, packed) for weight, to in op._OUTPUT_DTYPES.items() for packed in to]
    for dtype, packed in pairs:
        for width in (8, kernels.TILES[0][1] + 1):
            for count in (1, kernels.WEIGHTS) if packed == torch.float32 else (1,):
                yield from _pack_cases(kernels, dtype, packed, count, width)
    # The gates of more weights than one launch takes.
    yield from _pack_cases(kernels, torch.float32, torch.float32, kernels.WEIGHTS + 1, 8)


def _pack_cases(
    kernels: Any, dtype: torch.dtype, packed: torch.dtype, count: int, width: int
) -> Iterator[Case]:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.zeros(8, width, dtype=dtype) for _ in range(count)]
    grads = [torch.zeros(8, width, dtype=packed) for _ in range(count)]
    lists = (torch.ones(9, dtype=compute), torch.arange(width), torch.zeros(2, width).long())
    arguments = (weights, *lists, [0, 8, 0, width] * count)
    config = f"{_name(dtype)} to {_name(packed)}, {count} weights"
    yield config, _call(kernels.pack_weights, *arguments, packed)
    for need_z in (False, True):
        call = _call(kernels.pack_weights_backward, grads, *arguments, [True] * count, need_z)
        yield config, call


def masked_weight_cases() -> Iterator[Case]:
    from l0kernels.ops.masked_weight import triton as kernels
    from l0kernels.ops.pack_weight import op

    for dtype, to in op._OUTPUT_DTYPES.items():
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        weight, scores = torch.zeros(8, 8, dtype=dtype), torch.zeros(8, 8, dtype=compute)
        arguments = (weight, scores, torch.ones((), dtype=compute), 2.0, -87.0)
        for masked in to:
            config = f"{_name(dtype)} to {_name(masked)}"
            yield config, _call(kernels.masked_weight, *arguments, masked)
            for needs in ((True, True), (True, False), (False, True)):
                grad = torch.zeros(8, 8, dtype=masked)
                yield config, _call(kernels.masked_weight_backward, grad, *arguments, *needs)


def gate_apply_cases() -> Iterator[Case]:
    """Dtypes; features in rows and planes."""
    from l0kernels.ops.gate_apply import op
    from l0kernels.ops.gate_apply import triton as kernels

    for dtype, gates in op._GATE_DTYPES.items():
        for shape in ((32, 64), (2, 5, 3, 3)):
            x, z = torch.zeros(shape, dtype=dtype), torch.ones(9, dtype=gates)
            arguments = (x, z, torch.zeros(2, shape[1], dtype=torch.int64), 1)
            config = f"{_name(dtype)} {list(shape)}"
            yield config, _call(kernels.gate_apply, *arguments)
            for need_x in (True, False):
                yield config, _call(kernels.gate_apply_backward, x, *arguments, need_x)


def packed_norm_cases() -> Iterator[Case]:
    """Tiles, vectors, dtypes; of bfloat16 activations, modes, and what may be missing."""
    from l0kernels.ops.packed_norm import op

    tiles = [((64, 8), 8), ((64, 5), 8), ((64, 8), 3000), ((64, 5), 3000)]
    tiles += [((64, 5, 16, 1), 8), ((64, 5, 5, 1), 8)]
    for dtype, parameters in op._PARAMETER_DTYPES.items():
        for shape, features in tiles:
            yield from _norm_cases(dtype, parameters[0], shape, features)
        for parameter in parameters[1:]:
            yield from _norm_cases(dtype, parameter, *tiles[0])
    for shape, features in tiles[2::2]:
        for options in ({"training": False}, {"training": False, "activation": 0}):
            yield from _norm_cases(torch.bfloat16, torch.float32, shape, features, **options)
        options = {"activation": 0, "need_parameters": False}
        yield from _norm_cases(torch.bfloat16, None, shape, features, **options)


def _norm_cases(
    dtype: torch.dtype,
    parameter: torch.dtype | None,
    shape: tuple[int, ...],
    features: int,
    training: bool = True,
    activation: int = 1,
    need_parameters: bool = True,
) -> Iterator[Case]:
    from l0kernels.ops.packed_norm import triton as kernels

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, channels = torch.zeros(shape, dtype=dtype), shape[1]
    ones = None if parameter is None else torch.ones(features, dtype=parameter)
    lists = (torch.arange(channels), torch.ones(2, dtype=compute), torch.zeros(2, features).long())
    how = (*lists, training)
    config = f"{_name(dtype)} {list(shape)} of {features}"
    arguments = (x, ones, ones, ones, ones, *how, 0.1, 1e-5, activation)
    yield config, _call(kernels.packed_norm, *arguments)
    mean, rstd = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=compute)
    needs = (True, need_parameters, need_parameters)
    arguments = (x, x, ones, ones, mean, rstd, *how, activation, *needs)
    yield config, _call(kernels.packed_norm_backward, *arguments)


def dep_chain_cases() -> Iterator[Case]:
    """Tiles and dtypes; sizes that are multiples of 16, that are not, and 1."""
    from l0kernels.ops.dep_chain import triton as kernels

    few, many = kernels.FEW, 2 * kernels.FEW
    for dtype in (torch.float32, torch.float64):
        for sizes in ((few, few, many, many, few), (9, 5, many + 1, many + 1, 9), (1, 1, 1)):
            first, *layers = (torch.zeros(size, dtype=dtype) for size in sizes)
            weights = [
                torch.zeros(n, m, dtype=dtype) for n, m in zip(sizes[1:], sizes[:-1], strict=True)
            ]
            config = f"{_name(dtype)} {'-'.join(map(str, sizes))}"
            yield config, _call(kernels.dep_chain, first, weights, layers, False)
            flat = torch.zeros(sum(sizes[1:]), dtype=dtype)
            arguments = (flat, flat, flat, first, weights, False)
            yield config, _call(kernels.dep_chain_backward, *arguments)


CASES = {
    "dep_chain": dep_chain_cases,
    "sample_gates": sample_gates_cases,
    "pack_weight": pack_weight_cases,
    "masked_weight": masked_weight_cases,
    "gate_apply": gate_apply_cases,
    "packed_norm": packed_norm_cases,
    "gated_linear": gated_cases.gated_linear_cases,
    "gated_conv2d": gated_cases.gated_conv2d_cases,
}


def _call(function: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- compilation ----


class AbsentGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(arch: str) -> list[tuple[str, str, Any]]:
    """From now on this process compiles kernels for `arch` and launches none.

    Returns:
        A list to which every call of a kernel adds (name, constants, compiled kernel).
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found = []
    launch = JITFunction.run

    def run(function, *arguments, grid, warmup, **options):
        if TARGETS[arch][0] == "hip":
            options.pop("maxnreg", None)  # PyTorch for AMD GPUs would not have asked for it
        kernel = launch(function, *arguments, grid=grid, warmup=True, **options)
        constants = [f"{key}={value}" for key, value in options.items() if key.isupper()]
        found.append((function.fn.__name__, " ".join(constants), kernel))
        return kernel

    driver.set_active(AbsentGpu(GPUTarget(*TARGETS[arch])))
    JITFunction.run = run
    return found


def rows_of(arch: str, cases: Mapping[str, Callable[[], Iterator[Case]]] = CASES) -> list[Row]:
    """The rows of one architecture; needs a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    kernels = compile_only(arch)
    seen: set[str] = set()
    found = []
    for stem, calls in cases.items():
        for config, call in calls():
            kernels.clear()
            call()
            for name, constants, kernel in kernels:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    source = f"l0kernels/ops/{stem}/triton.py"
                    found.append(_row(arch, source, name, f"{config}, {constants}", kernel))
    return found


def _row(arch: str, source: str, name: str, config: str, kernel: Any) -> Row:
    read = _read_amd if "amdgcn" in kernel.asm else _read_nvidia
    resources, instructions = read(kernel)
    return Row(
        backend="triton",
        source=source,
        kernel=name,
        config=config,
        arch=arch,
        threads=kernel.metadata.num_warps * TARGETS[arch][2],
        registers=resources.registers,
        spilled=resources.spilled,
        shared=kernel.metadata.shared,
        instructions=instructions,
        problems=tuple(_problems(arch, source, kernel, instructions)),
    )


def _problems(arch: str, source: str, kernel: Any, instructions: dict[str, int]) -> Iterator[str]:
    # Machine code has some of the compiler's own, that hand descriptors and memory to the hardware.
    if "tt.atomic" in kernel.asm["ttir"]:
        yield "has atomics: all sums have one order"
    if kernel.metadata.enable_fp_fusion and "sample_gates" in source:
        yield "may fuse products with sums, which changes decisions"
    core = TENSOR_CORES[arch]
    if multiplies_short_matrices(kernel.asm["ttir"]) and core not in instructions:
        yield f"has no {core}: its products miss the tensor cores"


def multiplies_short_matrices(ttir: str) -> bool:
    """Whether a kernel, in Triton's first form, has matrix products of 16-bit numbers."""
    return re.search(r"tt\.dot .*: tensor<[\dx]+x(?:bf16|f16)>", ttir) is not None


def _read_nvidia(kernel: Any) -> tuple[Resources, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = sass.disassemble(cubin, "-res-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None
    (instructions,) = sass.count(text).values()
    # Triton's kernels have no arrays: what is on the stack did not fit into registers.
    return Resources(int(usage[1]), int(usage[2])), instructions


def _read_amd(kernel: Any) -> tuple[Resources, dict[str, int]]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    # Scalar registers spill into lanes of vector registers; a stack may be kept for more and stay
    # unused. What counts is memory that is read or written.
    uses_stack = re.search(r"\bscratch_(?:load|store)", text)
    spilled = field("private_segment_fixed_size") if uses_stack else 0
    counts = {name: len(re.findall(rf"\b{key}", text)) for name, key in AMD_KEY.items()}
    return Resources(field("vgpr_count"), spilled), {k: n for k, n in counts.items() if n}


def rows(root: Path = ROOT, targets: Iterable[str] = TARGETS) -> list[Row]:
    """Every Triton kernel in every configuration on every architecture of `targets`.

    Raises:
        Skipped: Triton is not installed.
        RuntimeError: an operator has Triton kernels that nothing here calls.
    """
    if find_spec("triton") is None:
        raise Skipped("Triton is not installed: skipped")
    stems = {path.parent.name for path in root.glob("l0kernels/ops/*/triton.py")}
    if missing := sorted(stems - CASES.keys()):
        raise RuntimeError(f"no cases for the Triton kernels of {', '.join(missing)}")
    # Triton keeps what it compiled for the process: one that goes on would give it for the next.
    with get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        return [row for found in pool.map(rows_of, targets, chunksize=1) for row in found]
