# SPDX-License-Identifier: Apache-2.0
"""Times packed batch normalisation with ReLU against index_select, F.batch_norm and F.relu."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import packed_norm

from ..timing import interleave, paired, spread

FEATURES = 640
SHAPES = ((32, 17, 32, 32), (32, 160, 32, 32), (32, 320, 16, 16), (32, 65, 8, 8), (128, 300))
LAYOUTS = ("channels_last", "contiguous")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Problem:
    """Packed activations, and parameters of `FEATURES` features with one open gate each."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    index: Tensor
    z: Tensor
    feature_map: Tensor
    training: bool

    def ours(self) -> Tensor:
        parameters = (self.weight, self.bias, self.mean, self.var)
        gates = (self.index, self.z, self.feature_map)
        return packed_norm(self.x, *parameters, *gates, self.training, activation="relu")

    def plain(self) -> Tensor:
        full = (self.mean, self.var, self.weight, self.bias)
        mean, var, weight, bias = (t.index_select(0, self.index) for t in full)
        y = F.relu(F.batch_norm(self.x, mean, var, weight, bias, self.training))
        if self.training:
            self.mean.index_copy_(0, self.index, mean)
            self.var.index_copy_(0, self.index, var)
        return y

    def inputs(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias]


def make_problem(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws activations, parameters and which features are packed.

    Args:
        shape: of the packed activations, [N, C, *].
        layout: "channels_last" or "contiguous".
        dtype: of the activations; parameters are float32.
        training: by the batch's statistics, else by the running ones.
        device: where it runs.
    """
    x = torch.randn(*shape, device=device).to(dtype)
    if layout == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    features = max(FEATURES, shape[1])
    tensors = (
        torch.rand(features),
        torch.randn(features),
        torch.zeros(features),
        torch.ones(features),
        torch.randperm(features)[: shape[1]].sort().values,
        torch.ones(features + 1),
        torch.stack([torch.arange(features), torch.full((features,), features)]),
    )
    weight, bias, mean, var, index, z, feature_map = (tensor.to(device) for tensor in tensors)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    return Problem(x, weight, bias, mean, var, index, z, feature_map, training)


def backward_of(y: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    """Returns a step that runs the backward pass of y."""
    upstream = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, inputs, upstream, retain_graph=True)


def measure(
    shapes: Sequence[Sequence[int]] = SHAPES,
    layouts: Sequence[str] = LAYOUTS,
    dtypes: Sequence[str] = tuple(DTYPES),
    rounds: int = 30,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Times both passes of both arms in turn, in training mode and the forward pass in eval mode.

    Args:
        shapes: of the packed activations, [N, C, *].
        layouts: of "channels_last" and "contiguous"; 2-D activations are timed once.
        dtypes: of "f32" and "bf16".
        rounds: how many times each is timed.
        device: where they run.

    Returns:
        One row per problem: microseconds of our passes, how many times slower PyTorch's are
        (medians of ratios within rounds), and the rate at which ours move the bytes they must.
    """
    rows = []
    for shape in shapes:
        for layout in layouts if len(shape) > 2 else ("contiguous",):
            for dtype in dtypes:
                row = {"shape": list(shape), "layout": layout, "dtype": dtype}
                rows.append(row | measure_one(shape, layout, DTYPES[dtype], rounds, device))
    return rows


def measure_one(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device | str = "cpu",
) -> dict:
    """Times one shape; see `measure`."""
    train, known = (make_problem(shape, layout, dtype, mode, device) for mode in (True, False))
    steps = {
        "ours forward": train.ours,
        "plain forward": train.plain,
        "ours backward": backward_of(train.ours(), train.inputs()),
        "plain backward": backward_of(train.plain(), train.inputs()),
        "ours eval": known.ours,
        "plain eval": known.plain,
    }
    times = interleave(steps, rounds, device=device)
    # Reads of x, reads of the gradient, writes of the result.
    moved = {"forward": 3 * train.x.nbytes, "backward": 5 * train.x.nbytes}
    moved["eval"] = 2 * train.x.nbytes
    row: dict = {}
    for what, count in moved.items():
        micros = 1e3 * spread(times[f"ours {what}"]).median
        slower = vars(paired(times, over=f"plain {what}", under=f"ours {what}"))
        row[what] = {"us": micros, "gb_per_s": count / micros / 1e3, "times_slower": slower}
    return row


def table(rows: list[dict]) -> str:
    """Formats the rows of `measure`."""
    head = f"{'packed x':<15} {'layout':<13} {'dtype':<5}"
    for name in ("forward", "backward", "eval"):
        head += f" {name + ' us':>12} {'GB/s':>6} {'PyTorch':>8}"
    lines = [head]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        line = f"{shape:<15} {row['layout']:<13} {row['dtype']:<5}"
        for name in ("forward", "backward", "eval"):
            part = row[name]
            slower = f"{part['times_slower']['median']:.2f}x"
            line += f" {part['us']:>12.1f} {part['gb_per_s']:>6.1f} {slower:>8}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(prog="l0kernels.bench.ops.packed_norm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="replaces the first number of each shape")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    shapes = [(options.batch or batch, *rest) for batch, *rest in SHAPES]
    rows = measure(shapes, rounds=options.rounds, device=options.device)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("normalisation and ReLU, all channels open; PyTorch: how many times slower than ours")
        print(table(rows))


if __name__ == "__main__":
    main()
