# SPDX-License-Identifier: Apache-2.0
"""Models that do unusual things: exact or refused, and never changed by the attempt."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import oracle
from l0kernels.convert.probe import Probe
from l0kernels.convert.tensors import InDouble

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """a -> b -> c; ``between`` lies after a."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def between(self, h: Tensor) -> Tensor:
        return F.relu(h)

    def rest(self, h: Tensor) -> Tensor:
        return self.c(F.relu(self.b(h)))

    def forward(self, x: Tensor):
        return self.rest(self.between(self.a(x)))


def converted(net: nn.Module, inputs=(X,), **options) -> nn.Module:
    return l0.convert(net, "hard_concrete", example_inputs=inputs, **options)


class Holder:
    __slots__ = ("loss", "shape")

    def __init__(self, loss: Tensor, shape: object) -> None:
        self.loss, self.shape = loss, shape


RESULTS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "number": lambda y, h: (y, h.mean().item()),
    "array": lambda y, h: (y, h.detach().numpy()),
    "slots": lambda y, h: (y, Holder(h, None)),
    "values of a dict": lambda y, h: {"y": y, "h": h}.values(),
    "iterator": lambda y, h: iter([y, h]),
    "nested": lambda y, h: {"y": y, "more": [{"h": (h,)}]},
}


LOWER: dict[str, Callable[[Tensor], Tensor]] = {
    "float": Tensor.float,
    "half": lambda x: x.half(),
    "to": lambda x: x.to(torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.bfloat16),
    "softmax": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "zeros": lambda x: torch.zeros(3, dtype=torch.float16),
}


