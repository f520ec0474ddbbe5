# SPDX-License-Identifier: Apache-2.0
"""Attention heads as units: packed where the model lets them, else gated where they are read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import oracle

HEADS, SIZE, TOKENS = 4, 3, 5
WIDTH = HEADS * SIZE


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over tensors [B, T, heads * SIZE], any number of heads."""
    heads = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def mixed(self, h: Tensor) -> Tensor:
        return attend(self.q(h), self.k(h), self.v(h))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(x + self.o(self.mixed(h)))


class Fused(Attention):
    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def mixed(self, h: Tensor) -> Tensor:
        return attend(*self.qkv(h).split(WIDTH, dim=-1))


class AcrossHeads(Attention):
    """The values of a head are read by its neighbour too."""

    def mixed(self, h: Tensor) -> Tensor:
        y = super().mixed(h)
        return y + y.roll(SIZE, -1)


def converted(net: nn.Module) -> oracle.Twins:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(net)
    packed = l0.convert(net, "hard_concrete", example_inputs=(x,), select=l0.select.heads)
    return oracle.twins(packed, plain, (x,)).to(torch.float64)


@pytest.mark.parametrize(
    ("kind", "makers", "path"),
    [(Attention, ("k", "q", "v"), "packed"), (Fused, (), "gathered at the input")],
)
def test_heads_are_exact(kind: type[Attention], makers: tuple[str, ...], path: str):
    torch.manual_seed(0)
    exact = converted(kind())
    assert (exact.packed.l0.names, exact.packed.l0.sizes) == (["o.heads"], [HEADS])
    row = l0.report(exact.packed).groups[0]
    assert (tuple(sorted(row.producers)), row.consumers, row.path) == (makers, ("o",), path)
    for seed in range(20):
        z = oracle.gate_values([HEADS], seed)
        masked, packed = exact.run_masked(z), exact.run_packed(z)
        assert max(oracle.relative_errors(masked, packed).values()) <= 1e-9
        assert exact.open_where_closed(z, packed) == []


def test_closed_heads_are_not_computed():
    torch.manual_seed(0)
    exact = converted(Attention())
    widths = []
    exact.packed.v.register_forward_hook(lambda m, i, out: widths.append(out.shape[-1]))
    for z in ([0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 1]):
        exact.run_packed(torch.tensor(z).double())
    assert widths == [2 * SIZE, 3 * SIZE, 2 * SIZE]


def test_heads_that_mix_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"nothing can be gated.*'v': 'its units are joined"):
        converted(AcrossHeads())


def test_heads_can_be_chosen_by_name():
    torch.manual_seed(0)
    net, x = Attention(), torch.randn(2, TOKENS, WIDTH)
    l0.convert(net, "hard_concrete", example_inputs=(x,), select=["o.heads"])
    assert net.l0.names == ["o.heads"]
    assert l0.select.inner | l0.select.heads == l0.select.heads | l0.select.inner
