# SPDX-License-Identifier: Apache-2.0
"""Random networks: what ``convert`` accepts equals the masked oracle, whatever it refuses."""

CASES = {"2d": 500, "1d": 250, "tokens": 250}
