# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: training resumes bit for bit, and other checkpoints load or are refused."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l0kernels as l0
from interop.nets import NETS, assert_equal, batch, make, objective, state

STEPS = 50
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}


class Training:
    """Network, optimizer, schedule and average, with one dictionary as checkpoint."""

    def __init__(self, kind: str, optimizer: str, seed: int) -> None:
        self.net = make(kind, seed)
        groups = l0.param_groups(self.net, lr=0.05, weight_decay=1e-3, gate_lr=0.5)
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 20, 0.5)
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def run(self, first: int, last: int, freeze_at: int | None = None) -> None:
        for step in range(first, last):
            if step == freeze_at:
                self.net.l0.freeze()
            self.optimizer.zero_grad()
            objective(self.net, *batch(seed=step)).backward()
            self.optimizer.step()
            self.schedule.step()
            self.ema.update_parameters(self.net)

    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "opt": self.optimizer, "lr": self.schedule, "ema": self.ema}

    def save(self) -> io.BytesIO:
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, buffer)
        buffer.seek(0)
        return buffer

    def load(self, file: io.BytesIO) -> None:
        content = torch.load(file, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(content[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "at"), [("mlp", 1), ("lenet", 17), ("norm", 25), ("residual", 9)])
@pytest.mark.parametrize("freeze_at", [None, 12, 30])
def test_resuming_equals_going_on(kind: str, at: int, optimizer: str, freeze_at: int | None):
    straight, first = (Training(kind, optimizer, seed=0) for _ in range(2))
    straight.run(0, STEPS, freeze_at)
    first.run(0, at, freeze_at)
    resumed = Training(kind, optimizer, seed=9)
    with torch.no_grad():  # nothing may depend on how the new process began
        for parameter in resumed.net.parameters():
            parameter.add_(0.1)
    resumed.load(first.save())
    torch.manual_seed(99)
    resumed.run(at, STEPS, freeze_at)
    assert_equal(state(straight.net), state(resumed.net))
    assert_equal(state(straight.ema), state(resumed.ema))
    assert resumed.net.l0.frozen == (freeze_at is not None)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_packed_training_resumes_a_masked_checkpoint(impl: str):
    with l0.use_impl("reference"):
        masked = Training("norm", "sgd", seed=0)
        masked.run(0, 5)
    resumed = Training("norm", "sgd", seed=3)
    resumed.load(masked.save())
    with l0.use_impl(impl):
        resumed.run(5, 8)
    with l0.use_impl("reference"):
        masked.run(5, 8)
    assert_equal(state(masked.net), state(resumed.net), 0.0 if impl == "reference" else 1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_state_dict_keeps_the_models_keys_and_loads_checkpoints_from_before(kind: str):
    torch.manual_seed(3)
    plain, net = NETS[kind](), make(kind)
    old = {name: t.clone() for name, t in plain.state_dict().items()}
    keys = set(net.state_dict())
    own = {"l0.log_alpha", "l0.step", "l0.seed", "l0._extra_state"}
    assert keys == set(old) | own
    gates = net.l0.log_alpha.detach().clone()
    result = net.load_state_dict(old)
    assert not result.missing_keys and not result.unexpected_keys
    for name, t in old.items():
        assert net.state_dict()[name].equal(t), name
    assert net.l0.log_alpha.equal(gates)
    objective(net, *batch()).backward()


def test_a_converted_checkpoint_loads_into_a_plain_model_but_for_the_gates():
    net, plain = make(), NETS["norm"]()
    result = plain.load_state_dict(net.state_dict(), strict=False)
    assert not result.missing_keys
    assert all(key.startswith("l0.") for key in result.unexpected_keys)


def test_gates_of_before_they_could_be_frozen_are_resumed():
    first, resumed = (Training("mlp", "sgd", seed) for seed in (0, 3))
    first.run(0, 3)
    content = torch.load(first.save(), weights_only=True)
    for name, prefix in (("net", "l0."), ("ema", "module.l0.")):
        old = content[name][f"{prefix}_extra_state"]
        content[name][f"{prefix}_extra_state"] = old["groups"]
    for name, part in resumed.parts().items():
        part.load_state_dict(content[name])
    for each in (first, resumed):
        each.run(3, 6)
    assert_equal(state(first.net), state(resumed.net))


def other() -> nn.Module:
    torch.manual_seed(0)
    x = batch(2)[0]
    return l0.convert(NETS["norm"](), "hard_concrete", example_inputs=(x,), select=["stem"])


def test_a_checkpoint_of_other_gates_is_refused():
    net = other()
    before = state(net)
    with pytest.raises(ValueError, match=r"expected gates \{'stem': 12\}, got \{.*'fc1': 24\}"):
        net.load_state_dict({k: v for k, v in make().state_dict().items() if k.startswith("l0.")})
    assert_equal(before, state(net))
    with pytest.raises(RuntimeError, match="Missing key"):
        net.l0.load_state_dict({})
