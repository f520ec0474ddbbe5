# SPDX-License-Identifier: Apache-2.0
"""Train networks with L0 gates at the cost of the open gates."""

from l0kernels import functional, gates, nn, optim, select
from l0kernels._config import use_impl
from l0kernels._version import __version__
from l0kernels.budget import Budget
from l0kernels.compact import compact, export_onnx, load_compact, save_compact
from l0kernels.convert import convert, revert
from l0kernels.gates.ref import cat
from l0kernels.graph import graph
from l0kernels.info import info
from l0kernels.report import report
from l0kernels.training import expected_loss, frozen, hold, param_groups, penalty

__all__ = [
    "Budget",
    "__version__",
    "cat",
    "compact",
    "convert",
    "expected_loss",
    "export_onnx",
    "frozen",
    "functional",
    "gates",
    "graph",
    "hold",
    "info",
    "load_compact",
    "nn",
    "optim",
    "param_groups",
    "penalty",
    "report",
    "revert",
    "save_compact",
    "select",
    "use_impl",
]
