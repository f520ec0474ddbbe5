# SPDX-License-Identifier: Apache-2.0
"""Runs that draw the same random numbers, and leave the generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_randomness(devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed Python, numpy and torch alike for every scope, and put their states back.

    Args:
        devices: those that the model is on; generators of other GPUs are not touched.
    """
    gpus = sorted({device for device in devices if device.type == "cuda"}, key=str)
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = [torch.cuda.get_rng_state(device) for device in gpus]
    random.seed(0)
    np.random.seed(0)
    # Not torch.manual_seed: it seeds every GPU.
    torch.default_generator.manual_seed(0)
    for device in gpus:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        for device, state in zip(gpus, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
