# SPDX-License-Identifier: Apache-2.0
"""Trainings that two processes run under DDP and one process runs with the whole batch.

One rank: ``python -m interop.ddp_worker RANK STORE OUT`` writes the records of all cases to OUT.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import l0kernels as l0
from interop.nets import batch, gradients, make, norms_in_eval
from l0kernels.optim import rows

WORLD = 2
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How one training goes.

    Args:
        options: of DDP.
        steps: optimizer steps.
        frozen: the steps at which gates are frozen.
        scoped: with ``expected_loss``.
        penalty: added to the loss.
        impl: packed or masked.
        parts: micro batches of each step, under ``hold`` and ``no_sync``.
        checkpointed: the inner block is recomputed in backward.
        norms_train: norms use the statistics of each rank's batch.
        closed: all gates of the first group are closed.
        kind: network.
        as_on_a_gpu: each layer packs weight and bias in one call, norms run as one operator.
        open_rows: with l0.optim.SGD.
        method: of the gates.
        granularity: of the gates.
        budget: added to the loss.
        l2: the coupled one, of hard concrete gates.
        scope: of the gates; of ``"example"`` the closure returns every example's loss.
        arm: further options of ARM's gates.
    """

    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    frozen: range = range(0)
    scoped: bool = True
    penalty: bool = True
    impl: str = "auto"
    parts: int = 1
    checkpointed: bool = False
    norms_train: bool = False
    closed: bool = False
    kind: str = "norm"
    as_on_a_gpu: bool = False
    open_rows: bool = False
    method: str = "hard_concrete"
    granularity: str = "unit"
    budget: bool = False
    l2: float = 0.0
    scope: str = "batch"
    arm: dict[str, Any] = field(default_factory=dict)


UNUSED, STATIC = {"find_unused_parameters": True}, {"static_graph": True}
VIEWS = {"gradient_as_bucket_view": True}
SOME = range(2, 4)
WEIGHTS = {"granularity": "weight"}

CASES: dict[str, Case] = {
    "20 steps": Case(steps=20),
    "residual, 20 steps": Case(steps=20, kind="residual"),
    "norms in training mode": Case(steps=20, norms_train=True),
    "masked": Case(impl="reference"),
    "no scope": Case(scoped=False),
    "no penalty": Case(penalty=False),
    "find unused": Case(UNUSED),
    "static graph": Case(STATIC),
    "bucket views": Case(VIEWS),
    "accumulated": Case(parts=2),
    "accumulated, bucket views": Case(VIEWS, parts=4),
    "checkpointed": Case(checkpointed=True),
    "checkpointed, static graph": Case(STATIC, checkpointed=True),
    "all closed": Case(closed=True),
    "all closed, find unused": Case(UNUSED, closed=True),
    "frozen": Case(frozen=SOME),
    "frozen from the start": Case(frozen=range(6)),
    "frozen, masked": Case(frozen=SOME, impl="reference"),
    "frozen, no scope": Case(frozen=SOME, scoped=False),
    "frozen, no penalty": Case(frozen=SOME, penalty=False),
    "frozen, find unused": Case(UNUSED, frozen=SOME),
    "frozen, static graph": Case(STATIC, frozen=SOME),
    "frozen, bucket views": Case(VIEWS, frozen=SOME),
    "frozen, accumulated": Case(frozen=SOME, parts=2),
    "frozen, checkpointed": Case(frozen=SOME, checkpointed=True),
    "open rows": Case(steps=20, open_rows=True),
    "open rows, bucket views": Case(VIEWS, steps=20, open_rows=True),
    "open rows, accumulated": Case(steps=20, parts=2, open_rows=True),
    "ARM": Case(steps=20, method="arm"),
    "ARM, find unused": Case(UNUSED, method="arm"),
    "ARM, static graph": Case(STATIC, method="arm"),
    "ARM, no penalty": Case(penalty=False, method="arm"),
    "ARM, checkpointed": Case(checkpointed=True, method="arm"),
    "ARM, three samples": Case(method="arm", arm={"samples": 3}),
    "AR": Case(steps=20, method="arm", arm={"estimator": "ar"}),
    "AR, three samples": Case(method="arm", arm={"estimator": "ar", "samples": 3}),
    "ARM, open rows": Case(steps=20, open_rows=True, method="arm"),
    "ARM, norms in training mode": Case(steps=20, norms_train=True, method="arm"),
    "gates per example": Case(scope="example"),
    "gates per example, ARM": Case(steps=20, scope="example", method="arm"),
    "gates per example, AR": Case(scope="example", method="arm", arm={"estimator": "ar"}),
    "gates per example, ARM, static graph": Case(STATIC, scope="example", method="arm"),
    "gates per example, Dep-L0, accumulated": Case(parts=2, scope="example", method="dep"),
    "scores of units": Case(method="cs"),
    "scores of weights": Case(method="cs", **WEIGHTS),
    "scores of weights, find unused": Case(UNUSED, method="cs", **WEIGHTS),
    "scores of weights, accumulated": Case(parts=2, method="cs", **WEIGHTS),
    "scores of weights, checkpointed": Case(checkpointed=True, method="cs", **WEIGHTS),
    "scores of weights, frozen": Case(frozen=SOME, method="cs", **WEIGHTS),
    "budget": Case(steps=20, budget=True),
    "budget, norms in training mode": Case(budget=True, norms_train=True),
    "budget, scores of weights": Case(penalty=False, budget=True, method="cs", **WEIGHTS),
    "coupled L2": Case(l2=10.0),
    "straight-through gates": Case(method="scl", **WEIGHTS),
    "straight-through gates, checkpointed": Case(checkpointed=True, method="scl", **WEIGHTS),
    "as on a GPU": Case(as_on_a_gpu=True),
    "as on a GPU, residual": Case(as_on_a_gpu=True, kind="residual"),
    "as on a GPU, norms in training mode": Case(as_on_a_gpu=True, norms_train=True),
    "as on a GPU, find unused": Case(UNUSED, as_on_a_gpu=True),
    "as on a GPU, static graph": Case(STATIC, as_on_a_gpu=True),
    "as on a GPU, bucket views": Case(VIEWS, as_on_a_gpu=True),
    "as on a GPU, accumulated": Case(as_on_a_gpu=True, parts=2),
    "as on a GPU, checkpointed": Case(as_on_a_gpu=True, checkpointed=True),
    "as on a GPU, frozen": Case(as_on_a_gpu=True, frozen=SOME),
}


