# SPDX-License-Identifier: Apache-2.0
"""Rounds, tickets, rewinding, magnitude pruning, fine-tuning, schedules of learning rates."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from l0kernels.recipes import checkpoint, data, published
from l0kernels.recipes.arm import PACKED, Arm, gated_network
from l0kernels.recipes.errors import InputError
from l0kernels.recipes.loop import Plan, Run
from l0kernels.recipes.models import resnet
from l0kernels.recipes.phases import Phase
from l0kernels.recipes.recipe import Settings
from l0kernels.training import gates_of

from .pictures import write_cifar10
from .test_loop import _assert_same_bits


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Plan]:
    """Makes plans of 5 steps per epoch for ResNet-8; keywords replace settings."""
    write_cifar10(tmp_path / "data")
    images = data.load(tmp_path / "data", (3, 32, 32))

    def plan(name: str, out: str = "run", **changes: Any) -> Plan:
        recipe = replace(published.find(name), make=partial(resnet, 1))
        settings = recipe.settings(recipe.default)
        changes = {"batch": 8, **settings.at_length(changes.pop("epochs", 2)), **changes}
        settings = replace(settings, **changes)
        return Plan(recipe, settings, images, 0, False, None, 1, tmp_path / out)

    return plan


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("l0.")}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(v.equal(other[k]) for k, v in one.items())


class Watched(Run):
    """A run that notes what each epoch starts from, and what each step leaves."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, on_step=self._note)
        self.starts: list[dict[str, Any]] = []

    def _note(self) -> None:
        arm = self.arms[0]
        if not self.starts or self.starts[-1]["epoch"] != self.epoch:
            gates: Any = gates_of(arm.net)
            rates = [group["lr"] for o in arm.optimizers for group in o.param_groups]
            self.starts.append(
                {
                    "epoch": self.epoch,
                    "frozen": gates.frozen,
                    "beta": float(getattr(gates, "beta", torch.ones(()))),
                    "rates": rates,
                    "optimizers": [*arm.optimizers],
                }
            )


def _run(plan: Plan) -> Watched:
    run = Watched(plan)
    run.start()
    run.train()
    return run


def test_rounds_harden_and_the_ticket_is_frozen(make: Callable[..., Plan]) -> None:
    run = _run(make("resnet20-cs", epochs=3, rounds=2, rewind=1))
    assert [record["phase"] for record in run.history] == (
        ["round 1"] * 3 + ["round 2"] * 3 + ["ticket"] * 3
    )
    betas = [start["beta"] for start in run.starts[:6]]
    assert betas == pytest.approx([1, 200**0.5, 200] * 2)
    assert [start["frozen"] for start in run.starts] == [False] * 6 + [True] * 3
    # Momentum goes on through rounds, and starts anew with the ticket.
    one, two, three = (run.starts[e]["optimizers"][0] for e in (0, 3, 6))
    assert one is two is not three
    entries = [record["arms"]["packed"] for record in run.history]
    assert {entry["weights_test"] for entry in entries[6:]} == {entries[5]["weights_test"]}
    assert entries[6]["weights_realised"] == entries[6]["weights_test"]
    assert entries[0]["weights_realised"] == entries[0]["weights_total"]


def test_scores_between_rounds(make: Callable[..., Plan]) -> None:
    plan = make("resnet20-cs", epochs=2, rounds=2, rewind=1, initial=0.1)
    run = Run(plan)
    run.start()
    arm = run.arms[0]
    gates: Any = gates_of(arm.net)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.linspace(-0.2, 0.3, gates.count))
    before = gates.log_alpha.detach().clone()
    plan.phases[1].begin(arm)
    assert torch.equal(gates.log_alpha, (200 * before).clamp(max=0.1))


