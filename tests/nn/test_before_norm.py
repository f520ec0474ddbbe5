# SPDX-License-Identifier: Apache-2.0
"""Gates before a norm against plain layers whose output is multiplied, y = act(norm(z conv(x)))."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from nn.draws import PATTERNS, STRIDES, gate_values, upstream
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import l0kernels as l0
from l0kernels.nn import (
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GatedConv1d,
    GatedConv2d,
    GatedConvTranspose2d,
    GatedLayer,
    GatedLinear,
    GatedPReLU,
)

Ref = l0.gates.GateRef


def conv(r: Ref, n: int, act: nn.Module, norm: dict[str, Any], **reader: Any) -> list[nn.Module]:
    return [
        GatedConv2d(2, n, 3, padding=1, out_gate=r),
        GatedBatchNorm2d(n, out_gate=r, **norm),
        act,
        GatedConv2d(n, 3, 3, in_gate=r, **reader),
    ]


def strided(r: Ref, n: int) -> list[nn.Module]:
    return conv(r, n, nn.ReLU(inplace=True), {}, stride=2, padding=1)


def circular(r: Ref, n: int) -> list[nn.Module]:
    how = {"padding": 2, "dilation": 2, "padding_mode": "circular", "bias": False}
    return conv(r, n, nn.Sigmoid(), {"momentum": None}, **how)


def max_pooled(r: Ref, n: int) -> list[nn.Module]:
    between = nn.Sequential(nn.SiLU(), nn.MaxPool2d(3, 2, padding=1))
    return conv(r, n, between, {"affine": False}, padding=2)


def mean_pooled(r: Ref, n: int) -> list[nn.Module]:
    between = nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(3, 2, padding=1), nn.GELU())
    return conv(r, n, between, {"track_running_stats": False})


def one_dimensional(r: Ref, n: int) -> list[nn.Module]:
    return [
        GatedConv1d(2, n, 3, bias=False, out_gate=r),
        GatedBatchNorm1d(n, out_gate=r),
        nn.Softplus(),
        GatedConv1d(n, 3, 4, padding=3, in_gate=r),
    ]


def tokens(r: Ref, n: int) -> list[nn.Module]:
    layers = one_dimensional(r, n)[:3]
    return [*layers, Transpose(), GatedLinear(n, 3, in_gate=r)]


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def neurons(r: Ref, n: int) -> list[nn.Module]:
    return [
        GatedLinear(5, n, out_gate=r),
        GatedBatchNorm1d(n, out_gate=r),
        nn.Tanh(),
        GatedLinear(n, 3, in_gate=r),
    ]


def flattened(r: Ref, n: int) -> list[nn.Module]:
    layers = conv(r, n, nn.ReLU(), {})[:3]
    return [*layers, nn.Flatten(), GatedLinear(n * 42, 3, in_gate=r.expand(42))]


CASES: dict[str, tuple[Callable[[Ref, int], list[nn.Module]], tuple[int, ...]]] = {
    "strided": (strided, (2, 7, 6)),
    "circular": (circular, (2, 7, 6)),
    "max pooled": (max_pooled, (2, 7, 6)),
    "mean pooled": (mean_pooled, (2, 7, 6)),
    "one-dimensional": (one_dimensional, (2, 11)),
    "tokens": (tokens, (2, 11)),
    "neurons": (neurons, (5,)),
    "flattened": (flattened, (2, 7, 6)),
}


def make(case: str, units: int, device: torch.device | str = "cpu") -> nn.Sequential:
    gates = l0.gates.HardConcrete({"a": units})
    net = nn.Sequential(*CASES[case][0](gates["a"].before_norm(), units))
    gates.attach(net)
    return shaken(net).double().to(device)


@torch.no_grad()
def shaken(net: nn.Sequential) -> nn.Sequential:
    """Norms with parameters and statistics away from 0 and 1."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.affine:
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
            if m.running_mean is not None and m.running_var is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return net


def inputs_of(case: str, batch: int = 4) -> Tensor:
    return torch.randn(batch, *CASES[case][1], dtype=torch.float64)


@contextmanager
def masked_by_hooks(net: nn.Sequential, z: Tensor) -> Iterator[nn.Sequential]:
    """Plain layers with the same parameters; a hook multiplies what the first one makes."""
    plain = copy.deepcopy(net)
    del plain.l0
    plain._forward_pre_hooks.clear()
    for layer in plain.modules():
        if isinstance(layer, GatedLayer):
            layer.__class__ = layer.plain_class  # pyright: ignore[reportAttributeAccessIssue]
    plain[0].register_forward_hook(
        lambda m, args, y: y * z.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
    )
    yield plain


