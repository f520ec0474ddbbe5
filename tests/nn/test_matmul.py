# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a CPU: every choice of libraries computes the layer."""

import itertools
import json
import stat

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import l0kernels as l0
from l0kernels.nn import GatedLinear, matmul
from l0kernels.testing import assert_within_budget

CHOICES = [
    dict(zip(matmul.PRODUCTS, chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=3)
]
SHAPES = {
    "matrix": (37, 29, 23),
    "one row": (1, 29, 23),
    "tokens": (5, 7, 29, 23),
    "vector": (29, 23),
    "one feature": (37, 1, 1),
}


@pytest.fixture(autouse=True)
def need_onednn():
    if not matmul.has_onednn():
        pytest.skip("this PyTorch has no oneDNN for dense matrices")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    matmul.faster_in_onednn.cache_clear()
    yield tmp_path / "l0kernels" / "linear.json"
    matmul.faster_in_onednn.cache_clear()


def outcome(layer, x, weight, bias, grad):
    """Result and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = layer(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chosen", CHOICES)
def test_errs_at_most_twice_as_much_as_pytorch(chosen, shape):
    *rows, inputs, outputs = SHAPES[shape]
    x, weight, bias = torch.randn(*rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    grad = torch.randn(*rows, outputs)
    tensors = (x, weight, bias, grad)
    exact = outcome(F.linear, *(t.double() for t in tensors))
    plain = outcome(F.linear, *tensors)
    ours = outcome(lambda *a: matmul.Linear.apply(*a, chosen), *tensors)
    for got, true, other in zip(ours, exact, plain, strict=True):
        assert got.shape == true.shape
        assert_within_budget(got, true, other)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("chosen", CHOICES[-2:])
def test_upstream_gradients_of_any_strides(chosen, kind):
    x, weight, bias = torch.randn(24, 16), torch.randn(32, 16), torch.randn(32)
    grad = {
        "transposed": torch.randn(32, 24).t(),
        "sliced": torch.randn(24, 64)[:, ::2],
        "expanded": torch.randn(()).expand(24, 32),
    }[kind]
    exact = outcome(F.linear, *(t.double() for t in (x, weight, bias, grad)))
    plain = outcome(F.linear, x, weight, bias, grad)
    ours = outcome(lambda *a: matmul.Linear.apply(*a, chosen), x, weight, bias, grad)
    for got, true, other in zip(ours, exact, plain, strict=True):
        assert_within_budget(got, true, other)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)))
def test_gradients_that_nobody_needs_are_not_computed(needed, monkeypatch):
    tensors = [torch.randn(9, 5), torch.randn(4, 5), torch.randn(4)]
    for tensor, wanted in zip(tensors, needed, strict=True):
        tensor.requires_grad_(wanted)
    products = []
    product = matmul._product
    monkeypatch.setattr(matmul, "_product", lambda *a: products.append(a) or product(*a))
    y = matmul.Linear.apply(*tensors, CHOICES[-1])
    assert y.requires_grad == any(needed)
    if y.requires_grad:
        y.sum().backward()
    assert [t.grad is not None for t in tensors] == list(needed)
    assert len(products) == 1 + needed[0] + needed[1]


def test_no_bias():
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(4, 5)
    y = matmul.Linear.apply(x, weight, None, CHOICES[-1])
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x, weight))


def force(monkeypatch, asked):
    """Everything in oneDNN, noting who asked."""

    def chosen(few_rows, threads):
        asked.append((few_rows, threads))
        return CHOICES[-1]

    monkeypatch.setattr(matmul, "faster_in_onednn", chosen)


def test_gated_layers_choose(monkeypatch):
    """Masked and packed agree, whatever computes the packed layer."""
    asked = []
    force(monkeypatch, asked)
    monkeypatch.setattr(matmul, "LEAST", 1)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(40, 8)
    l0.convert(net, "hard_concrete", example_inputs=(x[:2],))
    assert isinstance(net[0], GatedLinear)
    asked.clear()
    with l0.hold(net):
        packed = net(x)
        assert asked == [(False, torch.get_num_threads())] * 2
        with l0.use_impl("reference"):
            torch.testing.assert_close(packed, net(x))
    assert len(asked) == 2


@pytest.mark.parametrize("rows, few", [(1, True), (32, True), (33, False)])
def test_few_rows_are_another_case(monkeypatch, rows, few):
    asked = []
    force(monkeypatch, asked)
    monkeypatch.setattr(matmul, "LEAST", 1)
    matmul.linear(torch.randn(rows, 6), torch.randn(5, 6), None)
    assert asked == [(few, torch.get_num_threads())]


@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.randn(7, 6).double(), torch.randn(5, 6).double()),
        (torch.randn(7, 6).bfloat16(), torch.randn(5, 6).bfloat16()),
        (torch.randn(0, 6), torch.randn(5, 6)),
        (torch.randn(2, 6), torch.randn(5, 6)),
    ],
    ids=["float64", "bfloat16", "empty", "small"],
)
def test_the_rest_is_pytorch_s(monkeypatch, x, weight):
    asked = []
    force(monkeypatch, asked)
    monkeypatch.setattr(matmul, "LEAST", 7 * 6 * 5)
    assert torch.equal(matmul.linear(x, weight, None), F.linear(x, weight))
    assert asked == []


def test_autocast_is_pytorch_s(monkeypatch):
    asked = []
    force(monkeypatch, asked)
    monkeypatch.setattr(matmul, "LEAST", 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul.linear(torch.randn(7, 6), torch.randn(5, 6), None).dtype == torch.bfloat16
    assert asked == []


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(matmul, "LEAST", 1)
    compiled = torch.compile(matmul.linear, backend="eager", fullgraph=True)
    x, weight = torch.randn(7, 6), torch.randn(5, 6)
    torch.testing.assert_close(compiled(x, weight, None), F.linear(x, weight))


# ---- the answers ----


def count_timings(monkeypatch, answer=True):
    timed = []
    monkeypatch.setattr(matmul, "_is_faster", lambda product: timed.append(1) or answer)
    return timed


def test_timed_once_for_a_processor(cache, monkeypatch):
    timed = count_timings(monkeypatch)
    first = matmul.faster_in_onednn(False, 2)
    assert first == dict.fromkeys(matmul.PRODUCTS, True) and len(timed) == 3
    matmul.faster_in_onednn.cache_clear()  # as in another process
    count_timings(monkeypatch, answer=False)
    assert matmul.faster_in_onednn(False, 2) == first
    (key,) = json.loads(cache.read_text())
    assert torch.__version__ in key and "2 threads" in key


def test_other_threads_and_few_rows_are_timed_apart(cache, monkeypatch):
    timed = count_timings(monkeypatch)
    for few_rows, threads in ((False, 1), (False, 2), (True, 2)):
        matmul.faster_in_onednn(few_rows, threads)
    assert len(timed) == 9
    known = json.loads(cache.read_text())
    assert sorted(len(rows) for rows in known.values()) == [1, 2]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', "{}", '{"KEY": {"many rows": {"forward": 1}}}']
)
def test_a_file_that_says_nothing_is_replaced(cache, monkeypatch, text):
    key = f"{matmul.cpu_name()}, 2 threads, torch {torch.__version__}"
    cache.parent.mkdir()
    cache.write_text(text.replace("KEY", key))
    timed = count_timings(monkeypatch)
    matmul.faster_in_onednn(False, 2)
    assert len(timed) == 3
    assert json.loads(cache.read_text())[key] == {"many rows": dict.fromkeys(matmul.PRODUCTS, True)}


def test_a_folder_that_cannot_be_written_to_is_no_error(cache, monkeypatch):
    cache.parent.parent.joinpath("l0kernels").write_text("a file in its place")
    count_timings(monkeypatch)
    assert matmul.faster_in_onednn(False, 2) == dict.fromkeys(matmul.PRODUCTS, True)


def test_real_timings_give_an_answer_for_every_product(cache):
    found = matmul.faster_in_onednn(True, torch.get_num_threads())
    assert set(found) == set(matmul.PRODUCTS) and {type(v) for v in found.values()} == {bool}
    assert stat.S_ISREG(cache.stat().st_mode)
