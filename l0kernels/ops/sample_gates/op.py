# SPDX-License-Identifier: Apache-2.0
"""`sample_gates` and what goes with it: schemas, fakes, gradient, public functions."""

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.sample_gates import reference
from l0kernels.ops.sample_gates.reference import LAWS, GateLayout, OpenLists

_ROWS = 1 << 32
_LAW_NUMBER = {law: number for number, law in enumerate(LAWS)}


def _forward_fake(log_alpha, key, cost, group_offsets, maps, port_offsets, law, beta, gamma, zeta):
    lists = _lists_fake(log_alpha, group_offsets, maps, port_offsets)
    return log_alpha.new_empty(log_alpha.shape[0] + 1), log_alpha.new_empty(()), *lists


def _lists_fake(z, group_offsets, maps, port_offsets):
    features = maps.shape[1]
    return (
        maps.new_empty(features),
        maps.new_empty(features),
        maps.new_empty(port_offsets.shape[0] - 1),
    )


def _backward_fake(log_alpha, key, cost, grad_z, grad_expected, law, beta, gamma, zeta):
    return log_alpha.new_empty(log_alpha.shape[0])


def _arm_fake(difference, factor, key):
    return factor.new_empty(factor.shape[0])


def _noise_fake(key, examples, gates, first, stride):
    return key.new_empty((examples, gates), dtype=torch.int32)


def _forward_python(
    log_alpha, key, cost, group_offsets, maps, port_offsets, law, beta, gamma, zeta
):
    layout = GateLayout(group_offsets, maps, port_offsets)
    z, expected, lists = reference.sample_gates(
        log_alpha, key, cost, layout, LAWS[law], beta, gamma, zeta
    )
    return z, expected, *lists


def _lists_python(z, group_offsets, maps, port_offsets):
    return tuple(reference.open_lists(z, GateLayout(group_offsets, maps, port_offsets)))


def _backward_python(log_alpha, key, cost, grad_z, grad_expected, law, beta, gamma, zeta):
    la = log_alpha.double()
    grad = torch.zeros_like(la)
    if grad_z is not None and LAWS[law] == "hard_concrete":
        k = reference.noise_k(key, log_alpha.shape[0])
        closed, full = reference.hard_concrete_decisions(la, k, beta, gamma, zeta)
        s = reference.hard_concrete_s(la, k, beta)
        slope = (zeta - gamma) / beta * s * (1 - s)
        grad += torch.where(closed | full, 0.0, grad_z[:-1].double() * slope)
    if grad_expected is not None:
        is_concrete = LAWS[law] == "hard_concrete"
        p = torch.sigmoid(la - reference.closed_shift(beta, gamma, zeta) if is_concrete else la)
        grad += grad_expected.double() * cost.double() * p * (1 - p)
    return grad.to(log_alpha.dtype)


_arm_python = reference.arm_gradient
_noise_python = reference.example_noise

_registry.add_op("sample_gates")
_FORWARD = _registry.define(
    "sample_gates(Tensor log_alpha, Tensor key, Tensor cost, Tensor group_offsets, Tensor maps, "
    "Tensor port_offsets, int law, float beta, float gamma, float zeta) "
    "-> (Tensor z, Tensor expected, Tensor index, Tensor position, Tensor counts)",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "sample_gates_backward(Tensor log_alpha, Tensor key, Tensor cost, Tensor? grad_z, "
    "Tensor? grad_expected, int law, float beta, float gamma, float zeta) -> Tensor",
    fake=_backward_fake,
    python=_backward_python,
)
_ARM = _registry.define(
    "arm_gradient(Tensor difference, Tensor factor, Tensor key) -> Tensor",
    fake=_arm_fake,
    python=_arm_python,
)
_NOISE = _registry.define(
    "example_noise(Tensor key, SymInt examples, SymInt gates, int first, int stride) -> Tensor",
    fake=_noise_fake,
    python=_noise_python,
)
_LISTS = _registry.define(
    "open_lists(Tensor z, Tensor group_offsets, Tensor maps, Tensor port_offsets) "
    "-> (Tensor index, Tensor position, Tensor counts)",
    fake=_lists_fake,
    python=_lists_python,
)


