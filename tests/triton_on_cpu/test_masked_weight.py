# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `masked_weight`, by the tests of all implementations."""

from ops.test_masked_weight import (  # noqa: F401 - collected here, where `impl` is Triton
    test_a_unit_step_knows_no_value_to_skip_below,
    test_closed_weights_do_not_matter,
    test_dtypes,
    test_gates_below_a_value_are_closed,
    test_gradcheck,
    test_gradients_after_cat_and_sum,
    test_inference_mode,
    test_more_than_one_block,
    test_nan_in_scores_shows,
    test_only_the_gradient_asked_for,
    test_open_weights_keep_inf_and_nan,
    test_results_are_written_completely,
    test_same_bits_twice,
    test_scores_of_any_strides,
    test_shapes,
    test_shares_of_open_gates,
    test_unit_step,
    test_upstream_gradients_of_any_strides,
    test_weights_of_any_strides,
    test_what_nobody_needs_is_not_computed,
    test_where_gates_open_and_close,
)
