# SPDX-License-Identifier: Apache-2.0
"""Times drawing all gates, forward and backward, against the same in PyTorch operations.

The PyTorch arms draw, clamp, stretch and penalise as networks with L0 layers commonly do, once per
layer or once over all gates in one tensor. They do not list the open gates; `sample_gates` does.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import GateLayout, sample_gates

from ..timing import interleave, paired, spread

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
MODELS = {
    "wrn-28-10": (160,) * 4 + (320,) * 4 + (640,) * 4,
    "llama-7b": (11008,) * 32,
}
"""Gates of each layer: a wide residual network's inner channels, a language model's neurons."""
OURS, LAYERS, FLAT = "sample_gates", "PyTorch, per layer", "PyTorch, one tensor"


def one_port_per_group(sizes: Sequence[int], device: torch.device | str = "cpu") -> GateLayout:
    """Returns a layout whose ports are its groups."""
    gates = sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
    maps = torch.stack([torch.arange(gates), torch.full((gates,), gates)]).to(device)
    return GateLayout(offsets, maps, offsets)


def plain_draw(log_alpha: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Hard concrete gates and their expected cost in PyTorch operations."""
    u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
    z = F.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)
    penalty = (cost * torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))).sum()
    return z, penalty


def arms(sizes: Sequence[int], device: torch.device | str) -> dict[str, Callable[[], None]]:
    """Returns name -> one draw with its backward pass."""
    log_alpha = torch.randn(sum(sizes), device=device)
    cost = torch.rand(sum(sizes), device=device)
    grad_z = torch.randn(sum(sizes) + 1, device=device)
    one = torch.ones((), device=device)
    key = torch.tensor([0, 1], device=device)
    layout = one_port_per_group(sizes, device)
    leaf = log_alpha.clone().requires_grad_()
    leaves = [part.clone().requires_grad_() for part in log_alpha.split(list(sizes))]
    costs, grads = cost.split(list(sizes)), grad_z[:-1].split(list(sizes))

    def ours() -> None:
        leaf.grad = None
        z, expected, _ = sample_gates(leaf, key, cost, layout, "hard_concrete")
        torch.autograd.backward([z, expected], [grad_z, one])

    def one_tensor() -> None:
        leaf.grad = None
        z, penalty = plain_draw(leaf, cost)
        torch.autograd.backward([z, penalty], [grad_z[:-1], one])

    def per_layer() -> None:
        gates, penalties = [], []
        for layer, layer_cost in zip(leaves, costs, strict=True):
            layer.grad = None
            z, penalty = plain_draw(layer, layer_cost)
            gates.append(z)
            penalties.append(penalty)
        total = torch.stack(penalties).sum()
        torch.autograd.backward([*gates, total], [*grads, one])

    return {OURS: ours, LAYERS: per_layer, FLAT: one_tensor}


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """Returns a step that runs another several times, long enough to be timed."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def measure(
    sizes: Sequence[int], rounds: int = 60, repeats: int = 10, device: torch.device | str = "cpu"
) -> list[dict]:
    """Times all arms in turn.

    Args:
        sizes: gates of each layer.
        rounds: how many times each arm is timed.
        repeats: draws per timing.
        device: where they run.

    Returns:
        One row per arm: its name, microseconds per draw, and how many times slower than ours it
        is (medians and quartiles of ratios within rounds).
    """
    steps = {name: repeated(step, repeats) for name, step in arms(sizes, device).items()}
    times = interleave(steps, rounds, device=device)
    rows = []
    for name in steps:
        micros = spread([1e3 * time / repeats for time in times[name]])
        slower = paired(times, over=name, under=OURS)
        rows.append({"arm": name, "us": vars(micros), "times_slower": vars(slower)})
    return rows


def table(rows: list[dict]) -> str:
    """Formats the rows of `measure`."""
    lines = [f"{'arm':<22} {'us/draw':>9} {'times slower (quartiles)':>30}"]
    for row in rows:
        slower = row["times_slower"]
        ratio = f"{slower['median']:.2f} ({slower['low']:.2f} - {slower['high']:.2f})"
        lines.append(f"{row['arm']:<22} {row['us']['median']:>9.1f} {ratio:>30}")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.ops.sample_gates", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="wrn-28-10", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    rows = measure(sizes, options.rounds, options.repeats, options.device)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{sum(sizes)} gates in {len(sizes)} groups, float32, forward and backward")
        print(table(rows))


if __name__ == "__main__":
    main()
