# SPDX-License-Identifier: Apache-2.0
"""Packed batch normalisation with ReLU against index_select, F.batch_norm and F.relu."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l0kernels.functional import packed_norm

from ..operators import GRADIENT, Operator, Way, numbers, off_kinks
from . import main

LAYOUTS = ("channels_last", "contiguous")
MODES = ("train", "eval")
MEANING = "N x C x H x W or N x C, then :channels_last or :contiguous, then :train or :eval"


@dataclass
class Problem:
    """Activations and parameters of all features.

    Args:
        x: the open channels.
        wide_x: all channels.
        weight, bias, mean, var: of all features.
        index: which features are open.
        z: gates, one for each feature.
        feature_map: gates of each feature.
        upstream: gradient of the wide result.
        training: by the batch's statistics, else by the running ones.
    """

    x: Tensor
    wide_x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    index: Tensor
    z: Tensor
    feature_map: Tensor
    upstream: Tensor
    training: bool

    def ours(self) -> Tensor:
        parameters = (self.weight, self.bias, self.mean, self.var)
        gates = (self.index, self.z, self.feature_map)
        return packed_norm(self.x, *parameters, *gates, self.training, activation="relu")

    def gathered(self) -> Tensor:
        full = (self.mean, self.var, self.weight, self.bias)
        mean, var, weight, bias = (t.index_select(0, self.index) for t in full)
        y = F.relu(F.batch_norm(self.x, mean, var, weight, bias, self.training))
        if self.training:
            self.mean.index_copy_(0, self.index, mean)
            self.var.index_copy_(0, self.index, var)
        return y

    def plain(self) -> Tensor:
        return self.normalised(self.wide_x, self.mean, self.var, self.weight, self.bias)

    def normalised(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        # Copies: in bfloat16 the backward pass, timed by itself, wants statistics as they were.
        return F.relu(F.batch_norm(x, mean.clone(), var.clone(), weight, bias, self.training))

    def ways(self) -> dict[str, Way]:
        index, small_upstream = self.index, self.upstream[:, self.index]
        everything = (self.mean, self.var, self.weight, self.bias)
        mean, var, *parameters = (t.detach()[index] for t in everything)
        weight, bias = (t.requires_grad_() for t in parameters)

        def way(run, leaves, upstream, pick_x, pick) -> Way:
            def found(y, grads) -> dict[str, Tensor]:
                if not grads:
                    return {"y": pick_x(y[0])}
                grad_x, *others = grads
                named = zip(("weight", "bias"), map(pick, others), strict=True)
                return {
                    "y": pick_x(y[0]),
                    GRADIENT + "x": pick_x(grad_x),
                    **{GRADIENT + name: gradient for name, gradient in named},
                }

            return Way(lambda: [run()], leaves if self.training else [], [upstream], found)

        own = [self.x, self.weight, self.bias]
        return {
            "ours": way(self.ours, own, small_upstream, same, lambda g: g[index]),
            "gathered": way(self.gathered, own, small_upstream, same, lambda g: g[index]),
            "plain": way(
                self.plain,
                [self.wide_x, self.weight, self.bias],
                self.upstream,
                lambda y: y[:, index],
                lambda g: g[index],
            ),
            "oracle": way(
                lambda: self.normalised(self.x, mean, var, weight, bias),
                [self.x, weight, bias],
                small_upstream,
                same,
                same,
            ),
        }

    def work(self) -> dict[str, float]:
        """Bytes: training reads x twice and writes y; backward reads both twice and writes once."""
        size = self.x.nbytes
        return {"forward": (3.0 if self.training else 2.0) * size, "backward": 5.0 * size}


def same(tensor: Tensor) -> Tensor:
    return tensor


def make_problem(
    shape: str,
    fraction: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Draws activations, parameters and which features are open.

    Args:
        shape: see `MEANING`.
        fraction: of the features that are open.
        dtype: of the activations; parameters are float32, float64 where those are.
        device: where it runs.

    Raises:
        ValueError: another shape.
    """
    size, layout, mode = read(shape)
    features = size[1]
    floats = torch.promote_types(dtype, torch.float32)
    layout = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def normal(channels: int) -> Tensor:
        tensor = torch.randn(size[0], channels, *size[2:], device=device, dtype=dtype)
        return tensor.to(memory_format=layout)

    index = torch.randperm(features)[: max(2, round(fraction * features))].sort().values.to(device)
    wide_x = normal(features)
    gates = torch.arange(features)
    problem = Problem(
        x=wide_x[:, index].contiguous(memory_format=layout).requires_grad_(),
        wide_x=wide_x.requires_grad_(),
        weight=torch.rand(features, device=device, dtype=floats).requires_grad_(),
        bias=torch.randn(features, device=device, dtype=floats).requires_grad_(),
        mean=torch.zeros(features, device=device, dtype=floats),
        var=torch.ones(features, device=device, dtype=floats),
        index=index,
        z=torch.zeros(features + 1, device=device, dtype=floats),
        feature_map=torch.stack([gates, torch.full_like(gates, features)]).to(device),
        upstream=normal(features),
        training=mode == "train",
    )
    problem.z[index] = 0.5
    problem.z[-1] = 1
    with torch.no_grad():
        wide, *full = (t.double() for t in (wide_x, problem.weight, problem.bias))
        before = F.batch_norm(wide, None, None, *full, training=True)
        problem.upstream = off_kinks(problem.upstream, before)
    return problem


def read(shape: str) -> tuple[list[int], str, str]:
    """Returns size, layout and mode of a shape."""
    parts = shape.split(":")
    if len(parts) != 3 or parts[1] not in LAYOUTS or parts[2] not in MODES:
        raise ValueError(f"expected a shape of {MEANING}, got {shape!r}")
    return numbers(parts[0], 4 if parts[0].count("x") == 3 else 2, MEANING), parts[1], parts[2]


SIZES = ("32x160x32x32", "32x320x16x16", "32x640x8x8")
OPERATOR = Operator(
    "packed_norm",
    make_problem,
    MEANING,
    shapes=(
        *(f"{size}:channels_last:train" for size in SIZES),
        "32x320x16x16:contiguous:train",
        "32x320x16x16:channels_last:eval",
        "128x300:contiguous:train",
    ),
    small=("5x7x3x3:channels_last:train", "5x7x3x3:contiguous:eval", "9x7:contiguous:train"),
    dtypes=("f64", "f32", "bf16"),
    unit="GB/s",
    batched=lambda shape, batch: f"{batch}x{shape.split('x', 1)[1]}",
)

if __name__ == "__main__":
    main("packed_norm")
