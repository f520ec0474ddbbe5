# SPDX-License-Identifier: Apache-2.0
"""Triton kernels behind operators: checked by PyTorch, traced by its compiler."""

import pytest
from harness import ops as raw
from ops import (
    test_dep_chain,
    test_gate_apply,
    test_gated_conv2d,
    test_gated_linear,
    test_masked_weight,
    test_pack_weight,
    test_packed_norm,
    test_sample_gates,
)

from l0kernels import _registry


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """A test fails that runs no kernel."""
    ran, function = [], _registry._triton_function
    monkeypatch.setattr(
        _registry, "_triton_function", lambda *which: ran.append(which) or function(*which)
    )
    yield
    assert ran


@pytest.fixture
def triton_handles(monkeypatch):
    """For tests that call raw operators, not `chosen` ones."""
    for stem in raw.stems():
        for name, handle, *_ in raw.raw_ops(stem):
            monkeypatch.setattr(raw.module_of(stem), name, _registry._TRITON_HANDLES[handle])


@pytest.mark.usefixtures("triton_handles")
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
class TestOpcheck:
    @pytest.mark.parametrize("law", [0, 1, 2])
    def test_sample_gates(self, requires_grad, law):
        test_sample_gates.test_opcheck(requires_grad, law)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_dep_chain(self, requires_grad, reverse):
        test_dep_chain.test_opcheck(requires_grad, reverse)

    @pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
    def test_pack_weight(self, requires_grad, shape):
        test_pack_weight.test_opcheck(shape, requires_grad)

    def test_masked_weight(self, requires_grad):
        test_masked_weight.test_opcheck(requires_grad)

    def test_gate_apply(self, requires_grad):
        test_gate_apply.test_opcheck(requires_grad)

    def test_pack_weights(self, requires_grad):
        test_pack_weight.test_opcheck_of_lists(requires_grad)

    @pytest.mark.parametrize(
        "contract", [test_gated_linear.TestGatedLinear(), test_gated_conv2d.TestGatedConv2d()]
    )
    def test_gated_layers(self, requires_grad, contract):
        contract.test_opcheck(contract.problem, requires_grad)


@pytest.mark.usefixtures("triton_handles")
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_packed_norm(shape, training):
    test_packed_norm.test_opcheck(shape, "channels_last", training)


class TestCompile:
    def test_sample_gates(self):
        test_sample_gates.test_compiles_to_one_graph("triton")

    def test_dep_chain(self):
        test_dep_chain.test_one_graph_for_all_widths("triton")

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_pack_weight(self, channels_last):
        test_pack_weight.test_one_graph_for_all_widths("triton", channels_last)

    def test_masked_weight(self):
        test_masked_weight.test_one_graph_for_all_betas_and_sizes("triton")

    @pytest.mark.parametrize("per_example", [False, True])
    def test_gate_apply(self, per_example):
        test_gate_apply.test_one_graph_for_all_sizes("triton", per_example)

    @pytest.mark.parametrize("training", [True, False])
    def test_packed_norm(self, training):
        test_packed_norm.test_one_graph_for_all_widths("triton", "channels_last", training)

    def test_pack_weights(self):
        test_pack_weight.test_one_graph_for_lists_of_all_widths("triton")

    @pytest.mark.parametrize(
        "contract", [test_gated_linear.TestGatedLinear(), test_gated_conv2d.TestGatedConv2d()]
    )
    def test_gated_layers(self, contract):
        contract.test_one_graph_for_all_draws(contract.problem, "triton")
