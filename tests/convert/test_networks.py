# SPDX-License-Identifier: Apache-2.0
"""Packed networks equal masked ones, in every output, gradient and buffer.

The oracle knows nothing of the package's layers: a plain copy of the network whose readers have
their inputs multiplied by the gates through hooks.
"""

import copy
from collections.abc import Callable
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import models

DRAWS = 50
Finish = Callable[[], None]


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


class Case:
    """A packed network, its plain twin, and where the gates multiply in the twin."""

    def __init__(self, packed: nn.Module, plain: nn.Module, x: Tensor) -> None:
        self.packed, self.plain, self.x = packed, plain, x
        self.scales: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {}
        self.norms: dict[str, str] = {}
        self.rows: dict[str, str] = {}


def zoo(name: str, granularity: str = "unit") -> Case:
    torch.manual_seed(0)
    network = models.network(name)
    plain = network.build()
    x = network.example(2)[0]
    if name.startswith("wrn"):
        x = x[:, :, :8, :8]  # pooled globally: small images keep 50 draws quick
    packed = l0.convert(
        copy.deepcopy(plain), "hard_concrete", example_inputs=(x,), granularity=granularity
    )
    case = Case(packed, plain, x)
    for group in network.groups:
        extra = f"{group.consumer}.in" if f"{group.consumer}.in" in packed.l0.names else None

        def scale(z, group=group, extra=extra):
            own = z[group.producer].repeat_interleave(group.spread)
            return own if extra is None else own * z[extra]

        case.scales[group.consumer] = scale
        case.rows[group.producer] = group.producer
        if group.norm is not None:
            case.norms[group.norm] = group.producer
    if "fc1.in" in packed.l0.names and "fc1" not in case.scales:
        case.scales["fc1"] = lambda z: z["fc1.in"]
    return case


def by_hand(kind: type[nn.Module], x: Tensor) -> Case:
    torch.manual_seed(0)
    packed, plain = kind(gated=True), kind(gated=False)
    packed.l0.attach(packed)
    plain.load_state_dict({k: v for k, v in packed.state_dict().items() if k[:3] != "l0."})
    return Case(packed, plain, x)


def hand_conv() -> Case:
    case = by_hand(HandConv, torch.randn(3, 3, 8, 8))
    case.scales = {
        "b": lambda z: z["a"],
        "c": lambda z: torch.cat((z["b"], torch.ones_like(z["a"][:3]), z["a"])),
        "fc": lambda z: z["c"].repeat_interleave(16),
    }
    case.norms, case.rows = {"norm": "a"}, {n: n for n in "abc"} | {"depth": "a"}
    return case


def hand_linear() -> Case:
    case = by_hand(HandLinear, torch.randn(6, 9))
    case.scales = {
        "a": lambda z: z["x"],
        "b": lambda z: z["a"] * z["b.in"],
        "c": lambda z: z["b"],
    }
    case.norms, case.rows = {"norm": "a"}, {n: n for n in "ab"}
    return case


