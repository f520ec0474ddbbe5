# SPDX-License-Identifier: Apache-2.0
"""What every test gets: fixed seeds, deterministic algorithms, NaN in uninitialised memory."""

import os
import random
from collections.abc import Generator, Iterator
from pathlib import Path

# Before torch is imported: spinning threads make timings flip from run to run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without it cuBLAS refuses to run when deterministic algorithms are on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from error_table import note_outcome, write  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_state() -> Iterator[None]:
    """Seeds every generator, and restores the global settings a test may have changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    # With deterministic algorithms on, torch.empty is filled with NaN (integers: the largest), so
    # a kernel that forgets to write an element cannot pass.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; CUDA is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data sets; the test is skipped where L0K_DATA is not set."""
    if not os.environ.get("L0K_DATA"):
        pytest.skip("L0K_DATA is not set: no folder with real data sets")
    return Path(os.environ["L0K_DATA"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    note_outcome(item, report)
    return report


def pytest_sessionfinish() -> None:
    write()
