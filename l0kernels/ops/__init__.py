# SPDX-License-Identifier: Apache-2.0
"""One folder per operator: schema and public function in `op.py`, the oracle in `reference.py`."""
