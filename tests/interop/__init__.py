# SPDX-License-Identifier: Apache-2.0
"""A converted model among the things that training loops do to models."""
