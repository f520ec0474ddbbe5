# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the training step of whole networks, and the ops one by one."""
