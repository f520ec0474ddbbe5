# SPDX-License-Identifier: Apache-2.0
"""Problems and shared tests of the layers that read open lists on the device.

`GatedContract` holds the tests; a subclass says which layer it is, and its `impl` fixture what
runs behind the registered operators.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from error_table import close, within_budget
from ops.stand_ins import stand_ins
from torch.library import opcheck

import l0kernels as l0
from l0kernels.functional import GateLayout, gated_conv2d, gated_linear
from l0kernels.ops.sample_gates import reference as sample_gates

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
STRIDES = ["one number", "one row", "reversed", "every second"]
OTHER_FEATURES = 5  # of a port in front of the layer's two


@dataclass
class Problem:
    """Arguments of `gated_linear`; with a window (stride, padding, dilation), `gated_conv2d`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    z: torch.Tensor
    index: torch.Tensor
    counts: torch.Tensor
    maps: torch.Tensor
    in_span: tuple[int, int] | None
    out_span: tuple[int, int] | None
    activation: str = "none"
    window: tuple | None = None

    @property
    def dim(self):
        return -1 if self.window is None else 1

    def lists(self):
        return self.z, self.index, self.counts, self.maps

    def options(self):
        return (*(self.window or ()), self.activation)

    def run(self, x, weight, bias, z):
        layer = gated_linear if self.window is None else gated_conv2d
        lists = (z, self.index, self.counts, self.maps)
        return layer(x, weight, bias, *lists, self.in_span, self.out_span, *self.options())

    def raw(self):
        """The arguments of the registered operator."""
        spans = [list(span or ()) for span in (self.in_span, self.out_span)]
        window = [_pair(value) for value in self.window or ()]
        return (self.x, self.weight, self.bias, *self.lists(), *spans, *window, self.activation)

    def exact(self):
        """The same numbers in float64."""
        bias = None if self.bias is None else self.bias.double()
        return replace(
            self, x=self.x.double(), weight=self.weight.double(), bias=bias, z=self.z.double()
        )

    def width(self, span, features):
        return features if span is None else int(self.counts[span[1]])

    @property
    def n_in(self):
        return self.width(self.in_span, self.weight.shape[1])

    @property
    def n_out(self):
        return self.width(self.out_span, self.weight.shape[0])

    def features(self, span, count):
        """Packed features and their scales, with z's gradient."""
        if span is None:
            return slice(None), None
        places = slice(span[0], span[0] + count)
        features = self.index[places]
        return features, span[0] + features

    def scale(self, z, entries):
        z = torch.cat([z[:-1], z[-1:].detach()])
        return z[self.maps[0, entries]] * z[self.maps[1, entries]]

    def open_features(self, span, features):
        """Which features of a full axis are neither closed nor dummies."""
        if span is None:
            return torch.ones(features, dtype=torch.bool)
        packed, entries = self.features(span, self.width(span, features))
        is_open = torch.zeros(features, dtype=torch.bool)
        is_open[packed] = self.scale(self.z, entries) != 0
        return is_open


