# SPDX-License-Identifier: Apache-2.0
"""`convert(place="before_norm")`: WRN-16-4 against masked plain layers, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models
from l0kernels.nn import GatedLayer

DRAWS = {"half": 0.5, "a tenth": 0.1, "none": 0.0, "all": 1.0}


@pytest.fixture(scope="module")
def wrn() -> tuple[nn.Module, nn.Module, Tensor]:
    """A converted WRN-16-4 in fp64, the plain one, and a batch."""
    torch.manual_seed(0)
    network = models.network("wrn-16-4")
    plain = network.build()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)  # pyright: ignore
                module.running_var.uniform_(0.5, 1.5)  # pyright: ignore
    x = network.example(3)[0][:, :, :12, :12]
    packed = l0.convert(copy.deepcopy(plain), "arm", example_inputs=(x[:2],), place="before_norm")
    return packed.double(), plain.double(), x.double()


def gate_values(gates: l0.gates.Gates, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(int(10 * share))
    z = 0.2 + 0.8 * torch.rand(gates.count, generator=generator, dtype=torch.float64)
    for _, where in gates.slices():
        size = where.stop - where.start
        order = torch.randperm(size, generator=generator)
        z[where] = torch.where(order < round(share * size), z[where], 0.0)
    return z


def run(net: nn.Module, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Forward and backward; everything by name."""
    x = x.clone().requires_grad_()
    out = net(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "z": torch.where(z != 0, z.grad, 0.0)}
    found |= {f"grad {n}": p.grad for n, p in net.named_parameters() if n[:3] != "l0."}
    return found | {f"buffer {n}": b.clone() for n, b in net.named_buffers() if n[:3] != "l0."}


def run_masked(plain: nn.Module, gates: l0.gates.Gates, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Plain modules; hooks multiply what the producers make, before the norm."""
    net = copy.deepcopy(plain)
    for name, where in gates.slices():
        net.get_submodule(name).register_forward_hook(
            lambda m, args, y, where=where: y * z[where].view(-1, 1, 1)
        )
    return run(net, x, z)


@pytest.mark.parametrize("share", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrn_16_4_as_masked_in_fp64(wrn, share: float, training: bool):
    packed, plain, x = wrn
    packed, plain = copy.deepcopy(packed).train(training), plain.train(training)
    z = gate_values(packed.l0, share)
    expected = run_masked(plain, packed.l0, x, z.clone().requires_grad_())
    state = copy.deepcopy(packed.state_dict())
    for impl in ("reference", "auto"):
        packed.load_state_dict(state)
        packed.zero_grad()
        leaf = z.clone().requires_grad_()
        with l0.use_impl(impl), packed.l0.using(leaf):
            got = run(packed, x, leaf)
        assert set(got) == set(expected)
        largest = max(float(t.abs().max()) for n, t in expected.items() if n[:4] == "grad")
        for name, value in expected.items():
            floor = 1e-3 * largest if name[:4] == "grad" else 1e-12
            error = float((got[name] - value).abs().max()) / max(float(value.abs().max()), floor)
            assert error <= 1e-9, (impl, name, error)


def test_wrn_16_4_packs_its_inner_widths(wrn):
    packed = copy.deepcopy(wrn[0])
    widths = {}
    for name, module in packed.named_modules():
        if isinstance(module, GatedLayer):
            module.register_forward_pre_hook(
                lambda m, args, name=name: widths.update({name: args[0].shape[1]})
            )
    z = gate_values(packed.l0, 0.25)
    packed.l0._multiple = 1  # exact widths
    with packed.l0.using(z):
        packed(wrn[2])
    readers = [n for n, m in packed.named_modules() if getattr(m, "reads_constants", False)]
    assert len(readers) == len(packed.l0.names) == 6
    assert [widths[n] for n in readers] == [s // 4 for s in packed.l0.sizes]


class Chain(nn.Module):
    """stem -> a -> norm -> what is tested -> b -> head."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm is None else norm
        self.b = nn.Conv2d(8, 5, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(5)
        self.c = nn.Conv2d(5, 5, 1)
        self.extra = nn.Identity()
        self.between: Callable[[Tensor], Tensor] = F.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.between(self.norm(self.a(F.relu(self.stem(x))))))
        return self.c(F.relu(self.norm2(y))).mean((2, 3))


def with_between(function: Callable[[Tensor], Tensor], extra: nn.Module | None = None) -> Chain:
    net = Chain()
    net.between = function
    net.extra = nn.Identity() if extra is None else extra
    return net


class Past(Chain):
    def forward(self, x: Tensor) -> Tensor:
        made = self.a(F.relu(self.stem(x)))
        y = self.b(F.relu(self.norm(made)))
        return self.c(F.relu(self.norm2(y))).mean((2, 3)) + self.extra(made).mean((2, 3))


class Early(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.norm(F.relu(self.a(F.relu(self.stem(x))))))
        return self.c(F.relu(self.norm2(y))).mean((2, 3))


class Beside(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(F.relu(self.stem(x)))))
        beside = self.extra(torch.cat((h, x), 1)).mean((2, 3))
        return self.c(F.relu(self.norm2(self.b(h)))).mean((2, 3)) + beside