def test_tickets_start_from_the_kept_epoch(make: Callable[..., Plan]) -> None:
    plan = make("resnet20-cs", epochs=2, rounds=1, rewind=1)
    run = Run(plan)
    run.start()
    arm = run.arms[0]
    first = _weights(arm.net)
    run._train_epoch()
    early = _weights(arm.net)
    run._train_epoch()
    assert arm.kept is not None
    assert _same(arm.kept, early)
    assert not _same(early, first)
    gates = gates_of(arm.net)
    scores = gates.log_alpha.detach().clone()
    with torch.no_grad():
        gates.log_alpha[::3] = -scores[::3].abs() - 0.1
    scores = gates.log_alpha.detach().clone()
    plan.phases[-1].begin(arm)
    assert _same(_weights(arm.net), early)
    assert gates.frozen
    assert torch.equal(gates.deterministic() != 0, scores > 0)
    # Closed weights do not matter, and their gradients are exactly zero.
    x, y = plan.images.train_batch(torch.arange(8), (0,))
    arm.step(arm.place(x), y)
    conv = arm.net.get_submodule("stages.0.0.conv1")
    start = gates.starts["stages.0.0.conv1"]
    closed = (scores[start : start + conv.weight.numel()] <= 0).view_as(conv.weight)
    assert closed.any() and not closed.all()
    assert not conv.weight.grad[closed].any()
    assert conv.weight.grad[~closed].any()


def test_magnitude_pruning_is_that_of_pytorch(make: Callable[..., Plan]) -> None:
    plan = make("resnet20-imp", epochs=2, rounds=3, rewind=0)
    arm = Arm(
        PACKED, gated_network(plan.recipe, plan.settings, 40, 0), plan.settings, "channels_last"
    )
    gates = gates_of(arm.net)
    plan.phases[0].begin(arm)
    arm.keep()
    kept = _weights(arm.net)
    plain = resnet(1)
    layers = [(plain.get_submodule(name), "weight") for name in gates.names]
    assert len(layers) == 7
    for number in (1, 2):
        # Both get the weights of a round; a mask does not move them.
        for (layer, _), name in zip(layers, gates.names, strict=True):
            with torch.no_grad():
                weight = arm.net.get_submodule(name).weight
                weight.copy_(torch.randn(weight.shape))
                (layer.weight if number == 1 else layer.weight_orig).copy_(weight)
                if number > 1:
                    layer.weight = layer.weight_orig * layer.weight_mask
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.2)
        plan.phases[number].begin(arm)
        masks = torch.cat([layer.weight_mask.flatten() for layer, _ in layers])
        assert torch.equal(gates.deterministic(), masks)
        assert float(masks.mean()) == pytest.approx(0.8**number, abs=1e-4)
        assert _same(_weights(arm.net), kept)
        assert gates.frozen


def test_pruned_rounds_train_the_masked_network(make: Callable[..., Plan]) -> None:
    run = _run(make("resnet20-imp", epochs=2, rounds=3, rewind=1))
    left = [record["arms"]["packed"] for record in run.history]
    gated = gates_of(run.arms[0].net).count
    total = left[0]["weights_total"]
    assert [entry["weights_test"] for entry in left[:2]] == [total] * 2
    for number, entry in ((1, left[3]), (2, left[5])):
        closed = total - entry["weights_test"]
        assert closed == pytest.approx(gated * (1 - 0.8**number), abs=2)
        assert entry["weights_realised"] == entry["weights_test"]
    assert len({id(start["optimizers"][0]) for start in run.starts}) == 3
    assert all(start["frozen"] for start in run.starts)


@pytest.mark.parametrize(
    "name", ["resnet20-cs", "resnet20-imp", "resnet20-scl", "resnet56-dep", "wrn-28-10-hc"]
)
def test_packed_and_masked_train_alike(make: Callable[..., Plan], name: str) -> None:
    more = {"rounds": 2, "rewind": 1} if name in ("resnet20-cs", "resnet20-imp") else {}
    if name == "resnet20-cs":
        # From 0, rounding would decide which of the scores that hardly move end above it.
        more["initial"] = 0.1
    plan = make(name, epochs=2, lr=0.01, **more)
    run = Run(replace(plan, compare=True, reference_layout="channels_last"))
    run.start()
    run.train()
    for record in run.history:
        packed, masked = record["arms"]["packed"], record["arms"]["masked"]
        assert packed["data_loss"] == pytest.approx(masked["data_loss"], rel=1e-3)
        assert packed["weights_realised"] == pytest.approx(masked["weights_realised"], rel=1e-3)
        assert packed["weights_test"] == pytest.approx(masked["weights_test"], rel=1e-3)
    assert len(run.history) == plan.epochs