def _pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def dense(problem, x, weight, bias, z, mask=None):
    """The layer with indexing and PyTorch's own operations; `mask` stands in for relu's."""
    dim = problem.dim % x.dim()
    x = x.narrow(dim, 0, problem.n_in)
    cols, entries = problem.features(problem.in_span, problem.n_in)
    if entries is not None:
        shape = [-1 if d == dim else 1 for d in range(x.dim())]
        scale = problem.scale(z, entries).reshape(shape)
        x = torch.where(scale == 0, 0.0, x.to(scale.dtype) * scale).to(x.dtype)
    rows, entries = problem.features(problem.out_span, problem.n_out)
    is_open = problem.open_features(problem.in_span, weight.shape[1])
    is_open = is_open.reshape(1, -1, *[1] * (weight.dim() - 2))
    weight = torch.where(is_open, weight, 0.0)[rows][:, cols].to(x.dtype)
    bias = None if bias is None else bias[rows].to(x.dtype)
    if problem.window is None:
        y = F.linear(x, weight, bias)
    elif x.numel() and weight.numel():
        y = F.conv2d(x, weight, bias, *problem.window)
    else:  # PyTorch refuses convolutions without channels
        one = F.conv2d(x.new_zeros(x.shape[0], 1, *x.shape[2:]), weight.new_zeros(1, 1, *weight.shape[2:]), None, *problem.window)  # fmt: skip  # noqa: E501
        y = one.expand(-1, problem.n_out, -1, -1)
        y = y if bias is None else y + bias.reshape(-1, 1, 1)
    if problem.activation == "relu":
        y = F.relu(y) if mask is None else y * mask.narrow(dim, 0, problem.n_out)
    if entries is not None:
        closed = problem.scale(problem.z, entries) == 0
        y = y.masked_fill(closed.reshape([-1 if d == dim else 1 for d in range(y.dim())]), 0)
    behind = list(y.shape)
    behind[dim] = problem.weight.shape[0] - problem.n_out
    return torch.cat([y, y.new_zeros(behind)], dim)


def fill_behind(tensor, dim, count, value=math.nan):
    """Overwrites what lies behind the packed features."""
    tensor.narrow(dim, count, tensor.shape[dim] - count).fill_(value)
    return tensor


def gradients(problem, function, upstream, **options):
    """The output and the gradients of x, weight, bias (zeros if there is none) and z."""
    names = ("x", "weight", "bias", "z")
    leaves = [getattr(problem, name) for name in names]
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves, **options)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, upstream.to(y.dtype), allow_unused=True))
    grads = [None if leaf is None else next(found) for leaf in leaves]
    return y.detach(), *grads


def check(impl, problem, upstream=None):
    """Compares output and gradients with the dense layer, exact and in the same dtype."""
    exact_problem = problem.exact()
    y_shape = dense(exact_problem, *leaves_of(exact_problem)).shape
    if upstream is None:
        upstream = torch.randn(y_shape)
    upstream = upstream.to(problem.x.dtype)
    actual = gradients(problem, problem.run, upstream)
    # Near 0 rounding decides what relu lets through: the gradients are those of its own choice.
    mask = (actual[0] > 0).double()
    exact = gradients(exact_problem, bind(exact_problem), upstream, mask=mask)
    plain = gradients(problem, bind(problem), upstream, mask=mask.to(problem.x.dtype))
    forward = [
        dense(p, *leaves_of(p)).detach() for p in (exact_problem, problem)
    ]  # with relu of its own
    op = "gated_linear" if problem.window is None else "gated_conv2d"
    compare(op, "forward", actual[0], forward[0], forward[1])
    passes = ("dgrad", "wgrad", "wgrad", "gates")
    for what, mine, true, other in zip(passes, actual[1:], exact[1:], plain[1:], strict=True):
        if mine is None or true is None:
            assert true is None or bool((true == 0).all())
            assert mine is None or bool((mine == 0).all())
            continue
        compare(op, what, mine, true, other)
    check_zeros(problem, *actual)
    check_layouts(impl, problem, *actual)
    return actual


def compare(op, what, mine, true, other):
    if mine.dtype == torch.float64:
        close(op, what, mine, true)
    else:
        within_budget(op, what, mine, true, other)


def leaves_of(problem):
    return problem.x, problem.weight, problem.bias, problem.z


def bind(problem):
    return lambda *leaves, **options: dense(problem, *leaves, **options)


