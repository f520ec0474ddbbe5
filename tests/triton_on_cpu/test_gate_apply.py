# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `gate_apply`, by the tests of all implementations."""

from ops.test_gate_apply import (  # noqa: F401 - collected here, where `impl` is Triton
    test_activations_are_kept_for_gradients_of_gates_alone,
    test_activations_of_any_strides,
    test_closed_features_do_not_matter,
    test_dim_counts_from_either_end,
    test_dtypes,
    test_features_first,
    test_gates_and_maps_of_any_strides,
    test_gradcheck,
    test_gradients_after_cat_and_sum,
    test_gradients_per_example_of_any_strides,
    test_inference_mode,
    test_maps,
    test_more_than_one_block,
    test_nan_in_gates_shows,
    test_nothing_to_scale,
    test_numbers_of_gates,
    test_only_the_gradient_asked_for,
    test_open_features_keep_inf_and_nan,
    test_results_are_written_completely,
    test_same_bits_twice,
    test_shapes,
    test_shares_of_open_gates,
    test_upstream_gradients_of_any_strides,
    test_what_nobody_needs_is_not_computed,
)
