# SPDX-License-Identifier: Apache-2.0
"""`gate_apply`: schemas, fakes, gradient, public function."""

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.gate_apply import reference
from l0kernels.ops.gate_apply.reference import scale_along

_GATE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def _forward_fake(x, z, gate_map, dim):
    return torch.empty_like(x)


def _backward_fake(grad, x, z, gate_map, dim, need_x):
    return torch.empty_like(x) if need_x else x.new_empty(0), z.new_empty(z.shape)


def _forward_python(x, z, gate_map, dim):
    return _scaled(x, scale_along(x, z, gate_map, dim), torch.empty_like(x))


def _backward_python(grad, x, z, gate_map, dim, need_x):
    scale = scale_along(x, z, gate_map, dim)
    grad_x = _scaled(grad, scale, torch.empty_like(x)) if need_x else x.new_empty(0)
    kept = (dim,) if z.dim() == 1 else (0, dim)
    summed = [d for d in range(x.dim()) if d not in kept]
    sums = grad.double() * x.double()
    sums = sums.sum(summed, keepdim=True) if summed else sums
    return grad_x, _grad_z(sums.masked_fill(scale == 0, 0), z, gate_map)


def _scaled(x: Tensor, scale: Tensor, result: Tensor) -> Tensor:
    # Masked after the product: Inf * 0 is NaN.
    return result.copy_((x.to(scale.dtype) * scale).masked_fill(scale == 0, 0))


def _grad_z(sums: Tensor, z: Tensor, gate_map: Tensor) -> Tensor:
    """Adds the sums of features, times each one's other gate, to the gradients of its two gates."""
    rows = z.reshape(-1, z.shape[-1]).double()
    sums = sums.reshape(len(rows), gate_map.shape[1])
    grad_z = torch.zeros_like(rows)
    row = torch.arange(len(rows), device=z.device)[:, None]
    for mine, other in ((0, 1), (1, 0)):
        # index_put_ adds in a fixed order on every device; index_add_ need not.
        part = sums * rows[:, gate_map[other]]
        grad_z.index_put_((row, gate_map[mine][None]), part, accumulate=True)
    grad_z[:, -1] = 0
    return grad_z.to(z.dtype).reshape(z.shape)


_registry.add_op("gate_apply")
_FORWARD = _registry.define(
    "gate_apply(Tensor x, Tensor z, Tensor gate_map, int dim) -> Tensor",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "gate_apply_backward(Tensor grad, Tensor x, Tensor z, Tensor gate_map, int dim, bool need_x) "
    "-> (Tensor grad_x, Tensor grad_z)",
    fake=_backward_fake,
    python=_backward_python,
)


class _GateApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, gate_map, dim):
        # Like a product in PyTorch: x is kept for the gradient of z alone.
        ctx.save_for_backward(z, gate_map, *((x,) if ctx.needs_input_grad[1] else ()))
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        return _registry.chosen(_FORWARD)(x, z, gate_map, dim)

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        need_x, need_z = ctx.needs_input_grad[:2]
        if grad is None:
            return (None,) * 4
        z, gate_map, *saved = ctx.saved_tensors
        if not need_z:
            grad_x = _registry.chosen(_FORWARD)(_ordered(grad, z), z, gate_map, ctx.dim)
            return grad_x, None, None, None
        grad_x, grad_z = _registry.chosen(_BACKWARD)(grad, *saved, z, gate_map, ctx.dim, need_x)
        return grad_x if need_x else None, grad_z, None, None


def _ordered(x: Tensor, z: Tensor) -> Tensor:
    """Activations as the operators take them: gates per example want one example after the other.

    That is how contiguous and channels_last tensors lie in memory; others are copied.
    """
    if z.dim() == 1 or len(x) < 2:
        return x
    step = x.stride(0)
    between = any(
        size > 1 and stride >= step
        for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)
    )
    return x.contiguous() if between else x


