# SPDX-License-Identifier: Apache-2.0
"""The compact model equals the masked one, is plain, and leaves the net alone."""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map_only

import l0kernels as l0
from l0kernels.bench import models, zoo
from l0kernels.nn import GatedLayer, gated_class

Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


class Mixed(nn.Module):
    """Concatenation, depthwise, PReLU, padding, norms of all kinds, dropout that stays on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm_a = nn.BatchNorm2d(7, affine=False)
        self.b = nn.Conv2d(3, 5, 1)
        self.slope = nn.PReLU(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12, track_running_stats=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.c = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8 * 4, 9)
        self.norm_fc = nn.BatchNorm1d(9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.cat((self.norm_a(self.a(x)), F.softplus(self.b(x))), 1)
        y = F.hardswish(self.norm(self.depth(self.slope(y))))
        y = F.adaptive_max_pool2d(F.gelu(self.c(F.relu(self.up(y)))), 2)
        y = self.head(F.dropout(torch.tanh(self.norm_fc(self.fc(y.flatten(1)))), 0.5, True))
        return {"logits": y}


class Stack(nn.Module):
    """Convolutions with batch norm, wide enough for channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 36, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(36)
        self.conv2 = nn.Conv2d(36, 40, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(40)
        self.conv3 = nn.Conv2d(40, 33, 3, padding=1)
        self.classifier = nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return self.classifier(F.relu(self.conv3(y)).mean((2, 3)))


class Signal(nn.Module):
    """1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 9, 5, padding="same")
        self.norm = nn.BatchNorm1d(9)
        self.b = nn.Conv1d(9, 6, 3, stride=2, dilation=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.elu(self.norm(self.a(x))))
        return self.fc(F.silu(y).mean(2))


class TwoGates(nn.Module):
    """Two gates on one feature, and on network inputs, wired by hand; gates at a second place."""

    def __init__(self) -> None:
        super().__init__()
        g = l0.gates.HardConcrete({"x": 9, "a": 8, "b.in": 8, "b": 7})
        self.a = l0.nn.GatedLinear(9, 8, in_gate=g["x"], out_gate=g["a"])
        self.norm = l0.nn.GatedBatchNorm1d(8, out_gate=g["a"])
        self.rest = nn.Sequential(
            g,
            l0.nn.GatedLinear(8, 7, bias=False, in_gate=g["b.in"] * g["a"], out_gate=g["b"]),
            nn.Sigmoid(),
            l0.nn.GatedLinear(7, 3, in_gate=g["b"]),
            l0.nn.GatedLinear(3, 3),
        )
        g.attach(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.rest(F.gelu(self.norm(self.a(x))))
        return {"logits": y, "sure": y > 0}


def cached(make: Make) -> Make:
    """Convert once, and give every test its own copy."""
    made = cache(make)
    return lambda: copy.deepcopy(made())


def converted(net: nn.Module, inputs: tuple[Tensor, ...], **options) -> nn.Module:
    return l0.convert(net, "hard_concrete", example_inputs=inputs, **options)


def from_bench(name: str, **options) -> Make:
    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        network = models.network(name)
        x = network.example(3)[0]
        # Wide networks pool globally: small images keep the draws quick.
        x = x[:, :, :8, :8] if name.startswith("wrn") else x
        return converted(network.build(), (x,), **options), (x,)

    return cached(make)


def from_zoo(entry: zoo.Entry, **options) -> Make:
    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        if not entry.available():
            pytest.skip(f"{entry.name} needs {entry.needs}")
        inputs = entry.example("small", 2)
        return converted(entry.build("small"), inputs, **options), inputs

    return make


def here(kind: type[nn.Module], *shape: int) -> Make:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return cached(lambda: (converted(kind(), (x,)), (x,)))


def two_gates() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return TwoGates(), (torch.randn(6, 9),)


NETWORKS: dict[str, Make] = {
    "mlp": from_bench("mlp-784-300-100"),
    "mlp, input gates": from_bench("mlp-784-300-100", granularity="input"),
    "lenet5": from_bench("lenet5"),
    "lenet5, input gates": from_bench("lenet5", granularity="input"),
    "vgg16": from_bench("vgg16"),
    "wrn-16-4": from_bench("wrn-16-4"),
    "stack": here(Stack, 3, 3, 6, 6),
    "mixed": here(Mixed, 3, 3, 6, 6),
    "1-D": here(Signal, 2, 2, 17),
    "by hand": two_gates,
}
KINDS = ("all closed", "all open", "one open", "few", "half")


def set_gates(net: nn.Module, kind: str, seed: int = 0) -> None:
    """Give the deterministic gates a pattern; open ones are fractions and ones."""
    gates = l0.training.gates_of(net)
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(2, gates.count, generator=generator)
    if kind == "one open":
        is_open = torch.zeros(gates.count, dtype=torch.bool)
        is_open[[where.stop - 1 for _, where in gates.slices()]] = True
    else:
        is_open = u[0] < {"all closed": 0.0, "all open": 1.1, "few": 0.1, "half": 0.5}[kind]
    with torch.no_grad():
        gates.log_alpha.copy_(torch.where(is_open, 6 * u[1] - 2, -9.0))


def randomize(net: nn.Module) -> None:
    """Biases, slopes and statistics that are not 0, 1 or all the same."""
    generator = torch.Generator().manual_seed(1)
    for name, t in itertools.chain(net.named_parameters(), net.named_buffers()):
        if t.is_floating_point() and t.dim() == 1 and not name.startswith("l0."):
            t.data.add_(0.2 * torch.rand(t.shape, generator=generator))


def double(value):
    return tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t.clone(), value
    )


@torch.no_grad()
def outputs(net: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [t for t in tree_leaves(net(*inputs)) if isinstance(t, Tensor)]


def assert_close(expected: list[Tensor], got: list[Tensor], tolerance: float) -> None:
    assert len(expected) == len(got) > 0
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            assert float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-3)
        else:
            assert torch.equal(a, b)


def check_equal(make: Make, kinds: tuple[str, ...] = KINDS) -> None:
    net, inputs = make()
    randomize(net)
    net, inputs = net.double().eval(), double(inputs)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for kind in kinds:
        set_gates(net, kind)
        small = l0.compact(net, inputs)
        assert_plain(small)
        with l0.use_impl("reference"):
            masked = outputs(net, inputs)
        assert_close(masked, outputs(small, inputs), 1e-9)
        if kind == "all open":
            continue
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def assert_plain(small: nn.Module) -> None:
    for module in small.modules():
        assert not isinstance(module, (GatedLayer, l0.gates.Gates))
        assert not hasattr(module, "in_gate") and not hasattr(module, "in_port")
        assert_widths(module)
    assert not any("log_alpha" in name for name in small.state_dict())
    assert all(p.is_leaf for p in small.parameters())


def assert_widths(module: nn.Module) -> None:
    """What a module says of its widths is what its parameters have."""
    if isinstance(module, nn.Linear):
        assert module.weight.shape == (module.out_features, module.in_features)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        inputs = module.in_channels // module.groups
        assert module.weight.shape[:2] == (module.out_channels, inputs)
    if isinstance(module, nn.ConvTranspose2d):
        assert module.weight.shape[:2] == (module.in_channels, module.out_channels)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        for t in (module.weight, module.bias, module.running_mean, module.running_var):
            assert t is None or t.shape == (module.num_features,)
    if isinstance(module, nn.PReLU):
        assert module.weight.shape == (module.num_parameters,)


def deterministic(net: nn.Module) -> dict[str, Tensor]:
    gates = l0.training.gates_of(net)
    z = gates.deterministic().detach()
    return {name: z[where] for name, where in gates.slices()}


@pytest.fixture
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Masked and compact runs draw different dropout noise, which is not what is compared.
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x)
    return None


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("no_dropout")
def test_outputs_equal_masked_in_fp64(name):
    # VGG-16 has 15 million weights: two kinds of gates are enough of it.
    check_equal(NETWORKS[name], ("all closed", "half") if name == "vgg16" else KINDS)


@pytest.mark.parametrize("entry", zoo.entries(), ids=lambda e: e.name)
def test_zoo_outputs_equal_masked_in_fp64(entry):
    check_equal(from_zoo(entry), ("all closed", "one open", "half"))


@pytest.mark.parametrize("entry", zoo.entries(), ids=lambda e: e.name)
def test_zoo_outputs_equal_masked_in_fp32(entry):
    """Masked, packed and compact differ by rounding: 1e-5, relative in the Euclidean norm."""
    net, inputs = from_zoo(entry)()
    randomize(net)
    set_gates(net.eval(), "half")
    small = l0.compact(net, inputs)
    with l0.use_impl("reference"):
        masked = outputs(net, inputs)
    for found in (outputs(net, inputs), outputs(small, inputs)):
        for a, b in zip(masked, found, strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm()) > 0


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_heads_and_neurons_of_transformers(name):
    make = from_zoo(zoo.entry(name), select=l0.select.heads | l0.select.inner)
    check_equal(make, ("all closed", "one open", "half"))
    gates = l0.training.gates_of(make()[0])
    assert {group.endswith(".heads") for group in gates.names} == {True, False}


@pytest.mark.parametrize("name", ["lenet5", "googlenet", "bert"])
def test_zoo_with_input_gates(name):
    check_equal(from_zoo(zoo.entry(name), granularity="input"), ("one open", "few", "half"))


@pytest.mark.parametrize("name", ["mlp-784-300-100", "lenet5"])
def test_predictions_in_fp32_are_the_same(name):
    net, _ = from_bench(name)()
    set_gates(net, "half")
    x = models.network(name).example(2000, seed=1)[0]
    small = l0.compact(net, (x[:2],)).eval()
    net.eval()
    with l0.use_impl("reference"):
        masked = outputs(net, (x,))[0]
    found = outputs(small, (x,))[0]
    assert torch.equal(masked.argmax(1), found.argmax(1))
    assert len(found.argmax(1).unique()) > 1


@pytest.mark.parametrize("name", ["stack", "mixed", "1-D"])
def test_only_open_rows_and_columns_stay(name):
    net, inputs = NETWORKS[name]()
    set_gates(net, "half")
    kept = {n: (z != 0).nonzero().flatten() for n, z in deterministic(net).items()}
    small = l0.compact(net, inputs)
    for group, units in kept.items():
        layer, full = small.get_submodule(group), net.get_submodule(group)
        assert len(units) >= 2
        rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        assert layer.weight.shape[rows] == len(units) < full.weight.shape[rows]
        for bias in ("bias",) if layer.bias is not None else ():
            assert torch.equal(getattr(layer, bias), getattr(full, bias)[units])


def test_columns_are_multiplied_by_their_gates():
    net, inputs = NETWORKS["mlp"]()
    set_gates(net, "half")
    z = deterministic(net)
    rows, columns = ((z[n] != 0).nonzero().flatten() for n in ("fc2", "fc1"))
    expected = (net.fc2.weight * z["fc1"])[rows][:, columns]
    torch.testing.assert_close(l0.compact(net, inputs).fc2.weight.detach(), expected.detach())


def test_statistics_follow_their_channels():
    net, inputs = NETWORKS["stack"]()
    randomize(net)
    set_gates(net, "half")
    units = (deterministic(net)["conv1"] != 0).nonzero().flatten()
    small = l0.compact(net, inputs)
    norm, full = small.norm1, net.norm1
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(full, name)[units])
    assert norm.num_features == len(units)


def test_a_unit_that_all_readers_close_is_dropped():
    net, inputs = NETWORKS["lenet5, input gates"]()
    set_gates(net, "all open")
    where = dict(net.l0.slices())
    with torch.no_grad():
        extra = net.l0.log_alpha[where["fc1.in"]]
        extra[3 * 16 : 4 * 16] = -9  # all positions of channel 3
        extra[5 * 16 : 6 * 16 - 1] = -9  # all but one of channel 5
    small = l0.compact(net, inputs)
    assert small.conv2.out_channels == small.conv2.weight.shape[0] == 49
    assert small.fc1.in_features == 49 * 16
    columns = small.fc1.weight[:, 4 * 16 : 5 * 16]  # channel 5 has moved up
    assert (columns[:, :-1] == 0).all() and (columns[:, -1] != 0).any()


def test_closed_network_inputs_stay_as_zero_columns():
    net, inputs = NETWORKS["mlp, input gates"]()
    set_gates(net, "half")
    closed = deterministic(net)["fc1.in"] == 0
    small = l0.compact(net, inputs)
    assert small.fc1.in_features == 784
    assert (small.fc1.weight[:, closed] == 0).all()
    assert (small.fc1.weight[:, ~closed] != 0).any(0).all()


def test_all_closed_leaves_two_silent_units():
    net, inputs = NETWORKS["stack"]()
    randomize(net)
    set_gates(net, "all closed")
    small = l0.compact(net, inputs).eval()
    norm = small.norm2
    assert small.conv2.weight.shape[:2] == (2, 2)
    assert (norm.weight == 0).all() and (norm.bias == 0).all()
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
    assert (small.classifier.weight == 0).all()
    assert torch.equal(small(inputs[0]), small.classifier.bias.expand(3, 10))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_closed_units_stays_behind(bad):
    net, inputs = NETWORKS["stack"]()
    set_gates(net, "half")
    closed = deterministic(net)["conv1"] == 0
    norm = net.norm1
    for t in (net.conv1.weight, norm.weight, norm.bias, norm.running_var):
        t.data[closed] = bad
    net.conv2.weight.data[:, closed] = bad
    small = l0.compact(net, inputs)
    assert all(t.isfinite().all() for t in small.state_dict().values())


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items() if isinstance(t, Tensor)}


def test_the_net_is_left_as_it_was():
    net, inputs = NETWORKS["stack"]()
    set_gates(net, "half")
    net.train()
    net.norm1.eval()
    loss = net(inputs[0]).sum()
    torch.rand(3)  # away from the seed
    before, modes = snapshot(net), [m.training for m in net.modules()]
    types = [type(m) for m in net.modules()]
    generator, drawn = torch.get_rng_state(), net.l0.current_draw()
    l0.compact(net, inputs)
    assert torch.equal(torch.get_rng_state(), generator)
    assert net.l0.current_draw() is drawn
    assert [m.training for m in net.modules()] == modes
    assert [type(m) for m in net.modules()] == types
    after = snapshot(net)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    loss.backward()
    assert net.classifier.weight.grad is not None


def test_no_memory_is_shared_and_modes_dtypes_layouts_stay():
    net, inputs = NETWORKS["stack"]()
    set_gates(net, "half")
    net.train()
    net.norm1.eval()
    net.conv3.weight.requires_grad_(False)
    wide = net.conv2.weight
    assert wide.is_contiguous(memory_format=torch.channels_last) and not wide.is_contiguous()
    small = l0.compact(net, inputs)
    assert small.training and not small.norm1.training
    frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
    assert frozen == ["conv3.weight"]
    cut = small.conv2.weight
    assert cut.is_contiguous(memory_format=torch.channels_last) and not cut.is_contiguous()
    ours = {t.untyped_storage().data_ptr() for t in small.state_dict().values()}
    theirs = {t.untyped_storage().data_ptr() for t in snapshot_tensors(net)}
    assert not ours & theirs


def snapshot_tensors(net: nn.Module) -> list[Tensor]:
    return [t for t in net.state_dict().values() if isinstance(t, Tensor)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_stay_in_their_dtype(dtype):
    net, inputs = NETWORKS["mlp"]()
    net.to(dtype)
    set_gates(net, "half")
    with torch.autocast("cpu", torch.float16):
        small = l0.compact(net, (inputs[0].to(dtype),))
    assert {p.dtype for p in small.parameters()} == {dtype}


@pytest.fixture
def process_group() -> Iterator[None]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def compiled_twice(net: nn.Module) -> nn.Module:
    return torch.compile(nn.parallel.DataParallel(torch.compile(net)))


@pytest.mark.parametrize(
    "wrap",
    [AveragedModel, torch.compile, nn.parallel.DistributedDataParallel, compiled_twice],
)
@pytest.mark.usefixtures("process_group")
def test_wrappers(wrap):
    net, inputs = NETWORKS["lenet5"]()
    set_gates(net, "half")
    small = l0.compact(wrap(net), inputs)
    assert type(small) is type(net)
    assert_close(outputs(l0.compact(net, inputs), inputs), outputs(small, inputs), 0.0)


class Around(nn.Module):
    """A model with gates among other layers, and a layer that was never gated beside it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.before = nn.Conv2d(1, 1, 1)
        self.net = net
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(10, 3), l0.nn.GatedLinear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.before(x)))


