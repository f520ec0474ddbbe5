# SPDX-License-Identifier: Apache-2.0
"""`l0kernels bench capacity`: widths planned ahead, on gates as they were while networks trained.

A step that is captured once needs widths before its gates are drawn: a capacity for each group of
gates, see `l0kernels.gates.capacity`. A draw that does not fit costs a dense step, room that is not
used costs work. Both are computed, not sampled: open units are a sum of independent gates, whose
distribution is a product of polynomials.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from l0kernels.gates.capacity import SIGMAS, capacity

from . import models
from .figures import markdown, write_texts
from .operators import options_of
from .run import operations_per_weight
from .trajectories import Trajectory

RECORDED = Path(__file__).parent / "results" / "trajectories"
LARGE = "wrn-28-10"
SAMPLES = 8  # draws of each step that is looked at, for the check by sampling


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        recorded: files of `l0kernels bench record`; none: those in bench/results.
        every: steps between two plans.
        sigmas: standard deviations above the mean.
        stride: every which step is looked at, a divisor of `every` (but of 1).
        seed: of what is sampled.
    """

    recorded: tuple[str, ...] = ()
    every: tuple[int, ...] = (1, 100, 500, 2000)
    sigmas: tuple[float, ...] = (3.0, 4.0, 5.0)
    stride: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One policy on one trajectory.

    Args:
        gates: which.
        every, sigmas: of the policy.
        overflow: probability that a step does not fit, mean over all steps.
        worst: of the step where it is largest.
        width: planned over drawn, of all groups with a capacity together, mean over all steps.
        work: the same of the operations of convolutions and linear layers.
        saved: operations at planned widths over those of the dense network.
    """

    gates: str
    every: int
    sigmas: float
    overflow: float
    worst: float
    width: float
    work: float
    saved: float


@dataclass(frozen=True)
class Check:
    """How often draws of the package have more than mean + sigma open units in some group.

    Args:
        gates: which.
        draws: number.
        drawn, computed: part of them.
        error: standard error of `drawn`.
    """

    gates: str
    draws: int
    drawn: float
    computed: float
    error: float


@dataclass(frozen=True)
class Report:
    """All rows."""

    setting: Setting
    sources: dict[str, str]
    rows: list[Row]
    checks: list[Check]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "command": command(self.setting)}


def command(setting: Setting) -> str:
    """Return the command line that repeats a run."""
    return " ".join(["l0kernels bench capacity", *options_of(setting, Setting())])


def probabilities(trajectory: Trajectory, steps: np.ndarray) -> np.ndarray:
    """P(z != 0) at some steps, [steps, gates]."""
    gates = trajectory.gates()
    found = []
    for row in trajectory.at(steps):
        set_gates(gates, row)
        found.append(gates.open_probability().numpy())
    return np.stack(found)


@torch.no_grad()
def set_gates(gates: Any, row: np.ndarray) -> None:
    """Set `log_alpha`, in the range of the method, as before a draw."""
    gates.log_alpha.copy_(torch.as_tensor(row))
    gates.project(gates.log_alpha)


def tails(p: np.ndarray) -> np.ndarray:
    """P(more than k open) for k = 0 ... units, [steps, units + 1].

    Args:
        p: P(z != 0) of the units of a group, [steps, units].
    """
    steps, units = p.shape
    exactly = np.zeros((steps, units + 1))
    exactly[:, 0] = 1
    for unit in range(units):
        now, was = p[:, unit : unit + 1], exactly[:, : unit + 1].copy()
        exactly[:, : unit + 1] *= 1 - now
        exactly[:, 1 : unit + 2] += was * now
    # Summed from the small end.
    at_least = np.cumsum(exactly[:, ::-1], 1)[:, ::-1]
    return np.concatenate((at_least[:, 1:], np.zeros((steps, 1))), 1)


def planned(p: np.ndarray, sigmas: float) -> np.ndarray:
    """Capacities of a group, [steps].

    Args:
        p: P(z != 0) of its units, [steps, units].
        sigmas: standard deviations above the mean.
    """
    # The policy has its own number of them.
    variances = (sigmas / SIGMAS) ** 2 * (p * (1 - p)).sum(1)
    pairs = zip(p.sum(1).tolist(), variances.tolist(), strict=True)
    return np.array([capacity(mean, variance, p.shape[1]) for mean, variance in pairs])


class Walk:
    """A trajectory, step by step.

    Args:
        trajectory: the gates.
        stride: every which step is looked at: the last one before each multiple.
    """

    def __init__(self, trajectory: Trajectory, stride: int):
        self.trajectory = trajectory
        self.steps = np.arange(stride - 1, trajectory.steps[-1], stride)
        self.p = probabilities(trajectory, self.steps)
        ends = np.cumsum([0, *trajectory.sizes])
        self.groups = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        made, own = trajectory.maps
        count = ends[-1]
        # Gates that features have beside their producer's only multiply: nothing is packed by them.
        beside = set(own[(made != count) & (own != count)].tolist())
        self.planned = [g for g, at in enumerate(self.groups) if at.start not in beside]
        self.tails = {g: tails(self.p[:, self.groups[g]]) for g in self.planned}

    def overflow(self, fits: dict[int, np.ndarray]) -> np.ndarray:
        """P(some group has more open units than fit) at every step; [steps].

        Args:
            fits: capacities of the groups, [steps] each.
        """
        at = np.arange(len(self.steps))
        inside = np.prod([1 - self.tails[g][at, fits[g]] for g in self.planned], 0)
        # ARM's two draws of a step have the same law: at most twice as often.
        return (1 - inside) * (2 if self.trajectory.method == "arm" else 1)

    def policy(self, name: str, every: int, sigmas: float) -> Row:
        """What planning so often and so wide gives."""
        plans = self.steps // every * every if every > 1 else self.steps
        times, which = np.unique(plans, return_inverse=True)
        p = probabilities(self.trajectory, times)
        fits = {g: planned(p[:, self.groups[g]], sigmas)[which] for g in self.planned}
        overflow = self.overflow(fits)
        drawn = sum(self.p[:, self.groups[g]].sum(1) for g in self.planned)
        work = self._work(lambda port: self._planned_width(port, fits))
        return Row(
            name,
            every,
            sigmas,
            float(overflow.mean()),
            float(overflow.max()),
            float(np.mean(sum(fits.values()) / drawn)),
            float(np.mean(work / self._work(self._drawn_width))),
            float(np.mean(work / self._dense())),
        )

    def check(self, name: str, seed: int) -> Check:
        """Compare with draws of the package's own, above mean + sigma, where some can be seen."""
        gates = self.trajectory.gates()
        gates.seed.fill_(seed)
        limits = {g: self._limit(g) for g in self.planned}
        at = np.arange(len(self.steps))
        computed = 1 - np.prod([1 - self.tails[g][at, limits[g]] for g in self.planned], 0)
        above = 0
        for number, row in enumerate(self.trajectory.at(self.steps)):
            set_gates(gates, row)
            for sample in range(SAMPLES):
                key = torch.tensor([seed, number * SAMPLES + sample])
                with torch.no_grad():
                    z, _, _ = gates.sample(torch.zeros_like(gates.log_alpha), key)
                counts = {g: int((z[self.groups[g]] != 0).sum()) for g in self.planned}
                above += any(counts[g] > limits[g][number] for g in self.planned)
        draws = len(self.steps) * SAMPLES
        error = float(np.sqrt((computed * (1 - computed)).mean() / draws))
        return Check(name, draws, above / draws, float(computed.mean()), error)

    def _limit(self, group: int) -> np.ndarray:
        p = self.p[:, self.groups[group]]
        return np.floor(p.sum(1) + np.sqrt((p * (1 - p)).sum(1))).astype(int)

    def _port(self, port: int) -> np.ndarray:
        start, end = self.trajectory.ports[port : port + 2]
        return self.trajectory.maps[:, start:end]

    def _drawn_width(self, port: int) -> np.ndarray:
        """Expected number of open features."""
        p = np.concatenate((self.p, np.ones((len(self.p), 1))), 1)
        made, own = self._port(port)
        return (p[:, made] * p[:, own]).sum(1)

    def _planned_width(self, port: int, fits: dict[int, np.ndarray]) -> np.ndarray:
        """Features of a port of which units have capacities."""
        made, own = self._port(port)
        gates = np.where(made == self.p.shape[1], own, made)
        width = np.zeros(len(self.p))
        for group, at in enumerate(self.groups):
            features = ((gates >= at.start) & (gates < at.stop)).sum()
            if features:
                width += features / (at.stop - at.start) * fits[group]
        return width + (gates == self.p.shape[1]).sum()

    def _work(self, width: Any) -> np.ndarray:
        """Operations of a step and example at the widths of ports, [steps]."""
        total = np.zeros(len(self.p))
        for in_port, out_port, inputs, outputs, cost in self.trajectory.layers.tolist():
            read = inputs if in_port < 0 else width(in_port)
            total = total + cost * read * (outputs if out_port < 0 else width(out_port))
        return total

    def _dense(self) -> int:
        return int(self.trajectory.layers[:, 2:].prod(1).sum())


