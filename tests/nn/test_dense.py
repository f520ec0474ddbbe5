# SPDX-License-Identifier: Apache-2.0
"""Groups of which so few units are closed that all are computed, and gates multiply activations."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from interop.nets import assert_closed_get_nothing, batch, gradients, make, objective
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from l0kernels.gates import dense

BATCH = 8
OPEN = 2.0  # log alpha at which some units of most draws are closed


@pytest.fixture(autouse=True)
def small_groups_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "LEAST_WEIGHTS", 1)


class Mixed(nn.Module):
    """A norm, an activation with parameters and a product of two layers between others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(48, 20)
        self.norm = nn.BatchNorm1d(20)
        self.slopes = nn.PReLU(20)
        self.up, self.gate = nn.Linear(20, 30), nn.Linear(20, 30)
        self.down = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slopes(self.norm(self.fc1(x.flatten(1))))
        return self.down(self.up(x) * F.silu(self.gate(x)))


def converted(kind: str, method: str = "hard_concrete") -> nn.Module:
    if kind == "mixed":
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 4)
        net = l0.convert(Mixed(), method, example_inputs=(x,), lam=1e-3)
        assert net.l0.sizes == [20, 30]
    else:
        net = make(kind, method=method)
    return nearly_open(net)


@torch.no_grad()
def nearly_open(net: nn.Module) -> nn.Module:
    net.l0.log_alpha.fill_(OPEN / 7 if isinstance(net.l0, l0.gates.ARM) else OPEN)
    return net


def step(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    objective(net, x, y).backward()
    return {**gradients(net), **{n: b.clone() for n, b in net.named_buffers()}}


def assert_step_is_the_reference_s(net: nn.Module, twin: nn.Module, x: Tensor, y: Tensor) -> None:
    """A step of each, under the same draw."""
    with l0.use_impl("reference"):
        expected = step(twin, x, y)
    got = step(net, x, y)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-10, rtol=1e-10, msg=name)


def dense_groups(net: nn.Module) -> set[int]:
    """Numbers of the groups that ran dense in the present draw."""
    gates = net.l0
    return {gates.dense.ports[port][0] for port in gates.current_draw().dense}


def has_closed(net: nn.Module) -> bool:
    return bool((net.l0.current_draw().z == 0).any())


@pytest.mark.parametrize("method", ["hard_concrete", "arm"])
@pytest.mark.parametrize("kind", ["mlp", "mixed"])
def test_equal_to_the_masked_reference(kind: str, method: str):
    net = converted(kind, method).double()
    x, y = batch(BATCH)
    x = x.double()
    closed = 0
    for number in range(6):
        assert_step_is_the_reference_s(net, copy.deepcopy(net), x, y)
        # What layers get is known from the second step on.
        assert dense_groups(net) == (set(range(len(net.l0.sizes))) if number else set())
        if number and has_closed(net):
            closed += 1
            assert_closed_get_nothing(net)
    assert closed > 1


def test_some_groups_dense_and_others_packed():
    net = converted("lenet").double()
    x, y = batch(BATCH)
    with torch.no_grad():  # of the second group nearly all units are closed
        net.l0.log_alpha[8:18] = -4.0
    for _ in range(3):
        assert_step_is_the_reference_s(net, copy.deepcopy(net), x.double(), y)
    assert dense_groups(net) == {0, 2}
    assert net.l0.current_draw().widths[1] < 10


def test_all_units_are_computed_and_none_packed(monkeypatch: pytest.MonkeyPatch):
    net = converted("mlp")
    widths: list[int] = []
    x, y = batch(BATCH)
    step(net, x, y)
    net.fc2.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for _ in range(4):
        step(net, x, y)
        assert net.fc2.packed_parameters(net.l0.current_draw()) == (net.fc2.weight, net.fc2.bias)
    assert widths == [20] * 4


def test_from_how_many_open_units_on():
    net = converted("mlp")
    x, y = batch(32)
    step(net, x, y)
    rows = 32 + dense.ROWS_PER_READING
    least = rows / (rows + dense.ROWS_PER_PACKING)
    for group in range(2):
        assert net.l0.runs_dense(group, least + 1e-6)
        assert not net.l0.runs_dense(group, least - 1e-6)


def test_rows_are_averaged_over_weights():
    net = make("lenet")
    step(net, *batch(BATCH))
    conv1, conv2, fc1 = net.conv1.weight.numel(), net.conv2.weight.numel(), net.fc1.weight.numel()
    rows = (conv1 * BATCH * 16 + conv2 * BATCH * 4) / (conv1 + conv2)
    assert net.l0.dense.count_rows(net.l0.layers)[0] == pytest.approx(rows)
    rows = (conv2 * BATCH * 4 + fc1 * BATCH) / (conv2 + fc1)
    assert net.l0.dense.count_rows(net.l0.layers)[1] == pytest.approx(rows)


@pytest.mark.parametrize("limit", ["LEAST_WEIGHTS", "MOST_ROWS"])
def test_small_groups_and_many_rows_are_packed(limit: str, monkeypatch: pytest.MonkeyPatch):
    net = converted("mlp")
    bound = {"LEAST_WEIGHTS": 48 * 20 + 20 * 14 + 1, "MOST_ROWS": BATCH - 1}
    monkeypatch.setattr(dense, limit, bound[limit])
    for _ in range(2):
        step(net, *batch(BATCH))
    assert dense_groups(net) == set()
    monkeypatch.undo()
    monkeypatch.setattr(dense, "LEAST_WEIGHTS", 1)
    net.l0.dense.forget()
    step(net, *batch(BATCH))
    assert dense_groups(net) == {0, 1}


