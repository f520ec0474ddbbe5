# SPDX-License-Identifier: Apache-2.0
"""Which rows of a weight an optimizer has to update."""

from l0kernels.ops.open_rows.op import open_rows

__all__ = ["open_rows"]