def gate_apply(x: Tensor, z: Tensor, gate_map: Tensor, dim: int = 1) -> Tensor:
    """Multiplies every feature of activations by its two gates.

    With a, b = gate_map[:, f], feature f has the scale s_f = z[a] z[b], and y = x s, computed in
    z's dtype and rounded once. Where s_f is 0, y is exactly 0, whatever x holds there.

    The backward pass gives, from g = dL/dy in one sweep, dx = g s and
    dz[a] = sum over the features f with a gate a of (sum over examples and positions of g x) times
    the feature's other gate. Where s_f is 0, dx and what f adds to dz are exactly 0. The last gate
    is a constant: its gradient is 0. Sums are in float64, in one fixed order. With gates per
    example each example has its own sums. x is kept for backward only where z needs a gradient.

    A number costs a product forward, two and a float64 sum backward, so memory limits both passes:
    forward reads and writes w N bytes of N numbers of w bytes; backward reads g and x and writes
    dx, 3 w N bytes, and sums of products, on a GPU 8 bytes per feature for at most 256 parts of
    the rows. 512 x 4096 numbers in bfloat16: 8.4 MB forward, at least 2 us on an H200 (4.3 TB/s);
    12.6 MB backward, 3 us, and 4.2 MB of sums in 64 parts, written and read again by the second
    launch, 2 us. In float32: 16.8 MB, 4 us, and 25.2 MB, 6 us. Counted, not measured. On a GPU the
    forward pass is one launch, the backward pass two.

    Args:
        x: at least 2-D, with F features in dimension `dim`; float64, float32, bfloat16 or float16.
        z: [G + 1] gates that all examples share, or [N, G + 1] with one row for each of the
            N = x.shape[0] examples; float64 for float64 x, else float32. The last one must be 1:
            it is always open.
        gate_map: int64 [2, F], the two gates of each feature, from 0 to G.
        dim: of the features, from -x.dim() to x.dim() - 1; not that of the examples if they have
            gates of their own.

    Returns:
        x's shape and dtype, in the strides of `torch.empty_like(x)`; if gates are per example and
        these do not keep examples apart, contiguous. Differentiable in x and z.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or dim. RuntimeError: a gate out
        of bounds (on a GPU it counts as closed).

    Source: the gated network of Louizos, Welling, Kingma, "Learning sparse neural networks through
    L0 regularization" (ICLR 2018); their code has gates per example as `local_rep`.
    """
    dim = _check(x, z, gate_map, dim)
    if _config.reference_asked(x):
        return reference.gate_apply(_ordered(x, z), z, gate_map, dim)
    return _GateApply.apply(_ordered(x, z), z, gate_map, dim)


def _check(x: Tensor, z: Tensor, gate_map: Tensor, dim: int) -> int:
    """Returns the dimension of the features, counted from the first one."""
    if x.dtype not in _GATE_DTYPES:
        raise TypeError(f"x: expected a floating dtype; got {x.dtype}")
    ndim = x.dim()
    if ndim < 2:
        raise ValueError(f"x: expected at least 2 dimensions; got {ndim}")
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim: expected a number from {-ndim} to {ndim - 1}; got {dim}")
    dim %= ndim
    _check_gates(x, z, dim)
    for name, tensor in (("z", z), ("gate_map", gate_map)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}; got {tensor.device}")
    if gate_map.dtype != torch.int64:
        raise TypeError(f"gate_map: expected int64; got {gate_map.dtype}")
    if gate_map.shape != (2, x.shape[dim]):
        raise ValueError(
            f"gate_map: expected shape [2, {x.shape[dim]}]; got {list(gate_map.shape)}"
        )
    return dim


def _check_gates(x: Tensor, z: Tensor, dim: int) -> None:
    if z.dtype != _GATE_DTYPES[x.dtype]:
        raise TypeError(f"z: expected {_GATE_DTYPES[x.dtype]} with {x.dtype} x; got {z.dtype}")
    per_example = z.dim() == 2
    shaped = z.dim() == 1 or (per_example and z.shape[0] == x.shape[0])
    if not shaped or z.shape[-1] == 0:
        raise ValueError(f"z: expected shape [G + 1] or [{x.shape[0]}, G + 1]; got {list(z.shape)}")
    if per_example and dim == 0:
        raise ValueError("dim: expected another one than 0, the examples', with gates per example")
