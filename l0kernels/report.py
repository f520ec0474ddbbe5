# SPDX-License-Identifier: Apache-2.0
"""What is gated, how much of it is open, and why the rest is not gated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0kernels.gates.base import Gates
from l0kernels.nn import GatedLayer
from l0kernels.training import gates_of, root_of


@dataclass(frozen=True)
class GroupRow:
    """One group.

    Args:
        name: the group.
        producers: layers that make its units.
        consumers: layers that read them.
        units: number of units.
        expected_open: expected number of open units under the training law.
        test_open: open units of the deterministic gate.
        path: how it runs.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    expected_open: float
    test_open: int
    path: str


@dataclass(frozen=True)
class Report:
    """See :func:`report`."""

    groups: tuple[GroupRow, ...]
    ungated: dict[str, str]
    weights: dict[str, float]

    def weights_open(self) -> dict[str, float]:
        """Weights of convolutions and linear layers (no biases): ``expected`` open under the
        training law, open at ``test``, ``total``.
        """
        return dict(self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return {
            "groups": [asdict(row) for row in self.groups],
            "ungated": self.ungated,
            "weights": self.weights,
        }

    def __str__(self) -> str:
        lines = [
            "| group | made by | read by | units | open, expected | open, test | path |",
            "|---|---|---|---:|---:|---:|---|",
        ]
        lines += [
            f"| {r.name} | {', '.join(r.producers) or 'input'} | {', '.join(r.consumers)} "
            f"| {r.units} | {r.expected_open:.1f} | {r.test_open} | {r.path} |"
            for r in self.groups
        ]
        total = self.weights["total"]
        lines += [
            "",
            f"weights: {total:,.0f}; expected open {self.weights['expected'] / total:.1%}, "
            f"open at test {self.weights['test'] / total:.1%}",
        ]
        if self.ungated:
            lines += ["", "| not gated | why |", "|---|---|"]
            lines += [f"| {name} | {why} |" for name, why in self.ungated.items()]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Describe the gates of a model: ``print(l0kernels.report(net))`` gives Markdown tables.

    Args:
        model: a converted model, or a wrapper around one.

    Raises:
        ValueError: the model has no gates.
    """
    gates = gates_of(model)
    root = root_of(model, gates)
    named = {n: m for n, m in root.named_modules() if isinstance(m, GatedLayer)}
    expected, test = gates.expected_open(), gates.open_now()
    rows = tuple(
        GroupRow(
            name=name,
            producers=_users(named, "out_gate", where),
            consumers=_users(named, "in_gate", where),
            units=where.stop - where.start,
            expected_open=expected[name],
            test_open=test[name],
            path="packed",
        )
        for name, where in gates.slices()
    )
    return Report(rows, dict(gates.refused), _count_weights(root, gates))


def _users(named: dict[str, GatedLayer], side: str, where: slice) -> tuple[str, ...]:
    """Layers with two-dimensional or larger weights that use a range of gates on one side."""
    found = []
    for name, layer in named.items():
        ref = getattr(layer, side)
        weight = getattr(layer, "weight", None)
        if ref is None or weight is None or weight.dim() < 2 or layer.depthwise:
            continue
        if any(((m >= where.start) & (m < where.stop)).any() for m in ref.maps):
            found.append(name)
    return tuple(found)


@torch.no_grad()
def _count_weights(root: nn.Module, gates: Gates) -> dict[str, float]:
    """Open weights of all layers; gates are independent, so expectations multiply."""
    p = torch.cat((gates.open_probability().cpu(), torch.ones(1, dtype=torch.float64)))
    z = torch.cat((gates.deterministic().cpu() != 0, torch.ones(1, dtype=torch.bool))).double()
    total = expected = test = 0.0
    for module in root.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or weight is None:
            continue
        total += weight.numel()
        expected += _open_weights(module, weight, p)
        test += _open_weights(module, weight, z)
    return {"expected": expected, "test": test, "total": total}


def _open_weights(module: nn.Module, weight: Tensor, openness: Tensor) -> float:
    rows, columns = float(weight.shape[0]), float(weight.shape[1])
    if isinstance(module, GatedLayer):
        if module.out_gate is not None:
            rows = _open_features(module.out_gate.maps, openness)
        if module.in_gate is not None:
            columns = _open_features(module.in_gate.maps, openness)
    return rows * columns * weight[0, 0].numel()


def _open_features(maps: tuple[Tensor, ...], openness: Tensor) -> float:
    features = openness[maps[0]]
    for extra in maps[1:]:
        features = features * openness[extra]
    return float(features.sum())