def run_plain(net: nn.Sequential, z: Tensor, x: Tensor, grad: Tensor | None = None):
    leaf = z.clone().requires_grad_()
    with masked_by_hooks(net, leaf) as plain:
        return collect(plain, plain, leaf, x, grad)


def run_gated(net, z: Tensor, x: Tensor, impl: str = "auto", grad: Tensor | None = None, call=None):
    net = copy.deepcopy(net)  # with its statistics
    leaf = z.clone().requires_grad_()
    with l0.use_impl(impl), net.l0.using(leaf):
        return collect(net, net if call is None else lambda x: call(net, x), leaf, x, grad)


def collect(net: nn.Module, call, z: Tensor, x: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = call(x)
    out.backward(out.detach() if grad is None else grad)
    found = {"out": out.detach(), "x": x.grad, "z": torch.where(z != 0, z.grad, 0.0)}
    found |= {f"grad {n}": p.grad for n, p in net.named_parameters() if n[:3] != "l0."}
    return found | {f"buffer {n}": b.clone() for n, b in net.named_buffers() if n[:3] != "l0."}


def assert_same(expected: dict[str, Tensor], got: dict[str, Tensor], tolerance: float = 1e-10):
    assert set(expected) == set(got)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: name + m
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("units", [1, 2, 7])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_plain_layers(case: str, pattern: str, units: int, training: bool, device):
    net = make(case, units, device).train(training)
    z, x = gate_values(pattern, units).to(device), inputs_of(case).to(device)
    expected, got = run_plain(net, z, x), run_gated(net, z, x)
    assert_same(expected, run_gated(net, z, x, "reference"))
    assert_same(expected, got)
    closed = z == 0
    assert bool((got["grad 0.weight"][closed] == 0).all())
    if "grad 0.bias" in got:
        assert bool((got["grad 0.bias"][closed] == 0).all())
    if training and "grad 1.weight" in got:
        assert bool((got["grad 1.weight"][closed] == 0).all())


@pytest.mark.parametrize("case", ["strided", "neurons"])
def test_what_closed_units_leave_behind_learns(case: str):
    """Their beta and the columns that read them; statistics decay by 1 - momentum."""
    net = make(case, 7)
    z = gate_values("half", 7)
    with torch.no_grad():
        net[1].bias.fill_(0.5)
    got = run_gated(net, z, inputs_of(case))
    assert bool((got["grad 1.bias"][z == 0] != 0).all())
    assert bool((got["grad 3.weight"][:, z == 0] != 0).any())
    for name in ("running_mean", "running_var"):
        before = getattr(net[1], name)[z == 0]
        torch.testing.assert_close(got[f"buffer 1.{name}"][z == 0], 0.9 * before)


def test_closed_channels_are_skipped():
    """Convolutions take the work of the open channels, and of one example for the constants."""
    units, batch = 16, 8
    net = make("strided", units)
    x = inputs_of("strided", batch)
    z = torch.ones(units, dtype=torch.float64)
    z[4:] = 0.0
    shapes = []
    for layer in [*net.children()][:4]:
        layer.register_forward_hook(lambda m, args, y: shapes.append((*y.shape,)))
    with net.l0.using(z), FlopCounterMode(display=False) as work:
        net(x).sum().backward()
    assert shapes == [(8, 4, 7, 6), (8 + 4, 4, 7, 6), (8 + 4, 4, 7, 6), (8, 3, 4, 3)]
    made, read = 2 * 9 * 42 * 2, 3 * 9 * 12 * 2  # of one channel and example
    forward = batch * 4 * (made + read) + 12 * read
    # The input of the network needs no gradient.
    backward = batch * 4 * (made + 2 * read) + 2 * 12 * read
    assert work.get_total_flops() == forward + backward


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_upstream_gradient(case: str, strides: str):
    net = make(case, 6)
    z, x = gate_values("half", 6), inputs_of(case)
    shape = run_gated(net, z, x)["out"].shape
    grad = upstream(strides, shape)
    assert_same(run_plain(net, z, x, grad), run_gated(net, z, x, grad=grad))


def test_channels_last_stays():
    net = make("strided", 12).to(memory_format=torch.channels_last)
    x = inputs_of("strided").contiguous(memory_format=torch.channels_last).requires_grad_()
    layouts = []

    def note(grad: Tensor) -> None:
        layouts.append(grad.is_contiguous(memory_format=torch.channels_last))

    def hook(m: nn.Module, args: Any, y: Tensor) -> None:
        note(y)
        y.register_hook(note)

    for layer in (net[0], net[2]):
        layer.register_forward_hook(hook)
    z = gate_values("half", 12)
    with net.l0.using(z):
        net(x).sum().backward()
    assert layouts == [True] * 4
    assert_same(run_plain(net, z, x.detach()), run_gated(net, z, x.detach()))


# PyTorch takes no statistics of an empty batch: one case has no others.
@pytest.mark.parametrize("case", [c for c in CASES if make(c, 5)[1].running_mean is not None])
def test_empty_batch(case: str):
    net = make(case, 5).eval()
    z, x = gate_values("half", 5), inputs_of(case, 0)
    assert_same(run_plain(net, z, x), run_gated(net, z, x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_in_closed_rows_stay_there(case: str, value: float):
    net = make(case, 5)
    for pattern in ("half", "closed"):
        z, x = gate_values(pattern, 5), inputs_of(case)
        clean, broken = run_gated(net, z, x), copy.deepcopy(net)
        with torch.no_grad():
            broken[0].weight[z == 0] = value
        for name, got in run_gated(broken, z, x).items():
            assert got.equal(clean[name]), name


@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str):
    """bf16 is no further from fp64 than twice the masked run is, over several networks."""
    errors: dict[str, dict[str, float]] = {"reference": {}, "auto": {}}
    for seed in range(6):
        torch.manual_seed(seed)
        net = make(case, 48)
        z, x = gate_values("half", 48), inputs_of(case, 8)
        exact = run_plain(net, z, x)
        net.float()
        for impl, sums in errors.items():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = run_gated(net, z.float(), x.float(), impl)
            for name, t in found.items():
                error = float((t.double() - exact[name]).square().sum())
                sums[name] = sums.get(name, 0.0) + error
    for name, error in errors["auto"].items():
        assert error**0.5 <= 2 * errors["reference"][name] ** 0.5, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph_for_any_width(case: str, training: bool):
    net = make(case, 9).train(training)
    net[1].momentum = 0.1  # None is a number that compiled code does not know
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    x = inputs_of(case)
    for opened in (3, 7, 2, 5):
        z = (torch.arange(9) < opened).double()
        eager = copy.deepcopy(net)
        with net.l0.using(z), eager.l0.using(z):
            torch.testing.assert_close(compiled(x), eager(x))
        expected = dict(eager.named_buffers())
        for name, got in net.named_buffers():
            torch.testing.assert_close(got, expected[name], msg=name)
    assert counter.frame_count == 1


def test_gradients_of_compiled_layers():
    net = make("strided", 9)
    torch._dynamo.reset()
    z, x = gate_values("half", 9), inputs_of("strided")

    def call(net: nn.Module, x: Tensor) -> Tensor:
        return torch.compile(net, backend="aot_eager", fullgraph=True)(x)

    assert_same(run_plain(net, z, x), run_gated(net, z, x, call=call))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", [(0, 2), (1, 3), (2, 4), (0, 4)])
def test_checkpointed(part: tuple[int, int], reentrant: bool):
    net = make("circular", 8)
    net[1].momentum = 0.0  # statistics move once more when it runs again
    z, x = gate_values("half", 8), inputs_of("circular")

    def call(net: nn.Module, x: Tensor) -> Tensor:
        first, last = part
        for layer in net[:first]:
            x = layer(x)
        inner = nn.Sequential(*list(net.children())[first:last])
        x = checkpoint(inner, x, use_reentrant=reentrant)
        for layer in list(net.children())[last:4]:
            x = layer(x)
        return x

    found, expected = run_gated(net, z, x, call=call), run_plain(net, z, x)
    for kept in (found, expected):
        del kept["buffer 1.num_batches_tracked"]
    assert_same(expected, found)


@pytest.mark.parametrize("case", CASES)
def test_frozen(case: str):
    net = make(case, 8).eval()
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.linspace(-3, 3, 8))
        x = inputs_of(case)
        expected = net(x)
        with l0.frozen(net):
            torch.testing.assert_close(net(x), expected)
            torch.testing.assert_close(net(x), expected)


def trained(impl: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = make("strided", 16)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    with l0.use_impl(impl):
        for x in [inputs_of("strided") for _ in range(5)]:
            optimizer.zero_grad()
            loss = l0.expected_loss(net, lambda x=x: net(x).square().mean()) + l0.penalty(net)
            loss.backward()
            optimizer.step()
    return {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}


def test_training_steps_as_masked():
    """Draws of their own, SGD with momentum and decay, several steps."""
    assert_same(trained("reference"), trained("auto"))


def test_rows_of_closed_units_may_wait(monkeypatch: pytest.MonkeyPatch):
    """The optimizer that leaves closed rows behind: beta and columns of closed units learn."""
    monkeypatch.setattr("l0kernels.optim.rows.LEAST", 1 << 14)
    found = {}
    for ours in (True, False):
        torch.manual_seed(0)
        net = Wide().float()
        sgd = partial(l0.optim.SGD, model=net) if ours else torch.optim.SGD
        optimizer = sgd(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            x = torch.randn(2, 16, 4, 4)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        if ours:
            assert optimizer.row_weights == ["first.weight", "second.weight"]
        found[ours] = {n: p.detach().clone() for n, p in net.state_dict().items() if n[:2] != "l0"}
    assert_same(found[False], found[True], 1e-5)


class Wide(nn.Module):
    """Layers large enough for rows to be left behind."""

    def __init__(self) -> None:
        super().__init__()
        g = self.l0 = l0.gates.HardConcrete({"a": 256, "b": 64})
        a, b = g["a"].before_norm(), g["b"].before_norm()
        self.first = GatedConv2d(16, 256, 3, padding=1, out_gate=a)
        self.norm = GatedBatchNorm2d(256, out_gate=a)
        self.second = GatedConv2d(256, 64, 3, padding=1, in_gate=a, out_gate=b)
        self.norm2 = GatedBatchNorm2d(64, out_gate=b)
        self.third = GatedConv2d(64, 2, 1, in_gate=b)
        g.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(torch.sigmoid(self.norm(self.first(x)))))
        return self.third(torch.relu(y))


class TwoReaders(nn.Module):
    """A chain of two groups, the first read by two layers; the inputs have gates of their own."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        g = self.l0 = l0.gates.HardConcrete({"x": 3, "a": 8, "b": 6})
        a, b = g["a"].before_norm(), g["b"].before_norm()
        self.first = GatedConv2d(3, 8, 3, padding=1, in_gate=g["x"], out_gate=a)
        self.norm = GatedBatchNorm2d(8, out_gate=a)
        self.second = GatedConv2d(8, 6, 3, padding=1, in_gate=a, out_gate=b)
        self.norm2 = GatedBatchNorm2d(6, out_gate=b)
        self.third = GatedConv2d(6, 2, 1, in_gate=b)
        self.side = GatedConv2d(8, 2, 3, padding=1, in_gate=a)
        if gated:
            g.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        y = torch.sigmoid(self.norm2(self.second(torch.relu(h))))
        return self.third(y) + self.side(torch.cos(h))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_two_readers_and_gates_on_both_sides(training: bool):
    torch.manual_seed(0)
    net = TwoReaders(gated=True).double().train(training)
    x = torch.randn(3, 3, 6, 5, dtype=torch.float64)
    for seed in range(6):
        z = torch.rand(17, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        z = torch.where(z < seed / 5, 0.0, z)
        plain = copy.deepcopy(net)
        leaf = z.clone().requires_grad_()
        for layer in plain.modules():
            if isinstance(layer, GatedLayer):
                layer.__class__ = layer.plain_class  # pyright: ignore[reportAttributeAccessIssue]
        plain._forward_pre_hooks.clear()
        plain.first.register_forward_pre_hook(lambda m, a, s=leaf: (a[0] * s[:3].view(-1, 1, 1),))
        plain.first.register_forward_hook(lambda m, a, y, s=leaf: y * s[3:11].view(-1, 1, 1))
        plain.second.register_forward_hook(lambda m, a, y, s=leaf: y * s[11:].view(-1, 1, 1))
        assert_same(collect(plain, plain, leaf, x, None), run_gated(net, z, x))


def test_bad_use():
    g = l0.gates.HardConcrete({"a": 4, "b": 4})
    a = g["a"].before_norm()
    for make_one in (
        lambda: GatedPReLU(4, out_gate=a),
        lambda: GatedConvTranspose2d(2, 4, 3, out_gate=a),
        lambda: GatedConv2d(4, 4, 3, groups=4, out_gate=a),
        lambda: l0.cat(a, 2),
        lambda: a * g["b"],
        lambda: (g["a"] * g["b"]).before_norm(),
    ):
        with pytest.raises(ValueError, match="expected"):
            make_one()
    for layers, message in (
        ([GatedConv2d(2, 4, 3, out_gate=a), GatedConv2d(4, 2, 1, in_gate=a)], "one BatchNorm"),
        (
            [
                GatedConv2d(2, 4, 3, out_gate=a),
                GatedBatchNorm2d(4, out_gate=a),
                GatedConv2d(4, 2, 1, in_gate=g["a"]),
            ],
            "in every reference, got 1 of 3",
        ),
        (
            [
                GatedConv2d(2, 4, 3, out_gate=a),
                GatedBatchNorm2d(4, out_gate=a),
                GatedConv2d(4, 2, 1, in_gate=Ref(g, (torch.tensor([1, 0, 2, 3]),)).before_norm()),
            ],
            "alone and in order",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            g.attach(nn.Sequential(*layers))
