# SPDX-License-Identifier: Apache-2.0
"""The state that tests/conftest.py promises every test."""

import random

import numpy as np
import pytest
import torch


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(8).isnan().all()
    assert torch.empty(8, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(8, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("order", ["first", "second"])
def test_generators_start_alike(order):
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("order", ["changed", "restored"])
def test_global_settings_do_not_leak(order):
    assert torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float64)


def test_device_exists(device):
    assert torch.ones(2, device=device).sum().item() == 2
