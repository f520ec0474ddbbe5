# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `sample_gates` and `open_lists`, by the tests of all implementations."""

import math

import pytest
import torch
from ops.test_sample_gates import (  # noqa: F401 - collected here, where `impl` is Triton
    BETA,
    GAMMA,
    LAWS,
    ZETA,
    make_key,
    make_layout,
    test_a_draw_does_not_depend_on_the_gates_behind_it,
    test_a_draw_lists_its_own_gates,
    test_a_product_that_underflows_is_closed,
    test_arm_gradient_is_the_published_one,
    test_arm_gradient_is_zero_without_a_factor_whatever_the_losses,
    test_arm_gradient_of_a_key_that_no_draw_has,
    test_arm_gradient_refuses_bad_input,
    test_arm_gradient_takes_any_strides_and_no_graph,
    test_changes_between_draw_and_backward_are_noticed,
    test_cuda_refuses_layouts_out_of_bounds,
    test_decisions_next_to_the_threshold,
    test_draws_depend_on_seed_and_step,
    test_each_output_alone_has_a_gradient,
    test_example_noise_is_that_of_each_row,
    test_example_noise_of_a_key_that_no_draw_has,
    test_example_noise_of_the_last_rows,
    test_example_noise_refuses_bad_input,
    test_example_noise_takes_any_strides,
    test_gradcheck,
    test_gradients_within_budget,
    test_inference_mode,
    test_infinite_log_alpha,
    test_lists_of_a_model,
    test_models_report_bad_values,
    test_nan_is_reported,
    test_no_gates_at_all,
    test_one_draw_serves_several_backward_passes,
    test_one_open_gate_anywhere,
    test_open_lists,
    test_saturated_gates_have_gradient_zero_whatever_comes_in,
    test_seed_and_step_have_a_range,
    test_the_ends_of_the_range_are_legal,
    test_the_first_thing_wrong_is_reported,
    test_what_a_gpu_gives_for_bad_values,
)

from l0kernels import _registry
from l0kernels.ops.sample_gates import op


@pytest.mark.parametrize("gates", [1, 255, 256, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS)
def test_values_have_the_bits_of_the_cpu_kernels(impl, need_cpp, law, dtype, gates):
    log_alpha, cost = (8 * torch.randn(gates)).to(dtype), torch.rand(gates).to(dtype)
    log_alpha[::100], log_alpha[1::100] = math.inf, -math.inf
    layout = make_layout([gates])
    for options in ((BETA, GAMMA, ZETA), (0.3, -0.5, 1.2)):
        for key in (make_key(), make_key((1 << 63) - 1, (1 << 32) - 1)):
            arguments = (log_alpha, key, cost)
            law_options = (LAWS.index(law), *options)
            mine = _registry.chosen(op._FORWARD)(*arguments, *layout, *law_options)
            cpu = torch.ops.l0kernels.sample_gates(*arguments, *layout, *law_options)
            assert torch.equal(mine[0], cpu[0])
            assert all(map(torch.equal, mine[2:], cpu[2:]))
            # Sums in another order.
            torch.testing.assert_close(mine[1], cpu[1], rtol=4 * torch.finfo(dtype).eps, atol=0)
            for grads in (
                (torch.randn(gates + 1).to(dtype), torch.tensor(0.7, dtype=dtype)),
                (torch.randn(gates + 1).to(dtype), None),
                (None, torch.tensor(0.7, dtype=dtype)),
            ):
                given = (*arguments, *grads, *law_options)
                grad = _registry.chosen(op._BACKWARD)(*given)
                assert torch.equal(grad, torch.ops.l0kernels.sample_gates_backward(*given))
            arm = torch.tensor(-0.3, dtype=dtype), log_alpha.nan_to_num(0, 1, -1), key
            grad = _registry.chosen(op._ARM)(*arm)
            assert torch.equal(grad, torch.ops.l0kernels.arm_gradient(*arm))