def check_zeros(problem, y, grad_x, grad_weight, grad_bias, grad_z):
    """What belongs to closed features is exactly 0."""
    dim, n_in, n_out = problem.dim % y.dim(), problem.n_in, problem.n_out
    open_in = problem.open_features(problem.in_span, problem.weight.shape[1])
    open_out = problem.open_features(problem.out_span, problem.weight.shape[0])
    packed_in = open_in[problem.features(problem.in_span, n_in)[0]][:n_in]
    packed_out = open_out[problem.features(problem.out_span, n_out)[0]][:n_out]
    for tensor, is_open in ((y, packed_out), (grad_x, packed_in)):
        behind = tensor.shape[dim] - is_open.shape[0]
        is_closed = torch.cat([~is_open, torch.ones(behind, dtype=torch.bool)])
        assert bool((tensor.index_select(dim, is_closed.nonzero().flatten()) == 0).all())
    assert bool((grad_weight[~open_out] == 0).all())
    assert bool((grad_weight[:, ~open_in] == 0).all())
    assert grad_bias is None or bool((grad_bias[~open_out] == 0).all())
    idle = torch.ones(problem.z.shape[0], dtype=torch.bool)
    if problem.in_span is not None:
        start = problem.in_span[0]
        idle[problem.maps[:, start : start + open_in.shape[0]][:, open_in].flatten()] = False
    idle[-1] = True
    assert grad_z is None or bool((grad_z[idle] == 0).all())


def check_layouts(impl, problem, y, grad_x, grad_weight, grad_bias, grad_z):
    """Dtypes, and the strides that the registered operators promise."""
    for result, argument in zip((y, grad_x, grad_weight, grad_bias, grad_z),
                                (problem.x, *leaves_of(problem)), strict=True):  # fmt: skip
        assert result is None or result.dtype == argument.dtype
    if problem.window is not None:
        assert y.is_contiguous(memory_format=torch.channels_last)
    if impl != "reference":
        assert grad_weight.stride() == torch.empty_like(problem.weight).stride()


