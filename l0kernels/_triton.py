# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share on the host. Importing this module does not import Triton."""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from l0kernels import _ext


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not() -> str:
    """Why no Triton kernel can run here; an empty string where they can.

    It asks the driver, so nothing calls it before a GPU is wanted or `info` is.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    reason = "" if interpreted() else _ext.why_no_device()
    return f"{reason}, and TRITON_INTERPRET=1 is not set" if reason else ""


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def at_most_registers(count: int) -> dict[str, int]:
    """Options of a launch that bound the registers of a thread, for kernels that would spill.

    Without a bound NVIDIA's assembler spills a few registers to fit more blocks on a
    multiprocessor. AMD's compiler takes no such option.
    """
    return {} if torch.version.hip else {"maxnreg": count}
