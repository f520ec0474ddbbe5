# SPDX-License-Identifier: Apache-2.0
"""A tiny data set in IDX files, short plans on it, and what runs have moved."""

import copy
import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from l0kernels.recipes import checkpoint, data, loop, published
from l0kernels.recipes.arm import PACKED, Arm, Step, gated_network
from l0kernels.recipes.loop import Plan
from l0kernels.training import gates_of

TRAIN, TEST = 70, 30


def idx_bytes(values: np.ndarray) -> bytes:
    """The content of an IDX file of unsigned bytes."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_images(folder: Path, packed: bool = False) -> None:
    """The four files of a data set whose classes are bright squares at different places."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            top, left = 4 + 10 * (label // 5), 1 + 5 * (label % 5)
            image[top : top + 8, left : left + 5] += 150
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(values)
            if packed:
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder with a tiny data set."""
    folder = tmp_path / "squares"
    write_images(folder)
    return folder


@pytest.fixture
def make_plan(idx_folder: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Makes a plan of 3 steps per epoch; keywords replace its fields or its settings."""

    def make(name: str = "lenet5-hc", out: str = "run", **changes: Any) -> Plan:
        recipe = published.find(name)
        settings = replace(
            recipe.settings("digits"),
            batch=30,
            epochs=changes.pop("epochs", 2),
            **changes.pop("settings", {}),
        )
        plan = Plan(
            recipe=recipe,
            settings=settings,
            images=data.load(idx_folder),
            seed=0,
            compare=True,
            reference_layout="channels_last",
            save_every=1,
            folder=tmp_path / out,
        )
        return replace(plan, **changes)

    return make


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Copies of the networks that the runs of a test start from, in their order."""
    found: list[nn.Module] = []

    def noted(*args: Any) -> nn.Module:
        net = gated_network(*args)
        found.append(copy.deepcopy(net))
        return net

    monkeypatch.setattr(loop, "gated_network", noted)
    return found


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of devices that the steps of a test have run on."""
    found: set[str] = set()
    step = Arm.step

    def noted(arm: Arm, images: Tensor, labels: Tensor) -> Step:
        found.update({images.device.type, *(p.device.type for p in arm.net.parameters())})
        return step(arm, images, labels)

    monkeypatch.setattr(Arm, "step", noted)
    return found


def unmoved(start: nn.Module, path: Path) -> list[str]:
    """Parameters, and groups of gates, that a run has left as they were.

    Weights of tickets are compared with those that they were rewound to.

    Args:
        start: the network that the run started from.
        path: its last checkpoint.
    """
    state = checkpoint.load(path)["arms"][PACKED]
    end = copy.deepcopy(start)
    end.load_state_dict(state["model"])
    before = {**dict(start.named_parameters()), **(state["kept"] or {})}
    weights = {n: p for n, p in end.named_parameters() if not n.startswith("l0.")}
    old, new = (gates_of(net).alpha.split(gates_of(net).sizes) for net in (start, end))
    gates = zip(gates_of(start).names, old, new, strict=True)
    return [
        *(name for name, weight in weights.items() if weight.equal(before[name])),
        *(f"gates of {name}" for name, one, other in gates if one.equal(other)),
    ]
