# SPDX-License-Identifier: Apache-2.0
"""A converted model among the things people do to models."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import l0kernels as l0


class Net(nn.Module):
    """Convolution, norm, flatten and linear layers; ``wrap`` runs the inner block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.inner = nn.Conv2d(12, 10, 3, padding=1)
        self.fc1 = nn.Linear(10 * 16, 24)
        self.fc2 = nn.Linear(24, 5)
        self.wrap: Callable[..., Tensor] = lambda block, x: block(x)

    def block(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(F.relu(self.norm(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.wrap(self.block, x).flatten(1))))


def make(seed: int = 0, **options) -> Net:
    torch.manual_seed(0)
    net = Net()
    return l0.convert(
        net,
        "hard_concrete",
        example_inputs=(torch.randn(2, 3, 4, 4),),
        lam=1e-3,
        seed=seed,
        **options,
    )


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 4, 4, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


def objective(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return l0.expected_loss(net, lambda: F.cross_entropy(net(x), y)) + l0.penalty(net)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert set(a) == set(b) and len(a) > 0
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=name)


def test_bf16_autocast_trains_and_stays_near_fp32():
    nets = [make(), make()]
    x, y = batch()
    objective(nets[0], x, y).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(nets[1], x, y)
    loss.backward()
    for (name, exact), (_, low) in zip(
        gradients(nets[0]).items(), gradients(nets[1]).items(), strict=True
    ):
        assert low.dtype == torch.float32, name
        assert (low - exact).norm() <= 0.05 * exact.norm() + 1e-4, name


def test_bf16_autocast_is_as_near_to_fp32_as_the_masked_reference():
    x, y = batch()
    found = {}
    for impl, autocast in (("reference", False), ("reference", True), ("auto", True)):
        net = make()
        with l0.use_impl(impl), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = objective(net, x, y)
        loss.backward()
        found[impl, autocast] = gradients(net)
    for name, exact in found["reference", False].items():
        ours = (found["auto", True][name] - exact).abs().max()
        theirs = (found["reference", True][name] - exact).abs().max()
        assert ours <= 2 * theirs + 2**-8 * exact.abs().max(), name


@pytest.mark.parametrize(
    ("reentrant", "where", "scoped"),
    [
        (False, "block", False),
        (False, "block", True),
        (False, "root", False),
        (False, "root", True),
        (True, "block", False),
        (True, "block", True),
        (True, "root", True),
    ],
)
def test_checkpointing_gives_the_same_gradients(reentrant: bool, where: str, scoped: bool):
    def recompute(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant)

    x, y = batch()
    x.requires_grad_()  # reentrant checkpointing needs a differentiable input
    found = []
    for use in (False, True):
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # a recomputation counts a batch twice, in plain torch too
        run: Callable[[Tensor], Tensor] = net
        if use and where == "block":
            net.wrap = recompute
        elif use:

            def run(x: Tensor, net: nn.Module = net) -> Tensor:
                return recompute(net, x)

        def loss(run=run):
            return F.cross_entropy(run(x), y)

        for _ in range(2):
            net.zero_grad()
            value = l0.expected_loss(net, loss) if scoped else loss()
            (value + l0.penalty(net)).backward()
        assert int(net.l0.step) == 2
        found.append(gradients(net))
    assert_equal(*found, tolerance=1e-6)


def test_reentrant_checkpointing_around_the_root_asks_for_a_scope():
    net = make()
    x, y = batch()
    loss = F.cross_entropy(checkpoint(net, x.requires_grad_(), use_reentrant=True), y)
    with pytest.raises(RuntimeError, match="inside l0kernels.expected_loss"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_raises_when_the_draw_was_replaced(reentrant: bool):
    net = make()
    net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    x, y = batch()
    x.requires_grad_()
    first = F.cross_entropy(net(x), y)
    second = F.cross_entropy(net(x), y)
    with pytest.raises(RuntimeError, match="expected the draw of the forward being recomputed"):
        (first + second).backward()


def test_accumulation_under_hold_equals_the_big_batch():
    net = make().eval()
    net.l0.train()  # norms in eval mode, so that batches can be split
    x, y = batch()
    objective(net, x, y).backward()
    whole = gradients(net)
    net.zero_grad()
    net.l0.step.sub_(1)
    with l0.hold(net):
        for half in (slice(0, 4), slice(4, 8)):
            (l0.expected_loss(net, lambda h=half: F.cross_entropy(net(x[h]), y[h])) / 2).backward(
                retain_graph=True
            )
        l0.penalty(net).backward()
    assert int(net.l0.step) == 1
    assert_equal(whole, gradients(net), tolerance=1e-6)


def test_deepcopy_and_pickle_leave_the_draw_and_the_gates_behind():
    net = make()
    x, y = batch()
    objective(net, x, y).backward()
    restored = pickle.loads(pickle.dumps(net.l0))
    assert restored._draw is None
    twin = copy.deepcopy(net)
    assert twin.l0._draw is None and twin.inner.in_gate.gates is twin.l0
    assert twin.l0 is not net.l0
    objective(net, x, y).backward()
    net.zero_grad()
    objective(net, x, y).backward()
    for _ in range(2):
        twin.zero_grad()
        objective(twin, x, y).backward()
    assert_equal(gradients(net), gradients(twin))


def test_ema_model_evaluates_with_its_own_gates():
    net = make()
    x, y = batch()
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(l0.param_groups(net, lr=0.1, gate_lr=10.0))
    for _ in range(3):
        optimizer.zero_grad()
        objective(net, x, y).backward()
        optimizer.step()
        ema.update_parameters(net)
    ema.eval()
    averaged = ema.module.l0.log_alpha
    assert not torch.equal(averaged, net.l0.log_alpha)
    with torch.no_grad(), l0.frozen(ema):
        packed = ema(x)
    with torch.no_grad(), l0.use_impl("reference"):
        torch.testing.assert_close(ema(x), packed)


def test_state_dict_keeps_the_models_keys_and_loads_old_checkpoints():
    plain = Net()
    net = make()
    keys = set(net.state_dict())
    assert set(plain.state_dict()) <= keys
    own = {"l0.log_alpha", "l0.step", "l0.seed", "l0._extra_state"}
    assert {k for k in keys if k.startswith("l0.")} == own
    net.load_state_dict(plain.state_dict())
    torch.testing.assert_close(net.inner.weight, plain.inner.weight)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(seed=5)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert int(fresh.l0.seed) == 0


def test_a_checkpoint_of_other_gates_is_refused():
    net = make(select=["stem"])
    before = net.fc2.weight.detach().clone()
    with pytest.raises(ValueError, match=r"expected gates \{'stem': 12\}, got \{.*'fc1': 24\}"):
        net.load_state_dict({k: v for k, v in make().state_dict().items() if k.startswith("l0.")})
    assert net.fc2.weight.equal(before)
    with pytest.raises(RuntimeError, match="Missing key"):
        net.l0.load_state_dict({})


def silently_wrong(run: Callable[[nn.Module, bool], dict[str, Tensor]]) -> int:
    """How often ``run`` with checkpointing differs from the same without, and nothing is said."""
    wrong = 0
    for seed in range(20):
        exact = run(make(seed=seed), False)
        try:
            got = run(make(seed=seed), True)
        except RuntimeError:
            continue
        wrong += any(not torch.allclose(exact[n], got[n], atol=1e-6) for n in exact)
    return wrong


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["constant gates", "eval first", "held twice"])
def test_checkpointing_is_never_silently_wrong(case: str, reentrant: bool):
    def run(net: nn.Module, checkpointed: bool) -> dict[str, Tensor]:
        if checkpointed:
            net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
        x, y = batch()
        x.requires_grad_()
        if case == "constant gates":
            net.l0.log_alpha.requires_grad_(False)
        if case == "held twice":
            with l0.hold(net):
                first, second = (F.cross_entropy(net(x), y) for _ in range(2))
            first.backward()
            net(x)
            second.backward()
            return gradients(net)
        net.train(case != "eval first")
        first = F.cross_entropy(net(x), y)
        net.train()
        net(x)
        net.train(case != "eval first")
        first.backward()
        return gradients(net)

    assert silently_wrong(run) == 0


def test_constant_gates_can_be_checkpointed():
    net = make()
    net.l0.log_alpha.requires_grad_(False)
    x, y = batch()
    F.cross_entropy(checkpoint(net, x, use_reentrant=False), y).backward()
    assert net.fc2.weight.grad is not None


def _ddp_worker(rank: int, path: str, results) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    net = make(seed=rank).eval()
    net.l0.train()
    ddp = nn.parallel.DistributedDataParallel(net)
    x, y = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    widths = []
    for _ in range(3):
        ddp.zero_grad()
        loss = l0.expected_loss(ddp, lambda: F.cross_entropy(ddp(x[mine]), y[mine]))
        (loss + l0.penalty(ddp)).backward()
        widths.append(net.l0["inner"].index.tolist())
    results[rank] = (widths, {n: g.numpy() for n, g in gradients(net).items()})
    torch.distributed.destroy_process_group()


def test_ddp_ranks_agree_and_match_the_big_batch(tmp_path):
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        mp.spawn(_ddp_worker, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    assert found[0][0] == found[1][0]
    net = make(seed=0).eval()
    net.l0.train()
    x, y = batch()
    for _ in range(3):
        net.zero_grad()
        objective(net, x, y).backward()
    for rank in range(2):
        got = {n: torch.from_numpy(g) for n, g in found[rank][1].items()}
        assert_equal(gradients(net), got, tolerance=1e-6)


def test_compile_one_graph_for_thirty_draws():
    net = make()
    x, y = batch()
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    counters = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counters, fullgraph=True)
    widths = set()
    for _ in range(30):
        for model, run in ((net, compiled), (twin, twin)):
            model.zero_grad()
            loss = l0.expected_loss(model, lambda run=run: F.cross_entropy(run(x), y))
            (loss + l0.penalty(model)).backward()
        assert_equal(gradients(net), gradients(twin), tolerance=1e-6)
        widths.add(tuple(net.l0[name].count for name in net.l0.names))
    assert len(widths) > 10
    assert counters.frame_count == 1


def test_compile_without_a_scope_draws_between_graphs():
    net = make()
    x, y = batch()
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
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