class GatedContract:
    """What every implementation of a gated layer must do."""

    OP: object  # the module with the raw operators
    SHAPES: list  # of problems: (weight, x without its features, window)
    LARGE: tuple  # one of several blocks
    USUAL = DTYPES[1]  # of x and of the parameters, where a test does not choose

    @pytest.fixture
    def make(self):
        return self.problem

    def problem(
        self,
        shape=None,
        share=0.5,
        dtypes=None,
        *,
        bias=True,
        activation="none",
        packs=(True, True),
        capacity="full",
        expand=1,
        extra=False,
    ):
        """Draws a layer.

        Args:
            shape: like one of SHAPES; by default the first.
            share: of the gates that are open.
            dtypes: of x and of the parameters; by default USUAL.
            packs: whether the inputs and the outputs are packed.
            capacity: of x, "full", "exact" (no column behind the packed ones) or a number.
            expand: input features per gate.
            extra: a second gate for every input feature.
        """
        weight_shape, around, window = shape or self.SHAPES[0]
        dtypes = dtypes or self.USUAL
        outputs, inputs = weight_shape[:2]
        widths = [OTHER_FEATURES, -(-inputs // expand), outputs, inputs if extra else 0]
        ends = torch.tensor([0, *widths]).cumsum(0)
        gates = int(ends[-1])
        born = [
            torch.arange(OTHER_FEATURES),
            ends[1] + torch.arange(inputs) // expand,
            ends[2] + torch.arange(outputs),
        ]
        maps = torch.stack([torch.cat(born), torch.full((sum(map(len, born)),), gates)])
        starts = [0, OTHER_FEATURES, OTHER_FEATURES + inputs]
        if extra:
            maps[1, starts[1] : starts[2]] = ends[3] + torch.arange(inputs)
        z = torch.where(torch.rand(gates) < share, torch.rand(gates) + 0.25, 0.0)
        z = torch.cat([z, torch.ones(1)])
        ports = torch.tensor([*starts, maps.shape[1]])
        index, _, counts = sample_gates.open_lists(z, GateLayout(ends, maps, ports))
        in_span = (starts[1], 1) if packs[0] else None
        out_span = (starts[2], 2) if packs[1] else None
        n_in = int(counts[1]) if packs[0] else inputs
        columns = {"full": inputs, "exact": n_in}.get(capacity, capacity)
        dim = -1 if window is None else 1
        x_shape = (*around, columns) if window is None else (around[0], columns, *around[1:])
        x = torch.randn(x_shape).to(dtypes[0])
        if window is not None:
            x = x.to(memory_format=torch.channels_last)
        return Problem(
            fill_behind(x, dim, n_in),
            torch.randn(weight_shape).to(dtypes[1]),
            torch.randn(outputs).to(dtypes[1]) if bias else None,
            z.double() if dtypes[0] == torch.float64 else z,
            index,
            counts,
            maps,
            in_span,
            out_span,
            activation,
            window,
        )

    def upstream(self, problem):
        """A gradient with NaN where nothing is packed."""
        with torch.no_grad():
            grad = torch.randn(dense(problem.exact(), *leaves_of(problem.exact())).shape)
        return fill_behind(grad, problem.dim, problem.n_out)

    # ---- values and gradients ----

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_shapes(self, impl, make, share):
        for shape in self.SHAPES:
            problem = make(shape, share)
            check(impl, problem, self.upstream(problem))

    @pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}"[6:])
    @pytest.mark.parametrize("activation", ["none", "relu"])
    def test_dtypes(self, impl, make, dtypes, activation):
        problem = make(dtypes=dtypes, activation=activation)
        check(impl, problem, self.upstream(problem))

    @pytest.mark.parametrize("packs", [(False, False), (False, True), (True, False)], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    def test_axes_that_are_not_packed(self, impl, make, packs, bias):
        problem = make(packs=packs, bias=bias, activation="relu")
        check(impl, problem, self.upstream(problem))

    @pytest.mark.parametrize("more", [0, 1, 3, 16])
    def test_any_capacity(self, impl, make, more):
        exact = make(capacity="exact")
        wide = list(exact.x.shape)
        wide[exact.dim] = more
        behind = torch.full(wide, math.nan)
        problem = replace(exact, x=torch.cat([exact.x, behind], exact.dim))
        check(impl, problem, self.upstream(problem))

    def test_more_than_one_block(self, impl, make):
        problem = make(self.LARGE, 0.7)
        check(impl, problem, self.upstream(problem))

    @pytest.mark.parametrize("inputs", [0, 1])
    @pytest.mark.parametrize("outputs", [0, 1])
    def test_next_to_nothing_is_packed(self, impl, make, inputs, outputs):
        problem = make(share=1.0, activation="relu")
        problem.counts[1:] = torch.tensor([inputs, outputs])
        # A gradient is one sum or none: without cancellation its error is not luck.
        problem.x, problem.weight = problem.x.abs(), problem.weight.abs()
        fill_behind(problem.x, problem.dim, inputs)
        check(impl, problem, self.upstream(problem).abs())

    def test_one_open_feature_beside_a_dummy(self, impl, make):
        problem = make(share=0.0)
        first_in, first_out = OTHER_FEATURES, OTHER_FEATURES + problem.weight.shape[1]
        problem.z[first_in + 1] = 0.5  # the lists hold the features 0 and 1 of both axes
        problem.z[first_out] = 0.25
        # One sum is all that z's gradient is: without cancellation its error is not luck.
        problem.x, problem.weight = problem.x.abs(), problem.weight.abs()
        upstream = self.upstream(problem).abs()
        _, _, grad_weight, grad_bias, grad_z = check(impl, problem, upstream)
        assert bool((grad_weight[0, 1] != 0).all()) and grad_bias.nonzero().flatten() == 0
        assert grad_z.nonzero().flatten().tolist() == [first_in + 1]

    def test_gates_of_several_features(self, impl, make):
        check(impl, make(expand=4))

    def test_products_of_two_gates(self, impl, make):
        check(impl, make(share=0.8, extra=True))

    def test_one_gate_twice_on_a_feature(self, impl, make):
        problem = make()
        features = slice(OTHER_FEATURES, OTHER_FEATURES + problem.weight.shape[1])
        problem.maps[1, features] = problem.maps[0, features]
        check(impl, problem)

    def test_negative_gates(self, impl, make):
        problem = make()
        problem.z[:-1] *= -1
        check(impl, problem)

    @pytest.mark.parametrize("name", ["x", "weight", "bias", "z"])
    def test_only_the_gradient_asked_for(self, impl, make, name):
        problem = make(activation="relu")
        upstream = self.upstream(problem)
        names = ("x", "weight", "bias", "z")
        together = dict(zip(names, gradients(problem, problem.run, upstream)[1:], strict=True))
        leaves = {n: getattr(problem, n).detach().requires_grad_(n == name) for n in names}
        problem.run(**leaves).backward(upstream)
        for other, leaf in leaves.items():
            assert (leaf.grad is not None) == (other == name)
        assert torch.equal(leaves[name].grad, together[name])

    def test_gradcheck(self, impl, make):
        problem = make(self.SHAPES[1], 0.7, DTYPES[0], capacity="exact")
        is_open = problem.z[:-1] != 0
        x, weight, bias = (tensor.detach().requires_grad_() for tensor in leaves_of(problem)[:3])
        open_z = problem.z[:-1][is_open].clone().requires_grad_()

        def run(x, weight, bias, open_z):
            # Closed gates stay closed: opening them a little would change what is packed.
            z = torch.zeros(len(is_open), dtype=open_z.dtype).masked_scatter(is_open, open_z)
            return problem.run(x, weight, bias, torch.cat([z, torch.ones(1).double()]))

        assert torch.autograd.gradcheck(run, (x, weight, bias, open_z))

    # ---- strides ----

    @pytest.mark.parametrize("name", STRIDES)
    def test_upstream_gradients_of_any_strides(self, impl, make, name):
        problem = make(activation="relu")
        shape = self.upstream(problem).shape
        check(impl, problem, strided(name, shape))

    @pytest.mark.parametrize("name", STRIDES)
    def test_inputs_of_any_strides(self, impl, make, name):
        problem = make()
        problem.x = strided(name, problem.x.shape).to(problem.x.dtype)
        check(impl, problem)

    @pytest.mark.parametrize("name", STRIDES)
    def test_weights_of_any_strides(self, impl, make, name):
        problem = make()
        problem.weight = strided(name, problem.weight.shape).to(problem.weight.dtype)
        check(impl, problem)

    def test_lists_and_gates_of_any_strides(self, impl, make):
        problem = make()
        upstream = self.upstream(problem)
        plain = gradients(problem, problem.run, upstream)
        for name in ("z", "index", "counts", "bias"):
            tensor = getattr(problem, name)
            setattr(problem, name, tensor.repeat_interleave(2)[::2])
        problem.maps = problem.maps.t().contiguous().t()
        assert all(map(torch.equal, plain, gradients(problem, problem.run, upstream)))

    def test_gradients_of_a_sum(self, impl, make):
        problem = make()
        upstream = torch.ones(self.upstream(problem).shape)
        _, _, grad, _, grad_z = gradients(problem, problem.run, upstream)
        weight, z = problem.weight.requires_grad_(), problem.z.requires_grad_()
        problem.run(problem.x, weight, problem.bias, z).sum().backward()
        assert torch.equal(weight.grad, grad) and torch.equal(z.grad, grad_z)

    # ---- Inf and NaN ----

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_closed_parameters_do_not_matter(self, impl, make, bad):
        problem = make()
        upstream = self.upstream(problem)
        clean = gradients(problem, problem.run, upstream)
        problem.weight[~problem.open_features(problem.out_span, problem.weight.shape[0])] = bad
        problem.weight[:, ~problem.open_features(problem.in_span, problem.weight.shape[1])] = bad
        problem.bias[~problem.open_features(problem.out_span, problem.weight.shape[0])] = bad
        poisoned = gradients(problem, problem.run, upstream)
        assert all(map(torch.equal, clean, poisoned))

    @pytest.mark.parametrize("activation", ["none", "relu"])
    def test_open_features_keep_nan(self, impl, make, activation):
        problem = make(share=0.8, activation=activation)
        first = (0,) * problem.x.dim()
        problem.x[first] = math.nan
        y = problem.run(*leaves_of(problem))
        packed, _ = problem.features(problem.out_span, problem.n_out)
        is_open = problem.open_features(problem.out_span, problem.weight.shape[0])[packed]
        row = y[0, 0] if problem.window is None else y[0, :, 0, 0]
        assert bool(row[: problem.n_out][is_open].isnan().all())
        assert bool((row[: problem.n_out][~is_open] == 0).all())
        assert bool((row[problem.n_out :] == 0).all())

    # ---- modes, repetition ----

    def test_same_bits_twice(self, impl, make):
        problem = make(activation="relu")
        upstream = self.upstream(problem)
        first, second = (gradients(problem, problem.run, upstream) for _ in range(2))
        assert all(map(torch.equal, first, second))

    def test_nothing_is_left_unwritten(self, impl, make):
        # conftest fills uninitialised memory with NaN; check here that it does.
        assert torch.empty(3).isnan().all()
        problem = make(share=0.3)
        for result in gradients(problem, problem.run, self.upstream(problem)):
            assert bool(result.isfinite().all())

    def test_inference_mode(self, impl, make):
        problem = make()
        plain = problem.run(*leaves_of(problem))
        with torch.inference_mode():
            inferred = problem.run(*(tensor.clone() for tensor in leaves_of(problem)))
        assert torch.equal(inferred, plain)

    def test_autocast_changes_nothing(self, impl, make):
        if impl == "reference":
            pytest.skip("the reference is made of operations that autocast")
        problem = make()
        upstream = self.upstream(problem)
        plain = gradients(problem, problem.run, upstream)
        with torch.autocast("cpu", torch.bfloat16):
            cast = gradients(problem, problem.run, upstream)
        assert all(map(torch.equal, plain, cast))

    # ---- registration ----

    @pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, make, requires_grad):
        problem = make(activation="relu", share=0.7)
        for name in ("x", "weight", "bias", "z"):
            getattr(problem, name).requires_grad_(requires_grad)
        fill_behind(problem.x.detach(), problem.dim, problem.n_in, 0.0)
        forward, backward = self.OP._FORWARD, self.OP._BACKWARD
        opcheck(forward, problem.raw())
        y = problem.run(*leaves_of(problem)).detach()
        grad = torch.randn(y.shape)
        x, weight, _, *rest = problem.raw()
        for needs in ((True,) * 4, (False,) * 4):
            opcheck(backward, (grad, x, weight, y, *rest, *needs))
        unpacked = replace(make(packs=(False, False), bias=False)).raw()
        opcheck(forward, unpacked)

    def test_python_stand_in_passes_opcheck(self, make):
        # The same checks, also where compiled kernels own the operators.
        name = self.OP._FORWARD._schema.name.split("::")[1]
        problem = make(share=0.7, activation="relu")
        fill_behind(problem.x, problem.dim, problem.n_in, 0.0)
        namespace = stand_ins(name)
        opcheck(getattr(namespace, name).default, problem.raw())
        y = problem.run(*leaves_of(problem))
        x, weight, _, *rest = problem.raw()
        backward = getattr(namespace, f"{name}_backward").default
        for needs in ((True,) * 4, (False,) * 4):
            opcheck(backward, (torch.randn(y.shape), x, weight, y, *rest, *needs))

    @pytest.mark.parametrize("name", ["auto", "reference"])
    def test_one_graph_for_all_draws(self, make, name):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        problem = make(share=1.0, activation="relu")

        def loss(weight, z, counts):
            drawn = replace(problem, weight=weight, z=z, counts=counts)
            return (drawn.run(drawn.x, weight, drawn.bias, z) ** 2).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        with l0.use_impl(name):
            for n_in, n_out in ((3, 4), (2, 2), problem.weight.shape[1::-1]):
                counts = torch.tensor([5, n_in, n_out])
                results = []
                for function in (compiled, loss):
                    leaves = [t.clone().requires_grad_() for t in (problem.weight, problem.z)]
                    value = function(*leaves, counts)
                    results.append((value, *torch.autograd.grad(value, leaves)))
                for mine, other in zip(*results, strict=True):
                    torch.testing.assert_close(mine, other)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def test_same_result_on_every_device(self, make, device):
        problem = make(activation="relu")
        upstream = self.upstream(problem)
        fields = vars(problem).items()
        there = Problem(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in fields})
        found = gradients(there, there.run, upstream.to(device))
        mask = (found[0].cpu() > 0).double()
        exact_problem = problem.exact()
        exact = gradients(exact_problem, bind(exact_problem), upstream, mask=mask)
        for mine, true in zip(found, exact, strict=True):
            torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-4, atol=1e-4)

    # ---- errors ----

    BAD = {
        "x dtype": (TypeError, "x: expected a floating", lambda p: {"x": p.x.int()}),
        "weight dtype": (
            TypeError,
            "weight: expected torch.float32 with",
            lambda p: {"weight": p.weight.half()},
        ),
        "bias dtype": (TypeError, "bias: expected weight's", lambda p: {"bias": p.bias.double()}),
        "bias shape": (ValueError, r"bias: expected shape \[", lambda p: {"bias": p.bias[1:]}),
        "z dtype": (TypeError, "z: expected torch.float32", lambda p: {"z": p.z.double()}),
        "z shape": (ValueError, r"z: expected shape \[G", lambda p: {"z": p.z[None]}),
        "weight dims": (ValueError, "weight: expected shape", lambda p: {"weight": p.weight[0]}),
        "index dtype": (TypeError, "index: expected int64", lambda p: {"index": p.index.int()}),
        "counts dims": (ValueError, "counts: expected 1", lambda p: {"counts": p.counts[None]}),
        "maps shape": (
            ValueError,
            r"maps: expected shape \[2, ",
            lambda p: {"maps": p.maps[:, 1:]},
        ),
        "span": (ValueError, "in_span: expected None or", lambda p: {"in_span": (1, 2, 3)}),
        "span start": (ValueError, "out_span: expected a start", lambda p: {"out_span": (99, 2)}),
        "span port": (ValueError, "in_span: expected a port", lambda p: {"in_span": (5, 3)}),
        "features": (
            ValueError,
            "x: expected .* input features",
            lambda p: {"in_span": None, "x": p.x.narrow(p.dim, 0, p.x.shape[p.dim] - 1)},
        ),
        "activation": (ValueError, "none, relu; got 'gelu'", lambda p: {"activation": "gelu"}),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_bad_input_is_refused(self, impl, make, name):
        error, message, changes = self.BAD[name]
        problem = make()
        problem = replace(problem, **changes(problem))
        with pytest.raises(error, match=message):
            problem.run(*leaves_of(problem))

    CONTRACT = {
        "index": ("in_span: expected features from 0 to", lambda p: p.index.fill_(99)),
        "negative index": ("in_span: expected features from 0 to", lambda p: p.index.fill_(-1)),
        "negative count": ("in_span: expected a count from 0 to", lambda p: p.counts.fill_(-1)),
        "count": ("in_span: expected a count from 0 to", lambda p: p.counts.fill_(99)),
        "gate": ("in_span: expected gates from 0 to", lambda p: p.maps.fill_(99)),
    }

    @pytest.mark.parametrize("name", CONTRACT)
    def test_cpp_refuses_what_is_out_of_bounds(self, need_cpp, make, name):
        message, damage = self.CONTRACT[name]
        problem = make()
        damage(problem)
        with pytest.raises(RuntimeError, match=message), l0.use_impl("cpp"):
            problem.run(*leaves_of(problem))


def strided(name, shape):
    """Numbers with unusual strides."""
    if name == "one number":
        return torch.randn(()).expand(shape)
    if name == "one row":
        return torch.randn(1, *shape[1:]).expand(shape)
    if name == "reversed":
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    return torch.randn([2 * n for n in shape])[tuple(slice(0, None, 2) for _ in shape)]
