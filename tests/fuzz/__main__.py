# SPDX-License-Identifier: Apache-2.0
"""``python -m fuzz``: a long search."""

import sys

from fuzz.long import main

if __name__ == "__main__":
    sys.exit(main())
