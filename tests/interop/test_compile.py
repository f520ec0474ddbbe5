# SPDX-License-Identifier: Apache-2.0
"""torch.compile: one graph for all widths, with the eager results."""

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import l0kernels as l0
from interop.nets import NETS, assert_equal, batch, gradients, make, state

# From inside torch, when the compiler is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def step(net: nn.Module, run: nn.Module, x: Tensor, y: Tensor) -> None:
    net.zero_grad()
    (l0.expected_loss(net, lambda: F.cross_entropy(run(x), y)) + l0.penalty(net)).backward()


def widths(net: nn.Module) -> tuple[int, ...]:
    return tuple(net.l0[name].count for name in net.l0.names)


def assert_graphs(number: int) -> None:
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == number


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [*((kind, "unit") for kind in NETS), ("mlp", "input"), ("lenet", "input")],
)
def test_one_graph_for_200_draws(kind: str, granularity: str):
    net = make(kind, granularity=granularity)
    assert (granularity == "input") == any(net.l0.port_selects)
    twin = copy.deepcopy(net)
    x, y = batch(4)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    seen = set()
    for draw in range(200):
        if draw % 40 == 0:  # from nearly all closed to nearly all open
            for each in (net, twin):
                with torch.no_grad():
                    each.l0.log_alpha.fill_(draw / 20 - 4.5)
        step(net, compiled, x, y)
        seen.add(widths(net))
        if draw % 10 == 0:
            twin.l0.step.copy_(net.l0.step - 1)
            step(twin, twin, x, y)
            assert_equal(gradients(net), gradients(twin), tolerance=1e-6)
    assert len(seen) > 40
    assert {2, net.l0.sizes[0]} <= {first for first, *_ in seen}
    assert_graphs(1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("opened", [0, 1, 3])
def test_closed_inputs_may_hold_nan(opened: int, compiled: bool):
    net = make("mlp", granularity="input")
    inputs = dict(net.l0.slices())["fc1.in"]
    z = torch.full((net.l0.count,), 0.5)
    z[inputs] = torch.where(torch.arange(48) < opened, 0.5, 0.0)
    x, y = batch(4)
    with torch.no_grad(), net.l0.using(z), l0.use_impl("reference"):
        expected = net(x)
    x.flatten(1)[:, z[inputs] == 0] = torch.nan
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    with net.l0.using(z):
        out = run(x)
        F.cross_entropy(out, y).backward()
    torch.testing.assert_close(out, expected)
    assert all(bool(g.isfinite().all()) for g in gradients(net).values())


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("packed_once", [False, True])
def test_eval_and_training_have_a_graph_each(kind: str, packed_once: bool):
    net = make(kind)
    twin = copy.deepcopy(net)
    x, y = batch(4)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for round_ in range(4):
        for each in (net, twin):
            with torch.no_grad():
                each.l0.log_alpha.add_(0.4 * (round_ - 1))
            each.train()
        step(net, compiled, x, y)
        step(twin, twin, x, y)
        for each in (net, twin):
            each.eval()
        scope = l0.frozen if packed_once else l0.hold
        with torch.no_grad(), scope(net), scope(twin):
            torch.testing.assert_close(compiled(x), twin(x), atol=1e-5, rtol=1e-5)
    assert_equal(state(net), state(twin), tolerance=1e-5)
    assert_graphs(2)


@pytest.mark.parametrize("kind", NETS)
def test_frozen_training_uses_the_same_graph(kind: str):
    net = make(kind)
    twin = copy.deepcopy(net)
    x, y = batch(4)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for draw in range(6):
        if draw == 3:
            net.l0.freeze()
            twin.l0.freeze()
        step(net, compiled, x, y)
        step(twin, twin, x, y)
        assert_equal(gradients(net), gradients(twin), tolerance=1e-6)
        assert bool(net.l0.log_alpha.grad.any()) == (draw < 3)
    assert_graphs(1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile finds no g++")
def test_generated_code_computes_the_same():
    net = make("mlp")
    twin = copy.deepcopy(net)
    x, y = batch(4)
    compiled = torch.compile(net, fullgraph=True)
    for _ in range(4):
        step(net, compiled, x, y)
        step(twin, twin, x, y)
        assert_equal(gradients(net), gradients(twin), tolerance=1e-5)
    assert_graphs(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_one_graph(dtype: torch.dtype):
    net = make()
    twin = copy.deepcopy(net)
    x, y = batch(4)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(10):
        with torch.autocast("cpu", dtype):
            step(net, compiled, x, y)
            step(twin, twin, x, y)
        assert_equal(gradients(net), gradients(twin), tolerance=32 * torch.finfo(dtype).eps)
    assert_graphs(1)


@pytest.mark.parametrize("kind", ["mlp", "lenet", "residual"])
def test_a_saved_model_compiles(kind: str):
    net = pickle.loads(pickle.dumps(make(kind)))
    twin = copy.deepcopy(net)
    x, y = batch(4)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(5):
        step(net, compiled, x, y)
        step(twin, twin, x, y)
        assert_equal(gradients(net), gradients(twin), tolerance=1e-6)
    assert_graphs(1)


LOAD = """
import pathlib, pickle, sys, torch
from interop.nets import batch, gradients
import l0kernels as l0
found = []
for backend in (None, "aot_eager"):
    net = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
    run = net if backend is None else torch.compile(net, backend=backend)
    for _ in range(3):
        (run(batch(4)[0]).square().mean() + l0.penalty(net)).backward()
    assert int(net.l0.step) == 3, int(net.l0.step)
    found.append(gradients(net))
for name, expected in found[0].items():
    torch.testing.assert_close(found[1][name], expected, msg=name)
"""


def test_a_model_loaded_by_a_new_process_compiles_without_a_scope(tmp_path: Path):
    (tmp_path / "net.pt").write_bytes(pickle.dumps(make("mlp")))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "net.pt")]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_without_a_scope_gates_are_drawn_between_graphs():
    net = make()
    x, y = batch()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(4):
        for model, run in ((net, compiled), (twin, twin)):
            model.zero_grad()
            (F.cross_entropy(run(x), y) + l0.penalty(model)).backward()
        assert_equal(gradients(net), gradients(twin), tolerance=1e-6)
        assert int(net.l0.step) == int(twin.l0.step)
    net.eval()
    twin.eval()
    with torch.no_grad(), l0.frozen(twin):
        torch.testing.assert_close(compiled(x), twin(x))
