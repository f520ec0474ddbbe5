# SPDX-License-Identifier: Apache-2.0
"""The laws of random gates, from ten million draws of each, beside their closed forms."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.gates import arm, base, dep
from l0kernels.gates.hard_concrete import BETA, GAMMA, ZETA
from l0kernels.ops.sample_gates import reference
from l0kernels.testing import z_score

GATES, DRAWS = 1_000_000, 10
FURTHEST = 4.5  # standard deviations
CLOSED = BETA * math.log(-GAMMA / ZETA)
FULL = BETA * math.log((1 - GAMMA) / (ZETA - 1))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture(params=["reference", "cpp"])
def sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What draws; the reference too, though the masked network shares the draws of the kernels."""
    calls = []
    plain = reference.sample_gates
    monkeypatch.setattr(
        reference, "sample_gates", lambda *args: (calls.append(None), plain(*args))[1]
    )
    for module in (base, arm, dep):
        monkeypatch.setattr(module, "engine", nullcontext)
    with l0.use_impl(request.param):
        yield request.param
    assert bool(calls) == (request.param == "reference")


def attached(gates: l0.gates.Gates, name: str = "a") -> l0.gates.Gates:
    layer = l0.nn.GatedLinear(2, gates.sizes[-1], bias=False, out_gate=gates[name])
    gates.attach(nn.Sequential(layer))
    return gates


class Moments:
    """Sums of what is drawn from one law, and of its squares."""

    def __init__(self) -> None:
        self.count, self.closed, self.full, self.sum = 0, 0, 0, 0.0

    def add(self, z: Tensor) -> None:
        self.count += z.numel()
        self.closed += int((z == 0).sum())
        self.full += int((z == 1).sum())
        self.sum += float(z.double().sum())


def check_hard_concrete(found: Moments, logit: float) -> None:
    """P(z = 0), P(z = 1) and E z; the integral over u of z(u) gives the mean and its spread."""
    assert found.count == 10_000_000
    assert abs(z_score(found.closed, found.count, sigma(CLOSED - logit))) < FURTHEST
    assert abs(z_score(found.full, found.count, sigma(logit - FULL))) < FURTHEST
    u = (torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20)
    s = torch.sigmoid((torch.logit(u) + logit) / BETA)
    z = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    error = found.sum / found.count - float(z.mean())
    assert abs(error) < FURTHEST * float(z.std()) / math.sqrt(found.count)


@pytest.mark.parametrize("logit", [-2.0, 0.3, 1.5])
@pytest.mark.parametrize("method", ["hard_concrete", "dep"])
def test_hard_concrete_gates(sampler: str, method: str, logit: float):
    if method == "dep":  # the second group's logits are ln 100 tanh(bias) where the first's are 0
        gates = attached(l0.gates.DependentHardConcrete({"a": 2, "b": GATES}), "b")
        start = math.atanh(logit / math.log(100))
    else:
        gates, start = attached(l0.gates.HardConcrete({"a": GATES})), logit
    with torch.no_grad():
        gates.log_alpha.zero_()
        gates.log_alpha[-GATES:] = start
    found = Moments()
    for _ in range(DRAWS):
        gates.draw()
        found.add(gates._draw.z[-GATES - 1 : -1].detach())
    check_hard_concrete(found, logit)


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "normal"])
@pytest.mark.parametrize("pi", [0.02, 0.5, 0.8])
def test_binary_gates_and_their_antithetic_draw(sampler: str, gate: str, pi: float):
    density = torch.distributions.Normal(0.0, 1.0)
    pair = (torch.special.ndtr, lambda phi: density.log_prob(phi).exp())
    gates = l0.gates.ARM({"a": GATES}, gate=pair if gate == "normal" else gate)
    attached(gates)
    inverse = {
        "sigmoid": math.log(pi / (1 - pi)) / 7,
        "hard_sigmoid": pi - 0.5,
        "normal": float(torch.special.ndtri(torch.tensor(pi).double())),
    }
    with torch.no_grad():
        gates.log_alpha.fill_(inverse[gate])
    first, second, differ = 0, 0, 0
    for _ in range(DRAWS):
        gates.draw()
        draw = gates._draw
        other = gates._antithetic(draw, gates.open_probability(), draw.key)
        z1, z2 = draw.z[:-1], other.z[:-1]
        assert set(z1.unique().tolist()) | set(z2.unique().tolist()) == {0.0, 1.0}
        first, second = first + int(z1.sum()), second + int(z2.sum())
        differ += int((z1 != z2).sum())
    draws = GATES * DRAWS
    for count, probability in ((first, pi), (second, pi), (differ, 2 * min(pi, 1 - pi))):
        if probability < 1:
            assert abs(z_score(count, draws, probability)) < FURTHEST
        else:
            assert count == draws


@pytest.mark.parametrize("method", ["hard_concrete", "dep", "arm"])
def test_gates_per_example(method: str):
    gates = attached(l0.gates.METHODS[method]({"a": 1000}, scope="example"))
    with torch.no_grad():
        if method == "dep":
            gates.log_alpha.zero_()
            gates.log_alpha[-1000:] = math.atanh(0.5 / math.log(100))
        else:
            gates.log_alpha.fill_(0.5 / 7 if method == "arm" else 0.5)
    found = Moments()
    p_open = sigma(0.5) if method == "arm" else sigma(0.5 - CLOSED)
    for _ in range(DRAWS):
        gates.draw()
        z = gates._draw.examples.of(1000)[:, :-1].detach()
        assert z.shape == (1000, 1000)
        found.add(z)
        # Neither rows nor columns share their noise: both kinds of sums spread as independent ones.
        for dim in (0, 1):
            sums = (z != 0).double().sum(dim)
            assert float(sums.var()) == pytest.approx(1000 * p_open * (1 - p_open), rel=0.2)
    if method == "arm":
        assert found.closed + found.full == found.count == 10_000_000
        assert abs(z_score(found.full, found.count, sigma(0.5))) < FURTHEST
    else:
        check_hard_concrete(found, 0.5)
