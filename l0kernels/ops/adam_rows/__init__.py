# SPDX-License-Identifier: Apache-2.0
"""AdamW on the open rows of a weight, and the missed steps of the others."""

from l0kernels.ops.adam_rows.op import adam_rows, adam_rows_catch_up

__all__ = ["adam_rows", "adam_rows_catch_up"]