@pytest.mark.parametrize("name", ["resnet20-cs", "resnet20-imp"])
def test_resume_in_every_phase_gives_the_same_bits(make: Callable[..., Plan], name: str) -> None:
    changes = {"epochs": 2, "rounds": 2, "rewind": 1}
    whole = _run(make(name, out="whole", **changes))
    plan = make(name, out="parts", **changes)
    run = Run(plan)
    run.start()
    run._train_epoch()
    run.save()
    while run.epoch < plan.epochs:
        run = Run(plan)
        run.resume()
        run._train_epoch()
        run.save()
    _assert_same_bits(whole.plan.checkpoint, plan.checkpoint)
    assert checkpoint.load(plan.checkpoint)["epoch"] == plan.epochs > 2
    with pytest.raises(InputError, match="expected setting epochs 3, got 2"):
        Run(replace(plan, settings=replace(plan.settings, epochs=3))).resume()


def test_kept_weights_of_another_network_are_refused(make: Callable[..., Plan]) -> None:
    plan = make("resnet20-cs", epochs=2, rounds=1, rewind=1)
    _run(plan)
    content = torch.load(plan.checkpoint, weights_only=True)
    del content["arms"]["packed"]["kept"]["stem.weight"]
    torch.save(content, plan.checkpoint)
    with pytest.raises(InputError, match="kept weights: expected those of the network"):
        Run(plan).resume()


def test_two_optimizers_and_fine_tuning(make: Callable[..., Plan]) -> None:
    changes = {"milestones": (2, 6), "decay": 0.1, "gate_decay": 0.2, "fine_tune": 2}
    plan = make("resnet56-dep", epochs=6, **changes)
    assert plan.epochs == 8
    run = _run(plan)
    weights, gates = run.arms[0].optimizers
    assert isinstance(weights, torch.optim.SGD)
    assert isinstance(gates, torch.optim.Adam)
    assert not weights.param_groups[0]["nesterov"]
    assert [group["weight_decay"] for group in weights.param_groups] == [5e-4]
    assert gates.param_groups[0]["params"] == [gates_of(run.arms[0].net).log_alpha]
    drops = [0, 0, 1, 1, 1, 1, 2, 2]
    for start, drop in zip(run.starts, drops, strict=True):
        assert start["rates"] == pytest.approx([0.1 * 0.1**drop, 1e-3 * 0.2**drop])
    assert [start["frozen"] for start in run.starts] == [False] * 6 + [True] * 2
    left = [record["arms"]["packed"]["weights_test"] for record in run.history]
    assert len(set(left[5:])) == 1


def test_the_penalty_decays_gated_filters_of_wide_networks(make: Callable[..., Plan]) -> None:
    plan = make("wrn-28-10-hc")
    net = gated_network(plan.recipe, plan.settings, 40, 0)
    arm = Arm(PACKED, net, plan.settings, None)
    (optimizer,) = arm.optimizers
    decayed, free, gates = optimizer.param_groups
    filters = {p for n, p in net.named_parameters() if n.endswith("conv1.weight")}
    assert set(free["params"]) == filters and len(filters) == 3
    assert [group["weight_decay"] for group in (decayed, free, gates)] == [5e-4, 0, 0]
    assert gates_of(net).l2 == pytest.approx(40 * 5e-4 / 0.7)
    assert gates_of(net).n_train == 40
    part = Run(replace(plan, images=plan.images.subset(10)))
    part.start()
    assert gates_of(part.arms[0].net).n_train == 40
    expected = {p for p in net.parameters() if p not in filters} - set(gates["params"])
    assert set(decayed["params"]) == expected


def test_schedules_are_stretched_in_proportion() -> None:
    settings = published.find("vgg16-dep").settings("published")
    assert settings.at_length(5) == {"epochs": 5, "milestones": (1, 2, 3, 4)}
    assert settings.at_length(300)["milestones"] == settings.milestones
    assert Phase("a", 1).progress(0) == 1.0


@pytest.mark.parametrize("epochs, rewind", [(2, 2), (1, 5), (3, -1)])
def test_rewinding_has_to_come_before_the_end(epochs: int, rewind: int) -> None:
    settings = replace(published.find("resnet20-cs").settings("published"), epochs=epochs)
    with pytest.raises(InputError, match=f"--rewind: expected fewer than the {epochs} epochs"):
        replace(settings, rewind=rewind).check()
    assert Settings(1, 1, 1.0, 1.0, (0.0,)).check() is None