def prepare(case: Case, seed: int) -> nn.Module:
    net = make(case.kind, seed, case.granularity, case.method)
    net.l0._together = case.as_on_a_gpu
    if not case.norms_train:
        norms_in_eval(net)
    if case.checkpointed:
        net.wrap = lambda block, x: checkpoint(block, x, use_reentrant=False)
    if case.closed:
        with torch.no_grad():
            net.l0.log_alpha[next(net.l0.slices())[1]] = -100.0
    net.l0.l2, net.l0.scope = case.l2, case.scope
    for option, value in case.arm.items():
        setattr(net.l0, option, value)
    if case.budget:
        # Its buffers are the model's then: DDP sends those of rank 0. The target is out of reach.
        net.budget = l0.Budget(net, 0.01, lr=0.2, warmup=2)
    return net.double()


def train(case: Case, net: nn.Module, model: nn.Module, rank: int, ranks: int) -> list[Record]:
    """Train on every ``ranks``-th part of each batch; what happened in each step."""
    optimizer = make_optimizer(case, net, model)
    records = []
    for step in range(case.steps):
        set_frozen(net, step in case.frozen)
        if case.method == "cs":
            net.l0.set_progress(step / case.steps)
        torch.manual_seed(1000 * rank + step)  # users' seeds may differ
        x, y = (t[rank::ranks] for t in batch(seed=step))  # as DistributedSampler deals out
        optimizer.zero_grad()
        with l0.use_impl(case.impl):
            backward(case, net, model, x.double(), y)
        z = net.l0._draw.z.detach().clone()
        records.append({"z": z, "gradients": gradients(net), "step": int(net.l0.step)})
        optimizer.step()
    if isinstance(optimizer, l0.optim.SGD):
        assert optimizer.row_weights and optimizer._now
        optimizer.flush()
    parameters = {n: p.detach().clone() for n, p in net.named_parameters()}
    return [*records, {"parameters": parameters, "statistics": dict(net.named_buffers())}]


def make_optimizer(case: Case, net: nn.Module, model: nn.Module) -> torch.optim.SGD:
    # The slope of ARM gates is 7, and losses are not divided among gates.
    gate_lr = 0.01 if case.method == "arm" else 2.0
    groups = l0.param_groups(net, lr=0.1, gate_lr=gate_lr)
    # One process is PyTorch's optimizer, for the two that follow draws.
    if not case.open_rows or model is net:
        return torch.optim.SGD(groups, momentum=0.9)
    rows.LEAST = 1
    return l0.optim.SGD(groups, model=model, momentum=0.9)


def set_frozen(net: nn.Module, wanted: bool) -> None:
    if wanted and not net.l0.frozen:
        net.l0.freeze()
    elif net.l0.frozen and not wanted:
        net.l0.unfreeze()


def backward(case: Case, net: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> None:
    if case.parts > 1:
        accumulate(case, model, x, y)
        return
    if case.scoped:
        how = "none" if case.scope == "example" else "mean"
        loss = l0.expected_loss(model, lambda: F.cross_entropy(model(x), y, reduction=how))
    else:
        loss = F.cross_entropy(model(x), y)
    if case.penalty:
        loss = loss + l0.penalty(model)
    (loss + net.budget() if case.budget else loss).backward()


def accumulate(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> None:
    pieces = list(zip(x.chunk(case.parts), y.chunk(case.parts), strict=True))
    with l0.hold(model):
        for a, b in pieces[:-1]:
            if isinstance(model, DistributedDataParallel):
                with model.no_sync():
                    (F.cross_entropy(model(a), b) / case.parts).backward()
            else:
                (F.cross_entropy(model(a), b) / case.parts).backward()
        a, b = pieces[-1]
        (F.cross_entropy(model(a), b) / case.parts + l0.penalty(model)).backward()


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {}
    for name, case in CASES.items():
        print(name, flush=True)
        net = prepare(case, seed=7 * rank)  # the gates' seeds differ until DDP takes rank 0's
        model = DistributedDataParallel(net, **case.options)
        found[name] = train(case, net, model, rank, WORLD)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
