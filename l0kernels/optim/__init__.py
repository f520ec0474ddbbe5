# SPDX-License-Identifier: Apache-2.0
"""Optimizers that update open rows only, equal to PyTorch's."""

from l0kernels.optim.adamw import AdamW
from l0kernels.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