@pytest.mark.parametrize("wrap", [lambda net: net, AveragedModel, torch.compile])
def test_a_model_around_comes_back_whole(wrap):
    net, inputs = NETWORKS["lenet5"]()
    set_gates(net, "half")
    model = Around(net).double().eval()
    inputs = double(inputs)
    with l0.use_impl("reference"):
        masked = outputs(model, inputs)
    before = snapshot(model)
    small = l0.compact(wrap(model), inputs)
    assert type(small) is Around and small.net.conv2.out_channels < 50
    assert_plain(small)
    assert_close(masked, outputs(small, inputs), 1e-9)
    after = snapshot(model)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}


class Watched(Around):
    """Reads the width of what the model inside makes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.net.conv2.weight.shape[0]


def test_the_whole_model_is_compared():
    net, inputs = NETWORKS["lenet5"]()
    set_gates(net, "half")
    l0.compact(net, inputs)
    with pytest.raises(RuntimeError, match=r"agree to 1e-09, got .* in output 0"):
        l0.compact(Watched(net), inputs)


def test_two_models_with_gates_side_by_side_are_refused():
    with pytest.raises(ValueError, match="expected one set of gates, got 2; pass the part"):
        l0.compact(nn.ModuleList((Summed(), Summed())), (torch.randn(3, 4),))


def test_under_inference_mode_it_can_still_train():
    net, inputs = NETWORKS["lenet5"]()
    with torch.inference_mode():
        small = l0.compact(net, inputs)
    small(inputs[0]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("kind", ["all closed", "half"])
def test_it_trains_on(kind):
    net, inputs = NETWORKS["mixed"]()
    set_gates(net, kind)
    small = l0.compact(net, inputs).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.2)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(40):
        torch.manual_seed(0)
        loss = F.cross_entropy(small(*inputs)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_hooks_of_the_user_stay():
    net, inputs = NETWORKS["lenet5"]()
    set_gates(net, "half")
    seen = []
    net.conv2.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    small = l0.compact(net, inputs)
    seen.clear()
    small(*inputs)
    assert seen == [small.conv2.out_channels]
    assert len(small._forward_pre_hooks) == 0


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor, scale: float = 1.0, shift: Tensor | None = None):
        x = self.embed(words)
        x = x + self.down(F.relu(self.up(x))) * scale
        y = self.out(x)
        return (y if shift is None else y + shift), x


def tied() -> tuple[nn.Module, Tensor]:
    words = torch.arange(10).view(2, 5)
    net = converted(Tied(), (words,))
    set_gates(net, "half")
    return net, words


def test_tied_weights_stay_tied():
    net, words = tied()
    small = l0.compact(net, (words,))
    assert small.out.weight is small.embed.weight
    assert small.up.out_features == small.down.in_features < 20


def test_keyword_arguments_and_several_outputs():
    net, words = tied()
    inputs = {"shift": torch.randn(11), "words": words, "scale": 2.0}
    small = l0.compact(net, inputs).eval()
    net.eval()
    for a, b in zip(net(**inputs), small(**inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["lenet5", "wrn-16-4", "by hand"])
def test_torch_export(name, strict):
    net, inputs = NETWORKS[name]()
    set_gates(net, "half")
    small = l0.compact(net, inputs).eval()
    program = torch.export.export(small, inputs, strict=strict)
    assert_close(outputs(small, inputs), outputs(program.module(), inputs), 1e-6)


def test_layers_without_gates_become_plain_too():
    net, inputs = two_gates()
    small = l0.compact(net, inputs)
    assert type(small.rest[4]) is nn.Linear and type(small.rest[0]) is nn.Identity


class Summed(nn.Module):
    """Wrongly wired: units are summed by no layer, so closing one does not silence it."""

    def __init__(self) -> None:
        super().__init__()
        g = l0.gates.HardConcrete({"a": 6})
        self.a = l0.nn.GatedLinear(4, 6, out_gate=g["a"])
        self.b = l0.nn.GatedLinear(6, 2, in_gate=g["a"])
        g.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) + y.sum(1, keepdim=True)


def test_a_difference_is_found_and_named():
    net = Summed()
    set_gates(net, "half")
    with pytest.raises(RuntimeError, match=r"agree to 1e-09, got .* in output 0"):
        l0.compact(net, (torch.randn(3, 4),))


class Last(nn.Module):
    """Two outputs from a gated layer each; what ``after`` makes of them is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.a(x))
        return self.after(self.b(y)), self.c(y)

    def after(self, y: Tensor) -> Tensor:
        return y

    @property
    def is_small(self) -> bool:
        return type(self.a) is nn.Linear


