# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `packed_norm`, by the tests of all implementations."""

import itertools

import pytest
import torch
from ops.test_packed_norm import (  # noqa: F401 - collected here, where `impl` is Triton
    LAYOUTS,
    make_case,
    ours,
    size_limit,
    test_a_batch_does_not_depend_on_what_ran_before,
    test_all_dummies,
    test_backward_saves_no_activation_but_x,
    test_backward_uses_the_statistics_of_its_forward,
    test_constant_channels_give_their_bias,
    test_dtypes,
    test_dummies_do_not_matter,
    test_empty_batches_as_torch,
    test_gates_do_not_scale,
    test_index_order_is_the_order_of_the_channels,
    test_inputs_of_any_strides,
    test_means_far_from_zero,
    test_missing_parameters,
    test_momentum_and_eps,
    test_more_than_one_part,
    test_no_channels,
    test_one_channel,
    test_one_outlier,
    test_one_value_per_channel_is_refused_as_by_torch,
    test_only_the_gradients_asked_for,
    test_open_channels_keep_inf_and_nan,
    test_products_of_two_gates,
    test_results_are_written_completely,
    test_same_bits_twice,
    test_shapes,
    test_statistics_that_backward_reads,
    test_strided_parameters,
    test_upstream_gradients_of_any_strides,
)
from ops.test_packed_norm import test_gradcheck as compare_with_differences
from triton.runtime.interpreter import GridExecutor

from l0kernels.ops.packed_norm import triton as kernels
from l0kernels.testing import assert_within_budget


def test_gradcheck(impl):
    # In all layouts and modes it would take minutes; the other tests compare gradients too.
    compare_with_differences(impl, "channels_last", "relu", True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(40, 17), (3, 17, 5, 5)])
def test_a_step_is_three_launches_each_way(impl, monkeypatch, shape, layout):
    launched, launch = [], GridExecutor.__call__

    def count(executor, *arguments, **options):
        launched.append(executor.fn.__name__)
        return launch(executor, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    for training in (True, False):
        case = make_case(shape, layout=layout, training=training, activation="relu")
        case.x.requires_grad_()
        y = ours(case)
        assert launched == ["_moments"] * training + ["_finish_moments", "_values"]
        launched.clear()
        y.sum().backward()
        assert launched == ["_grads"] * training + ["_finish_grads", "_values"]
        launched.clear()


def test_chunks_hold_all_values_once():
    for shape, layout, features in itertools.product(
        [(1, 300), (2, 1), (9001, 17), (3, 700, 5, 5), (130, 2, 40, 40), (2, 600, 65, 65)],
        LAYOUTS,
        (8, 3000),
    ):
        x = make_case(shape, layout=layout).x
        for programs, unroll in ((kernels.SUM_PROGRAMS, 2), (kernels.VALUE_PROGRAMS, 4)):
            plan = kernels._Plan.of(x, features, programs, unroll)
            assert (plan.chunks - 1) * plan.chunk_values < plan.values
            assert plan.chunks * plan.chunk_values >= plan.values
            assert plan.chunks == 1 or plan.grid[0] * plan.grid[1] <= programs
            assert plan.is_rows == (x.stride(1) == 1 or x.shape[2:].numel() == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_values_do_not_all_err_to_one_side(impl, monkeypatch, dtype, layout):
    # Less a shift of many digits, all numbers of few digits may be rounded the same way.
    monkeypatch.setattr(kernels, "SUM_PROGRAMS", 1)  # one chunk, one shift for each channel
    case = make_case((8, 8, 64, 64), 1.0, (dtype, torch.float32), layout, momentum=1.0)
    case.x.normal_()[:, 4:] += 3
    ours(case)
    found = case.running_mean[case.index]
    exact, plain = (case.x.mean((0, 2, 3), dtype=kind) for kind in (torch.float64, torch.float32))
    for half in (slice(0, 4), slice(4, 8)):
        assert_within_budget(found[half], exact[half], plain[half])
