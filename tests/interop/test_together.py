# SPDX-License-Identifier: Apache-2.0
"""Tests of this folder once more, with all weights of a model packed by one call as on a GPU."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from interop.nets import assert_equal, gradients
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
from l0kernels.nn import packing


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l0.gates.Gates, "_together", True)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Blocks(nn.Module):
    """Layers that DDP must see once each: the first as it is, others recomputed by ``how``."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = l0.gates.HardConcrete({"a": 12, "b": 10, "c": 8})
        a, b, c = (self.l0[name] for name in "abc")
        self.first = l0.nn.GatedLinear(5, 12, out_gate=a)
        self.second = l0.nn.GatedLinear(12, 10, in_gate=a, out_gate=b)
        self.third = l0.nn.GatedLinear(10, 8, in_gate=b, out_gate=c)
        self.last = l0.nn.GatedLinear(8, 3, in_gate=c)
        self.how: bool | None = None
        self.l0.attach(self)
        with torch.no_grad():  # of what is all open nothing is packed
            self.l0.log_alpha[[0, 12, 22]] = -9.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in (self.second, self.third):
            run = layer if self.how is None else partial(checkpoint, layer, use_reentrant=self.how)
            x = torch.tanh(run(x))
        return self.last(x)


@pytest.mark.parametrize("how", [None, False, True])
def test_under_ddp_every_layer_packs_alone(alone, how: bool | None, monkeypatch):
    calls = []

    def counted(weights, *args):
        calls.append(len(weights))
        return l0.functional.pack_weights(weights, *args)

    monkeypatch.setattr(packing, "pack_weights", counted)
    net, twin = Blocks(), Blocks()
    twin.load_state_dict(net.state_dict())
    net.how = how
    # Several reentrant backward passes reach log_alpha: DDP asks for this then.
    model = DistributedDataParallel(net, static_graph=how is True)
    x = torch.linspace(-1, 1, 20).view(4, 5)
    for step in range(3):
        objectives = [l0.expected_loss(m, lambda m=m: m(x).square().sum()) for m in (model, twin)]
        if step == 0:
            assert calls == [2, 2, 2, 1, 7]
        for each, loss in zip((model, twin), objectives, strict=True):
            each.zero_grad()
            (loss + l0.penalty(each)).backward()
        assert_equal(gradients(net), gradients(twin), tolerance=1e-6)
