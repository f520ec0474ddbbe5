# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `dep_chain`, by the tests of all implementations."""

from ops.test_dep_chain import (  # noqa: F401 - collected here, where `impl` is Triton
    test_arguments_of_any_strides,
    test_autocast_changes_nothing,
    test_biases_may_change_before_backward,
    test_changes_before_backward_are_noticed,
    test_dtypes,
    test_gradcheck,
    test_gradients_of_parts,
    test_inference_mode,
    test_infinite_sums_have_gradient_zero,
    test_layers_are_in_the_order_of_the_model,
    test_nan_is_carried_along_the_chain,
    test_one_draw_serves_several_backward_passes,
    test_only_the_gradients_asked_for,
    test_same_bits_twice,
    test_saturated_gates_keep_the_digits_of_their_gradients,
    test_shapes,
    test_sums_of_every_size,
    test_upstream_gradients_of_any_strides,
)
