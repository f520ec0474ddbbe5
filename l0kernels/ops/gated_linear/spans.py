# SPDX-License-Identifier: Apache-2.0
"""Where the packed features of an axis stand in the flat lists; shared by the gated operators.

A span says how one axis is packed: empty, all features are there; or [start, port], packed place
k holds feature index[start + k] for k < counts[port], and the gates of feature f are
maps[:, start + f].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l0kernels.ops.pack_weight.reference import feature_scale

ACTIVATIONS = ("none", "relu")
PARAMETER_DTYPES = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}
"""The dtypes that weight and bias may have, by the dtype of x."""


def along(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Shapes a vector so that it broadcasts along one dimension."""
    shape = [1] * ndim
    shape[dim] = -1
    return values.reshape(shape)


class Axis:
    """One axis of a layer with its packed features, found without asking the device.

    Args:
        features: how many the axis has when nothing is packed.
        span: [] or [start, port].
        z, index, counts, maps: as in `gated_linear`.
    """

    def __init__(
        self,
        features: int,
        span: Sequence[int],
        z: Tensor,
        index: Tensor,
        counts: Tensor,
        maps: Tensor,
    ) -> None:
        self.features = features
        self.packs = len(span) > 0
        if not self.packs:
            return
        start, port = span
        places = torch.arange(features, device=index.device)
        # Behind the packed ones every place holds `features`, a feature that does not exist.
        self.feature_at = torch.where(
            places < counts[port], index.narrow(0, start, features), features
        )
        # The other way round: closed features have place -1.
        ranks = places.new_full((features + 1,), -1).scatter(0, self.feature_at, places)
        self.place_of = ranks[:-1]
        self.scale = feature_scale(z, maps.narrow(1, start, features), None)
        self.closed = (self.scale == 0) | (self.place_of < 0)

    def unpack(self, x: Tensor, dim: int) -> Tensor:
        """Puts packed features at their places, closed ones 0, and multiplies by the gates."""
        if not self.packs:
            return x
        dim %= x.dim()
        nothing = x.new_zeros([1 if d == dim else n for d, n in enumerate(x.shape)])
        place = torch.where(self.closed, x.shape[dim], self.place_of)
        full = torch.cat([x, nothing], dim).index_select(dim, place)
        closed = along(self.closed, dim, x.dim())
        scaled = full.to(self.scale.dtype) * along(self.scale, dim, x.dim())
        return scaled.masked_fill(closed, 0).to(x.dtype)

    def pack(self, y: Tensor, dim: int) -> Tensor:
        """Moves packed features to the front, zeros behind them and at dummies."""
        if not self.packs:
            return y
        dim %= y.dim()
        y = self.without_closed(y, dim)
        nothing = y.new_zeros([1 if d == dim else n for d, n in enumerate(y.shape)])
        return torch.cat([y, nothing], dim).index_select(dim, self.feature_at)

    def without_closed(self, tensor: Tensor, dim: int) -> Tensor:
        """Zeroes what belongs to closed features, whatever it holds."""
        if not self.packs:
            return tensor
        return tensor.masked_fill(along(self.closed, dim, tensor.dim()), 0)


def packed_count(counts: Tensor, span: Sequence[int], features: int) -> int:
    """How many features of an axis are packed; waits for the device."""
    return int(counts[span[1]]) if span else features


def index_and_map(
    index: Tensor, maps: Tensor, span: Sequence[int], features: int, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """The packed features of an axis and its map, as `pack_weight` takes them."""
    if not span:
        return None, None
    return index.narrow(0, span[0], count), maps.narrow(1, span[0], features)


def without_dummies(
    y: Tensor, dim: int, z: Tensor, index: Tensor | None, feature_map: Tensor | None
) -> Tensor:
    """Zeroes packed features whose scale is 0, whatever they hold."""
    if feature_map is None:
        return y
    closed = feature_scale(z, feature_map, index) == 0
    return y.masked_fill(along(closed, dim, y.dim()), 0)


def check(
    x: Tensor,
    in_capacity: int,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    index: Tensor,
    counts: Tensor,
    maps: Tensor,
    in_span: Sequence[int],
    out_span: Sequence[int],
    activation: str,
) -> None:
    """Raises TypeError or ValueError if the arguments that all gated operators share are wrong."""
    _check_numbers(x, weight, bias, z)
    for name, tensor, dims in (("index", index, 1), ("counts", counts, 1), ("maps", maps, 2)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64; got {tensor.dtype}")
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dims; got {list(tensor.shape)}")
    if maps.shape[0] != 2 or maps.shape[1] != index.shape[0]:
        raise ValueError(f"maps: expected shape [2, {index.shape[0]}]; got {list(maps.shape)}")
    for name, tensor in (("bias", bias), ("weight", weight), ("z", z), ("index", index),
                         ("counts", counts), ("maps", maps)):  # fmt: skip
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}; got {tensor.device}")
    _check_span("in_span", in_span, weight.shape[1], index.shape[0], counts.shape[0])
    _check_span("out_span", out_span, weight.shape[0], index.shape[0], counts.shape[0])
    if not in_span and in_capacity != weight.shape[1]:
        raise ValueError(f"x: expected {weight.shape[1]} input features; got {in_capacity}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )


def _check_numbers(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    if x.dtype not in PARAMETER_DTYPES:
        raise TypeError(f"x: expected a floating dtype; got {x.dtype}")
    if weight.dtype not in PARAMETER_DTYPES[x.dtype]:
        allowed = " or ".join(map(str, PARAMETER_DTYPES[x.dtype]))
        raise TypeError(f"weight: expected {allowed} with {x.dtype} x; got {weight.dtype}")
    if bias is not None:
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias: expected weight's dtype {weight.dtype}; got {bias.dtype}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}]; got {list(bias.shape)}")
    gates = torch.float64 if x.dtype == torch.float64 else torch.float32
    if z.dtype != gates:
        raise TypeError(f"z: expected {gates} with {x.dtype} x; got {z.dtype}")
    if z.dim() != 1 or z.shape[0] < 1:
        raise ValueError(f"z: expected shape [G + 1]; got {list(z.shape)}")


def _check_span(name: str, span: Any, features: int, listed: int, ports: int) -> None:
    if not span:
        return
    if len(span) != 2:
        raise ValueError(f"{name}: expected None or (start, port); got {span}")
    start, port = span
    if not 0 <= start <= listed - features:
        raise ValueError(
            f"{name}: expected a start from 0 to {listed - features}, for {features} features "
            f"among {listed}; got {start}"
        )
    if not 0 <= port < ports:
        raise ValueError(f"{name}: expected a port from 0 to {ports - 1}; got {port}")