class _SampleGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_alpha, key, cost, group_offsets, maps, port_offsets, *law):
        outputs = _registry.chosen(_FORWARD)(
            log_alpha, key, cost, group_offsets, maps, port_offsets, *law
        )
        ctx.set_materialize_grads(False)
        # Plain references instead of saved tensors: a draw that is held serves several backward
        # passes, and autograd frees saved tensors after the first.
        ctx.inputs, ctx.law = (log_alpha, key, cost), law
        if not torch.compiler.is_compiling():  # compiled graphs save and check these themselves
            ctx.versions = _versions(ctx.inputs)
        return outputs

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad_z, grad_expected, *_):  # type: ignore[override]
        if not torch.compiler.is_compiling():
            _check_unmodified(ctx)
        grad = None
        if grad_z is not None or grad_expected is not None:
            grad = _registry.chosen(_BACKWARD)(*ctx.inputs, grad_z, grad_expected, *ctx.law)
        return grad, *(None,) * 9


def _versions(tensors) -> list[int]:
    """Version counters; tensors of inference mode have none, and no backward pass either."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _check_unmodified(ctx) -> None:
    if _versions(ctx.inputs) != ctx.versions:
        raise RuntimeError(
            "sample_gates: log_alpha, key or cost was modified in place since the draw; "
            "run backward before the optimizer step, or draw again"
        )


def sample_gates(
    log_alpha: Tensor,
    key: Tensor,
    cost: Tensor,
    layout: GateLayout,
    law: str,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> tuple[Tensor, Tensor, OpenLists]:
    """Draws every gate of a model: values, expected cost of the open ones, ordered open lists.

    Gate j gets the 23-bit integer k = word >> 9 from Philox4x32-10 keyed by the seed, at counter
    (j // 4, 0, 0, step), word j % 4, and u = (k + .5) 2^-23. With la = log_alpha,
    K0 = beta ln(-gamma / zeta) and K1 = beta ln((1 - gamma) / (zeta - 1)), all in float64:

    hard concrete: s = sigma((logit(u) + la) / beta), z = clip(s (zeta - gamma) + gamma, 0, 1).
    z = 0 iff u <= sigma(K0 - la) and z = 1 iff u >= sigma(K1 - la), decided by comparing k with
    thresholds, so that every device takes the same decisions; in between
    dz/dla = (zeta - gamma) / beta s (1 - s), elsewhere 0. P(z != 0) = sigma(la - K0).

    bernoulli: z = 1 iff u < sigma(la), else 0; dz/dla = 0. P(z != 0) = sigma(la).

    antithetic: as bernoulli, with 1 - u for u: z = 1 iff 1 - u < sigma(la).

    Args:
        log_alpha: [G], float32 or float64; infinities are legal (always open or closed).
        key: int64 [2], seed (0 <= seed < 2^63) and step (0 <= step < 2^32). The backward pass
            draws the same noise again from it.
        cost: [G], log_alpha's dtype, what gate j costs when open.
        layout: groups and ports, see `GateLayout`.
        law: "hard_concrete", "bernoulli" or "antithetic".
        beta: temperature of the hard concrete law, positive.
        gamma: lower end of its stretched interval, below 0.
        zeta: upper end, above 1.

    Returns:
        z [G + 1], the last entry 1 (the gate that is always open); expected, 0-d, the sum of
        cost[j] P(z[j] != 0); the `OpenLists`. Differentiable in log_alpha.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or options, NaN in log_alpha,
        seed or step out of range. RuntimeError in backward: an input was modified in place.

    A GPU is not waited for, so nothing is raised for values there: counts[0] is -1 for NaN in
    log_alpha, -2 for the seed, -3 for the step; z is NaN at NaN and everywhere after a bad key,
    and so are expected and the gradient. counts[p] is -4 where the layout of port p is out of
    bounds. Models raise the errors when they read the counts.

    Cost on a GPU, float32: 12 bytes and about 200 float64 FLOP (130 instructions) per gate
    forward, 16 bytes and 200 backward, 36 bytes per feature of the lists. On an H200 (4.3 TB/s,
    34 TFLOP/s in float64) a million gates and features need at least 6 us of arithmetic (3 us of
    memory) to be drawn, 8 us of memory to be listed and 6 us of arithmetic (4 us of memory)
    backward. The 4,480 gates of a 28-10 wide residual network need less than 0.1 us of either:
    what limits them is the launch, one forward and one backward, and one chain of dependent
    instructions. Beyond 16,384 gates or features forward takes two launches. A port is listed by
    one block, 1,024 features at a time, so latency limits ports that are much longer than others.

    Source: Louizos, Welling, Kingma, "Learning sparse neural networks through L0 regularization"
    (ICLR 2018), eq. 10-12.
    """
    _check_draw(log_alpha, key, cost, law, beta, gamma, zeta)
    _check_layout(layout, log_alpha.device)
    if _config.reference_asked(log_alpha):
        return reference.sample_gates(log_alpha, key, cost, layout, law, beta, gamma, zeta)
    z, expected, index, position, counts = _SampleGates.apply(
        log_alpha, key, cost, *layout, _LAW_NUMBER[law], float(beta), float(gamma), float(zeta)
    )
    return z, expected, OpenLists(index, position, counts)


def arm_gradient(difference: Tensor, factor: Tensor, key: Tensor) -> Tensor:
    """Weighs the noise of a draw: the ARM estimate of a gradient with respect to gate parameters.

    grad[j] = difference factor[j] (u[j] - 1/2), computed in float64, with the u of
    `sample_gates`; where factor[j] = 0 it is 0, whatever the difference.

    With z1 = 1[u < pi], z2 = 1[1 - u < pi] (laws "bernoulli" and "antithetic" of log_alpha =
    logit(pi)), pi = g(phi) and factor = g'(phi) / (pi (1 - pi)), the expectation of
    factor (f(z2) - f(z1)) (u - 1/2) is d E f / d phi: factor times pi (1 - pi)
    (E f|z_j=1 - E f|z_j=0). So it is with -2 f(z1) for the difference (AR).

    Args:
        difference: 0-d, factor's dtype.
        factor: [G], float32 or float64.
        key: int64 [2], seed and step of the draw.

    Returns:
        [G], factor's dtype; not differentiable.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices; on a CPU also seed or step
        out of range (on a GPU the result is NaN then).

    Cost on a GPU, float32: 8 bytes and 130 integer instructions per gate, one launch, which is
    what limits models of up to a hundred thousand gates.

    Source: Yin, Zhou, "ARM: augment-REINFORCE-merge gradient for stochastic binary networks"
    (ICLR 2019), theorem 1; Li, Ji, "L0-ARM: network sparsification via stochastic binary
    optimization" (ECML 2019).
    """
    _check_arm(difference, factor, key)
    difference, factor = difference.detach(), factor.detach()
    if _config.reference_asked(factor):
        return reference.arm_gradient(difference, factor, key)
    return _registry.chosen(_ARM)(difference, factor, key)


def example_noise(
    key: Tensor, examples: int, gates: int, first: int = 1, stride: int = 1
) -> Tensor:
    """The noise of gates that every example of a batch draws for itself.

    With row = first + stride b and w(j, row) word j % 4 of the Philox4x32-10 block with the key
    seed and the counter (j // 4, row, 0, step), k[b, j] = floor(w(j, row) / 2^9). It stands for the
    number u = (k + 1/2) 2^-23 in (0, 1), as in `sample_gates`, which reads row 0.

    Args:
        key: int64 [2], seed and step.
        examples: B, rows that are drawn.
        gates: G, numbers in each.
        first: row of the first example.
        stride: rows from one example to the next.

    Returns:
        k, int32 [B, G], from 0 to 2^23 - 1, contiguous.

    Raises:
        TypeError, ValueError: a wrong key, negative sizes, rows beyond 32 bits; on a CPU also seed
        or step out of range (on a GPU every number is -1 then).

    Cost on a GPU: 4 bytes and 40 integer instructions per number, which is what limits it; in
    Triton 130, a block for each number instead of one for four.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    _check_key(key)
    if min(examples, gates) < 0:
        raise ValueError(f"expected examples, gates >= 0; got {examples}, {gates}")
    last = first + stride * max(0, examples - 1)
    if not (0 <= first < _ROWS and 0 <= last < _ROWS):
        raise ValueError(f"expected rows from 0 to 2^32 - 1; got {first} to {last}")
    if _config.reference_asked(key):
        return reference.example_noise(key, examples, gates, first, stride)
    return _registry.chosen(_NOISE)(key, examples, gates, first, stride)


def open_lists(z: Tensor, layout: GateLayout) -> OpenLists:
    """Lists the packed features of every port for given gates.

    Kept gates of a group: those with z != 0, filled up with the lowest-numbered closed ones
    (dummies) to min(2, group size). Features of a port arrive packed if the gate maps[0] is kept.
    Packed are those that arrive; in a port with extra gates only the ones whose two gates are both
    open, filled up with the lowest-numbered other arriving ones to min(2, arriving).

    Args:
        z: [G + 1], float32 or float64, the gates; the last entry belongs to "always open".
        layout: groups and ports, see `GateLayout`.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices. RuntimeError on a CPU: a
        layout out of bounds; on a GPU counts[p] is -4 instead.

    Cost on a GPU: 36 bytes per feature in float32 (two gates and z read, index and position
    written), next to no arithmetic, one launch; see `sample_gates` for what limits it.
    """
    if z.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"z: expected float32 or float64; got {z.dtype}")
    if z.dim() != 1 or z.shape[0] < 1:
        raise ValueError(f"z: expected shape [G + 1]; got {list(z.shape)}")
    _check_layout(layout, z.device)
    if _config.reference_asked(z):
        return reference.open_lists(z.detach(), layout)
    return OpenLists(*_registry.chosen(_LISTS)(z.detach(), *layout))


def _check_draw(log_alpha, key, cost, law, beta, gamma, zeta) -> None:
    if log_alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_alpha: expected float32 or float64; got {log_alpha.dtype}")
    if log_alpha.dim() != 1:
        raise ValueError(f"log_alpha: expected 1 dimension; got shape {list(log_alpha.shape)}")
    if cost.dtype != log_alpha.dtype:
        raise TypeError(f"cost: expected log_alpha's dtype {log_alpha.dtype}; got {cost.dtype}")
    if cost.shape != log_alpha.shape:
        raise ValueError(
            f"cost: expected shape {list(log_alpha.shape)} as log_alpha; got {list(cost.shape)}"
        )
    if cost.requires_grad:
        raise ValueError("cost: expected no gradient (requires_grad=False); got True")
    _check_key(key)
    if key.device != log_alpha.device or cost.device != log_alpha.device:
        raise ValueError(
            f"expected log_alpha, key and cost on one device; got {log_alpha.device}, "
            f"{key.device}, {cost.device}"
        )
    if law not in _LAW_NUMBER:
        raise ValueError(f"law: expected one of {', '.join(LAWS)}; got {law!r}")
    if not (beta > 0 and gamma < 0 and zeta > 1):
        raise ValueError(f"expected beta > 0, gamma < 0, zeta > 1; got {beta}, {gamma}, {zeta}")


def _check_key(key) -> None:
    if key.dtype != torch.int64:
        raise TypeError(f"key: expected int64; got {key.dtype}")
    if key.shape != (2,):
        raise ValueError(f"key: expected shape [2] (seed, step); got {list(key.shape)}")


def _check_arm(difference, factor, key) -> None:
    if factor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"factor: expected float32 or float64; got {factor.dtype}")
    if factor.dim() != 1:
        raise ValueError(f"factor: expected 1 dimension; got shape {list(factor.shape)}")
    if difference.dtype != factor.dtype:
        raise TypeError(f"difference: expected {factor.dtype} as factor; got {difference.dtype}")
    if difference.dim() != 0:
        raise ValueError(f"difference: expected a scalar; got shape {list(difference.shape)}")
    _check_key(key)
    if not difference.device == factor.device == key.device:
        raise ValueError(
            f"expected difference, factor and key on one device; got {difference.device}, "
            f"{factor.device}, {key.device}"
        )


def _check_layout(layout: GateLayout, device: torch.device) -> None:
    group_offsets, maps, port_offsets = layout
    _check_index("group_offsets", group_offsets, 1, device)
    _check_index("maps", maps, 2, device)
    _check_index("port_offsets", port_offsets, 1, device)
    if maps.shape[0] != 2:
        raise ValueError(f"layout.maps: expected shape [2, F]; got {list(maps.shape)}")
    if group_offsets.shape[0] < 1 or port_offsets.shape[0] < 1:
        raise ValueError("layout: expected offsets that start with 0; got an empty tensor")


def _check_index(name: str, tensor: Tensor, dims: int, device: torch.device) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"layout.{name}: expected int64; got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"layout.{name}: expected device {device}; got {tensor.device}")
    if tensor.dim() != dims:
        raise ValueError(f"layout.{name}: expected {dims} dims; got {list(tensor.shape)}")
