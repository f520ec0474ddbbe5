# SPDX-License-Identifier: Apache-2.0
"""Tests of Triton kernels in Triton's interpreter.

A process interprets all its kernels or none: Triton decides when it decorates them. So these tests
need TRITON_INTERPRET=1 from the start. Without it, test_in_interpreter.py runs them in processes
of their own, and nothing else is collected here. To debug one:
`TRITON_INTERPRET=1 python -m pytest tests/triton_on_cpu -k name`.

The folder is not named triton because it would be taken for the package where that is missing.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
STARTER = "test_in_interpreter.py"
MOST_GATES = 5000
REUSED = [
    f"ops.test_{name}"
    for name in (
        "dep_chain",
        "gate_apply",
        "masked_weight",
        "pack_weight",
        "packed_norm",
        "sample_gates",
    )
]

collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py")]
if INTERPRETS:
    from triton_on_cpu import interpreter

    interpreter.install()
    pytest.register_assert_rewrite(*REUSED)
    collect_ignore = [STARTER]
else:
    collect_ignore.remove(STARTER)


@pytest.fixture(scope="session")
def need_cpp() -> None:
    from l0kernels import _ext

    if not _ext.cpp_available():
        pytest.skip(f"the C++ ops are not there: {_ext.why_not()}")


@pytest.fixture
def impl() -> Iterator[str]:
    """Runs the operators by their Triton kernels."""
    import l0kernels as l0

    with l0.use_impl("triton"):
        yield "triton"


@pytest.fixture
def op_impl(impl: str) -> str:
    return impl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out sizes that take the interpreter minutes and reach no other code."""
    items[:] = [
        item
        for item in items
        if not (isinstance(item, pytest.Function) and _size(item) > MOST_GATES)
    ]


def _size(item: pytest.Function) -> int:
    size = item.callspec.params.get("gates", 0) if hasattr(item, "callspec") else 0
    return size if isinstance(size, int) else 0
