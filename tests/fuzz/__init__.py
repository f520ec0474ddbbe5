# SPDX-License-Identifier: Apache-2.0
"""Random networks: packed against an oracle that knows nothing of the package's layers."""