def past() -> nn.Module:
    net = Past()
    net.extra = nn.Conv2d(8, 5, 1)
    return net


def beside() -> nn.Module:
    net = Beside()
    net.extra = nn.Conv2d(11, 5, 3)
    return net


class Scaled(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.between = lambda h: F.relu(h * self.scale)


def per_channel(h: Tensor) -> Tensor:
    return h + torch.arange(h.shape[1]).to(h).view(-1, 1, 1)


REFUSED = {
    "no norm": (lambda: Chain(nn.Identity()), "no BatchNorm reads what it makes, as it is"),
    "another norm": (lambda: Chain(nn.InstanceNorm2d(8)), "no BatchNorm reads what it makes"),
    "an activation first": (Early, "no BatchNorm reads what it makes, as it is"),
    "softmax": (lambda: with_between(lambda h: h.softmax(1)), "mixed with one another before b"),
    "dropout": (
        lambda: with_between(lambda h: F.dropout(h, 0.5)),
        "dropout acts on what b reads",
    ),
    "one reader past the norm": (past, "extra reads its units past norm"),
    "one reader with others": (beside, "extra reads its units beside others"),
    "by channel": (lambda: with_between(per_channel), "packed and masked to differ by"),
    "by example": (
        lambda: with_between(lambda h: h - h.mean(0)),
        "packed and masked to differ by",
    ),
    "a scale": (Scaled, "there is scale (8, 1, 1)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str):
    build, reason = REFUSED[case]
    torch.manual_seed(0)
    net = l0.convert(
        build(), "hard_concrete", example_inputs=(torch.randn(3, 3, 7, 7),), place="before_norm"
    )
    assert reason in net.l0.refused["a"], net.l0.refused["a"]
    assert reason in str(l0.report(net))
    assert "b" in net.l0.names  # the other group stays


@pytest.mark.parametrize("kind", ["prelu", "depthwise", "transposed"])
def test_modules_between_are_refused(kind: str):
    extra = {
        "prelu": nn.PReLU(8),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "transposed": nn.ConvTranspose2d(6, 8, 3, padding=1),
    }[kind]
    net = Chain()
    if kind == "transposed":
        net.a = extra
    else:
        net.extra = extra
        net.between = extra
    net = l0.convert(
        net, "hard_concrete", example_inputs=(torch.randn(3, 3, 7, 7),), place="before_norm"
    )
    expected = {
        "prelu": "behind norm its units pass through PReLU extra",
        "depthwise": "behind norm its units pass through Conv2d extra",
        "transposed": "ConvTranspose2d a cannot work with constants for closed units",
    }
    assert expected[kind] in net.l0.refused["a"]


@pytest.mark.parametrize(
    "between",
    [
        F.relu,
        torch.sigmoid,
        lambda h: h * torch.sigmoid(h),
        lambda h: F.relu(h, inplace=True),
        lambda h: F.dropout(h, 0.5, training=False),
        lambda h: F.avg_pool2d(F.pad(F.elu(h), (2, 0, 1, 1)), 2, padding=1),
    ],
    ids=["relu", "sigmoid", "swish", "in place", "no dropout", "padded and pooled"],
)
def test_gated(between: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    net = l0.convert(
        with_between(between),
        "hard_concrete",
        example_inputs=(torch.randn(3, 3, 7, 7),),
        place="before_norm",
    )
    assert net.l0.names == ["a", "b"]
    assert "stem" in net.l0.refused
    assert l0.report(net).groups[0].consumers == ("b",)


def test_neurons_and_flattened_channels():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.BatchNorm1d(10),
        nn.Tanh(),
        nn.Linear(10, 3),
    )
    net = l0.convert(
        net, "hard_concrete", example_inputs=(torch.randn(4, 3, 6, 6),), place="before_norm"
    )
    assert net.l0.names == ["0", "5"]


def trained(method: str, impl: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Chain().double()
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    l0.convert(net, method, example_inputs=(x,), place="before_norm", lam=1e-3)
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.05, gate_lr=0.5), momentum=0.9)
    opened = []
    for i in range(4):
        optimizer.zero_grad()
        y = torch.randn(4, 5, dtype=torch.float64)
        with l0.use_impl(impl):
            loss = l0.expected_loss(net, lambda y=y: (net(x + i) - y).square().mean())  # noqa: B023
            (loss + l0.penalty(net)).backward()
        opened.append(sum(net.l0.current_draw().counts[:2]))
        optimizer.step()
    found = {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    return found | {"opened": torch.tensor(opened)}


@pytest.mark.parametrize("method", ["hard_concrete", "arm", "dep", "cs"])
def test_methods_train_as_masked(method: str):
    masked, packed = trained(method, "reference"), trained(method, "auto")
    if method in ("hard_concrete", "arm"):
        assert min(masked.pop("opened")) < 13
    for name, value in packed.items():
        if name != "opened":
            torch.testing.assert_close(value, masked[name], atol=1e-9, rtol=1e-9, msg=name)


def test_report_with_inputs_times_it():
    net = Chain()
    x = (torch.randn(3, 3, 7, 7),)
    l0.convert(net, "hard_concrete", example_inputs=x, place="before_norm")
    speed = l0.report(net, x).speed
    assert speed is not None
    assert set(speed.groups) == {"a", "b"}
    assert speed.packed > 0


def test_revert_gives_plain_layers_back():
    net = Chain()
    before = {name: type(module) for name, module in net.named_modules()}
    l0.convert(net, "hard_concrete", example_inputs=(torch.randn(3, 3, 7, 7),), place="before_norm")
    l0.revert(net)
    assert {name: type(module) for name, module in net.named_modules()} == before


def test_bad_arguments():
    x = (torch.randn(3, 3, 7, 7),)
    with pytest.raises(ValueError, match="place: expected one of .* got 'before'"):
        l0.convert(Chain(), "arm", example_inputs=x, place="before")
    with pytest.raises(ValueError, match="place: expected 'after_act' with 'input' gates"):
        l0.convert(Chain(), "arm", example_inputs=x, place="before_norm", granularity="input")
    net = Chain()
    with pytest.raises(ValueError, match="place: expected 'after_act' with scope='example'"):
        l0.convert(net, "arm", example_inputs=x, place="before_norm", scope="example")
    assert not any(isinstance(m, GatedLayer) for m in net.modules())
    with pytest.raises(ValueError, match="nothing can be gated"):
        l0.convert(
            nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
            "arm",
            example_inputs=(torch.randn(3, 4),),
            place="before_norm",
        )