CASES: dict[str, Callable[[], Case]] = {
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


def by_group(packed: nn.Module, z: Tensor) -> dict[str, Tensor]:
    return {name: z[where] for name, where in packed.l0.slices()}


def run_masked(case: Case, model: nn.Module, z: Tensor, x: Tensor) -> tuple[Tensor, Finish]:
    """The plain twin with gates multiplied in by hooks; ``finish`` puts closed statistics back."""
    groups = by_group(case.packed, z)
    modules = dict(model.named_modules())
    before = {
        name: (modules[name].running_mean.clone(), modules[name].running_var.clone())
        for name in case.norms
    }
    handles = []
    for name, scale in case.scales.items():

        def multiply(module, args, scale=scale):
            shape = (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
            return (args[0] * scale(groups).view(shape), *args[1:])

        handles.append(modules[name].register_forward_pre_hook(multiply))
    out = model(x)
    for handle in handles:
        handle.remove()

    def finish() -> None:
        for name, (mean, var) in before.items():
            closed = groups[case.norms[name]] == 0
            modules[name].running_mean[closed] = mean[closed]
            modules[name].running_var[closed] = var[closed]

    return out, finish


def collect(
    model: nn.Module, run: Callable[[Tensor, Tensor], tuple[Tensor, Finish]], z: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward; the model is left as it was."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.zero_grad()
    z, x = z.clone().requires_grad_(), x.clone().requires_grad_()
    out, finish = run(z, x)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    finish()
    found = {"output": out.detach(), "grad input": x.grad}
    found["grad gates"] = torch.where(z.detach() != 0, z.grad, 0.0)
    for name, p in model.named_parameters():
        if not name.startswith("l0."):
            found[f"grad {name}"] = p.grad
    with torch.no_grad():
        for name, b in model.named_buffers():
            if not name.startswith("l0."):
                found[f"buffer {name}"] = b.double().clone()
                b.copy_(before[name])
    return found


def run_packed(case: Case):
    def run(z: Tensor, x: Tensor) -> tuple[Tensor, Finish]:
        with case.packed.l0.using(z):
            return case.packed(x), lambda: None

    return run


def run_twin(case: Case, twin: nn.Module):
    return lambda z, x: run_masked(case, twin, z, x)


def draw(count: int, seed: int, sizes: list[int]) -> Tensor:
    """Gate values: mostly random fractions, also all closed, all open and one open per group."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(2, count, generator=generator, dtype=torch.float64)
    fraction = (0.5, 0.1, 0.9, 0.25, 0.03)[seed % 5]
    z = torch.where(u[0] < fraction, 0.05 + 0.95 * u[1], 0.0)
    if seed == 0:
        z = torch.zeros(count, dtype=torch.float64)
    if seed == 1:
        z = torch.ones(count, dtype=torch.float64)
    if seed == 2:
        z = torch.zeros(count, dtype=torch.float64)
        z[torch.tensor([0, *sizes[:-1]]).cumsum(0)] = 0.7
    return z


def relative_errors(exact: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Largest error per tensor relative to its size; gradients that vanish share a floor."""
    assert set(exact) == set(got)
    largest = max(float(t.abs().max()) for n, t in exact.items() if n.startswith("grad"))
    errors = {}
    for name, t in exact.items():
        assert t.shape == got[name].shape, name
        floor = 1e-3 * largest if name.startswith("grad") else 1e-12
        errors[name] = float((got[name].double() - t).abs().max()) / max(
            float(t.abs().max()), floor
        )
    return errors


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_packed_equals_masked_in_fp64(name: str, training: bool):
    case = CASES[name]()
    case.packed.double().train(training)
    case.plain.double().train(training)
    x = case.x.double()
    gates = case.packed.l0
    for seed in range(DRAWS if training else 5):
        z = draw(gates.count, seed, gates.sizes)
        exact = collect(case.plain, run_twin(case, case.plain), z, x)
        got = collect(case.packed, run_packed(case), z, x)
        errors = relative_errors(exact, got)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-10, (seed, worst, errors[worst])
        check_closed_gradients(case, z, got)


def check_closed_gradients(case: Case, z: Tensor, got: dict[str, Tensor]) -> None:
    groups = by_group(case.packed, z)
    for layer, group in case.rows.items():
        closed = groups[group] == 0
        for kind in ("weight", "bias"):
            grad = got.get(f"grad {layer}.{kind}")
            assert grad is None or bool((grad[closed] == 0).all()), (layer, kind)
    for layer, scale in case.scales.items():
        assert bool((got[f"grad {layer}.weight"][:, scale(groups) == 0] == 0).all()), layer


def errors_by_kind(exact: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """L2 error relative to the exact values: output, gradients by kind, buffers."""
    kinds = {
        "output": ["output"],
        "grad input": ["grad input"],
        "grad gates": ["grad gates"],
        "grad parameters": [n for n in exact if n.startswith("grad ") and "." in n],
        "buffers": [n for n in exact if n.startswith("buffer")],
    }
    errors = {}
    for kind, names in kinds.items():
        if names:
            t = torch.cat([exact[n].double().flatten() for n in names])
            error = torch.cat([got[n].double().flatten() for n in names]) - t
            errors[kind] = float(error.norm() / t.norm().clamp_min(1e-30))
    return errors


@pytest.mark.parametrize("name", CASES)
def test_packed_fp32_errs_at_most_twice_as_much_as_masked_fp32(name: str):
    case = CASES[name]()
    exact_twin = copy.deepcopy(case.plain).double()
    # PyTorch's own error depends on the layout: the masked twin gets that of the packed network.
    packed_parameters = dict(case.packed.named_parameters())
    for name_, p in case.plain.named_parameters():
        p.data = torch.empty_like(packed_parameters[name_]).copy_(p)
    gates = case.packed.l0
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for seed in range(5, 14):
        z = draw(gates.count, seed, gates.sizes).float()
        exact = collect(exact_twin, run_twin(case, exact_twin), z.double(), case.x.double())
        masked = collect(case.plain, run_twin(case, case.plain), z, case.x)
        packed = collect(case.packed, run_packed(case), z, case.x)
        for errors, got in ((ours, packed), (theirs, masked)):
            for kind, error in errors_by_kind(exact, got).items():
                errors.setdefault(kind, []).append(error)
    # Medians: a rounding error that flips one ReLU is worth more than all others together.
    for kind in ours:
        floor = torch.finfo(torch.float32).eps
        assert median(ours[kind]) <= 2 * median(theirs[kind]) + floor, kind


def test_a_wrong_gate_gradient_is_seen():
    case = hand_linear()
    case.packed.double()
    z = draw(case.packed.l0.count, 5, case.packed.l0.sizes)
    got = collect(case.packed, run_packed(case), z, case.x.double())
    wrong = dict(got) | {"grad gates": got["grad gates"] * (1 + 1e-9)}
    assert max(relative_errors(got, wrong).values()) > 1e-10