@pytest.mark.parametrize("kind", LOWER)
def test_in_double(kind: str):
    with InDouble():
        assert LOWER[kind](X.double()).dtype == torch.float64
        assert X.long().to(torch.int32).view(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", RESULTS)
def test_no_result_leaves_unseen(kind: str):
    class Net(Chain):
        def forward(self, x: Tensor):
            h = self.between(self.a(x))
            return RESULTS[kind](self.rest(h), h)

    torch.manual_seed(0)
    net = converted(Net())
    assert net.l0.names == ["b"]
    assert net.l0.refused["a"].startswith("its units reach an output of the model")


class InPlace(Chain):
    def forward(self, x: Tensor):
        return super().forward(x.sub_(0.1))


class PopsItsBatch(Chain):
    def forward(self, batch: dict[str, Tensor]):
        return super().forward(batch.pop("x"))


@pytest.mark.parametrize(
    ("kind", "inputs"), [(InPlace, (X.clone(),)), (PopsItsBatch, ({"x": X.clone()},))]
)
def test_inputs_stay_as_they_are(kind: type[Chain], inputs: tuple):
    torch.manual_seed(0)
    net = converted(kind(), inputs)
    assert net.l0.names == ["a", "b"]
    kept = inputs[0]["x"] if isinstance(inputs[0], dict) else inputs[0]
    assert torch.equal(kept, X)


class RandomDepth(Chain):
    def forward(self, x: Tensor):
        if self.training and random.random() < 0.5:
            x = x + 1.0
        return super().forward(x + float(np.random.rand()))


def test_generators_stay_as_they_are_and_do_not_matter():
    found = []
    for seed in range(3):
        torch.manual_seed(0)
        net = RandomDepth()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        converted(net)
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
        found.append((net.l0.names, net.l0.refused))
    assert found[0] == found[1] == found[2] and found[0][0] == ["a", "b"]


def test_generators_of_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise AssertionError("a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed", fail)
    converted(Chain())


def test_statistics_reached_through_a_closure_stay():
    class Net(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.act = lambda h: F.relu(self.norm(h))

        def between(self, h: Tensor) -> Tensor:
            return self.act(h)

    net = Net()
    before = copy.deepcopy(net.norm.state_dict())
    with pytest.raises(ValueError, match="forward and backward fail|forward fails"):
        converted(net)
    assert all(torch.equal(t, before[n]) for n, t in net.norm.state_dict().items())


class Asserts(Chain):
    def between(self, h: Tensor) -> Tensor:
        assert h.shape[1] == 8
        return F.relu(h)


def test_an_assertion_on_the_width_refuses_the_group():
    torch.manual_seed(0)
    net = converted(Asserts())
    assert net.l0.names == ["b"]
    assert net.l0.refused["a"].startswith("the self-check found that the packed forward fails")


class Experts(nn.Module):
    """Each token goes to the expert that a router chooses for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(6, 8), nn.Linear(8, 3)
        self.up = nn.ModuleList(nn.Linear(8, 9) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(9, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor):
        h = F.relu(self.stem(x))
        chosen = self.router(h).argmax(-1)
        y = torch.zeros_like(h)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows = (chosen == i).nonzero().flatten()
            y = y.index_add(0, rows, down(F.relu(up(h[rows]))))
        return self.head(y)


def test_experts_chosen_by_values():
    torch.manual_seed(0)
    net, x = Experts(), torch.randn(32, 6)
    plain = copy.deepcopy(net)
    twins = oracle.twins(converted(net, (x,)), plain, (x,)).to(torch.float64)
    assert set(twins.packed.l0.names) >= {"up.0", "up.1", "up.2"}
    assert "router" in twins.packed.l0.refused
    for seed in range(6):
        z = oracle.gate_values(twins.packed.l0.sizes, seed)
        errors = oracle.relative_errors(twins.run_masked(z), twins.run_packed(z))
        assert max(errors.values()) <= 1e-9


class IdleExpert(Chain):
    """Given no token, as an expert that no example is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 9), nn.Linear(9, 8)

    def between(self, h: Tensor) -> Tensor:
        h = F.relu(h)
        return torch.cat((h, self.down(F.relu(self.up(h[:0])))))


class AutocastMask(Chain):
    """fp16 inside, and a feature that a mask takes away, whatever its size."""

    def between(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            h = F.relu(self.b(1e3 * h))
            return h * (torch.arange(7) > 0).half()

    def rest(self, h: Tensor) -> Tensor:
        return self.c(h.float())


def test_changes_stay_finite_in_half_precision():
    with Probe(AutocastMask(), (X,)) as probe:
        touched = probe.touched({"b": torch.ones(7, dtype=torch.bool)}, 0)
    assert touched.features["c"].tolist() == [False] + [True] * 6


class Predicts(Chain):
    def forward(self, x: Tensor):
        y = super().forward(x)
        return y if self.training else y.argmax(-1)


class WithoutGradient(Chain):
    def forward(self, x: Tensor):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class IntParameter(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)


class ComplexInput(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.PReLU()

    def forward(self, x: Tensor):
        return super().forward(self.scale(torch.view_as_complex(x.view(4, 3, 2)).real.repeat(1, 2)))


class MaskedLogits(Chain):
    def forward(self, x: Tensor):
        y = super().forward(x)
        return y.masked_fill(torch.arange(3) == 1, -torch.inf)


class ComplexOutput(Chain):
    def forward(self, x: Tensor):
        return torch.polar(*super().forward(x)[:, :2].exp().unbind(1))


class KeepsInBuffer(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def rest(self, h: Tensor) -> Tensor:
        y = self.b(h)
        self.seen = y.detach()
        return self.c(F.relu(y))


class RoundsToSingle(Chain):
    """What is lost in fp32, as large as the rest: a last digit of fp64 decides about it."""

    def rest(self, h: Tensor) -> Tensor:
        h = F.relu(self.b(h))
        return self.c(h + 2**28 * (h.to(torch.float32) - h) + F.softmax(h, -1, torch.float32))


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (RoundsToSingle, ["a"]),
        (Predicts, ["a", "b"]),
        (WithoutGradient, ["a", "b"]),
        (IntParameter, ["a", "b"]),
        (ComplexInput, ["a", "b"]),
        (ComplexOutput, ["a", "b"]),
        (MaskedLogits, ["a", "b"]),
        (KeepsInBuffer, ["a"]),
        (IdleExpert, ["b"]),
    ],
)
def test_unusual_models(kind: type[Chain], groups: list[str]):
    torch.manual_seed(0)
    assert converted(kind()).l0.names == groups


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_mode_around_convert_does_not_matter(context: Callable):
    torch.manual_seed(0)
    net = Chain()
    with context():
        converted(net)
    assert net.l0.names == ["a", "b"]
    net(X).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert converted(Chain()).l0.names == ["a", "b"]


class Attends(nn.Module):
    """Nothing but the attention reads the stem: no residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.o = nn.Linear(8, 2)

    def forward(self, x: Tensor):
        h = F.relu(self.stem(x))
        return self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))


def test_what_only_attention_reads_is_no_stem():
    torch.manual_seed(0)
    assert converted(Attends(), (torch.randn(2, 5, 6),)).l0.names == ["stem"]


def test_padding_masks_of_transformer_encoders():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    before = encoder.use_nested_tensor
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": mask}
    net = converted(encoder, inputs).eval()
    with torch.no_grad():
        net.l0.log_alpha[::2] = -5.0
        packed = net(**inputs)
        with l0.use_impl("reference"):
            masked = net(**inputs)
    torch.testing.assert_close(packed[~mask], masked[~mask])
    l0.revert(net)
    assert net.use_nested_tensor == before


def test_options_for_the_groups_that_remain():
    class Net(Chain):
        def between(self, h: Tensor) -> Tensor:
            return F.relu(h).roll(1, -1)

    torch.manual_seed(0)
    assert converted(Net(), lam={"b": 0.5}).l0.lam == {"b": 0.5}
    assert converted(Net(), lam={"a": 0.25, "b": 0.5}).l0.lam == {"b": 0.5}
    with pytest.raises(ValueError, match="lam: expected one value for each"):
        converted(Net(), lam={"b": 0.5, "d": 1.0})
    assert converted(Chain(), select={"a"}).l0.names == ["a"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(converted(Chain()), nn.Linear(3, 2)), "got a converted one"),
        (lambda: torch.compile(Chain()), "got a compiled one"),
        (lambda: Chain().to("meta"), "parameters with values, got none"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), "with values, got none"),
    ],
)
def test_models_that_are_not_ready(model: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        converted(model())
