# SPDX-License-Identifier: Apache-2.0
"""SGD on the open rows of a weight, and the missed steps of the others."""

from l0kernels.ops.sgd_rows.op import sgd_rows, sgd_rows_catch_up

__all__ = ["sgd_rows", "sgd_rows_catch_up"]
