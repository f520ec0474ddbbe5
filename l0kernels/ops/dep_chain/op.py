# SPDX-License-Identifier: Apache-2.0
"""`dep_chain`: schema, fake, gradient, public function."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.dep_chain import reference
from l0kernels.ops.dep_chain.reference import BOUND, order_of


class Place(NamedTuple):
    """Where a layer stands in the flat vector of logits.

    Args:
        layer: its number.
        at: its own logits.
        source: the logits that it reads; None: `first`.
    """

    layer: int
    at: slice
    source: slice | None


def places(weights: Sequence[Tensor], reverse: bool) -> Iterator[Place]:
    """The layers in the order in which they are computed."""
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight.shape[0])
    source = None
    for i in order_of(len(weights), reverse):
        at = slice(ends[i], ends[i + 1])
        yield Place(i, at, source)
        source = at


def _forward_fake(first, weights, biases, reverse):
    size = sum(weight.shape[0] for weight in weights)
    return first.new_empty(size), first.new_empty(size)


def _backward_fake(grad, logits, slopes, first, weights, reverse):
    grads = [weight.new_empty(weight.shape) for weight in weights]
    return [first.new_empty(first.shape), logits.new_empty(logits.shape), *grads]


def _forward_python(first, weights, biases, reverse):
    logits, slopes = _forward_fake(first, weights, biases, reverse)
    for layer, at, source in places(weights, reverse):
        read = first if source is None else logits[source]
        sums = weights[layer].double() @ read.double() + biases[layer].double()
        logits[at] = BOUND * sums.tanh()
        slopes[at] = BOUND / sums.cosh().square()
    return logits, slopes


def _backward_python(grad, logits, slopes, first, weights, reverse):
    delta, slopes = grad.double(), slopes.double()
    results = _backward_fake(grad, logits, slopes, first, weights, reverse)
    back = None
    for layer, at, source in reversed(list(places(weights, reverse))):
        mine = (delta[at] if back is None else delta[at] + back) * slopes[at]
        read = first if source is None else logits[source]
        results[1][at] = mine
        results[2 + layer].copy_(torch.outer(mine, read.double()))
        back = mine @ weights[layer].double()
    results[0].copy_(back)
    return results


_registry.add_op("dep_chain")
_FORWARD = _registry.define(
    "dep_chain(Tensor first, Tensor[] weights, Tensor[] biases, bool reverse) "
    "-> (Tensor logits, Tensor slopes)",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "dep_chain_backward(Tensor grad, Tensor logits, Tensor slopes, Tensor first, "
    "Tensor[] weights, bool reverse) -> Tensor[]",
    fake=_backward_fake,
    python=_backward_python,
)


def _versions(tensors) -> list[int]:
    """Version counters; tensors of inference mode have none, and no backward pass either."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class _DepChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, first, *parameters):
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        logits, slopes = _registry.chosen(_FORWARD)(first, weights, biases, reverse)
        ctx.set_materialize_grads(False)
        # Plain references instead of saved tensors: a draw that is held serves several backward
        # passes, and autograd frees saved tensors after the first. Two numbers per gate are kept:
        # to make them again takes as long as the backward pass.
        ctx.inputs, ctx.reverse = (logits.detach(), slopes, first, *weights), reverse
        if not torch.compiler.is_compiling():  # compiled graphs save and check these themselves
            ctx.versions = _versions(ctx.inputs)
        return logits

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        if not torch.compiler.is_compiling() and _versions(ctx.inputs) != ctx.versions:
            raise RuntimeError(
                "dep_chain: expected weights and logits as they were computed, got some modified "
                "in place since; run backward before the optimizer step"
            )
        logits, slopes, first, *weights = ctx.inputs
        if grad is None:
            return None, None, *(None,) * (2 * len(weights))
        grad_first, grad_biases, *grad_weights = _registry.chosen(_BACKWARD)(
            grad, logits, slopes, first, weights, ctx.reverse
        )
        sizes = [weight.shape[0] for weight in weights]
        return None, grad_first, *grad_weights, *grad_biases.split(sizes)