def enlarged(trajectory: Trajectory, model: str, seed: int) -> Trajectory:
    """The groups of another network, each gate one of the recorded ones, drawn with replacement.

    Args:
        trajectory: recorded gates.
        model: name as in `models.network`, of features of which each has one gate.
        seed: of the choice.
    """
    network = models.network(model)
    with torch.device("meta"):
        net = network.build()
        operations = operations_per_weight(net, network.input_shape)
    reads = {group.consumer: port for port, group in enumerate(network.groups)}
    makes = {group.producer: port for port, group in enumerate(network.groups)}
    layers = []
    for name, cost in operations.items():
        weight = net.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        outputs, inputs = weight.shape[:2]
        ports = (reads.get(name, -1), makes.get(name, -1))
        layers.append((*ports, inputs, outputs, 2 * cost * weight[0, 0].numel()))
    names = tuple(group.producer for group in network.groups)
    sizes = np.array([net.get_submodule(name).weight.shape[0] for name in names])  # pyright: ignore
    chosen = np.random.default_rng(seed).integers(trajectory.log_alpha.shape[1], size=sizes.sum())
    gates = np.arange(sizes.sum())
    return replace(
        trajectory,
        names=names,
        sizes=sizes,
        log_alpha=trajectory.log_alpha[:, chosen],
        maps=np.stack((gates, np.full_like(gates, len(gates)))),
        ports=np.cumsum([0, *sizes]),
        layers=np.array(layers),
    )


