# SPDX-License-Identifier: Apache-2.0
"""What records training steps on a device, and tells the host later how they went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class News(Protocol):
    """A flag on its way to the host."""

    def is_here(self) -> bool:
        """Whether it has arrived; does not wait."""
        ...

    def is_raised(self) -> bool:
        """The flag, which is waited for."""
        ...


class Recorder(Protocol):
    """Runs a function of no arguments once, or over and over without its Python."""

    def warm(self, run: Callable[[], None]) -> None:
        """Run it as it will be recorded, so that all that is made once is there."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record without running it; what is returned runs it again, with the same tensors.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...

    def send(self, flag: Tensor) -> News:
        """Send what the flag is after all that has been run, without waiting."""
        ...


class CudaRecorder:
    """CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm(self, run: Callable[[], None]) -> None:
        present = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            run()
        present.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer scope ends, unlike the inner one, also where capturing fails. What other
            # threads do, as those that pin batches, does not matter.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                run()
        except RuntimeError as error:
            raise RuntimeError(
                "graph: expected a step that a CUDA graph can record (nothing read from the GPU "
                f"by item(), print or if, no shapes that depend on values), got: {error}"
            ) from error
        return graph.replay

    def send(self, flag: Tensor) -> News:
        return _OnItsWay(flag)


class _OnItsWay:
    def __init__(self, flag: Tensor) -> None:
        self._flag = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
        self._flag.copy_(flag, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(flag.device))

    def is_here(self) -> bool:
        return self._copied.query()

    def is_raised(self) -> bool:
        self._copied.synchronize()
        return bool(self._flag)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records steps on a device; None where there is nothing to record, as on a CPU."""
    return CudaRecorder(device) if device.type == "cuda" else None