def dep_chain(
    first: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    reverse: bool = False,
) -> Tensor:
    """Computes the logits of all gates of a model, each layer's from those of its neighbour.

    Layer i of L with n_i gates has the logits h_i = ln(100) tanh(a_i), a_i = W_i h_(i-1) + b_i,
    where layer 0 reads ``first``. With ``reverse`` the chain runs from the last layer to the
    first: h_i = ln(100) tanh(W_i h_(i+1) + b_i), where layer L - 1 reads ``first``.

    The backward pass runs along the chain once, from its end. With g_i = dL/dh_i,
    delta_i = s_i (g_i + W_j^T delta_j), j being the layer that reads i, and the slope
    s_i = ln(100) (1 - tanh(a_i)^2): db_i = delta_i, dW_i = delta_i h^T with h what the layer
    reads, dfirst = W^T delta of the layer that reads ``first``. Slopes are made with the logits,
    by a formula that keeps their digits where tanh is next to 1, and kept for the backward pass.

    Args:
        first: [n], float32 or float64, what the first layer of the chain reads.
        weights: W_i [n_i, n_(i-1)], or [n_i, n_(i+1)] with ``reverse``, in the order of the
            layers, of first's dtype.
        biases: b_i [n_i], in the same order.
        reverse: whether the chain runs from the last layer to the first.

    Returns:
        [sum n_i], the logits of all layers, in the order of the layers whatever the direction.
        Differentiable in first, weights and biases; gradients of weights are contiguous.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices, no layers, as many biases as
        weights not given. RuntimeError in backward: an input or the result was modified in place.

    NaN and infinities are carried on as PyTorch's operations do. Sums are in float64, in a fixed
    order whatever the number of threads.

    Cost in float32, with E = sum n_i n_(i-1) weights and G gates: 4 E + 16 G bytes and 2 E FLOP
    forward, 8 E + 24 G bytes and 4 E FLOP backward. VGG-16 has E = 1.6 million and G = 4,224:
    6.6 and 13 MB, on an H200 (4.3 TB/s) at least 1.5 and 3.1 us, and 0.1 and 0.2 us of arithmetic
    (34 TFLOP/s in float64). What limits it is the chain: each layer waits for the one before, and
    a launch takes about 2 us. In CUDA C++, neighbours with up to 128 x 128 weights each share a
    launch of one block, which should read a layer of that size in the time of a launch (estimated,
    not measured): one launch forward and one backward for all 28 layers of ResNet-56, ten and ten
    for VGG-16. Triton's kernels take a launch for each layer.

    Source: Li, Ji, "Dep-L0: Improving L0-based network sparsification via dependency modeling"
    (ECML PKDD 2021), where ``first`` is a vector of ones.
    """
    _check(first, weights, biases, reverse)
    if _config.reference_asked(first):
        return reference.dep_chain(first, weights, biases, reverse)
    return _DepChain.apply(reverse, first, *weights, *biases)


def _check(
    first: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], reverse: bool
) -> None:
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"expected at least one weight and as many biases; got {len(weights)} weights and "
            f"{len(biases)} biases"
        )
    if first.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"first: expected float32 or float64; got {first.dtype}")
    if first.dim() != 1:
        raise ValueError(f"first: expected 1 dimension; got shape {list(first.shape)}")
    width = first.shape[0]
    for i in order_of(len(weights), reverse):
        _check_like(first, f"weights[{i}]", weights[i])
        _check_like(first, f"biases[{i}]", biases[i])
        if weights[i].dim() != 2 or weights[i].shape[1] != width:
            raise ValueError(
                f"weights[{i}]: expected shape [n, {width}], for the {width} logits that it reads; "
                f"got {list(weights[i].shape)}"
            )
        width = weights[i].shape[0]
        if biases[i].shape != (width,):
            raise ValueError(
                f"biases[{i}]: expected shape [{width}] as rows of weights[{i}]; "
                f"got {list(biases[i].shape)}"
            )


def _check_like(first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype != first.dtype:
        raise TypeError(f"{name}: expected first's dtype {first.dtype}; got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device}; got {tensor.device}")
