# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: plain content, whole files, and files that are not what they say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from l0kernels._files import write_whole
from l0kernels.recipes import checkpoint, data
from l0kernels.recipes.errors import InputError
from l0kernels.recipes.loop import Plan, Run


@pytest.fixture
def finished(make_plan: Callable[..., Plan]) -> Plan:
    """A plan with a checkpoint of one epoch."""
    plan = make_plan("mlp-hc", epochs=1)
    run = Run(plan)
    run.start()
    run.train()
    return plan


def _resume(plan: Plan) -> None:
    Run(plan).resume()


def test_it_holds_plain_values_only(finished: Plan) -> None:
    content = torch.load(finished.checkpoint, weights_only=True)

    def check(value: Any) -> int:
        if type(value) is dict:
            return sum(check(v) for v in value.values())
        if type(value) in (list, tuple):
            return sum(check(v) for v in value)
        assert value is None or type(value) in (int, float, str, bool, torch.Tensor)
        return 1

    assert check(content) > 50


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: Any) -> None:
        file.write(b"new, but not all of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], "expected a whole checkpoint"),
        (lambda b: b[:-100], "expected a whole checkpoint"),
        (lambda b: b"", "expected a whole checkpoint"),
        (lambda b: b"hello", "expected a whole checkpoint"),
    ],
    ids=["half", "without its end", "empty", "text"],
)
def test_damaged_files_are_named(
    finished: Plan, change: Callable[[bytes], bytes], message: str
) -> None:
    path = finished.checkpoint
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        _resume(finished)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("code in a checkpoint was run",))


def test_code_is_never_run(finished: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": checkpoint.FORMAT, "version": _Code()}, finished.checkpoint)
    with pytest.raises(InputError, match="expected a whole checkpoint"):
        _resume(finished)
    assert "was run" not in capsys.readouterr().out


def _drop_gates(content: Any) -> None:
    del content["arms"]["packed"]["model"]["l0.log_alpha"]


def _narrow_layer(content: Any) -> None:
    content["arms"]["packed"]["model"]["fc1.weight"] = torch.zeros(3, 3)


def _narrow_moment(content: Any) -> None:
    content["arms"]["masked"]["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(3)


def _no_moments(content: Any) -> None:
    content["arms"]["packed"]["optimizers"][0]["state"] = {}


LIES: dict[str, tuple[Callable[[Any], None], str]] = {
    "format": (lambda c: c.update(format="other"), "checkpoint of 'l0kernels train'"),
    "version": (lambda c: c.update(version=99), "expected version 2, got 99"),
    "epoch": (lambda c: c.update(epoch=7), "expected a history of 7 epochs, got 1"),
    "epoch type": (lambda c: c.update(epoch="1"), "expected 'epoch' to be a int, got str"),
    "no arms": (lambda c: c.pop("arms"), "expected 'arms' to be a dict, got NoneType"),
    "layout": (lambda c: c.update(reference_layout="x"), "expected reference_layout in"),
    "history": (lambda c: c["history"][0].update(epoch=3), "expected a whole record of epoch 1"),
    "phase": (lambda c: c["history"][0].pop("phase"), "expected a whole record of epoch 1"),
    "gates": (_drop_gates, r"expected entries \['l0.log_alpha'\], got none"),
    "weights": (_narrow_layer, "one that does not fit: .*fc1.weight"),
    "optimizer": (_narrow_moment, r"exp_avg: expected shape \(300, 784\), got \(3,\)"),
    "no optimizer": (_no_moments, "one that does not fit"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_checkpoints_are_named(finished: Plan, lie: str) -> None:
    change, message = LIES[lie]
    content = torch.load(finished.checkpoint, weights_only=True)
    change(content)
    torch.save(content, finished.checkpoint)
    with pytest.raises(InputError, match=message) as caught:
        _resume(finished)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_other_runs_are_refused(
    finished: Plan, make_plan: Callable[..., Plan]
) -> None:
    others = {
        "expected recipe 'lenet5-hc', got 'mlp-hc'": make_plan("lenet5-hc"),
        "expected seed 5, got 0": replace(finished, seed=5),
        "expected setting lr 0.5, got 0.001": replace(
            finished, settings=replace(finished.settings, lr=0.5)
        ),
        "expected networks .'packed'., got": replace(finished, compare=False),
        "expected data": replace(finished, images=data.load(None)),
        "expected device 'cuda', got 'cpu'": replace(finished, device=torch.device("cuda")),
    }
    for message, plan in others.items():
        with pytest.raises(InputError, match=message):
            _resume(plan)


def test_fewer_epochs_than_done_are_refused(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan("mlp-hc", epochs=2, compare=False)
    run = Run(plan)
    run.start()
    run.train()
    with pytest.raises(InputError, match="--epochs: expected at least 2, .* got 1"):
        _resume(replace(plan, settings=replace(plan.settings, epochs=1)))
