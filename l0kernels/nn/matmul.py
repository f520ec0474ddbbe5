# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a CPU by the faster of PyTorch's two libraries.

PyTorch multiplies float32 matrices with the library it was built for, on x86 Intel's MKL, which is
slow on other makers' processors: oneDNN, which PyTorch has for convolutions, needs half the time
on some. Which one is faster depends on the processor, on the product (a forward pass, the
gradient of its input, that of its weight) and on whether rows are few, and is found out by timing
one product of each kind, once for a processor: a file in the user's cache keeps the answer.

oneDNN prepares every shape that it has not met, for some hundred microseconds, and widths change
with every draw: only large products are worth it.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels import _registry
from l0kernels._files import write_whole
from l0kernels.info import cpu_name

PRODUCTS = ("forward", "dgrad", "wgrad")
LEAST = 1 << 27  # multiplications of a product for which choosing pays
FEW_ROWS = 32
CLEARLY = 0.95  # of PyTorch's time: below it oneDNN is taken
ROUNDS = 7
# Rows, input and output features of the products that are timed.
SHAPES = {True: (8, 1024, 1024), False: (256, 512, 512)}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b as ``torch.nn.functional.linear``, by the faster library.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.
    """
    if not torch.compiler.is_compiling() and _is_worth_choosing(x, weight):
        rows = x.numel() // x.shape[-1]
        chosen = faster_in_onednn(rows <= FEW_ROWS, torch.get_num_threads())
        if any(chosen.values()):
            return Linear.apply(x, weight, bias, chosen)
    return F.linear(x, weight, bias)


def _is_worth_choosing(x: Tensor, weight: Tensor) -> bool:
    return (
        x.numel() * weight.shape[0] >= LEAST
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and has_onednn()
    )


@functools.cache
def has_onednn() -> bool:
    """Whether this PyTorch can multiply dense float32 matrices with oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(torch.autograd.Function):
    """The linear layer, each of its three products by its own library.

    Args:
        chosen: whether oneDNN computes a product of `PRODUCTS`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, chosen):
        ctx.save_for_backward(x, weight)
        ctx.chosen = chosen
        y = _product(chosen["forward"], _as_rows(x), weight, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        rows = _as_rows(grad)
        grad_x = grad_weight = None
        if need_x:
            grad_x = _product(ctx.chosen["dgrad"], rows, weight.t()).view(x.shape)
        if need_weight:
            # Laid out as the weight, which may be stored [I, O]: as it goes on to be unpacked.
            a, b = rows.t(), _as_rows(x).t()
            in_onednn = ctx.chosen["wgrad"]
            turned = not weight.is_contiguous()
            grad_weight = _product(in_onednn, b, a).t() if turned else _product(in_onednn, a, b)
        return grad_x, grad_weight, rows.sum(0) if need_bias else None, None


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(in_onednn: bool, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias, of shape [rows of a, rows of b]."""
    if in_onednn:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


@functools.cache
def faster_in_onednn(few_rows: bool, threads: int) -> dict[str, bool]:
    """Which products oneDNN computes faster here, from the cache or by timing them now.

    Args:
        few_rows: whether the products have up to `FEW_ROWS` rows.
        threads: that PyTorch uses now.
    """
    key = f"{cpu_name()}, {threads} threads, torch {torch.__version__}"
    rows = "few rows" if few_rows else "many rows"
    known = _read(cache_file())
    found = known.get(key, {}).get(rows, {})
    if set(found) != set(PRODUCTS) or not all(isinstance(v, bool) for v in found.values()):
        found = _compare(*SHAPES[few_rows])
        known[key] = {**known.get(key, {}), rows: found}
        _keep(cache_file(), known)
    return found


def cache_file() -> Path:
    """The file that keeps the answers: ``l0kernels/linear.json`` in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "l0kernels" / "linear.json"


def _read(path: Path) -> dict[str, dict[str, dict[str, bool]]]:
    """What a cache file says; nothing if it cannot be read."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    usable = isinstance(known, dict) and all(isinstance(v, dict) for v in known.values())
    return known if usable else {}


def _keep(path: Path, known: dict[str, dict[str, dict[str, bool]]]) -> None:
    text = json.dumps(known, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(text.encode()))
    except OSError:
        return  # a home that cannot be written to: timed again in the next process


@torch.no_grad()
def _compare(rows: int, inputs: int, outputs: int) -> dict[str, bool]:
    """Time the three products in both libraries, in turn; the shortest times count."""
    x, weight, grad = (
        torch.full(shape, 0.5) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    operands = ((x, weight), (grad, weight.t()), (grad.t(), x.t()))
    return {
        name: _is_faster(functools.partial(_product, a=a, b=b))
        for name, (a, b) in zip(PRODUCTS, operands, strict=True)
    }


def _is_faster(product: Callable[[bool], Tensor]) -> bool:
    best = {True: float("inf"), False: float("inf")}
    for _ in range(ROUNDS):
        for in_onednn in best:
            start = time.perf_counter()
            product(in_onednn)
            best[in_onednn] = min(best[in_onednn], time.perf_counter() - start)
    return best[True] < CLEARLY * best[False]
