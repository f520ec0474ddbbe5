# SPDX-License-Identifier: Apache-2.0
"""Calls of the gated layers that make every choice their Triton kernels can make."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

Case = tuple[str, Callable[[], Any]]  # what it is, the call

# Triton compiles anew where an argument is 1 or a multiple of 16: most are of wide layers.
WIDTHS = {"wide": (80, 96), "narrow": (56, 40), "uneven": (20, 50), "8": (8, 8), "1": (1, 1)}
WINDOWS = {
    "3x3": ((3, 3), [1, 1], [1, 1], [1, 1]),
    "3x3 stride 2": ((3, 3), [2, 2], [1, 1], [1, 1]),
    "3x3 stride 2 dilation 2": ((3, 3), [2, 2], [1, 1], [2, 2]),
    "1x1 stride 2": ((1, 1), [2, 2], [0, 0], [1, 1]),
}
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]


def gated_linear_cases() -> Iterator[Case]:
    """Forms, widths, dtypes, activations; layers whose features are all there."""
    from l0kernels.ops.gated_linear import triton as kernels

    def call(x_dtype, dtype, rows, width, packs, activation, bias, tma):
        inputs, outputs = WIDTHS[width]
        x, weight = torch.zeros(rows, inputs, dtype=x_dtype), torch.zeros(outputs, inputs)
        weight, bias = weight.to(dtype), torch.zeros(outputs, dtype=dtype) if bias else None
        options = (*_lists(inputs, outputs, packs), activation)
        with _descriptors(tma):
            y = kernels.gated_linear(x, weight, bias, *options)
            needs = (True, True, bias is not None, True)
            kernels.gated_linear_backward(y, x, weight, y, *options, *needs)

    few, many = kernels.IN_PLACE_ROWS, 4 * kernels.IN_PLACE_ROWS

    def case(pair, name, rows, width, packs=True, activation="relu", tma=False):
        arguments = (*pair, rows, width, packs, activation, True, tma)
        return f"{_names(pair)} {name}", _bind(call, *arguments)

    for pair in DTYPES:
        yield case(pair, "wide", many, "wide")
        yield case(pair, "in place", few, "wide")
        if pair[0] != torch.float32:
            yield case(pair, "wide descriptors", many, "wide", tma=True)
    for pair in (DTYPES[0], DTYPES[4]):
        yield case(pair, "uneven", many, "uneven")
    pair = DTYPES[0]
    yield case(pair, "narrow", many, "narrow")
    yield case(pair, "narrow descriptors", many, "narrow", tma=True)
    for rows in (few, many):
        yield case(pair, "all features", rows, "wide", False, "none")
    # Strides of one vector, sizes of 1.
    yield case(pair, "8 features", many, "8")
    for rows in (1, many):
        yield case(pair, "one feature", rows, "1", False)


def gated_conv2d_cases() -> Iterator[Case]:
    """Forms, windows, widths, dtypes."""
    from l0kernels.ops.gated_conv2d import triton as kernels

    def call(x_dtype, dtype, images, width, window, tma):
        inputs, outputs = WIDTHS[width]
        kernel, *options = WINDOWS[window]
        layout = torch.channels_last
        x = torch.zeros(images, inputs, 8, 8, dtype=x_dtype).to(memory_format=layout)
        weight = torch.zeros(outputs, inputs, *kernel, dtype=dtype).to(memory_format=layout)
        options = (*_lists(inputs, outputs, True), *options, "none")
        with _descriptors(tma):
            y = kernels.gated_conv2d(x, weight, None, *options)
            needs = (True, True, False, True)
            kernels.gated_conv2d_backward(y, x, weight, None, *options, *needs)

    def case(pair, name, images, width, window, tma=False):
        return f"{_names(pair)} {name}", _bind(call, *pair, images, width, window, tma)

    for pair in (DTYPES[0], DTYPES[3], DTYPES[4]):
        yield case(pair, "3x3", 64, "wide", "3x3")
        yield case(pair, "in place 3x3", 1, "wide", "3x3")
        if pair[0] != torch.float32:
            yield case(pair, "3x3 descriptors", 64, "wide", "3x3", True)
    pair = DTYPES[0]
    for window in list(WINDOWS)[1:]:
        yield case(pair, window, 64, "wide", window)
    yield case(pair, "narrow 3x3", 64, "narrow", "3x3")
    yield case(pair, "narrow 3x3 descriptors", 64, "narrow", "3x3", True)
    for pair in (DTYPES[0], DTYPES[4]):
        yield case(pair, "uneven 3x3", 64, "uneven", "3x3")
    yield case(DTYPES[4], "3x3 stride 2", 64, "wide", "3x3 stride 2")


def _descriptors(wanted: bool):
    """Lets the kernels that read by descriptor run, where the GPU has them."""
    from triton.runtime import driver

    from l0kernels.ops.gated_linear import triton as kernels

    target = driver.active.get_current_target()
    there = target.backend == "cuda" and target.arch >= 90
    return patch.object(kernels, "has_tma", lambda device: wanted and there)


def _lists(inputs: int, outputs: int, packs: bool) -> tuple:
    features = inputs + outputs
    index = torch.cat([torch.arange(inputs), torch.arange(outputs)])
    maps = torch.stack([torch.arange(features), torch.full((features,), features)])
    counts, z = torch.tensor([inputs, outputs]), torch.ones(features + 1)
    spans = ([0, 0], [inputs, 1]) if packs else ([], [])
    return z, index, counts, maps, *spans


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _bind(function: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)
