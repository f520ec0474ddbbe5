# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA sources on a CPU: one fiber per CUDA thread."""
