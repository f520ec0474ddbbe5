# SPDX-License-Identifier: Apache-2.0
"""Chains of logits and their gradients, each implementation against the definition."""

import math
from dataclasses import dataclass

import pytest
import torch
from error_table import close, same, within_budget
from harness import ops as harness_ops
from ops.stand_ins import stand_ins
from ops.threads import assert_threads_do_not_matter
from torch import Tensor
from torch.library import opcheck

import l0kernels as l0
from l0kernels.functional import dep_chain
from l0kernels.ops.dep_chain import op

LN100 = math.log(100.0)
SIZES = {
    "one": (1, 1),
    "primes": (3, 7, 5, 2),
    "alike": (16, 16, 16),
    "empty between": (4, 0, 5),
    "empty start": (0, 6, 3),
    "empty end": (6, 3, 0),
    "vectors": (64, 32, 128),
    "more than one task": (130, 257, 200, 65),
    "more rows than threads": (3, 2100, 2),
    "many": (5, *[7, 4, 9] * 23),
}


@dataclass
class Chain:
    """Arguments of dep_chain, and a gradient of its result."""

    first: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    reverse: bool
    upstream: Tensor

    def to(self, *args):
        return Chain(
            self.first.to(*args),
            [weight.to(*args) for weight in self.weights],
            [bias.to(*args) for bias in self.biases],
            self.reverse,
            self.upstream.to(*args),
        )


@dataclass
class Found:
    logits: Tensor
    first: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def tensors(self):
        return [self.logits, self.first, *self.weights, *self.biases]


def make_chain(sizes=SIZES["primes"], reverse=False, dtype=torch.float64, mean=0.0, scale=1.0):
    """A chain whose first size is that of `first`, in the order of computation."""
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    if reverse:
        pairs.reverse()
    weights = [scale * (2 * torch.rand(n, m) - 1) / max(1, m) ** 0.5 for n, m in pairs]
    biases = [mean + 0.3 * torch.randn(n) for n, _ in pairs]
    upstream = torch.randn(sum(n for n, _ in pairs))
    return Chain(torch.randn(sizes[0]), weights, biases, reverse, upstream).to(dtype)


def run(chain, call=dep_chain):
    """The logits, and the gradients of <upstream, logits>."""
    leaves = [chain.first, *chain.weights, *chain.biases]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    layers = len(chain.weights)
    logits = call(leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :], chain.reverse)
    grads = torch.autograd.grad(logits, leaves, chain.upstream)
    assert all(g.shape == leaf.shape for g, leaf in zip(grads, leaves, strict=True))
    return Found(logits.detach(), grads[0], [*grads[1 : 1 + layers]], [*grads[1 + layers :]])


def by_definition(first, weights, biases, reverse):
    """The formula, layer by layer."""
    made, previous = [], first
    pairs = list(zip(weights, biases, strict=True))
    for weight, bias in reversed(pairs) if reverse else pairs:
        previous = LN100 * torch.tanh(weight @ previous + bias)
        made.append(previous)
    return torch.cat(made[::-1] if reverse else made)


def check(chain):
    """Compares with PyTorch: in float64, and in lower precision by its errors."""
    found, exact = run(chain), run(chain.to(torch.float64), by_definition)
    parts = [("forward", "logits"), ("dgrad", "first"), ("wgrad", "weights"), ("wgrad", "biases")]
    plain = run(chain, by_definition)
    for what, name in parts:
        tensors = [getattr(one, name) for one in (found, exact, plain)]
        lists = [one if isinstance(one, list) else [one] for one in tensors]
        for mine, true, pytorch in zip(*lists, strict=True):
            if mine.dtype == torch.float64:
                close("dep_chain", what, mine, true)
            elif mine.numel():
                within_budget("dep_chain", what, mine, true, pytorch)
    return found


