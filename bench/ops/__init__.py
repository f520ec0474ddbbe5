# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the operators one by one: `python -m l0kernels.bench.ops.<operator>`."""
