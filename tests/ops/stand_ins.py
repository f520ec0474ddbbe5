# SPDX-License-Identifier: Apache-2.0
"""Operators in Python alone, for the checks of the real ones where compiled kernels own those."""

import functools
from typing import Any

import torch
from harness import ops

_LIBRARIES: list[torch.library.Library] = []  # what they register goes with them


@functools.cache
def stand_ins(stem: str) -> Any:
    """A namespace of ``torch.ops`` with the raw operators of a stem in Python, on the CPU."""
    namespace = f"l0kernels_python_{stem}"
    library = torch.library.Library(namespace, "DEF")
    _LIBRARIES.append(library)
    for _, handle, fake, python in ops.raw_ops(stem):
        name = ops.raw_name(handle)
        library.define(str(handle._schema).removeprefix("l0kernels::"))
        library.impl(name, torch.no_grad()(python), "CPU")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return getattr(torch.ops, namespace)
