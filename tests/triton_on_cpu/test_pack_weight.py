# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `pack_weight` and `pack_weights`, by the tests of all implementations."""

import pytest
import torch
from ops.test_pack_weight import (  # noqa: F401 - collected here, where `impl` is Triton
    check_list,
    make_list,
    test_all_rows_in_another_order,
    test_closed_rows_are_zero_whatever_the_gates_of_columns,
    test_closed_weights_do_not_matter,
    test_closed_weights_of_lists_do_not_matter,
    test_dtypes,
    test_empty_widths_and_weights,
    test_every_combination_of_arguments,
    test_expanded_gates_add_up,
    test_gate_gradients_of_many_small_numbers,
    test_gates_of_weights_without_columns_get_zeros,
    test_gates_shared_by_layers_add_up,
    test_gradients_after_cat_and_sum,
    test_index_order_is_the_order_of_the_result,
    test_inference_mode,
    test_kernels_take_gates_out_of_bounds_for_closed,
    test_kernels_take_indices_out_of_bounds_for_closed,
    test_list_upstream_gradients_of_any_strides,
    test_lists_have_the_same_bits_twice,
    test_lists_of_all_dtypes,
    test_lists_of_strided_arguments,
    test_lists_of_weights,
    test_lists_of_wide_weights,
    test_lists_of_widths_that_fill_16_bytes,
    test_more_than_one_task,
    test_negative_gates,
    test_nothing_is_packed,
    test_one_gate_twice_on_a_feature,
    test_one_open_row_and_column,
    test_only_the_gradient_asked_for,
    test_open_weights_keep_inf_and_nan,
    test_outputs_without_upstream_gradients,
    test_products_of_two_gates,
    test_results_are_written_completely,
    test_same_bits_as_the_cpu_kernels,
    test_shapes,
    test_strided_gates_and_indices,
    test_the_gate_that_is_always_open_gets_no_gradient,
    test_upstream_gradients_of_any_strides,
    test_weights_of_any_strides,
    test_weights_that_need_no_gradient,
    test_what_nobody_needs_is_not_computed,
)

from l0kernels.ops.pack_weight import triton as kernels


@pytest.mark.parametrize("weights", [1, 4])
def test_more_weights_than_one_launch_takes(impl, monkeypatch, weights):
    case = make_list()
    upstreams = case.upstreams()
    together = check_list(impl, case, upstreams)
    monkeypatch.setattr(kernels, "WEIGHTS", weights)
    packed, grads, grad_z = check_list(impl, case, upstreams)
    assert all(map(torch.equal, packed + grads, together[0] + together[1]))
    torch.testing.assert_close(grad_z, together[2])


def test_sums_over_several_chunks_of_lines(impl, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 2)
    check_list(impl, make_list(0.7, groups=(40, 30, 7)))