def files(setting: Setting) -> list[Path]:
    """The recorded gates of a setting.

    Raises:
        ValueError: there are none, or numbers out of range.
    """
    if setting.stride < 1 or any(n < 1 or (n > 1 and n % setting.stride) for n in setting.every):
        raise ValueError(
            f"expected steps between plans of 1 or multiples of --stride {setting.stride}, "
            f"got {setting.every}"
        )
    if any(not 0 <= value < np.inf for value in setting.sigmas):
        raise ValueError(f"expected sigmas of at least 0, got {setting.sigmas}")
    found = [Path(name) for name in setting.recorded] or sorted(RECORDED.glob("*.npz"))
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise ValueError(
            "expected files of l0kernels bench record, got no file "
            f"{', '.join(missing) or RECORDED}"
        )
    return found


def simulate(setting: Setting) -> Report:
    """All policies on all trajectories, and on groups of the size of a wide residual network's.

    Raises:
        ValueError: see `files`.
    """
    rows: list[Row] = []
    checks: list[Check] = []
    sources = {}
    for path in tqdm(files(setting), desc="trajectories", disable=None):
        recorded = Trajectory.load(path)
        sources[path.stem] = recorded.command
        large = enlarged(recorded, LARGE, setting.seed)
        for name, one in ((path.stem, recorded), (f"{LARGE} of {path.stem}'s gates", large)):
            walk = Walk(one, setting.stride)
            checks.append(walk.check(name, setting.seed))
            rows += [walk.policy(name, n, s) for n in setting.every for s in setting.sigmas]
    return Report(setting, sources, rows, checks)


def table(report: Report) -> str:
    """Return the rows as a Markdown table with what they mean."""
    head = ("gates", "planned every", "sigmas", "overflow", "worst step")
    head += ("width", "work", "work / dense")
    rows = [
        (
            row.gates,
            "step" if row.every == 1 else f"{row.every} steps",
            f"{row.sigmas:g}",
            f"{row.overflow:.1e}",
            f"{row.worst:.1e}",
            f"{row.width:.2f}",
            f"{row.work:.2f}",
            f"{row.saved:.3f}",
        )
        for row in report.rows
    ]
    checks = [
        f"- {one.gates}: more than mean + sigma in some group in {one.drawn:.4f} of {one.draws:,} "
        f"draws of `sample_gates`, computed {one.computed:.4f} (standard error {one.error:.4f})"
        for one in report.checks
    ]
    sources = [f"- {name}: `{line}`" for name, line in report.sources.items()]
    parts = (f"`{command(report.setting)}`", markdown(head, rows, 1), meaning(report.setting))
    return "\n\n".join((*parts, "\n".join(sources), "\n".join(checks)))


def meaning(setting: Setting) -> str:
    """Return what the columns are."""
    return (
        "Capacities min(group, ceil16(mean + sigmas x sigma)). Overflow: probability that a step "
        "has a group with more open units than that, computed from the gates' open probabilities "
        f"at every {setting.stride}th step (log_alpha linear between records), mean over them; "
        "twice that of a draw for ARM, which draws two. Width and work: planned over drawn, of "
        "all groups with a capacity together, and of the operations of all convolutions and "
        "linear layers. LeNet-5's groups of 20 and 50 units leave little choice: multiples of 16 "
        "are 16 or all of 20, and 16, 32, 48 or all of 50; input gates of its linear layer only "
        f"multiply. The gates of {LARGE} were not recorded: each of its units follows one of "
        "LeNet-5's gates, drawn with replacement from all groups."
    )


def write(report: Report, folder: Path) -> list[Path]:
    """Write capacity.md and capacity.json into a folder."""
    texts = {"capacity.md": table(report) + "\n"}
    texts["capacity.json"] = json.dumps(report.to_dict(), indent=1) + "\n"
    return write_texts(folder, texts)
