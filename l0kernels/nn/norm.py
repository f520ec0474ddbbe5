# SPDX-License-Identifier: Apache-2.0
"""Gated batch normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0kernels._config import current_impl
from l0kernels.functional import packed_norm
from l0kernels.gates.draw import Draw
from l0kernels.gates.ref import GateRef
from l0kernels.nn.base import GatedLayer
from l0kernels.nn.constants import append, left_out


class _GatedBatchNorm(GatedLayer, nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of the open features only.

    Running statistics of closed features are left as they are in that draw, in the packed run and
    in the masked reference. With gates before the norm (``out_gate=g["a"].before_norm()``) closed
    features are zeros that it normalises, statistics included: it packs what is constant behind it
    into further examples, see ``l0kernels.nn.constants``.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in
            ``nn.BatchNorm1d`` / ``nn.BatchNorm2d``; parameters and buffers keep their full shape.
        out_gate: gates of the features, those of the layer that makes them.

    Shape: x and y [N, packed features, ...]; with gates before the norm y has as many examples more
    as closed features need.

    Raises:
        ValueError: the gate has another number of features than the layer.
    """

    packs_alone = True
    knows_constants = True

    def __init__(
        self, num_features: int, *args: Any, out_gate: GateRef | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.connect(None, out_gate)

    def _in_width(self) -> int:
        return self.num_features

    def _out_width(self) -> int:
        return self.num_features

    def resize(self, inputs: int, outputs: int) -> None:
        self.num_features = outputs

    def forward(self, input: Tensor) -> Tensor:
        if self.gates is None:
            return super().forward(input)
        self._check_input_dim(input)
        draw = self.current_draw()
        masked = current_impl() == "reference"
        if self.makes_constants:
            return super().forward(input) if masked else self._with_constants(input, draw)
        if not masked and draw.packed is None and not torch.compiler.is_compiling():
            return self._in_one(input, draw)
        weight, bias = self.weight, self.bias
        if weight is not None and not masked:
            weight, bias = self.packed_parameters(draw)
        if self.running_mean is None or self.running_var is None:
            factor = self._count_batch()
            return F.batch_norm(input, None, None, weight, bias, True, factor, self.eps)
        if not self.training:
            mean, var = (
                self._known_statistics(draw)
                if masked
                else self._once(draw, "statistics", self._known_statistics)
            )
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        index, is_open = self._features(draw)
        mean = self.running_mean.index_select(0, index)
        var = self.running_var.index_select(0, index)
        factor = self._count_batch()
        out = F.batch_norm(input, mean, var, weight, bias, True, factor, self.eps)
        self._keep_statistics(index, is_open, mean, var)
        return out

    def _in_one(self, x: Tensor, draw: Draw) -> Tensor:
        """All of it as one operator, which reads parameters and statistics at their full shape."""
        index = self._index(x, draw)
        assert self.gates is not None
        return packed_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            index,
            draw.z.detach(),
            self.gates.port_maps[self.out_port],
            self.training or self.running_mean is None,
            self._count_batch(),
            self.eps,
        )

    def _index(self, x: Tensor, draw: Draw) -> Tensor:
        """The features that are packed."""
        index = draw.index[self.out_port]
        if not torch.compiler.is_compiling() and x.shape[1] != index.numel():
            raise ValueError(
                f"{type(self).__name__}: expected {index.numel()} features, got {x.shape[1]}"
            )
        return index

    def _with_constants(self, x: Tensor, draw: Draw) -> Tensor:
        """Gates before the norm: normalise what is packed, append what closed features become.

        What fills up the width is packed like open features: zeros, as they are multiplied by 0.
        """
        index = self._index(x, draw)
        closed = left_out(index, self.num_features)
        by_batch = self.training or self.running_mean is None
        factor = self._count_batch()
        constants = self._constants(closed, by_batch, x.dtype)
        y = self._normalized(x, index, draw, by_batch, factor)
        if factor and x.shape[0]:
            self._decay_statistics(closed, factor)
        return append(y, constants) if closed.shape[0] else y

    def _normalized(
        self, x: Tensor, index: Tensor, draw: Draw, by_batch: bool, factor: float
    ) -> Tensor:
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        if not torch.compiler.is_compiling():
            gates = self.gates
            assert gates is not None
            no_gate = torch.full_like(gates.port_maps[self.out_port], gates.count)
            z = draw.z.detach()
            return packed_norm(x, *tensors, index, z, no_gate, by_batch, factor, self.eps)
        weight, bias = self._pack(draw)
        mean, var = (None if t is None else t.index_select(0, index) for t in tensors[2:])
        y = F.batch_norm(x, mean, var, weight, bias, by_batch, factor, self.eps)
        if factor:
            with torch.no_grad():
                for buffer, new in ((self.running_mean, mean), (self.running_var, var)):
                    assert buffer is not None and new is not None
                    buffer.index_copy_(0, index, new)
        return y

    def _pack(self, draw: Draw) -> tuple[Any, Tensor | None]:
        if not self.makes_constants:
            return super()._pack(draw)
        # What closed features hold counts here.
        index = draw.index[self.out_port]
        weight, bias = (
            None if t is None else t.index_select(0, index) for t in (self.weight, self.bias)
        )
        return weight, bias

    def _constants(self, closed: Tensor, by_batch: bool, dtype: torch.dtype) -> Tensor:
        """What the norm makes of zeros, for some features."""
        weight, bias, mean, var = (
            None if t is None else t.index_select(0, closed)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        value = torch.zeros(closed.shape, dtype=dtype, device=closed.device)
        if not by_batch:
            assert mean is not None and var is not None
            value = -mean * torch.rsqrt(var + self.eps)
            value = value if weight is None else value * weight
        return value if bias is None else value + bias

    @torch.no_grad()
    def _decay_statistics(self, closed: Tensor, factor: float) -> None:
        """Zeros move running statistics towards mean and variance 0."""
        for buffer in (self.running_mean, self.running_var):
            assert buffer is not None
            buffer.index_copy_(0, closed, buffer.index_select(0, closed) * (1 - factor))

    def _features(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The features of this run, packed or all, and which of them are open."""
        if current_impl() != "reference":
            return draw.index[self.out_port], self.open_rows(draw)
        gates = self.gates
        assert gates is not None
        made = gates.port_maps[self.out_port][0]
        return torch.arange(self.num_features, device=made.device), draw.z[made] != 0

    def _known_statistics(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Running mean and variance as eval mode takes them."""
        index, is_open = self._features(draw)
        assert self.running_mean is not None and self.running_var is not None
        mean, var = (t.index_select(0, index) for t in (self.running_mean, self.running_var))
        # Statistics of closed units may be Inf or NaN; some are packed to keep the width.
        return torch.where(is_open, mean, 0.0), torch.where(is_open, var, 1.0)

    def compute_dtype(self) -> torch.dtype:
        """That of its parameters: normalisation stays in it under autocast."""
        return self.weight.dtype

    def _count_batch(self) -> float:
        """Count the batch and return the averaging factor of this update."""
        if not (self.training and self.track_running_stats):
            return 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # it waits for a GPU, as PyTorch's norm does
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    @torch.no_grad()
    def _keep_statistics(self, index: Tensor, is_open: Tensor, mean: Tensor, var: Tensor) -> None:
        for buffer, new in ((self.running_mean, mean), (self.running_var, var)):
            assert buffer is not None
            old = buffer.index_select(0, index)
            buffer.index_copy_(0, index, torch.where(is_open, new, old))


class GatedBatchNorm1d(_GatedBatchNorm, nn.BatchNorm1d):
    __doc__ = _GatedBatchNorm.__doc__
    plain_class = nn.BatchNorm1d


class GatedBatchNorm2d(_GatedBatchNorm, nn.BatchNorm2d):
    __doc__ = _GatedBatchNorm.__doc__
    plain_class = nn.BatchNorm2d
