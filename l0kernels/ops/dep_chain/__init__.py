# SPDX-License-Identifier: Apache-2.0
"""Make the logits of all layers from those of the layer before each, in one call."""

from l0kernels.ops.dep_chain.op import dep_chain

__all__ = ["dep_chain"]