def last(after: Callable[[Last, Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    x = torch.randn(3, 4)
    net = converted(Last(), (x,))
    set_gates(net, "half")
    net.__class__ = type("After", (Last,), {"after": after})
    return net, x


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "after",
    [
        lambda net, y: y * NAN if net.is_small else y,
        lambda net, y: y if net.is_small else y * NAN,
        lambda net, y: y.index_fill(1, torch.tensor([2]), NAN if net.is_small else -INF),
        lambda net, y: y.index_fill(1, torch.tensor([2]), INF if net.is_small else -INF),
        lambda net, y: y.index_fill(1, torch.tensor([2 + net.is_small]), -INF),
    ],
    ids=["NaN in compact", "NaN in masked", "NaN for -inf", "inf for -inf", "-inf elsewhere"],
)
def test_what_is_not_finite_on_one_side_only_is_a_difference(after):
    net, x = last(after)
    with pytest.raises(RuntimeError, match="agree to 1e-09, got inf in output 0"):
        l0.compact(net, (x,))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_on_both_sides_is_equal(value):
    net, x = last(lambda net, y: y.index_fill(1, torch.tensor([1, 4]), value))
    net.register_forward_hook(lambda module, args, out: (*out, out[0]))  # first and last
    small = l0.compact(net, (x,))
    assert_places(small(x)[0], [1, 4], value)


def assert_places(y: Tensor, places: list[int], value: float) -> None:
    rest = [i for i in range(y.shape[1]) if i not in places]
    assert y[:, rest].isfinite().all()
    filled = y[:, places]
    assert torch.equal(filled.nan_to_num(7.0), torch.full_like(filled, value).nan_to_num(7.0))


@pytest.mark.parametrize("value", [NAN, -INF])
def test_finite_places_beside_others_are_compared(value):
    net, x = last(lambda net, y: y.index_fill(1, torch.tensor([1]), value) + 1e-6 * net.is_small)
    with pytest.raises(RuntimeError, match="agree to 1e-09, got .*e-0. in output 0"):
        l0.compact(net, (x,))


def test_both_parts_of_complex_outputs_are_compared():
    net, x = last(lambda net, y: torch.complex(y, y + 1e-3 * net.is_small).conj())
    with pytest.raises(RuntimeError, match="agree to 1e-09, got .*e-0. in output 0"):
        l0.compact(net, (x,))
    net, x = last(lambda net, y: torch.complex(y, y + 1).conj())
    assert l0.compact(net, (x,))(x)[0].is_complex()


class Inplace(Last):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.mul_(2))


def test_a_forward_that_changes_its_inputs():
    x = torch.randn(3, 4, dtype=torch.float64)
    net = converted(Last(), (x.float(),)).double()
    net.__class__ = Inplace
    set_gates(net, "half")
    before = x.clone()
    l0.compact(net, (x,))
    assert torch.equal(x, before)


class Viewed(Summed):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 6))


