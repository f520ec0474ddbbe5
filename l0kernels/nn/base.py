# SPDX-License-Identifier: Apache-2.0
"""What all gated layers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from l0kernels.functional import gate_apply, pack_weight
from l0kernels.gates.base import Gates
from l0kernels.gates.draw import LEAST, Draw
from l0kernels.gates.ref import GateRef
from l0kernels.nn import packing
from l0kernels.nn.constants import add_shared, left_out, take_off
from l0kernels.ops.gate_apply.reference import scale_along


class GatedLayer(nn.Module):
    """Mix-in: a layer whose output features, input features or both have gates.

    Only ``in_gate`` multiplies (the layer's input, folded into its weights); ``out_gate`` says
    which output features exist in a draw. Before a norm it is the other way round, and what is
    closed is a constant: see ``l0kernels.nn.constants``. ``plain_class`` is the class that a layer
    is swapped from and back to.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.Module
    weight: Tensor
    bias: Tensor | None
    in_gate: GateRef | None = None
    out_gate: GateRef | None = None
    in_port: int = -1
    out_port: int = -1
    depthwise: bool = False
    # Whether a gate that multiplies an input feature stands for the feature's columns.
    has_columns: bool = False
    # Which dimension of the input has the features; of convolutions it depends on the kernel.
    feature_dim: int = -1
    # Examples, pixels or tokens that came in last.
    rows: int = 0
    # Whether its parameters are not packed with those of other layers.
    packs_alone: ClassVar[bool] = False
    # Whether its gates may have their place before a norm.
    knows_constants: ClassVar[bool] = False
    # Whether the weight is stored [in, out, ...] instead of [out, in, ...].
    stored_in_out: bool = False

    @property
    def gates(self) -> Gates | None:
        """The gates that this layer refers to."""
        ref = self.in_gate if self.in_gate is not None else self.out_gate
        return None if ref is None else ref.gates

    @property
    def makes_constants(self) -> bool:
        """Whether gates multiply what it makes, or normalises, before a norm."""
        return self.out_gate is not None and self.out_gate.is_before_norm

    @property
    def reads_constants(self) -> bool:
        """Whether it reads constants where gates before a norm are closed."""
        return self.in_gate is not None and self.in_gate.is_before_norm

    @property
    def packs_together(self) -> bool:
        """Whether its parameters may be packed with those of other layers, in one call."""
        return not (self.packs_alone or self.makes_constants or self.reads_constants)

    def connect(self, in_gate: GateRef | None, out_gate: GateRef | None) -> None:
        """Set the references; ``gates.attach(model)`` makes them work.

        Raises:
            ValueError: a reference has another number of features than the layer, the two belong
                to different gates, or one is before a norm and the layer cannot be there.
        """
        for what, ref, width in (
            ("in_gate", in_gate, self._in_width()),
            ("out_gate", out_gate, self._out_width()),
        ):
            if ref is not None and ref.features != width:
                raise ValueError(
                    f"{type(self).__name__}: expected {what} of {width} features, "
                    f"got {ref.features}"
                )
            if ref is not None and ref.is_before_norm and not self.knows_constants:
                raise ValueError(
                    f"{type(self).__name__}: expected gates that multiply what is read, got "
                    f"{what} of before_norm()"
                )
        if in_gate is not None and out_gate is not None and in_gate.gates is not out_gate.gates:
            raise ValueError(f"{type(self).__name__}: in_gate and out_gate need the same gates")
        self.in_gate, self.out_gate = in_gate, out_gate

    def compute(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the plain layer computes, with packed inputs and parameters.

        Args:
            x: input.
            weight: laid out as the layer's own.
            bias: or None.
            args, kwargs: what else a forward takes.
        """
        raise NotImplementedError

    def _in_width(self) -> int:
        raise NotImplementedError

    def _out_width(self) -> int:
        raise NotImplementedError

    def resize(self, inputs: int, outputs: int) -> None:
        """Set the attributes that hold the widths; parameters and buffers are the caller's.

        It reads plain attributes only, so that ``gated_class(type(m)).resize(m, ...)`` serves a
        plain layer ``m`` too.

        Args:
            inputs: number of input features.
            outputs: number of output features.
        """
        raise NotImplementedError

    def shape_out_in(self) -> tuple[int, int, int]:
        """Output features, input features and elements per pair of the weight.

        Their product is the number of weights. A layer that features pass through (normalisation,
        activation, depthwise convolution) has one input feature per output feature.
        """
        if self.weight is None or self.weight.dim() < 2:
            return self._out_width(), 1, 1
        rows, columns, *kernel = self._out_in(self.weight).shape
        return rows, columns, math.prod(kernel)

    def uses(self, positions: int) -> float:
        """Multiply-adds of one weight per example, given the output positions (pixels, tokens)."""
        return positions

    def _out_in(self, weight: Tensor) -> Tensor:
        """View a weight stored as the layer stores it as [out, in, ...], or the other way round."""
        return weight.transpose(0, 1) if self.stored_in_out else weight

    def current_draw(self) -> Draw:
        """The draw that this layer works with now."""
        gates = self.gates
        assert gates is not None
        if self.in_port < 0 and self.out_port < 0:
            raise RuntimeError(
                f"{type(self).__name__}: its gates are not attached; call gates.attach(model)"
            )
        return gates.current_draw((self.in_port, self.out_port))

    def scale(self, draw: Draw) -> Tensor:
        """Gate values of all input features, shape [features] (masked reference)."""
        return _scale(self.gates, self.in_port, draw)

    def mask_inputs(self, x: Tensor, dim: int, draw: Draw) -> Tensor:
        """Multiply every input feature by its gate (masked reference); ``dim`` is negative."""
        if self.in_port < 0 or self.reads_constants:
            return x
        if draw.examples is not None:
            assert self.gates is not None
            z, made = self._example_gates(x, dim, draw)
            return x * scale_along(x, z, made, x.dim() + dim).to(x.dtype)
        return x * self.scale(draw).to(x.dtype).view(-1, *[1] * (-dim - 1))

    def mask_outputs(self, y: Tensor, dim: int, draw: Draw) -> Tensor:
        """Multiply every output feature by its gate before a norm (masked reference)."""
        if not self.makes_constants:
            return y
        scale = _scale(self.gates, self.out_port, draw)
        return y * scale.to(y.dtype).view(-1, *[1] * (-dim - 1))

    def compute_packed(
        self, input: Tensor, dim: int, draw: Draw, *args: Any, **kwargs: Any
    ) -> Tensor:
        """What the layer computes with packed features.

        Args:
            input: packed, see the layer.
            dim: of its features, negative.
            draw: says what is open.
            args, kwargs: what else a forward takes.
        """
        x, constants = input, None
        if self.reads_constants:
            closed = self._in_width() - draw.index[self.in_port].shape[0]
            if closed:
                x, constants = take_off(input, dim, closed)
        weight, bias = self.packed_parameters(draw)
        x = self.select_inputs(x, dim, draw, weight)
        if constants is None:
            return self.compute_drawn(draw, x, weight, bias, *args, **kwargs)
        columns, _ = self._once(draw, ("closed", self.compute_dtype()), self._pack_closed)
        shared = self.compute(constants, columns, bias, *args, **kwargs)
        if shared.numel() == weight.shape[0]:  # one position
            return self.compute(x, weight, shared.flatten(), *args, **kwargs)
        return add_shared(self.compute(x, weight, None, *args, **kwargs), shared)

    def compute_drawn(
        self, draw: Draw, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """``compute``, for layers that do something else with parameters packed for a draw."""
        return self.compute(x, weight, bias, *args, **kwargs)

    def _example_gates(self, x: Tensor, dim: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """Gates of every example of ``x``, and the map of its features to them."""
        assert draw.examples is not None and self.gates is not None
        if x.dim() + dim < 1:
            raise ValueError(
                f"{type(self).__name__}: expected a batch, whose examples have gates of their "
                f"own, got an input of shape {list(x.shape)}"
            )
        return draw.examples.of(x.shape[0]), self.gates.port_maps[self.in_port]

    def open_rows(self, draw: Draw) -> Tensor:
        """Which packed output features are really open, bool of shape [packed]."""
        return _scale(self.gates, self.out_port, draw)[draw.index[self.out_port]] != 0

    def packed_parameters(self, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Weight (input gates folded in) and bias at the packed widths, in the compute dtype.

        The weight has the layer's own layout.
        """
        if draw.packed is None:  # most often: the dtype need not be looked up
            return self._pack(draw)
        return self._once(draw, self.compute_dtype(), self._pack)

    def compute_dtype(self) -> torch.dtype:
        """The dtype autocast would give the layer; it casts other than fp32 weights by itself."""
        weight = self.weight
        device = weight.device.type
        if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype

    def _once(
        self, draw: Draw, what: Any, pack: Callable[[Draw], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """``pack(draw)``, kept under ``what`` where the draw keeps what is packed with it."""
        if draw.packed is None:
            return pack(draw)
        key = (self, what)
        if key not in draw.packed:
            with torch.inference_mode(False), torch.no_grad():
                draw.packed[key] = pack(draw)
        return draw.packed[key]

    def _pack(self, draw: Draw) -> tuple[Tensor, Tensor | None]:
        gates = self.gates
        assert gates is not None
        if not self.makes_constants and not self.reads_constants:
            if not torch.compiler.is_compiling() and not gates.packs(self, draw):
                return self.weight, self.bias
            if gates.together:
                return packing.take(self, gates, draw)
            if not torch.compiler.is_compiling() and self.weight in gates.kept:
                return packing.pack({self: self.compute_dtype()}, gates, draw)[self]
        dtype = self.compute_dtype()
        weight = self._pack_one(self._out_in(self.weight), draw, dtype, columns=True)
        bias = None if self.bias is None else self._pack_one(self.bias, draw, dtype, columns=False)
        return self._out_in(weight), bias

    def _pack_closed(self, draw: Draw) -> tuple[Tensor, None]:
        """The columns of features that are constants."""
        closed = left_out(draw.index[self.in_port], self._in_width())
        dtype = self.compute_dtype()
        return self._pack_one(self.weight, draw, dtype, columns=True, closed=closed), None

    def _pack_one(
        self,
        full: Tensor,
        draw: Draw,
        dtype: torch.dtype,
        columns: bool,
        closed: Tensor | None = None,
    ) -> Tensor:
        gates = self.gates
        assert gates is not None
        rows = row_map = cols = col_map = None
        # A graph that depends on a width would serve one draw only.
        compiling = torch.compiler.is_compiling()
        drops = compiling or self.makes_constants or gates.drops(self.out_port, draw)
        if self.out_port >= 0 and drops:
            rows, row_map = draw.index[self.out_port], gates.port_maps[self.out_port]
        if closed is not None:
            cols = closed
        elif columns and self.in_port >= 0 and (compiling or self.in_port not in draw.dense):
            cols = draw.index[self.in_port]
            col_map = None if self.reads_constants else gates.port_maps[self.in_port]
        if self.makes_constants:
            packed = pack_weight(full, draw.z, rows, row_map, cols, col_map)
            scale = _scale(gates, self.out_port, draw).index_select(0, draw.index[self.out_port])
            return (packed * scale.view(-1, *[1] * (full.dim() - 1))).to(dtype)
        if rows is None and cols is None:
            return full
        return pack_weight(full, draw.z, rows, row_map, cols, col_map, dtype)

    def select_inputs(self, x: Tensor, dim: int, draw: Draw, weight: Tensor) -> Tensor:
        """Drop input features that only a gate without producer closes.

        Raises:
            ValueError: ``x`` has another width than the draw packs (not checked in compiled code).
        """
        if draw.examples is not None and self.in_port >= 0:
            return gate_apply(x, *self._example_gates(x, dim, draw), dim)
        position = None if self.in_port < 0 else draw.position[self.in_port]
        # A graph that depends on a width would serve one draw only.
        compiling = torch.compiler.is_compiling()
        if not compiling:
            gates = self.gates
            assert gates is not None and gates.dense is not None
            if draw.training:
                gates.dense.note(self, x.numel() // max(1, x.shape[dim]))
            if not self.depthwise:
                self._check_width(x.shape[dim], draw, weight)
            if self.in_port in draw.dense:
                return gate_apply(x, draw.z, gates.port_maps[self.in_port], dim)
        if position is None:
            return x
        x = x.index_select(dim, position)
        if not compiling and position.numel() > LEAST and not draw.is_planned:
            return x
        # Closed ones may be there to fill up: 0 * NaN would spread what they hold.
        is_open = self.scale(draw)[draw.index[self.in_port]] != 0
        return torch.where(is_open.view(-1, *[1] * (-dim - 1)), x, 0)

    def _check_width(self, width: int, draw: Draw, weight: Tensor) -> None:
        gates = self.gates
        assert gates is not None
        if self.in_port < 0 or draw.position[self.in_port] is None:
            expected = self._out_in(weight).shape[1]
        else:
            expected = gates.arriving(self.in_port, draw)
        if expected is not None and width != expected:
            raise ValueError(
                f"{type(self).__name__}: expected {expected} input features, got {width}"
            )


def _scale(gates: Gates | None, port: int, draw: Draw) -> Tensor:
    assert gates is not None
    made, extra = gates.port_maps[port]
    return draw.z[made] * draw.z[extra] if gates.port_selects[port] else draw.z[made]
