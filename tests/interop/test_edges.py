# SPDX-License-Identifier: Apache-2.0
"""Values, numbers and layers that users bring along."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from interop.nets import NETS, assert_equal, batch, make, objective, state


def shifted(net: nn.Module, by: float) -> None:
    net.l0.log_alpha.data.add_(by)  # no version tells


@pytest.mark.parametrize("when", ["before the forward", "after the penalty", "between steps"])
def test_the_penalty_sees_what_is_written_through_data(when: str):
    net, fresh = make(), make()
    shifted(fresh, 1.0)
    expected = float(l0.penalty(fresh).detach())
    x, _ = batch()
    if when != "before the forward":
        net(x)
        assert float(l0.penalty(net).detach()) != pytest.approx(expected, rel=1e-2)
    shifted(net, 1.0)
    if when != "after the penalty":
        net(x)
    assert float(l0.penalty(net).detach()) == pytest.approx(expected, rel=1e-6)


def test_the_draw_sees_what_is_written_through_data():
    net, twin = make(), make()
    x, _ = batch()
    for each in (net, twin):
        each(x)
    shifted(net, 2.0)
    with torch.no_grad():
        twin.l0.log_alpha.add_(2.0)
    assert net(x).equal(twin(x))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor, int])
def test_integers_of_any_kind(kind):
    torch.manual_seed(0)
    net = NETS["mlp"]()
    plain = copy.deepcopy(net)
    x, _ = batch(2)
    for each, n_train, seed in ((net, kind(60), kind(7)), (plain, 60, 7)):
        l0.convert(each, "hard_concrete", example_inputs=(x,), n_train=n_train, seed=seed)
    assert type(net.l0.n_train) is int and int(net.l0.seed) == 7
    assert net.l0.log_alpha.equal(plain.l0.log_alpha)
    assert l0.penalty(net).equal(l0.penalty(plain))
    assert net(x).equal(plain(x))
    assert l0.gates.HardConcrete({"a": kind(4)}).sizes == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_train": 60.0}, r"n_train: expected a positive integer, got 60\.0"),
        ({"n_train": np.int64(0)}, r"n_train: expected a positive integer, got .*0"),
        ({"n_train": "60"}, "n_train: expected a positive integer, got '60'"),
        ({"seed": 1.5}, r"seed: expected an integer 0 <= seed < 2\*\*63, got 1\.5"),
        ({"seed": -1}, r"seed: expected an integer 0 <= seed < 2\*\*63, got -1"),
        ({"seed": 2**63}, r"seed: expected an integer 0 <= seed < 2\*\*63, got 92"),
    ],
)
def test_other_numbers_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        l0.gates.HardConcrete({"a": 4}, **options)


@pytest.mark.parametrize("size", [0, -1, 2.0, "3"])
def test_sizes_are_positive_integers(size):
    with pytest.raises(ValueError, match="group 'a': expected a positive number of units, got"):
        l0.gates.HardConcrete({"a": size})


class Attention(nn.Module):
    """A transformer block whose attention drops weights."""

    def __init__(self, builtin: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
        self.builtin = builtin
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        if self.builtin:
            y = self.attention(x, x, x, need_weights=False)[0]
        else:
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            p = 0.4 if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        y = x + y
        return y + self.down(self.drop(F.gelu(self.up(y))))


@pytest.mark.parametrize("builtin", [False, True])
def test_attention_that_drops_weights_passes_the_self_check(builtin: bool):
    torch.manual_seed(0)
    net = Attention(builtin)
    before = state(net)
    x = torch.randn(3, 6, 8)
    l0.convert(net, "hard_concrete", example_inputs=(x,))
    assert net.l0.names == ["up"]
    assert_equal(before, {n: t for n, t in state(net).items() if not n.startswith("l0.")})
    assert net.drop.p == 0.4 and net.attention.dropout == 0.4
    net.train()
    with l0.hold(net):
        assert not net(x).equal(net(x)), "dropout was expected to be on again"
    net.eval()
    with torch.no_grad():
        packed = net(x)
        with l0.use_impl("reference"):
            torch.testing.assert_close(net(x), packed)


class Heads(nn.Module):
    """Attention whose heads can be gated, whatever their number."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = 0.4 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_attention_of_gated_heads_may_drop_weights():
    # The noise of packed heads has another shape: only without it are both runs the same.
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    net = l0.convert(Heads(), "hard_concrete", example_inputs=(x,), select=l0.select.heads)
    assert net.l0.names == ["out.heads"] and net.l0.sizes == [4]


def test_gradient_clipping_sees_the_masked_norm():
    found = []
    for impl in ("auto", "reference"):
        net = make()
        with l0.use_impl(impl):
            objective(net, *batch()).backward()
        found.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1))
    torch.testing.assert_close(*found)
