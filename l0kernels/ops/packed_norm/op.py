# SPDX-License-Identifier: Apache-2.0
"""`packed_norm`: schemas, fakes, gradient, public function."""

import math

import torch
from torch import Tensor

from l0kernels import _config, _registry
from l0kernels.ops.packed_norm import reference
from l0kernels.ops.packed_norm.reference import is_dummy, layout_of

ACTIVATIONS = ("none", "relu")  # raw operators take the number

_PARAMETER_DTYPES = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=layout_of(x))
    # float64: what float32 loses of a mean far from zero would show in y.
    mean = x.new_empty((x.shape[1],), dtype=torch.float64)
    return y, mean, torch.empty_like(mean, dtype=_compute_dtype(x))


def _empty_gradients(x, weight, bias, need_x, need_w, need_b) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=layout_of(x)) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_w and weight is not None else x.new_empty(0),
        torch.empty_like(bias) if need_b and bias is not None else x.new_empty(0),
    )


def _forward_fake(x, weight, bias, mean, var, index, z, map, training, momentum, eps, activation):
    return _empty_results(x)


def _backward_fake(
    grad, x, weight, bias, mean, rstd, index, z, map, training, activation, need_x, need_w, need_b
):
    return _empty_gradients(x, weight, bias, need_x, need_w, need_b)


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape([1, -1] + [1] * (x.dim() - 2))


def _rows(full: Tensor | None, index: Tensor, x: Tensor, otherwise: float) -> Tensor:
    """The packed entries of a parameter, in the dtype that is computed in."""
    if full is None:
        return torch.full((1,), otherwise, dtype=_compute_dtype(x), device=x.device)
    return full.index_select(0, index).to(_compute_dtype(x))