def test_test_gates_and_given_ones_are_packed():
    net = converted("mlp")
    x, y = batch(BATCH)
    step(net, x, y)
    with net.l0.using(torch.ones(net.l0.count)):
        net(x)
        assert dense_groups(net) == set()
    net.eval()(x)
    assert dense_groups(net) == set()
    net.train().l0.freeze()
    net(x)
    assert dense_groups(net) == set()


def test_features_without_a_producer_are_packed():
    net = nearly_open(make("lenet", granularity="input"))
    for _ in range(2):
        step(net, *batch(BATCH))
    # Those of the second group meet gates of the input of fc1.
    assert net.l0.sizes == [8, 10, 40, 16] and dense_groups(net) == {0, 3}


def test_a_recomputed_forward_is_the_same():
    net = converted("mlp").double()
    x, y = batch(BATCH)
    step(net, x.double(), y)
    twin = copy.deepcopy(net)
    expected = step(twin, x.double(), y)
    net.zero_grad()
    with l0.hold(net):
        loss = F.cross_entropy(checkpoint(net, x.double(), use_reentrant=False), y)
        (loss + l0.penalty(net)).backward()
    assert dense_groups(net) == {0, 1}
    for name, value in gradients(net).items():
        torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=1e-12, msg=name)


def test_what_a_closed_unit_holds_reaches_no_other():
    net = converted("mlp")
    x, y = batch(BATCH)
    step(net, x, y)
    with torch.no_grad():
        net.l0.log_alpha[:] = 4.6
        net.l0.log_alpha[3] = -4.0
        net.fc1.weight[3] = torch.inf
    while True:
        grads = step(net, x, y)
        if net.l0.current_draw().z[3] == 0:
            break
    assert dense_groups(net) == {0, 1}
    assert all(bool(grads[name].isfinite().all()) for name in ("fc2.weight", "fc3.weight"))


def test_compiled_layers_pack():
    net = converted("mlp")
    x, y = batch(BATCH)
    step(net, x, y)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        net.zero_grad()
        (l0.expected_loss(compiled, lambda: F.cross_entropy(compiled(x), y))).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert dense_groups(net) == set()


def test_a_compiled_layer_among_others():
    net = converted("mlp").double()
    x, y = batch(BATCH)
    twin = copy.deepcopy(net)
    net.fc2.compile(backend="aot_eager")
    for _ in range(3):
        assert_step_is_the_reference_s(net, twin, x.double(), y)
    assert dense_groups(net) == {0, 1}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_run_dense_too(copied):
    net = converted("mlp")
    step(net, *batch(BATCH))
    twin = copied(net)
    for _ in range(2):
        step(twin, *batch(BATCH))
    assert dense_groups(twin) == {0, 1}


def test_an_optimizer_of_open_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0kernels.optim.rows.LEAST", 1)
    runs = []
    for make_optimizer in (torch.optim.SGD, l0.optim.SGD):
        net = converted("mlp").double()
        extra = {} if make_optimizer is torch.optim.SGD else {"model": net}
        groups = l0.param_groups(net, lr=0.1, weight_decay=1e-2)
        optimizer = make_optimizer(groups, lr=0.1, momentum=0.9, **extra)
        assert not extra or optimizer.row_weights
        x, y = batch(BATCH)
        for _ in range(5):
            step(net, x.double(), y)
            optimizer.step()
        net.eval()(x.double())
        runs.append({name: p.detach().clone() for name, p in net.named_parameters()})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, atol=1e-12, rtol=1e-12, msg=name)


def test_the_report_says_so():
    net = converted("mlp")
    assert {row.path for row in l0.report(net).groups} == {"packed"}
    step(net, *batch(BATCH))
    assert {row.path for row in l0.report(net).groups} == {"dense"}
    with torch.no_grad():
        net.l0.log_alpha.fill_(-4.0)
    assert {row.path for row in l0.report(net).groups} == {"packed"}
    nearly_open(net)
    speed = l0.report(net, (batch(BATCH)[0],)).speed
    assert speed is not None
    whys = {group.why for group in speed.groups.values()}
    assert all("of its units are open" in why for why in whys), whys


def test_a_resumed_run_has_the_same_bits():
    net, twin = (converted("mlp") for _ in range(2))
    step(net, *batch(BATCH))
    net.eval()(batch(3)[0])  # what is evaluated says nothing of training
    net.train()
    state = net.state_dict()
    assert state["l0._extra_state"]["rows"] == [BATCH, BATCH]
    twin.load_state_dict(state)
    for _ in range(2):
        expected, got = (step(run, *batch(BATCH)) for run in (net, twin))
        assert dense_groups(net) == dense_groups(twin) == {0, 1}
        for name, value in expected.items():
            assert got[name].equal(value), name


@pytest.mark.parametrize("rows", ["many", [1.0], [1.0, "2"], {"a": 1.0}])
def test_rows_of_other_groups_are_refused(rows: object):
    net = converted("mlp")
    state = net.state_dict()
    state["l0._extra_state"] = {**state["l0._extra_state"], "rows": rows}
    with pytest.raises((ValueError, RuntimeError), match="expected rows of 2 groups, got"):
        net.load_state_dict(state)