# ---- values and gradients ----


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_shapes(impl, name, reverse):
    check(make_chain(SIZES[name], reverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_dtypes(impl, dtype, mean):
    # A mean of 3 is where training starts: most slopes are small.
    for sizes in ((64, 64, 130, 70), (31, 50, 17, 3, 20)):
        found = check(make_chain(sizes, dtype=dtype, mean=mean, scale=0.5))
        assert all(tensor.dtype == dtype for tensor in found.tensors())


@pytest.mark.parametrize("impl", ["cpp", "harness"], indirect=True)
def test_a_large_model(impl):
    sizes = (64, 64, 64, 128, 128, 256, 256, 256, 300)
    check(make_chain(sizes, dtype=torch.float32, mean=3.0))


def test_layers_are_in_the_order_of_the_model(impl):
    chain = make_chain((2, 3, 4), reverse=True)
    assert [len(bias) for bias in chain.biases] == [4, 3]
    logits = run(chain).logits
    last = LN100 * torch.tanh(chain.weights[1] @ chain.first + chain.biases[1])
    torch.testing.assert_close(logits[4:], last)
    before = LN100 * torch.tanh(chain.weights[0] @ last + chain.biases[0])
    torch.testing.assert_close(logits[:4], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_every_size(impl, dtype):
    sizes = [10.0**e for e in range(-300 if dtype == torch.float64 else -30, 3)]
    points = torch.tensor([0.0, 0.03124, 0.03125, 0.03126, 0.4, 9.0, 18.0, 20.0, *sizes])
    bias = torch.cat([points.double(), -points.double()]).to(dtype)
    logits = dep_chain(bias.new_ones(1), [bias.new_zeros(len(bias), 1)], [bias])
    exact = [LN100 * math.tanh(value) for value in bias.tolist()]
    for mine, true in zip(logits.tolist(), exact, strict=True):
        assert mine == pytest.approx(true, rel=8 * torch.finfo(dtype).eps, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_sums_have_gradient_zero(impl, dtype):
    bias = torch.tensor([math.inf, -math.inf, 0.5], dtype=dtype)
    chain = Chain(bias.new_ones(2), [bias.new_ones(3, 2)], [bias], False, torch.ones_like(bias))
    found = run(chain)
    bound = torch.tensor(LN100, dtype=dtype)
    assert found.logits[:2].tolist() == [bound, -bound]
    assert bool((found.biases[0][:2] == 0).all()) and bool((found.weights[0][:2] == 0).all())
    assert float(found.biases[0][2]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_gates_keep_the_digits_of_their_gradients(op_impl, dtype):
    # PyTorch's own has none left of 1 - tanh^2 from 9 on in float32.
    bias = torch.tensor([0.0, 1.0, 3.0, 9.0, 15.0, -20.0, -40.0], dtype=dtype)
    chain = Chain(bias.new_ones(1), [bias.new_zeros(7, 1)], [bias], False, torch.ones_like(bias))
    for mine, sum_ in zip(run(chain).biases[0].tolist(), bias.tolist(), strict=True):
        exact = LN100 / math.cosh(sum_) ** 2
        assert mine == pytest.approx(exact, rel=8 * torch.finfo(dtype).eps, abs=0)


def test_nan_is_carried_along_the_chain(impl):
    chain = make_chain((3, 4, 5, 2))
    chain.biases[1][2] = math.nan
    found = run(chain)
    assert found.logits.isnan().tolist() == [False] * 4 + [
        False,
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    assert bool(found.weights[0].isnan().all()) and bool(found.biases[2].isnan().all())


def test_gradcheck(impl):
    for reverse in (False, True):
        chain = make_chain((3, 5, 4, 2), reverse)
        leaves = [chain.first, *chain.weights, *chain.biases]

        def call(first, *parameters):
            return dep_chain(first, parameters[:3], parameters[3:], reverse)  # noqa: B023

        assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("kind", ["transposed", "sliced", "stepped", "expanded", "from cat", "one"])
def test_upstream_gradients_of_any_strides(impl, kind):
    chain = make_chain((4, 6, 6), dtype=torch.float32)
    size = len(chain.upstream)
    chain.upstream = {
        "transposed": torch.randn(2, size).t()[:, 1],
        "sliced": torch.randn(size + 5)[3:-2],
        "stepped": torch.randn(3 * size)[::3],
        "expanded": torch.tensor(0.7).expand(size),
        "from cat": torch.cat([torch.randn(size - 4), torch.randn(4)]),
        "one": torch.nn.functional.one_hot(torch.tensor(1), size).float(),
    }[kind]
    check(chain)


def test_gradients_of_parts(impl):
    chain = make_chain((4, 6, 5))
    leaves = [leaf.requires_grad_() for leaf in [*chain.weights, *chain.biases]]
    logits = dep_chain(chain.first, chain.weights, chain.biases)
    grads = torch.autograd.grad(logits.split([6, 5])[0].square().sum(), leaves)
    exact = by_definition(chain.first, chain.weights, chain.biases, False)
    expected = torch.autograd.grad(exact[:6].square().sum(), leaves)
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other)
    # What nothing depends on.
    assert bool((grads[1] == 0).all()) and bool((grads[3] == 0).all())


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
def test_arguments_of_any_strides(impl, kind):
    chain = make_chain((6, 5, 7), dtype=torch.float32)
    for tensors in (chain.weights, chain.biases):
        for i, tensor in enumerate(tensors):
            tensors[i] = {
                "transposed": tensor.t().contiguous().t(),
                "sliced": torch.stack([tensor, tensor], -1)[..., 0],
                "expanded": tensor[:1].expand(tensor.shape),
            }[kind]
    chain.first = torch.randn(6, 2)[:, 0]
    check(chain)


@pytest.mark.parametrize("wanted", ["first", "weights", "biases", "one weight"])
def test_only_the_gradients_asked_for(impl, wanted):
    chain = make_chain((4, 6, 5))
    expected = run(chain, by_definition)
    picked, grads = {
        "first": ([chain.first], [expected.first]),
        "weights": (chain.weights, expected.weights),
        "biases": (chain.biases, expected.biases),
        "one weight": (chain.weights[:1], expected.weights[:1]),
    }[wanted]
    for leaf in picked:
        leaf.requires_grad_()
    dep_chain(chain.first, chain.weights, chain.biases).backward(chain.upstream)
    for leaf, grad in zip(picked, grads, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, grad)
    others = [chain.first, *chain.weights, *chain.biases]
    assert sum(leaf.grad is not None for leaf in others) == len(picked)


def test_one_draw_serves_several_backward_passes(op_impl):
    chain = make_chain()
    weight = chain.weights[0].requires_grad_()
    logits = dep_chain(chain.first, chain.weights, chain.biases)
    (logits * 2).sum().backward()
    assert weight.grad is not None
    first = weight.grad.clone()
    (logits * 2).sum().backward()
    assert bool((first != 0).any()) and torch.equal(weight.grad, 2 * first)


@pytest.mark.parametrize("changed", ["first", "weight", "logits"])
def test_changes_before_backward_are_noticed(op_impl, changed):
    chain = make_chain()
    chain.biases[0].requires_grad_()
    logits = dep_chain(chain.first, chain.weights, chain.biases)
    tensors = {"first": chain.first, "weight": chain.weights[1], "logits": logits}
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        logits.sum().backward()


def test_biases_may_change_before_backward(op_impl):
    chain = make_chain()
    expected = run(chain).biases[0]
    bias = chain.biases[0].requires_grad_()
    logits = dep_chain(chain.first, chain.weights, chain.biases)
    with torch.no_grad():
        bias.add_(1)
    assert torch.equal(torch.autograd.grad(logits, bias, chain.upstream)[0], expected)


def test_nothing_keeps_the_graph_alive(op_impl):
    import weakref

    chain = make_chain()
    chain.biases[0].requires_grad_()
    logits = dep_chain(chain.first, chain.weights, chain.biases)
    gone = weakref.ref(logits)
    del logits
    assert gone() is None


def test_double_backward_is_refused(op_impl):
    chain = make_chain()
    bias = chain.biases[0].requires_grad_()
    logits = dep_chain(chain.first, chain.weights, chain.biases)
    (grad,) = torch.autograd.grad(logits.square().sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inference_mode(impl):
    chain = make_chain()
    plain = dep_chain(chain.first, chain.weights, chain.biases)
    with torch.inference_mode():
        assert torch.equal(dep_chain(chain.first, chain.weights, chain.biases), plain)


def test_autocast_changes_nothing(impl):
    chain = make_chain(dtype=torch.float32)

    def under_autocast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return dep_chain(*arguments)

    plain, there = run(chain), run(chain, under_autocast)
    assert all(map(torch.equal, there.tensors(), plain.tensors()))


# ---- bits ----


def test_same_bits_twice(impl):
    chain = make_chain((130, 257, 65), dtype=torch.float32, mean=3.0)
    for mine, again in zip(run(chain).tensors(), run(chain).tensors(), strict=True):
        same("dep_chain", mine, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads(need_cpp, dtype):
    chain = make_chain((300, 500, 301, 129), dtype=dtype, mean=1.0)
    assert_threads_do_not_matter(lambda: run(chain).tensors(), (1, 2, 3, 1))


@pytest.mark.parametrize("op_impl", ["harness"], indirect=True)
def test_bits_do_not_depend_on_the_order_of_threads(op_impl):
    chain = make_chain((65, 257, 70, 33, 1100, 2), dtype=torch.float32)
    harness_ops.set_schedule(-1)
    found = run(chain).tensors()
    for seed in (1, 2):
        harness_ops.set_schedule(seed)
        assert all(map(torch.equal, run(chain).tensors(), found))


@pytest.mark.parametrize("op_impl", ["harness"], indirect=True)
@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ((16,) * 29, 1),  # ResNet-56 has 28 layers
        ((4,) * 34, 2),  # more layers than parameters of a launch have room for
        ((64, 64, 128, 128), 1),
        ((128, 129, 8, 8), 2),
        ((8, 8, 129, 128, 8), 3),
        ((8, 129, 128, 129, 8), 4),
    ],
)
def test_small_neighbours_share_a_launch(op_impl, sizes, launches):
    chain = make_chain(sizes)
    run(chain)
    harness_ops.launches(reset=True)
    run(chain)
    assert harness_ops.launches(reset=True)["dep_chain"] == 2 * launches


# ---- bad input ----

BAD = {
    "no layers": (ValueError, "at least one weight .* got 0 weights and 0 biases"),
    "fewer biases": (ValueError, "got 3 weights and 2 biases"),
    "half": (TypeError, "first: expected float32 or float64; got torch.float16"),
    "other dtype": (TypeError, r"weights\[1\]: expected first's dtype torch.float64; got torch.fl"),
    "bias dtype": (TypeError, r"biases\[0\]: expected first's dtype torch.float64; got torch.int"),
    "first": (ValueError, r"first: expected 1 dimension; got shape \[1, 3\]"),
    "columns": (ValueError, r"weights\[1\]: expected shape \[n, 7\].* got \[5, 6\]"),
    "vector": (ValueError, r"weights\[2\]: expected shape \[n, 5\].* got \[5\]"),
    "bias shape": (ValueError, r"biases\[1\]: expected shape \[5\] .* got \[4\]"),
    "device": (ValueError, r"weights\[0\]: expected device cpu; got meta"),
    "direction": (ValueError, r"weights\[2\]: expected shape \[n, 3\].* got \[2, 5\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(impl, name):
    chain = make_chain((3, 7, 5, 2))
    first, weights, biases, reverse = chain.first, chain.weights, chain.biases, False
    if name == "no layers":
        weights = biases = []
    elif name == "fewer biases":
        biases = biases[:2]
    elif name == "half":
        first = first.half()
    elif name == "other dtype":
        weights[1] = weights[1].float()
    elif name == "bias dtype":
        biases[0] = biases[0].long()
    elif name == "first":
        first = first[None]
    elif name == "columns":
        weights[1] = weights[1][:, 1:]
    elif name == "vector":
        weights[2] = weights[2][0]
    elif name == "bias shape":
        biases[1] = biases[1][1:]
    elif name == "device":
        weights[0] = weights[0].to("meta")
    else:
        reverse = True
    error, message = BAD[name]
    with pytest.raises(error, match=message):
        dep_chain(first, weights, biases, reverse)


@pytest.mark.parametrize("op_impl", ["cpp", "harness"], indirect=True)
def test_what_does_not_fit_is_refused_by_kernels(op_impl):
    chain = make_chain((3, 7, 5, 2))
    given = (chain.first, chain.weights, chain.biases)
    with pytest.raises(RuntimeError, match=r"weights\[1\]: expected 7 columns; got 6"):
        broken = [chain.weights[0], chain.weights[1][:, 1:], chain.weights[2]]
        op._FORWARD(given[0], broken, given[2], False)
    with pytest.raises(RuntimeError, match=r"biases\[2\]: expected one number for each row"):
        op._FORWARD(*given[:2], [*chain.biases[:2], chain.biases[1]], False)
    with pytest.raises(RuntimeError, match="expected at least one weight"):
        op._FORWARD(chain.first, [], [], False)
    with pytest.raises(RuntimeError, match="grad, logits, slopes: expected 14 numbers"):
        op._BACKWARD(chain.upstream, chain.upstream, chain.upstream[1:], *given[:2], False)


# ---- registration and compilation ----


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(requires_grad, reverse):
    chain = make_chain((3, 7, 5, 2), reverse)
    weights = [weight.requires_grad_(requires_grad) for weight in chain.weights]
    opcheck(op._FORWARD, (chain.first, weights, chain.biases, reverse))
    kept = torch.randn(2, 14, dtype=torch.float64).unbind()
    opcheck(op._BACKWARD, (chain.upstream, *kept, chain.first, weights, reverse))


def test_python_stand_in_passes_opcheck():
    # The same checks as above, also where the C++ kernels own the operators.
    namespace = stand_ins("dep_chain")
    chain = make_chain((3, 7, 5, 2))
    chain.weights[0] = chain.weights[0].t().contiguous().t()
    given = (chain.first, chain.weights)
    opcheck(namespace.dep_chain.default, (*given, chain.biases, False))
    backward = namespace.dep_chain_backward.default
    kept = torch.randn(2, 14, dtype=torch.float64).unbind()
    opcheck(backward, (chain.upstream, *kept, *given, False))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_one_graph_for_all_widths(name):
    def loss(first, weights, biases):
        return dep_chain(first, weights, biases).square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with l0.use_impl(name):
        for sizes in ((3, 7, 5), (4, 9, 6), (11, 3, 8)):
            chain = make_chain(sizes)
            leaves = [leaf.requires_grad_() for leaf in [*chain.weights, *chain.biases]]
            arguments = chain.first, chain.weights, chain.biases
            value, plain = compiled(*arguments), loss(*arguments)
            torch.testing.assert_close(value, plain)
            grads = zip(
                torch.autograd.grad(value, leaves), torch.autograd.grad(plain, leaves), strict=True
            )
            for mine, other in grads:
                torch.testing.assert_close(mine, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_same_result_on_every_device(device):
    chain = make_chain((64, 130, 200, 30), dtype=torch.float32, mean=1.0)
    exact = run(chain.to(torch.float64), by_definition)
    found = run(chain.to(device))
    for mine, true in zip(found.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-4, atol=1e-4)