def _forward_python(x, weight, bias, mean, var, index, z, map, training, momentum, eps, activation):
    running = (mean, var)
    y, mean, rstd = _empty_results(x)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    dummy = is_dummy(x, index, z, map)
    closed = dummy.flatten()
    if training:
        near = x.masked_fill(dummy, 0).mean(_all_but_channels(x), dtype=rstd.dtype)
        shifted = (x.to(rstd.dtype) - _along(near, x)).masked_fill(dummy, 0)
        rest = shifted.mean(_all_but_channels(x), dtype=torch.float64)
        average = near.double() + rest.masked_fill(~rest.isfinite(), 0)
        var = shifted.square().mean(_all_but_channels(x), dtype=torch.float64) - rest.square()
        _update(running, (average, var), index, closed, momentum, x.numel() // x.shape[1])
    else:
        average, var = (t.index_select(0, index).double() for t in running)
    mean.copy_(average.masked_fill(closed, 0))
    rstd.copy_(torch.rsqrt(var + eps).masked_fill(closed, 0))
    value = _normalized(x, weight, bias, mean, rstd, index)
    if activation:
        value = value.relu()
    return y.copy_(value.masked_fill(dummy, 0)), mean, rstd


def _update(running, batch, index, closed, momentum, count) -> None:
    """Moves the running statistics of open features towards the batch's."""
    for full, new, factor in zip(running, batch, (1, count / (count - 1)), strict=True):
        if full is not None:
            old = full.index_select(0, index)
            mixed = ((1 - momentum) * old + momentum * factor * new).to(full.dtype)
            full.index_copy_(0, index, torch.where(closed, old, mixed))


def _near_and_rest(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean in the dtype that is computed in, and what that loses."""
    near = mean.to(_compute_dtype(x))
    rest = mean - near.double()
    return near, rest.masked_fill(~rest.isfinite(), 0)


def _normalized(x, weight, bias, mean, rstd, index) -> Tensor:
    near, rest = _near_and_rest(mean, x)
    alpha = rstd * _rows(weight, index, x, 1.0)
    beta = (_rows(bias, index, x, 0.0) - rest * alpha).to(rstd.dtype)
    return (x.to(rstd.dtype) - _along(near, x)) * _along(alpha, x) + _along(beta, x)


def _backward_python(
    grad, x, weight, bias, mean, rstd, index, z, map, training, activation, need_x, need_w, need_b
):
    grad_x, grad_weight, grad_bias = _empty_gradients(x, weight, bias, need_x, need_w, need_b)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    dummy = is_dummy(x, index, z, map)
    grad = grad.to(rstd.dtype).masked_fill(dummy, 0)
    if activation:
        grad = grad.masked_fill(_normalized(x, weight, bias, mean, rstd, index) <= 0, 0)
    near, rest = _near_and_rest(mean, x)
    shifted = (x.to(rstd.dtype) - _along(near, x)).masked_fill(dummy, 0)
    total = grad.sum(_all_but_channels(x), dtype=torch.float64)
    product = (grad * shifted).sum(_all_but_channels(x), dtype=torch.float64) - rest * total
    for result, sums in ((grad_weight, product * rstd), (grad_bias, total)):
        if result.numel():
            result.zero_().index_copy_(0, index, sums.to(result.dtype))
    if need_x:
        if training:
            count = x.numel() // x.shape[1]
            slope = product / count * rstd * rstd
            same = (total / count - rest * slope).to(rstd.dtype)
            grad = grad - _along(same, x) - shifted * _along(slope.to(rstd.dtype), x)
        alpha = _along(rstd * _rows(weight, index, x, 1.0), x)
        grad_x.copy_((grad * alpha).masked_fill(dummy, 0))
    return grad_x, grad_weight, grad_bias


_registry.add_op("packed_norm")
_FORWARD = _registry.define(
    "packed_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor index, Tensor z, Tensor map, bool training, float momentum, "
    "float eps, int activation) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_forward_fake,
    python=_forward_python,
)
_BACKWARD = _registry.define(
    "packed_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, Tensor index, Tensor z, Tensor map, bool training, int activation, bool need_x, "
    "bool need_weight, bool need_bias) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_backward_fake,
    python=_backward_python,
)


class _PackedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, index, z, feature_map, *how):
        y, mean, rstd = _registry.chosen(_FORWARD)(
            x, weight, bias, running_mean, running_var, index, z, feature_map, *how
        )
        # Two numbers per channel besides x; the sign that ReLU saw is computed again.
        ctx.save_for_backward(x, weight, bias, mean, rstd, index, z, feature_map)
        training, _, _, activation = how
        ctx.how = training, activation
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @_registry.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        needs = ctx.needs_input_grad[:3]
        if grad is None:
            return (None,) * 12
        grads = _registry.chosen(_BACKWARD)(grad, *ctx.saved_tensors, *ctx.how, *needs)
        wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
        return (*wanted, *(None,) * 9)


def packed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    index: Tensor,
    z: Tensor,
    feature_map: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Batch normalisation and activation of packed channels, parameters at full shape.

    With f = index[c], channel c of x has m values x_i. In training mode
    mean = sum x_i / m, var = sum (x_i - mean)^2 / m, and in place
    running_mean[f] = (1 - momentum) running_mean[f] + momentum mean,
    running_var[f] = (1 - momentum) running_var[f] + momentum var m / (m - 1);
    else mean = running_mean[f] and var = running_var[f]. With rstd = (var + eps)^-1/2,

        y_i = act((x_i - mean) rstd weight[f] + bias[f]).

    From g = dL/dy times act' the backward pass gives dbias[f] = sum g_i,
    dweight[f] = sum g_i (x_i - mean) rstd, exactly 0 at all closed features, and
    dx_i = rstd weight[f] (g_i - sum g / m - (x_i - mean) rstd dweight[f] / m), in eval mode
    rstd weight[f] g_i. A packed feature with z[feature_map[0, f]] z[feature_map[1, f]] = 0 is a
    dummy: its y and gradients are exactly 0 and its statistics stay, whatever it holds. Sums are
    added in float64 and in a fixed order whatever the number of threads.

    An empty batch gives an empty result and leaves the statistics alone, as in PyTorch.

    Args:
        x: [N, C, *], 2 to 5 dimensions; float64, float32, bfloat16 or float16. Fastest if
            channels_last, contiguous or [N, C].
        weight: [F], or None: ones. weight, bias and statistics have x's dtype, or float32 where
            x has bfloat16 or float16.
        bias: [F], or None: zeros.
        running_mean: [F], or None, then running_var too: the batch's own in training mode.
        running_var: [F] or None.
        index: int64 [C], the feature of every channel of x, distinct.
        z: [G + 1] gates, the last one always open; float64 for float64 x, else float32. No
            gradient: a closed gate leaves channels out, an open one does not scale them.
        feature_map: int64 [2, F], the two gates of each feature.
        training: normalise by the batch's statistics and update the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; above 0, in eval mode 0 will do.
        activation: "none" or "relu".

    Returns:
        y, shape and dtype of x: channels_last if x is 4-D or 5-D with its channels side by side,
        else contiguous. Differentiable in x, weight and bias.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices, eps or activation, one
        running statistic without the other, eval mode without them, one value per channel in
        training mode. RuntimeError: an index out of bounds or twice (on a GPU this is not
        checked: nothing waits for the kernels).

    Cost on a GPU, three launches each way; memory limits them. With m numbers of b bytes, forward
    takes the moments (b m bytes, 4 m FLOP; none in eval mode), what follows for each channel
    (about 100 bytes per channel, a launch is what it costs), and y (2 b m bytes, 4 m FLOP).
    Backward takes the sums (2 b m bytes, 8 m FLOP), what follows, and dx (3 b m bytes, 9 m FLOP).
    [128, 160, 32, 32] in bfloat16, 21.0 M numbers: 42 and 84 MB forward, 84 and 126 MB backward,
    so at least 10 and 20 us, 20 and 29 us on an H200 (4.3 TB/s); its float32 units need 6 us at
    most. Counted, not measured.

    Source: Ioffe and Szegedy, "Batch normalization" (ICML 2015), algorithm 1, with the running
    averages of `torch.nn.functional.batch_norm`.
    """
    parameters = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    _check(x, parameters, index, z, feature_map, training, eps, activation)
    tensors = (x, weight, bias, running_mean, running_var, index, z, feature_map)
    if _config.reference_asked(x):
        return reference.packed_norm(*tensors, training, momentum, eps, activation)
    number = ACTIVATIONS.index(activation)
    return _PackedNorm.apply(*tensors, training, momentum, eps, number)


def _check(x, parameters, index, z, feature_map, training, eps, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation}")
    if x.dtype not in _PARAMETER_DTYPES:
        raise TypeError(f"x: expected a floating dtype; got {x.dtype}")
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x: expected 2 to 5 dimensions; got {x.dim()}")
    _check_gates(x, index, z, feature_map)
    _check_parameters(x, feature_map.shape[1], parameters)
    absent = [name for name in ("running_mean", "running_var") if parameters[name] is None]
    if len(absent) == 1:
        raise ValueError(f"running_mean, running_var: expected both or neither; got no {absent[0]}")
    if absent and not training:
        raise ValueError("running_mean, running_var: expected both in eval mode; got None")
    if eps < 0 or (training and eps == 0):
        raise ValueError(
            f"eps: expected a number {'above' if training else 'of at least'} 0; got {eps:g}"
        )
    if training and math.prod((x.shape[0], *x.shape[2:])) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def _check_gates(x, index, z, feature_map) -> None:
    for name, tensor in (("index", index), ("feature_map", feature_map)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64; got {tensor.dtype}")
        _check_device(name, tensor, x)
    if list(index.shape) != [x.shape[1]]:
        raise ValueError(f"index: expected shape [{x.shape[1]}]; got {list(index.shape)}")
    if feature_map.dim() != 2 or feature_map.shape[0] != 2:
        raise ValueError(f"feature_map: expected shape [2, F]; got {list(feature_map.shape)}")
    if z.dtype != _compute_dtype(x):
        raise TypeError(f"z: expected {_compute_dtype(x)} with {x.dtype} x; got {z.dtype}")
    if z.dim() != 1:
        raise ValueError(f"z: expected shape [G + 1]; got {list(z.shape)}")
    _check_device("z", z, x)


def _check_parameters(x, features: int, parameters: dict[str, Tensor | None]) -> None:
    dtype = None
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.dtype not in _PARAMETER_DTYPES[x.dtype]:
            allowed = " or ".join(map(str, _PARAMETER_DTYPES[x.dtype]))
            raise TypeError(f"{name}: expected {allowed} with {x.dtype} x; got {tensor.dtype}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as the others; got {tensor.dtype}")
        if list(tensor.shape) != [features]:
            raise ValueError(f"{name}: expected shape [{features}]; got {list(tensor.shape)}")
        _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}; got {tensor.device}")
