# SPDX-License-Identifier: Apache-2.0
"""Tests of this folder once more, with all weights of a model packed by one call as on a GPU."""

import pytest

import l0kernels as l0
from interop.test_accumulation import (  # noqa: F401 - collected here
    test_parts_equal_the_whole,
    test_several_optimizer_steps,
)
from interop.test_amp import (  # noqa: F401
    test_autocast_errs_as_little_as_the_masked_reference,
    test_half_precision_weights,
    test_outputs_have_the_dtype_and_nearly_the_values_of_the_reference,
)
from interop.test_checkpointing import (  # noqa: F401
    test_a_block_under_autocast_is_recomputed_in_the_same_dtype,
    test_a_replaced_draw_is_an_error,
    test_constant_gates_can_be_checkpointed,
    test_freezing_before_the_recomputation_is_an_error,
    test_gradients_are_the_same,
    test_nothing_is_silently_wrong,
    test_reentrant_around_the_root_asks_for_a_scope,
)
from interop.test_ema import (  # noqa: F401
    test_copies_leave_the_draw_behind_and_draw_the_same,
    test_whole_models_can_be_pickled,
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0.gates.Gates, "_together", True)
