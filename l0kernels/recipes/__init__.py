# SPDX-License-Identifier: Apache-2.0
"""Published settings, data readers and the training loop behind ``l0kernels train``."""
