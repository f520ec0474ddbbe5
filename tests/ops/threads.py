# SPDX-License-Identifier: Apache-2.0
"""Results of C++ operators do not depend on the number of threads."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import l0kernels as l0


def assert_threads_do_not_matter(
    run: Callable[[], Sequence[Tensor]], counts: Iterable[int]
) -> None:
    """Runs with each number of threads; conftest puts torch's own number back.

    Args:
        run: gives what is compared, bit by bit.
        counts: numbers of threads.
    """
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        with l0.use_impl("cpp"):
            results.append(run())
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
