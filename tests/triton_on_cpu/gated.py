# SPDX-License-Identifier: Apache-2.0
"""How the tests of the gated layers meet their Triton kernels."""

import pytest
from ops.gated import DTYPES, GatedContract, check

from l0kernels.ops.gated_linear import triton as linear_kernels


class Interpreted:
    """Leaves out what does not depend on the kernels."""

    IN_PLACE = False  # whether the kernels read the weight in place, or a packed copy
    test_opcheck = None
    test_python_stand_in_passes_opcheck = None
    test_one_graph_for_all_draws = None
    test_same_result_on_every_device = None
    test_cpp_refuses_what_is_out_of_bounds = None
    test_bad_input_is_refused = None
    test_gradcheck = None  # in float64, which the stand-in computes

    @pytest.fixture
    def impl(self, impl, monkeypatch):
        rows = 1 << 30 if self.IN_PLACE else -1
        monkeypatch.setattr(linear_kernels, "IN_PLACE_ROWS", rows)
        # The interpreter takes as long for a small block as for a large one.
        monkeypatch.setattr(linear_kernels, "WEIGHT_BLOCK", (64, 128))
        return impl


class Values:
    """The tests that compare values, for kernels that differ in how they get them."""

    OP: object
    SHAPES: list
    LARGE: tuple
    USUAL = GatedContract.USUAL
    make = GatedContract.make
    problem = GatedContract.problem
    upstream = GatedContract.upstream
    test_shapes = GatedContract.test_shapes
    test_axes_that_are_not_packed = GatedContract.test_axes_that_are_not_packed
    test_more_than_one_block = GatedContract.test_more_than_one_block
    test_next_to_nothing_is_packed = GatedContract.test_next_to_nothing_is_packed
    test_closed_parameters_do_not_matter = GatedContract.test_closed_parameters_do_not_matter
    test_open_features_keep_nan = GatedContract.test_open_features_keep_nan
    test_same_bits_twice = GatedContract.test_same_bits_twice

    @pytest.mark.parametrize("dtypes", DTYPES[2:], ids=str)
    def test_short_dtypes(self, impl, make, dtypes):
        problem = make(dtypes=dtypes, activation="relu")
        check(impl, problem, self.upstream(problem))


class Descriptors(Interpreted, Values):
    """Takes rows that tensor descriptors can describe: 16-byte multiples of a short dtype."""

    USUAL = DTYPES[2]

    @pytest.fixture
    def launched(self, impl, monkeypatch):
        monkeypatch.setattr(linear_kernels, "has_tma", lambda device: True)
        launch = linear_kernels.Layer._launch_tma
        calls = []
        monkeypatch.setattr(
            linear_kernels.Layer,
            "_launch_tma",
            lambda *arguments: calls.append(arguments) or launch(*arguments),
        )
        return calls

    @pytest.fixture(autouse=True)
    def were_launched(self, launched):
        yield
        assert launched
