# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench record`: the gates of a training run, kept step by step."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from l0kernels._files import write_whole
from l0kernels.functional import GateLayout
from l0kernels.gates import ARM, HardConcrete
from l0kernels.gates.base import Gates
from l0kernels.nn.base import GatedLayer
from l0kernels.recipes import cli as train
from l0kernels.recipes.loop import Plan, Run
from l0kernels.training import gates_of

from . import run as whole_runs

METHODS: dict[str, type[Gates]] = {"hard_concrete": HardConcrete, "arm": ARM}
EVERY, SPARSE_EVERY, SPARSE_FROM = 20, 60, 1200  # steps
# log_alpha is kept in multiples of 1 / unit, logits of ARM's gates, 7 times as large, to 1 / 73.
UNITS = {"hard_concrete": 64, "arm": 512}


@dataclass(frozen=True)
class Trajectory:
    """Gates of a network while it trained.

    Args:
        method: of the gates.
        command: that recorded it.
        names: of the groups.
        sizes: of the groups, [groups].
        steps: of the records, [records]; after so many optimizer steps.
        log_alpha: [records, gates].
        maps, ports: gates of the features of every port, and where ports begin, see `GateLayout`.
        layers: [layers, 5]: ports of the input and output features (-1: none is gated), numbers of
            both, and floating-point operations of a step for each pair and example.
    """

    method: str
    command: str
    names: tuple[str, ...]
    sizes: np.ndarray
    steps: np.ndarray
    log_alpha: np.ndarray
    maps: np.ndarray
    ports: np.ndarray
    layers: np.ndarray

    def gates(self) -> Gates:
        """Gates of the method, whose `log_alpha` is to be set."""
        gates = METHODS[self.method](dict(zip(self.names, self.sizes.tolist(), strict=True)))
        offsets = torch.tensor([0, *self.sizes.tolist()]).cumsum(0)
        gates.layout = GateLayout(offsets, torch.tensor(self.maps), torch.tensor(self.ports))
        return gates

    def at(self, steps: np.ndarray) -> np.ndarray:
        """`log_alpha` at any steps, [steps, gates]; linear between records."""
        after = np.searchsorted(self.steps, steps).clip(1, len(self.steps) - 1)
        left, right = self.steps[after - 1], self.steps[after]
        share = ((steps - left) / (right - left)).clip(0, 1)[:, None]
        return (1 - share) * self.log_alpha[after - 1] + share * self.log_alpha[after]

    def save(self, path: Path) -> None:
        """Write it; `log_alpha` as whole numbers, differences from record to record."""
        kept = np.rint(self.log_alpha * UNITS[self.method]).astype(np.int16)
        arrays = {**asdict(self), "log_alpha": np.diff(kept, axis=0, prepend=np.int16(0))}
        write_whole(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Trajectory":
        """Read what `save` wrote.

        Raises:
            ValueError: something else is there.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            texts = {name: str(arrays[name]) for name in ("method", "command")}
            log_alpha = arrays["log_alpha"].cumsum(0, dtype=np.int16) / UNITS[texts["method"]]
            names = tuple(arrays["names"].tolist())
            return cls(**{**arrays, **texts, "names": names, "log_alpha": log_alpha})
        except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path}: expected a file of l0kernels bench record, got {error!r}"
            ) from error


def is_recorded(step: int) -> bool:
    """Whether the gates are kept after so many steps."""
    return step % (EVERY if step < SPARSE_FROM else SPARSE_EVERY) == 0


def record(plan: Plan, command: str) -> Trajectory:
    """Train a plan and keep its gates.

    Raises:
        ValueError: gates of another method.
    """
    if plan.recipe.method not in METHODS:
        raise ValueError(f"expected a recipe of {', '.join(METHODS)}, got {plan.recipe.name}")
    current = Run(plan)
    current.start()
    gates = gates_of(current.arms[0].net)
    steps, rows = [0], [gates.log_alpha.detach().clone()]
    done = 0

    def keep() -> None:
        nonlocal done
        done += 1
        if is_recorded(done) or done == plan.epochs * plan.steps:
            steps.append(done)
            rows.append(gates.log_alpha.detach().clone())

    current.on_step = keep
    current.train()
    return Trajectory(
        plan.recipe.method,
        command,
        tuple(gates.names),
        np.array(gates.sizes),
        np.array(steps),
        torch.stack(rows).double().cpu().numpy(),
        gates.layout.maps.cpu().numpy(),
        gates.layout.port_offsets.cpu().numpy(),
        _layers(current.arms[0].net, plan),
    )


def _layers(net: nn.Module, plan: Plan) -> np.ndarray:
    operations = whole_runs.operations_per_weight(plan.recipe.make(), plan.recipe.shape)
    rows = []
    for name, cost in operations.items():
        layer = net.get_submodule(name)
        ports = (layer.in_port, layer.out_port) if isinstance(layer, GatedLayer) else (-1, -1)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        rows.append((*ports, weight.shape[1], weight.shape[0], 2 * cost * weight[0, 0].numel()))
    return np.array(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: those of `l0kernels bench run`, and the file."""
    whole_runs.add_arguments(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="NPZ", help="the file to write")


def run(args: argparse.Namespace) -> int:
    """Train a recipe and write its gates.

    Raises:
        ValueError: an option cannot be used.
    """
    if args.resume or args.list or args.seeds or args.initial:
        raise ValueError(
            "expected one run from the start, got --resume, --list, --seeds or --initial"
        )
    if not args.to.absolute().parent.is_dir():
        raise ValueError(f"--to: expected a file in a folder that exists, got {args.to}")
    (plan,) = train.plans(args)
    record(plan, whole_runs.command(args, "l0kernels bench record")).save(args.to)
    print(args.to)
    return 0
