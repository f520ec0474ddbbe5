# SPDX-License-Identifier: Apache-2.0
"""Packed batch normalisation, each implementation against PyTorch's on the open channels alone."""

import itertools
import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from error_table import within_budget
from harness import ops
from ops.stand_ins import stand_ins
from torch.library import opcheck

import l0kernels as l0
from l0kernels._registry import chosen
from l0kernels.functional import packed_norm
from l0kernels.ops.packed_norm import op
from l0kernels.testing import max_error

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
LAYOUTS = ["contiguous", "channels_last"]
ACTIVATIONS = ["none", "relu"]
PASSES = {"grad_x": "dgrad", "grad_weight": "wgrad", "grad_bias": "wgrad"}  # the rest: forward
NEAR_ZERO = 1e-4  # before ReLU: rounding may change the sign


@dataclass
class Case:
    """Arguments of packed_norm."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    index: torch.Tensor
    z: torch.Tensor
    feature_map: torch.Tensor
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str = "none"

    def tensors(self):
        return {f.name: v for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))}

    def copy(self, **changes):
        """A case with tensors of its own, strides kept."""
        tensors = {k: v.detach().clone() for k, v in self.tensors().items()}
        return replace(self, **(tensors | changes))

    def is_open(self):
        return scale_of(self.z, self.feature_map)[self.index] != 0


def scale_of(z, feature_map):
    return z[feature_map[0]] * z[feature_map[1]]


def make_case(shape, share=0.5, dtypes=DTYPES[1], layout="contiguous", features=None, **changes):
    """One gate per feature; x has as many channels as `shape` says, dummies where gates are closed.

    About `share` of the channels are open; the rest are dummies.
    """
    channels = shape[1]
    features = features or 2 * channels + 3
    x = torch.randn(shape).mul(2).add(0.5).to(dtypes[0])
    if layout == "channels_last" and len(shape) > 3:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    index = torch.randperm(features)[:channels].sort().values
    z = torch.rand(features + 1) + 0.25
    z[index[torch.rand(channels) >= share]] = 0
    z[-1] = 1
    return Case(
        x,
        (torch.rand(features) + 0.5).to(dtypes[1]),
        torch.randn(features).to(dtypes[1]),
        torch.randn(features).to(dtypes[1]),
        (torch.rand(features) + 0.5).to(dtypes[1]),
        index,
        z.double() if dtypes[0] == torch.float64 else z,
        torch.stack([torch.arange(features), torch.full((features,), features)]),
        **changes,
    )


def ours(case):
    return packed_norm(*(getattr(case, f.name) for f in fields(case)))


def plain(case):
    """F.batch_norm of the open channels alone, put in their places among zeros."""
    places = case.is_open().nonzero().flatten()
    if not len(places):  # PyTorch refuses a weight of no channels
        return sum((0 * t.sum() for t in (case.weight, case.bias) if t is not None), 0 * case.x)
    features = case.index[places]
    names = ("running_mean", "running_var", "weight", "bias")
    packed = [None if t is None else t[features] for t in (getattr(case, n) for n in names)]
    open_x = case.x.index_select(1, places)
    y = F.batch_norm(open_x, *packed, case.training, case.momentum, case.eps)
    if case.activation == "relu":
        y = F.relu(y)
    if case.training and case.running_mean is not None:
        with torch.no_grad():
            case.running_mean[features] = packed[0]
            case.running_var[features] = packed[1]
    return torch.zeros_like(case.x).index_copy(1, places, y)


def wide(tensor):
    """Numbers with more digits than float64."""
    return tensor.detach().double().numpy().astype(np.longdouble)


def exact_results(case, upstream):
    """What `results` gives, by the formulas, in more digits than float64; dummies: zeros."""
    places = case.is_open().nonzero().flatten().numpy()
    features = case.index.numpy()[places]
    full = {k: wide(v) for k, v in case.tensors().items() if v.is_floating_point()}
    along = (slice(None), *[None] * (case.x.dim() - 2))
    others = tuple(d for d in range(case.x.dim()) if d != 1)
    count = case.x.numel() // max(1, case.x.shape[1])
    weight, bias = (full.get(name, np.ones(1) * i) for name, i in (("weight", 1), ("bias", 0)))
    weight, bias = (t[features][along] if len(t) > 1 else t for t in (weight, bias))
    x, g = full["x"][:, places], wide(upstream)[:, places]
    if case.training:
        mean = x.mean(others)
        var = ((x - mean[along]) ** 2).mean(others)
        new = {"running_mean": mean, "running_var": var * (count / np.longdouble(count - 1))}
        for name in new.keys() & full.keys():
            full[name][features] *= 1 - np.longdouble(case.momentum)
            full[name][features] += case.momentum * new[name]
    else:
        mean, var = full["running_mean"][features], full["running_var"][features]
    rstd = 1 / np.sqrt(var + case.eps)
    xhat = (x - mean[along]) * rstd[along]
    y = xhat * weight + bias
    if case.activation == "relu":
        g = np.where(y > 0, g, 0)
        y = np.maximum(y, 0)
    total, product = g.sum(others), (g * xhat).sum(others)
    if case.training:
        g = g - total[along] / count - xhat * product[along] / count
    found = {name: full[name] for name in ("running_mean", "running_var") if name in full}
    for name, values in (("y", y), ("grad_x", g * weight * rstd[along])):
        found[name] = np.zeros(case.x.shape, np.longdouble)
        found[name][:, places] = values
    for name, values in (("weight", product), ("bias", total)):
        if name in full:
            found[f"grad_{name}"] = np.zeros_like(full[name])
            found[f"grad_{name}"][features] = values
    return {name: torch.from_numpy(values.astype(np.float64)) for name, values in found.items()}


def results(case, function, upstream):
    """y, then the gradients, then the running statistics, by name; `case` stays as it is."""
    case = case.copy(x=case.x.detach())
    wanted = {}
    for name in ("x", "weight", "bias"):
        if getattr(case, name) is not None:
            wanted[name] = getattr(case, name).requires_grad_()
    y = function(case)
    grads = torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype))
    found = {"y": y.detach()} | {f"grad_{n}": g for n, g in zip(wanted, grads, strict=True)}
    if case.running_mean is not None:
        found |= {"running_mean": case.running_mean, "running_var": case.running_var}
    return found


def away_from_zero(case, upstream):
    """Upstream gradients without those whose way through ReLU rounding decides."""
    if case.activation == "none":
        return upstream
    before = exact_results(replace(case, activation="none"), upstream)["y"]
    return upstream.masked_fill(before.abs() < NEAR_ZERO, 0)


def check(case, upstream=None):
    """Compares values, gradients and statistics with PyTorch, exact and in the same dtype."""
    upstream = torch.randn(case.x.shape) if upstream is None else upstream
    upstream = away_from_zero(case, upstream.to(case.x.dtype))
    actual = results(case, ours, upstream)
    exact = exact_results(case, upstream)
    other = results(case, plain, upstream)
    assert set(actual) == set(exact)
    for name, value in actual.items():
        assert value.dtype == other[name].dtype, name
        check_error(name, value, exact[name], other[name])
    check_closed(case, actual)
    return actual


def check_error(name, actual, exact, plain):
    within_budget("packed_norm", PASSES.get(name, "forward"), actual, exact, plain)


def check_closed(case, actual):
    """What dummies and features that are not packed must be, to the bit."""
    closed = ~case.is_open()
    assert bool((actual["y"][:, closed] == 0).all())
    assert bool((actual["grad_x"][:, closed] == 0).all())
    rest = torch.ones(case.feature_map.shape[1], dtype=torch.bool)
    rest[case.index[~closed]] = False
    for name in ("grad_weight", "grad_bias"):
        assert name not in actual or bool((actual[name][rest] == 0).all())
    for name in ("running_mean", "running_var"):
        before = getattr(case, name)
        if before is not None:
            unchanged = rest if case.training else torch.ones_like(rest)
            assert torch.equal(bits(actual[name][unchanged]), bits(before[unchanged]))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(bits(a[name]), bits(b[name])), name


@pytest.fixture
def size_limit(request):
    """Makes shapes smaller where every thread of a GPU is simulated."""
    name = request.getfixturevalue("impl" if "impl" in request.fixturenames else "op_impl")
    return lambda shape: tuple(min(n, 40) for n in shape) if name == "harness" else shape


# ---- values, gradients, statistics ----

SHAPES = [
    (2, 1),
    (7, 5),
    (67, 17),
    (33, 24),
    (5, 300),
    (2, 3, 1),
    (3, 5, 7),
    (1, 2, 65),
    (4, 6, 5, 5),
    (3, 16, 8, 8),
    (1, 3, 1, 2),
    (2, 1, 3, 3),
    (2, 3, 2, 3, 2),
]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(impl, shape, layout, share):
    check(make_case(shape, share, layout=layout, activation="relu"))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
@pytest.mark.parametrize("layout", [*LAYOUTS, "matrix"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_dtypes(impl, dtypes, layout, activation, training):
    shape = (61, 19) if layout == "matrix" else (5, 19, 4, 3)
    case = make_case(shape, 0.7, dtypes, layout, training=training, activation=activation)
    y = check(case)["y"]
    last = layout == "channels_last"
    assert len(shape) == 2 or y.is_contiguous(memory_format=torch.channels_last) == last
    assert y.is_contiguous() != last


@pytest.mark.parametrize("missing", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_missing_parameters(impl, missing, training, activation):
    case = make_case((9, 7, 3, 3), training=training, activation=activation)
    for name, absent in zip(("weight", "bias", "running_mean"), missing, strict=True):
        if absent:
            setattr(case, name, None)
    if case.running_mean is None:
        case.running_var = None
        if not training:
            with pytest.raises(ValueError, match="expected both in eval mode; got None"):
                ours(case)
            return
    check(case)


@pytest.mark.parametrize("momentum", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_momentum_and_eps(impl, momentum, eps):
    check(make_case((8, 6, 3, 3), momentum=momentum, eps=eps))


@pytest.mark.parametrize("shape", [(9001, 17), (260, 640), (5, 33, 40, 40)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_one_part(impl, shape, layout, size_limit):
    check(make_case(size_limit(shape), 0.8, layout=layout, activation="relu"))


def test_all_dummies(impl):
    case = make_case((6, 2, 3, 3), 0.0)
    found = check(case)
    assert not any(bool(found[name].any()) for name in ("y", "grad_x", "grad_weight", "grad_bias"))


def test_one_channel(impl):
    for shape in ((9, 1), (4, 1, 5), (4, 1, 3, 3)):
        check(make_case(shape, 1.0, features=1))
        check(make_case(shape, 0.0, features=1))


def test_index_order_is_the_order_of_the_channels(impl):
    case = make_case((7, 4, 3, 3), 1.0)
    case.index = torch.tensor([8, 0, 10, 3])
    case.z[3] = 0
    check(case)


def test_products_of_two_gates(impl):
    case = make_case((7, 4, 3, 3), 1.0, features=4)
    case.z = torch.tensor([0.5, 0.0, 0.5, 0.25, 1.0])
    case.feature_map = torch.tensor([[0, 0, 2, 4], [2, 1, 4, 1]])
    assert case.is_open().tolist() == [True, False, True, False]
    check(case)


def test_gates_do_not_scale(impl):
    case = make_case((7, 4, 3, 3), 1.0)
    halved = replace(case, z=case.z / 2)
    upstream = torch.randn(case.x.shape)
    same_bits(results(case, ours, upstream), results(halved, ours, upstream))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_only_the_gradients_asked_for(impl, needs, training):
    case = make_case((6, 5, 3, 3), training=training, activation="relu")
    upstream = torch.randn(case.x.shape)
    everything = results(case, ours, upstream)
    some = case.copy()
    inputs = (some.x, some.weight, some.bias)
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(need)
    y = ours(some)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(upstream)
    for name, tensor, need in zip(("x", "weight", "bias"), inputs, needs, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            assert torch.equal(tensor.grad, everything[f"grad_{name}"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(impl, layout, activation, training):
    case = make_case((4, 3, 2, 2), 1.0, DTYPES[0], layout, training=training)
    case.z[case.index[1]] = 0
    exact = plain(case.copy())
    case.activation = activation
    if activation == "relu":  # not smooth at 0
        assert float(exact[:, case.is_open()].abs().min()) > 1e-4

    def call(x, weight, bias):
        return ours(case.copy(x=x, weight=weight, bias=bias))

    inputs = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
    assert torch.autograd.gradcheck(call, inputs)


def test_backward_saves_no_activation_but_x(op_impl):
    case = make_case((8, 6, 5, 5), activation="relu")
    case.x.requires_grad_()
    held = []

    def note(tensor):
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ours(case)
    assert [t is case.x for t in held if t.numel() >= case.x.numel()] == [True]


# ---- precision ----


@pytest.mark.parametrize("layout", [*LAYOUTS, "matrix"])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=["f64", "f32"])
def test_means_far_from_zero(impl, dtypes, layout):
    shape = (512, 5) if layout == "matrix" else (8, 5, 8, 8)
    case = make_case(shape, 1.0, dtypes, layout)
    case.x += torch.tensor([0.0, 1e1, 1e3, -1e4, 1e5]).reshape([1, -1] + [1] * (len(shape) - 2))
    upstream = torch.randn(shape)
    actual = results(case, ours, upstream)
    exact = exact_results(case, upstream)
    other = results(case, plain, upstream)
    for channel in range(5):  # budgets are per channel: magnitudes differ
        for name in ("y", "grad_x"):
            check_error(name, *(r[name][:, channel] for r in (actual, exact, other)))
        for name in ("running_mean", "running_var"):
            f = int(case.index[channel])
            check_error(name, *(r[name][f] for r in (actual, exact, other)))


@pytest.mark.parametrize("layout", [*LAYOUTS, "matrix"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_outlier(impl, layout, place):
    shape = (700, 3) if layout == "matrix" else (11, 3, 8, 8)
    case = make_case(shape, 1.0, layout=layout)
    at = 0 if place == "first" else -1
    case.x[(at, slice(None), *[at] * (len(shape) - 2))] = 3e4
    check(case)


@pytest.mark.parametrize("layout", [*LAYOUTS, "matrix"])
def test_constant_channels_give_their_bias(op_impl, layout):
    shape = (70, 4) if layout == "matrix" else (7, 4, 5, 5)
    case = make_case(shape, 1.0, layout=layout)
    case.x.copy_(torch.tensor([0.1, -3.3, 1e6, 7e-9]).reshape([1, -1] + [1] * (len(shape) - 2)))
    y = ours(case)
    others = [d for d in range(y.dim()) if d != 1]
    assert torch.equal(y.amin(others), y.amax(others))
    torch.testing.assert_close(y.amin(others), case.bias[case.index], rtol=0, atol=1e-4)


# ---- strides ----

UPSTREAMS = ["one number", "one row", "reversed", "every second", "channels_last", "cat"]


def upstream_of(name, shape):
    if name == "one number":
        return torch.randn(()).expand(shape)
    if name == "one row":
        return torch.randn(1, *shape[1:]).expand(shape)
    if name == "reversed":
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if name == "every second":
        return torch.randn([2 * n for n in shape])[tuple(slice(0, None, 2) for _ in shape)]
    if name == "cat":
        return torch.cat([torch.randn(shape), torch.randn(shape)], 1)[:, shape[1] :]
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", UPSTREAMS)
def test_upstream_gradients_of_any_strides(impl, name, layout):
    case = make_case((6, 5, 4, 3), layout=layout, activation="relu")
    upstream = upstream_of(name, case.x.shape)
    check(case, upstream)
    strided = results(case, ours, upstream)
    same_bits(strided, results(case, ours, upstream.contiguous()))


def inputs(name):
    shape = (6, 5, 4, 3)
    if name == "channels":
        return torch.randn(6, 4, 3, 9).permute(0, 3, 1, 2)[:, 2:7]
    if name == "every second":
        return torch.randn(12, 10, 8, 6)[::2, ::2, ::2, ::2]
    if name == "expanded":
        return torch.randn(6, 5, 1, 1).expand(shape)
    if name == "permuted":
        return torch.randn(4, 5, 3, 6).permute(3, 1, 0, 2)
    if name == "one number later":
        return torch.randn(6 * 5 * 4 * 3 + 1)[1:].reshape(shape)
    return torch.randn(6 * 5 * 4 * 3 + 1)[1:].reshape(6, 4, 3, 5).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "name",
    ["channels", "every second", "expanded", "permuted", "one number later", "later, last"],
)
def test_inputs_of_any_strides(impl, name):
    case = make_case((6, 5, 4, 3), activation="relu")
    case.x = inputs(name)
    actual = results(case, ours, upstream := torch.randn(case.x.shape))
    last = case.x.stride(1) == 1
    for result in (actual["y"], actual["grad_x"]):
        if result is actual["grad_x"] and impl == "reference":
            continue  # PyTorch's own choice
        assert result.is_contiguous(memory_format=torch.channels_last) == last
    like = torch.channels_last if last else torch.contiguous_format
    same = replace(case, x=case.x.contiguous(memory_format=like))
    same_bits(actual, results(same, ours, upstream))
    check(same, upstream)


def test_strided_parameters(impl):
    case = make_case((6, 5, 4, 3), activation="relu")
    upstream = torch.randn(case.x.shape)
    expected = results(case, ours, upstream)
    strided = case.copy()
    for name in ("weight", "bias", "index", "z"):
        setattr(strided, name, getattr(case, name).repeat_interleave(2)[::2])
    strided.feature_map = case.feature_map.t().contiguous().t()
    means, variances = (t.repeat_interleave(2) for t in (case.running_mean, case.running_var))
    strided.running_mean, strided.running_var = means[::2], variances[::2]
    y = ours(strided)
    assert torch.equal(y, expected["y"])
    assert torch.equal(means[::2], expected["running_mean"])
    assert torch.equal(variances[::2], expected["running_var"])
    assert torch.equal(means[1::2], case.running_mean)
    grads = torch.autograd.grad(
        ours(replace(strided, weight=strided.weight.requires_grad_())), strided.weight, upstream
    )
    assert torch.equal(grads[0], expected["grad_weight"])


# ---- empty and tiny ----


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3, 3), (5, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_as_torch(impl, shape, training):
    case = make_case(shape, 1.0, training=training, activation="relu")
    found = results(case, ours, torch.randn(shape))
    expected = results(case, plain, torch.randn(shape))
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(found["running_mean"], case.running_mean)


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_no_channels(op_impl, shape, training):
    case = make_case(shape, 1.0, training=training, activation="relu")
    found = results(case, ours, torch.randn(shape))
    assert found["y"].shape == found["grad_x"].shape == shape
    assert not found["grad_weight"].any() and not found["grad_bias"].any()
    assert torch.equal(found["running_mean"], case.running_mean)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_value_per_channel_is_refused_as_by_torch(impl, shape, share):
    case = make_case(shape, share)
    with pytest.raises(ValueError) as theirs:
        F.batch_norm(case.x, None, None, training=True)
    with pytest.raises(ValueError) as mine:
        ours(case)
    assert str(mine.value) == str(theirs.value)
    check(replace(case, training=False))


# ---- Inf and NaN ----


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("layout", [*LAYOUTS, "matrix"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dummies_do_not_matter(impl, bad, layout, training, activation):
    shape = (30, 6) if layout == "matrix" else (5, 6, 3, 3)
    case = make_case(shape, 1.0, layout=layout, training=training, activation=activation)
    case.z[case.index[[1, 4]]] = 0
    upstream = torch.randn(shape)
    clean = results(case, ours, upstream)
    closed = torch.ones(case.feature_map.shape[1], dtype=torch.bool)
    closed[case.index[[0, 2, 3, 5]]] = False
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(case, name)[closed] = bad
    case.x[:, [1, 4]] = upstream[:, [1, 4]] = bad
    poisoned = results(case, ours, upstream)
    for name in ("running_mean", "running_var"):
        assert torch.equal(bits(poisoned.pop(name)[closed]), bits(getattr(case, name)[closed]))
        clean.pop(name)
    same_bits(poisoned, clean)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("layout", [*LAYOUTS, "matrix"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_open_channels_keep_inf_and_nan(impl, bad, layout, training, activation):
    shape = (30, 3) if layout == "matrix" else (5, 3, 3, 3)
    case = make_case(shape, 1.0, layout=layout, training=training, activation=activation)
    case.x[(2, 1, *[1] * (len(shape) - 2))] = bad
    upstream = torch.randn(shape)
    actual, expected = (results(case, f, upstream) for f in (ours, plain))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)


def test_results_are_written_completely(impl):
    # conftest fills uninitialised memory with NaN; check here that it does.
    assert torch.empty(3).isnan().all()
    for layout, training in itertools.product(LAYOUTS, (True, False)):
        case = make_case((7, 13, 5, 5), 0.4, layout=layout, training=training)
        for name, value in results(case, ours, torch.randn(case.x.shape)).items():
            assert bool(value.isfinite().all()), name


# ---- the raw operator ----


def raw(case):
    """Arguments of the raw operator."""
    values = [getattr(case, f.name) for f in fields(case)]
    return [*values[:-1], op.ACTIVATIONS.index(case.activation)]


def test_statistics_that_backward_reads(op_impl):
    case = make_case((6, 5, 3, 3), 1.0)
    case.z[case.index[2]] = 0
    case.x[:, 2] = math.nan
    case.running_var[case.index[2]] = math.nan
    var, mean = torch.var_mean(case.x.double(), (0, 2, 3), correction=0)
    known = case.running_mean[case.index].double(), case.running_var[case.index].double()
    for training, (m, v) in ((True, (mean, var)), (False, known)):
        _, found_mean, found_rstd = chosen(op._FORWARD)(*raw(case.copy(training=training)))
        m[2], v[2] = 0, math.inf
        torch.testing.assert_close(found_mean.double(), m, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_rstd.double(), (v + case.eps).rsqrt(), rtol=1e-6, atol=0)


def test_a_gpu_step_is_three_launches_each_way(op_impl):
    if op_impl != "harness":
        pytest.skip("only CUDA kernels are launched")
    for shape, layout, training in itertools.product(
        [(40, 17), (3, 17, 5, 5), (5, 3)], LAYOUTS, (True, False)
    ):
        case = make_case(shape, layout=layout, training=training, activation="relu")
        case.x.requires_grad_()
        ops.launches(reset=True)
        y = ours(case)
        assert ops.launches(reset=True)["packed_norm"] <= 3
        y.sum().backward()
        assert ops.launches(reset=True)["packed_norm"] <= 3


def test_backward_uses_the_statistics_of_its_forward(impl):
    case = make_case((6, 5, 3, 3), training=False)
    upstream = torch.randn(case.x.shape)
    expected = results(case, ours, upstream)
    x = case.x.clone().requires_grad_()
    y = ours(replace(case, x=x))
    ours(case.copy(x=case.x + 3, training=True))
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], expected["grad_x"])


# ---- determinism ----


@pytest.mark.parametrize("shape", [(9001, 17), (5, 33, 40, 40)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES[1:3], ids=["f32", "bf16"])
def test_bits_do_not_depend_on_threads(need_cpp, shape, layout, dtypes):
    case = make_case(shape, 0.8, dtypes, layout, activation="relu")
    upstream = torch.randn(shape)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        with l0.use_impl("cpp"):
            found.append(results(case, ours, upstream))
    for other in found[1:]:
        same_bits(found[0], other)


def test_same_bits_twice(op_impl, size_limit):
    case = make_case(size_limit((300, 17, 3, 3)), 0.8, activation="relu")
    upstream = torch.randn(case.x.shape)
    same_bits(results(case, ours, upstream), results(case, ours, upstream))


def test_a_batch_does_not_depend_on_what_ran_before(op_impl):
    case = make_case((5, 7, 3, 3))
    upstream = torch.randn(case.x.shape)
    first = results(case, ours, upstream)
    results(make_case((64, 31)), ours, torch.randn(64, 31))
    same_bits(first, results(case, ours, upstream))


# ---- errors ----


BAD = {
    "x dtype": (TypeError, "x: expected a floating", {"x": torch.ones(4, 3).int()}),
    "x dims": (ValueError, "x: expected 2 to 5 dimensions; got 1", {"x": torch.ones(3)}),
    "activation": (ValueError, "activation: .* none, relu; got gelu", {"activation": "gelu"}),
    "index dtype": (TypeError, "index: expected int64", {"index": torch.ones(3)}),
    "index shape": (
        ValueError,
        r"index: expected shape \[3\]; got \[2\]",
        {"index": torch.arange(2)},
    ),
    "map dtype": (TypeError, "feature_map: expected int64", {"feature_map": torch.ones(2, 9)}),
    "map shape": (
        ValueError,
        r"feature_map: expected shape \[2, F\]; got \[1, 9\]",
        {"feature_map": torch.ones(1, 9).long()},
    ),
    "z dtype": (TypeError, "z: expected torch.float32 with", {"z": torch.ones(10).double()}),
    "z shape": (ValueError, r"z: expected shape \[G", {"z": torch.ones(2, 5)}),
    "weight dtype": (
        TypeError,
        "weight: expected torch.float32 with torch.float32 x; got torch.bfloat16",
        {"weight": torch.ones(9).bfloat16()},
    ),
    "weight shape": (
        ValueError,
        r"weight: expected shape \[9\]; got \[3\]",
        {"weight": torch.ones(3)},
    ),
    "bias shape": (
        ValueError,
        r"bias: expected shape \[9\]; got \[\]",
        {"bias": torch.tensor(1.0)},
    ),
    "eps": (ValueError, "eps: expected a number above 0; got 0", {"eps": 0.0}),
    "eps in eval": (
        ValueError,
        "eps: expected a number of at least 0; got -0.1",
        {"eps": -0.1, "training": False},
    ),
    "one statistic": (
        ValueError,
        "expected both or neither; got no running_var",
        {"running_var": None},
    ),
    "no statistics": (
        ValueError,
        "expected both in eval mode; got None",
        {"running_mean": None, "running_var": None, "training": False},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(impl, name):
    error, message, changes = BAD[name]
    case = make_case((4, 3))
    before = case.copy()
    with pytest.raises(error, match=message):
        ours(replace(case, **changes))
    assert torch.equal(case.running_mean, before.running_mean)


def test_mixed_parameter_dtypes_are_refused(impl):
    case = make_case((4, 3), dtypes=DTYPES[2])
    case.bias = case.bias.bfloat16()
    with pytest.raises(TypeError, match="bias: expected torch.float32 as the others; got torch.bf"):
        ours(case)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"index": torch.tensor([0, 1, 9])}, "index: expected indices from 0 to 8"),
        ({"index": torch.tensor([-1, 1, 2])}, "index: expected indices from 0 to 8"),
        ({"index": torch.tensor([1, 2, 1])}, "index: expected distinct indices"),
        ({"feature_map": torch.full((2, 9), 10)}, "map: expected gates from 0 to 9"),
        ({"feature_map": torch.full((2, 9), -1)}, "map: expected gates from 0 to 9"),
    ],
)
def test_cpp_refuses_bad_indices_before_it_writes(need_cpp, changes, message):
    case = make_case((4, 3), 1.0)
    before = case.running_mean.clone()
    with pytest.raises(RuntimeError, match=message), l0.use_impl("cpp"):
        ours(replace(case, **changes))
    assert torch.equal(case.running_mean, before)


# ---- registration and compilation ----


def opcheck_both(forward, backward, case):
    opcheck(forward, raw(case.copy()))
    case = case.copy()
    _, mean, rstd = forward(*raw(case))
    arguments = (case.weight, case.bias, mean, rstd, case.index, case.z, case.feature_map)
    grad = torch.randn(case.x.shape).to(case.x.dtype)
    how = case.training, op.ACTIVATIONS.index(case.activation)
    for needs in ((True, True, True), (False, True, False), (False, False, False)):
        opcheck(backward, (grad, case.x, *arguments, *how, *needs))


OPCHECKED = list(itertools.product([(6, 5), (6, 5, 3, 3)], LAYOUTS, [True, False]))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("shape, layout, training", OPCHECKED, ids=str)
def test_opcheck(shape, layout, training):
    case = make_case(shape, layout=layout, training=training, activation="relu")
    opcheck_both(op._FORWARD, op._BACKWARD, case)
    bare = replace(case, weight=None, bias=None)
    if training:
        bare = replace(bare, running_mean=None, running_var=None)
    opcheck_both(op._FORWARD, op._BACKWARD, bare)
    grown = case.copy()
    for tensor in (grown.x, grown.weight, grown.bias):
        tensor.requires_grad_()
    opcheck(op._FORWARD, raw(grown))


@pytest.mark.parametrize("shape, layout, training", OPCHECKED, ids=str)
def test_python_stand_in_passes_opcheck(shape, layout, training):
    case = make_case(shape, layout=layout, training=training, activation="relu")
    # The same checks as above, also where the C++ kernels own the operators.
    namespace = stand_ins("packed_norm")
    opcheck_both(namespace.packed_norm.default, namespace.packed_norm_backward.default, case)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_all_widths(name, layout, training):
    full = make_case((4, 12, 3, 3), 1.0, layout=layout, training=training, activation="relu")

    def loss(x, weight, bias, running_mean, running_var, index):
        y = packed_norm(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            index,
            full.z,
            full.feature_map,
            training=training,
            activation="relu",
        )
        return (y**2).sum() + y.shape[1]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with l0.use_impl(name):
        for width in (12, 5, 2, 7):
            found = []
            x = full.x[:, :width].contiguous(
                memory_format=torch.channels_last
                if layout == "channels_last"
                else torch.contiguous_format
            )
            index = torch.randperm(27)[:width].sort().values
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(index, 0)
            for function in (compiled, loss):
                case = full.copy()
                leaves = [t.clone().requires_grad_() for t in (x, case.weight, case.bias)]
                torch._dynamo.mark_dynamic(leaves[0], 1)
                value = function(*leaves, case.running_mean, case.running_var, index)
                grads = torch.autograd.grad(value, leaves)
                found.append((value, *grads, case.running_mean, case.running_var))
            for mine, other in zip(*found, strict=True):
                torch.testing.assert_close(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inference_mode(impl):
    case = make_case((6, 5, 3, 3))
    expected = ours(case.copy())
    with torch.inference_mode():
        assert torch.equal(ours(case.copy()), expected)


def test_same_result_on_every_device(device):
    case = make_case((6, 5, 3, 3), activation="relu")
    upstream = away_from_zero(case, torch.randn(case.x.shape))
    exact = exact_results(case, upstream)
    there = replace(case, **{k: v.to(device) for k, v in case.tensors().items()})
    for name, value in results(there, ours, upstream.to(device)).items():
        assert max_error(value.cpu(), exact[name]) < 1e-5, name