def test_a_forward_that_needs_the_full_width_is_found():
    net = Viewed()
    set_gates(net, "half")
    with pytest.raises(RuntimeError, match="compact model's forward fails"):
        l0.compact(net, (torch.randn(3, 4),))


class Own(l0.nn.GatedLinear):
    pass


def test_errors():
    net, (x,) = NETWORKS["lenet5"]()
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        l0.compact(3, (x,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="as a tuple .* or a mapping .*, got Tensor"):
        l0.compact(net, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected a model with gates"):
        l0.compact(nn.Linear(2, 2), (x,))
    with pytest.raises(ValueError, match="example_inputs: the model's forward fails"):
        l0.compact(net, (x[:, :, :3],))
    net.l0.log_alpha.data[1] = float("nan")
    with pytest.raises(ValueError, match="expected gates without NaN, got 1 of 570"):
        l0.compact(net, (x,))


def test_layers_of_the_users_own_are_refused():
    net = Summed()
    net.a.__class__ = Own
    with pytest.raises(ValueError, match=r"expected gated layers of l0kernels.nn, got \['Own'\]"):
        l0.compact(net, (torch.randn(3, 4),))


def test_two_sets_of_gates_are_refused():
    outer = Summed()
    outer.inner = Summed()
    with pytest.raises(ValueError, match="expected one set of gates"):
        l0.compact(outer, (torch.randn(3, 4),))


def test_every_gated_class_is_compacted_somewhere():
    swapped = {type(m) for make in NETWORKS.values() for m in make()[0].modules()}
    convolutions = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    others = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)
    assert {gated_class(cls) for cls in convolutions + others} <= swapped
