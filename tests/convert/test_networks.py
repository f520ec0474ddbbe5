# SPDX-License-Identifier: Apache-2.0
"""Packed networks equal masked ones, in every output, gradient and buffer.

The oracle knows nothing of the package's layers: a plain copy of the network whose readers have
their inputs multiplied by the gates through hooks.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models, oracle

DRAWS = 50


class HandConv(nn.Module):
    """Strided, dilated, padded, depthwise and concatenated, wired by hand."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        if not gated:
            self.a = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect")
            self.norm = nn.BatchNorm2d(6)
            self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.b = nn.Conv2d(6, 5, 3, padding=2, dilation=2, padding_mode="circular")
            self.c = nn.Conv2d(14, 7, 3, padding="same")
            self.fc = nn.Linear(7 * 16, 4)
            return
        self.l0 = l0.gates.HardConcrete({"a": 6, "b": 5, "c": 7})
        a, b, c = (self.l0[name] for name in "abc")
        self.a = l0.nn.GatedConv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect", out_gate=a)
        self.norm = l0.nn.GatedBatchNorm2d(6, out_gate=a)
        self.depth = l0.nn.GatedConv2d(6, 6, 3, padding=1, groups=6, out_gate=a)
        self.b = l0.nn.GatedConv2d(
            6, 5, 3, padding=2, dilation=2, padding_mode="circular", in_gate=a, out_gate=b
        )
        self.c = l0.nn.GatedConv2d(14, 7, 3, padding="same", in_gate=l0.cat(b, 3, a), out_gate=c)
        self.fc = l0.nn.GatedLinear(7 * 16, 4, in_gate=c.expand(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(F.relu(self.norm(self.a(x))))
        skip = F.avg_pool2d(x, 2)
        y = torch.cat((F.softplus(self.b(y)), skip, y), 1)
        return self.fc(F.relu(self.c(y)).flatten(1))


class HandLinear(nn.Module):
    """Two gates on one feature, network inputs and 1-D normalisation, wired by hand."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        if not gated:
            self.a = nn.Linear(9, 8)
            self.norm = nn.BatchNorm1d(8)
            self.b = nn.Linear(8, 7, bias=False)
            self.c = nn.Linear(7, 3)
            return
        self.l0 = l0.gates.HardConcrete({"x": 9, "a": 8, "b.in": 8, "b": 7})
        g = self.l0
        self.a = l0.nn.GatedLinear(9, 8, in_gate=g["x"], out_gate=g["a"])
        self.norm = l0.nn.GatedBatchNorm1d(8, out_gate=g["a"])
        self.b = l0.nn.GatedLinear(8, 7, bias=False, in_gate=g["b.in"] * g["a"], out_gate=g["b"])
        self.c = l0.nn.GatedLinear(7, 3, in_gate=g["b"])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.b(F.gelu(self.norm(self.a(x))))))


ByName = Callable[[dict[str, Tensor]], Tensor]


def on_groups(packed: nn.Module, scale: ByName) -> oracle.Scale:
    """A scale as a function of all gates, from one of the gates by group."""
    slices = dict(packed.l0.slices())
    return lambda z: scale({name: z[where] for name, where in slices.items()})


def case(
    packed: nn.Module, plain: nn.Module, x: Tensor, reads: dict[str, ByName], makes: dict[str, str]
) -> oracle.Twins:
    """Twins from what is read, by layer, and whose units each layer or norm makes."""
    return oracle.Twins(
        packed,
        plain,
        (x,),
        {name: on_groups(packed, scale) for name, scale in reads.items()},
        {n: on_groups(packed, lambda z, group=g: z[group]) for n, g in makes.items()},
    )


def zoo(name: str, granularity: str = "unit") -> oracle.Twins:
    torch.manual_seed(0)
    network = models.network(name)
    plain = network.build()
    x = network.example(2)[0]
    if name.startswith("wrn"):
        x = x[:, :, :8, :8]  # pooled globally: small images keep 50 draws quick
    packed = l0.convert(
        copy.deepcopy(plain), "hard_concrete", example_inputs=(x,), granularity=granularity
    )
    reads, makes = {}, {}
    for group in network.groups:
        extra = f"{group.consumer}.in" if f"{group.consumer}.in" in packed.l0.names else None

        def scale(z, group=group, extra=extra):
            own = z[group.producer].repeat_interleave(group.spread)
            return own if extra is None else own * z[extra]

        reads[group.consumer] = scale
        makes[group.producer] = group.producer
        if group.norm is not None:
            makes[group.norm] = group.producer
    if "fc1.in" in packed.l0.names and "fc1" not in reads:
        reads["fc1"] = lambda z: z["fc1.in"]
    return case(packed, plain, x, reads, makes)


def by_hand(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    packed, plain = kind(gated=True), kind(gated=False)
    packed.l0.attach(packed)
    plain.load_state_dict({k: v for k, v in packed.state_dict().items() if k[:3] != "l0."})
    return packed, plain


def hand_conv() -> oracle.Twins:
    reads: dict[str, ByName] = {
        "b": lambda z: z["a"],
        "c": lambda z: torch.cat((z["b"], torch.ones_like(z["a"][:3]), z["a"])),
        "fc": lambda z: z["c"].repeat_interleave(16),
    }
    makes = {n: n for n in "abc"} | {"depth": "a", "norm": "a"}
    return case(*by_hand(HandConv), torch.randn(3, 3, 8, 8), reads, makes)


def hand_linear() -> oracle.Twins:
    reads: dict[str, ByName] = {
        "a": lambda z: z["x"],
        "b": lambda z: z["a"] * z["b.in"],
        "c": lambda z: z["b"],
    }
    return case(*by_hand(HandLinear), torch.randn(6, 9), reads, {"norm": "a", "a": "a", "b": "b"})


CASES: dict[str, Callable[[], oracle.Twins]] = {
    "mlp": lambda: zoo("mlp-784-300-100"),
    "mlp, input gates": lambda: zoo("mlp-784-300-100", "input"),
    "lenet5": lambda: zoo("lenet5"),
    "lenet5, input gates": lambda: zoo("lenet5", "input"),
    "vgg16": lambda: zoo("vgg16"),
    "wrn-16-4": lambda: zoo("wrn-16-4"),
    "wrn-28-10": lambda: zoo("wrn-28-10"),
    "by hand, convolutions": hand_conv,
    "by hand, linear": hand_linear,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_packed_equals_masked_in_fp64(name: str, training: bool):
    twins = CASES[name]().to(torch.float64)
    twins.train(training)
    for seed in range(DRAWS if training else 5):
        z = oracle.gate_values(twins.packed.l0.sizes, seed)
        packed = twins.run_packed(z)
        errors = oracle.relative_errors(twins.run_masked(z), packed)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-10, (seed, worst, errors[worst])
        assert twins.open_where_closed(z, packed) == [], seed


@pytest.mark.parametrize("name", CASES)
def test_packed_fp32_errs_at_most_twice_as_much_as_masked_fp32(name: str):
    for kind, (ours, theirs) in oracle.fp32_errors(CASES[name](), range(5, 14)).items():
        assert ours <= 2 * theirs + torch.finfo(torch.float32).eps, kind


def test_a_wrong_gate_gradient_is_seen():
    twins = hand_linear().to(torch.float64)
    got = twins.run_packed(oracle.gate_values(twins.packed.l0.sizes, 5))
    wrong = dict(got) | {"grad gates": got["grad gates"] * (1 + 1e-9)}
    assert max(oracle.relative_errors(got, wrong).values()) > 1e-10
