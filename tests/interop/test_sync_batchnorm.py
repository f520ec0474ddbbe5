# SPDX-License-Identifier: Apache-2.0
"""SyncBatchNorm, which would take packed features for all features."""

import copy

import pytest
import torch
from torch import nn

import l0kernels as l0
from interop.nets import NETS, batch, make, objective


@pytest.mark.parametrize("kind", ["norm", "residual"])
@pytest.mark.parametrize("gates", ["half open", "all open"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_after_convert_it_is_one_clear_error(kind: str, gates: str, training: bool, impl: str):
    net = make(kind)
    if gates == "all open":
        with torch.no_grad():
            net.l0.log_alpha.fill_(50.0)
    net = copy.deepcopy(nn.SyncBatchNorm.convert_sync_batchnorm(net)).train(training)
    x, _ = batch()
    message = r"norm\d?: expected the gated BatchNorm that convert made, got SyncBatchNorm"
    with pytest.raises(RuntimeError, match=message), l0.use_impl(impl):
        net(x)
    with pytest.raises(RuntimeError, match=message), l0.use_impl(impl), l0.hold(net):
        net(x)


def test_a_model_without_gated_norms_may_be_converted():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make("mlp"))
    objective(net, *batch()).backward()


def test_norms_that_left_the_model_do_not_matter():
    net = make("norm")
    net.norm = nn.Identity()
    net(batch()[0])
    del net.norm
    net.block = lambda x: net.inner(net.stem(x))
    net(batch()[0])


def test_before_convert_its_group_is_left_ungated():
    torch.manual_seed(0)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(NETS["norm"]())
    x, y = batch()
    l0.convert(net, "hard_concrete", example_inputs=(x,))
    assert net.l0.names == ["inner", "fc1"] and "stem" in net.l0.refused
    outs = []
    for impl in ("auto", "reference"):
        net.l0.step.zero_()
        with l0.use_impl(impl):
            outs.append(net(x))
    torch.testing.assert_close(*outs)


def test_revert_and_convert_again():
    net = make("norm")
    l0.revert(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(net.norm, nn.SyncBatchNorm)
    net(batch()[0])
