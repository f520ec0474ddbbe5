# SPDX-License-Identifier: Apache-2.0
"""`masked_weight`: schemas, fakes, gradient, public function."""

import math

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.masked_weight import reference
from l0kernels.ops.masked_weight.reference import closed_below
from l0kernels.ops.pack_weight import op as pack_weight
from l0kernels.ops.pack_weight.reference import is_channels_last


def _forward_fake(weight, scores, beta, scale, closed_below, dtype):
    return _empty(weight, dtype)


def _backward_fake(grad, weight, scores, beta, scale, closed_below, need_weight, need_scores):
    return (
        _empty(weight, weight.dtype) if need_weight else weight.new_empty(0),
        _empty(weight, scores.dtype) if need_scores else scores.new_empty(0),
    )


def _empty(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=layout)


def _forward_python(weight, scores, beta, scale, closed_below, dtype):
    closed, gate, _ = _gates(scores, beta, scale, closed_below)
    return _empty(weight, dtype).copy_((weight.to(gate.dtype) * gate).masked_fill(closed, 0))


def _backward_python(grad, weight, scores, beta, scale, closed_below, need_weight, need_scores):
    closed, gate, slope = _gates(scores, beta, scale, closed_below)
    grad = grad.to(gate.dtype)
    grad_weight, grad_scores = weight.new_empty(0), scores.new_empty(0)
    if need_weight:
        grad_weight = _empty(weight, weight.dtype).copy_((grad * gate).masked_fill(closed, 0))
    if need_scores:
        product = (grad * weight.to(gate.dtype) * slope).masked_fill(closed, 0)
        grad_scores = _empty(weight, scores.dtype).copy_(product)
    return grad_weight, grad_scores


def _gates(
    scores: Tensor, beta: Tensor, scale: float, closed_below: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which gates are closed, and of the others the values and their slopes in the scores."""
    soft = beta.isfinite()
    x = scores * torch.where(soft, beta, 1)
    closed = torch.where(soft, x < closed_below, ~(scores > 0))
    gate = torch.where(soft, torch.sigmoid(x), 1)
    # sigmoid(-x) is 1 - sigmoid(x) without the difference.
    slope = torch.where(soft, gate * torch.sigmoid(-x) * (beta * scale), 0)
    return closed, gate * scale, slope


_registry.add_op("masked_weight")
_FORWARD = _registry.define(
    "masked_weight(Tensor weight, Tensor scores, Tensor beta, float scale, float closed_below, "
    "ScalarType dtype) -> Tensor",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "masked_weight_backward(Tensor grad, Tensor weight, Tensor scores, Tensor beta, float scale, "
    "float closed_below, bool need_weight, bool need_scores) "
    "-> (Tensor grad_weight, Tensor grad_scores)",
    fake=_backward_fake,
    python=_backward_python,
)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scores, beta, scale, closed_below, dtype):
        ctx.save_for_backward(weight, scores, beta)
        ctx.numbers = scale, closed_below
        ctx.set_materialize_grads(False)
        return _registry.chosen(_FORWARD)(weight, scores, beta, scale, closed_below, dtype)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        need_weight, need_scores = ctx.needs_input_grad[:2]
        if grad is None:
            return (None,) * 6
        grad_weight, grad_scores = _registry.chosen(_BACKWARD)(
            grad, *ctx.saved_tensors, *ctx.numbers, need_weight, need_scores
        )
        return (
            grad_weight if need_weight else None,
            grad_scores if need_scores else None,
            *(None,) * 4,
        )


def masked_weight(
    weight: Tensor,
    scores: Tensor,
    beta: Tensor,
    scale: float = 1.0,
    skip_below: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies every number of a weight by a gate of its own, m = scale sigmoid(beta scores).

    As beta grows, m tends to the unit step scale 1[scores > 0]; an infinite beta is that step.
    masked = weight m, rounded once, to `dtype`.

    The backward pass gives, from g = dL/dmasked in one sweep,
    dweight = g m and dscores = g weight scale beta sigmoid(beta scores) sigmoid(-beta scores), for
    an infinite beta exactly 0.

    Gates with beta scores below -87 (float64: -700), where sigmoid is about to underflow, are
    exactly 0, and so are the number and both gradients there, whatever the weight holds; above 87
    they are exactly `scale`. What is closed is decided by comparing the product beta scores with
    one number, and every implementation takes the same decision.

    A number costs about 20 operations and a division forward, a few more backward, so memory
    limits both passes. Weights of N numbers of w bytes, masked ones of p, and scores of s: forward
    reads (w + s) N and writes p N bytes; backward reads (p + w + s) N and writes (w + s) N. The 24
    3x3 weights of the blocks of a 28-10 wide residual network (36.2 million numbers), float32 to
    bfloat16: 362 MB forward, at least 84 us on an H200 (4.3 TB/s); 652 MB backward, 152 us. Their
    0.8 and 1.1 GFLOP take 12 and 16 us there (67 TFLOP/s). Counted, not measured. On a GPU each
    pass is one launch.

    Args:
        weight: any shape; float64, float32, bfloat16 or float16.
        scores: of weight's shape; float64 for float64 weights, else float32.
        beta: [], of scores' dtype; positive, infinite for the unit step. No gradient reaches it.
        scale: positive. Continuous Sparsification takes 1 / sigmoid(initial score), with which
            training starts at the weight itself.
        skip_below: gates with sigmoid(beta scores) below it count as closed, an approximation; from
            0, for none, up to, and without, 1. It does nothing to a unit step.
        dtype: of the result; default weight's. float32 weights are also masked to bfloat16 and
            float16.

    Returns:
        weight's shape: channels_last if the weight is 4-D and strided so, else contiguous.
        Differentiable in weight and scores; both gradients have that layout, too.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices, scale or skip_below out of
        range.

    Source: Savarese, Silva, Maire, "Winning the lottery with Continuous Sparsification"
    (NeurIPS 2020, arXiv:1912.04427); the scale is in the authors' code.
    """
    dtype = dtype or weight.dtype
    _check(weight, scores, beta, scale, skip_below, dtype)
    if _config.reference_asked(weight):
        return reference.masked_weight(weight, scores, beta, scale, skip_below, dtype)
    threshold = closed_below(skip_below, scores.dtype)
    return _MaskedWeight.apply(weight, scores, beta, float(scale), threshold, dtype)


def _check(weight, scores, beta, scale, skip_below, dtype) -> None:
    pack_weight._check_dtypes(weight, dtype)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for name, tensor, shape in (("scores", scores, weight.shape), ("beta", beta, ())):
        if tensor.dtype != compute:
            raise TypeError(f"{name}: expected {compute}; got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}; got {list(tensor.shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{name}: expected a tensor on {weight.device}; got {tensor.device}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive number; got {scale}")
    if not 0 <= skip_below < 1:
        raise ValueError(f"skip_below: expected a number from 0 up to 1; got {skip_below}")
