# SPDX-License-Identifier: Apache-2.0
"""Runs that draw the same random numbers, and leave the generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Generators:
    """The states of Python's, numpy's and torch's random generators, to be put back.

    Args:
        devices: those that the model is on; generators of other GPUs are not touched.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.gpus = sorted({device for device in devices if device.type == "cuda"}, key=str)
        self._python, self._array = random.getstate(), np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self.gpus]

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        np.random.set_state(self._array)
        torch.set_rng_state(self._cpu)
        for device, state in zip(self.gpus, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def same_randomness(devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed Python, numpy and torch alike for every scope, and put their states back.

    Args:
        devices: those that the model is on; generators of other GPUs are not touched.
    """
    before = Generators(devices)
    random.seed(0)
    np.random.seed(0)
    # Not torch.manual_seed: it seeds every GPU.
    torch.default_generator.manual_seed(0)
    for device in before.gpus:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    try:
        yield
    finally:
        before.restore()
