# SPDX-License-Identifier: Apache-2.0
"""Rebuild a gated model at its open widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

from l0kernels._config import use_impl
from l0kernels.compact.constants import Fold, find_folds, fold_columns, watching_constants
from l0kernels.compact.inputs import check_inputs, outputs_of
from l0kernels.convert.check import worst_difference
from l0kernels.convert.probe import NoDropout
from l0kernels.convert.randomness import same_randomness
from l0kernels.convert.swap import REFERENCES, can_be_plain, uninstall
from l0kernels.convert.tensors import InDouble, Inputs, to_double
from l0kernels.functional import GateLayout, open_lists
from l0kernels.gates.base import Gates
from l0kernels.gates.draw import Draw
from l0kernels.nn import GatedLayer
from l0kernels.ops.pack_weight.reference import is_channels_last
from l0kernels.training import gates_of, root_of

TOLERANCE = 1e-9
LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}


def compact(net: nn.Module, example_inputs: Inputs) -> nn.Module:
    """A new, plain model at the open widths of the deterministic (eval) gates.

    Every gated layer becomes its plain class: rows of closed units are dropped, gates are folded
    into the columns that read them, normalisations and other passages are cut alike. A unit is
    kept only if some layer reads it with a gate other than zero. Columns stay, as zeros, where
    dropping them would take a gather of activations: features that only a gate without a producer
    closes, such as network inputs, or some positions of a unit that stays. No width falls below
    min(2, width), as in packed runs: where fewer units are open, zeroed ones fill up. Before a norm
    closed units are constants: for each layer that reads some that are not 0, one of them stays,
    with a filter that adds what all of them add.

    The new model is checked before it is returned: fp64 copies of the masked network and of the
    compact one agree in every output to 1e-9 of its largest element, in eval mode; places that
    are not finite (masked logits) are the same.

    Args:
        net: a model with gates anywhere inside; left as it is.
        example_inputs: arguments of the forward, a tuple (positional) or a mapping (keywords).

    Returns:
        A copy of the whole model, without gates: same module names, dtypes, device, memory
        formats, modes, hooks and ``requires_grad``. It shares no memory with ``net``. Only DDP,
        ``DataParallel``, ``torch.compile`` and ``AveragedModel`` around it are taken off.

    Raises:
        TypeError: ``net`` is not a module, or ``example_inputs`` neither tuple nor mapping.
        ValueError: the model has no gates or several sets, cannot be copied, has gated layers of
            a class that is not the package's own, NaN gates, a forward that fails with
            ``example_inputs``, or padding between a norm and a layer that makes constants others
            at the border.
        RuntimeError: the compact model fails or differs.
    """
    check_inputs("compact", net, example_inputs)
    gates = gates_of(net)
    whole = _inside_wrappers(net)
    autocast = torch.autocast(gates.log_alpha.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        values = _eval_gates(gates)
        constants = _verify(_copy(whole).double(), values.double(), example_inputs)
        small = _copy(whole)
        shrink(small, values, constants)
    return small


def _inside_wrappers(net: nn.Module) -> nn.Module:
    """The model without what training puts around it and inference does not need."""
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    while True:
        if isinstance(net, (*parallel, AveragedModel)):
            net = net.module
        elif isinstance(inner := net._modules.get("_orig_mod"), nn.Module):  # torch.compile
            net = inner
        else:
            return net


def _eval_gates(gates: Gates) -> Tensor:
    values = gates.deterministic()
    if bool(values.isnan().any()):
        raise ValueError(
            f"compact: expected gates without NaN, got {int(values.isnan().sum())} of {gates.count}"
        )
    return values


def _copy(whole: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(whole)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"compact: the model cannot be copied: {error}") from error


def shrink(whole: nn.Module, values: Tensor, constants: Mapping[str, Tensor] | None = None) -> None:
    """Cut a model with gates to given gate values and make it plain, in place.

    Args:
        whole: the module that the gates are attached to, or one around it.
        values: gate values, shape [gates].
        constants: what layers read of closed units, see `watching_constants`; only models with
            gates before a norm need it.

    Raises:
        ValueError: a layer has other gates, is of a class that cannot be made plain, or reads
            closed units that are not constants.
    """
    gates = gates_of(whole)
    layers = _gated_layers(whole, gates)
    z = torch.cat((values, values.new_ones(1)))
    folds = find_folds(whole, gates, z, constants or {})
    draw = _draw_of_kept(gates, layers, values, folds)
    for layer in layers:
        _cut(layer, draw, folds.get(layer))
    uninstall(root_of(whole, gates), gates)
    _forget(whole, gates)


def _gated_layers(whole: nn.Module, gates: Gates) -> list[GatedLayer]:
    layers = [m for m in whole.modules() if isinstance(m, GatedLayer)]
    strange = sorted({type(m).__name__ for m in layers if not can_be_plain(m)})
    if strange:
        raise ValueError(f"compact: expected gated layers of l0kernels.nn, got {strange}")
    connected = [layer for layer in layers if layer.gates is not None]
    if any(layer.gates is not gates for layer in connected):
        raise ValueError("compact: expected one set of gates in the model, got several")
    return connected


def _draw_of_kept(
    gates: Gates, layers: list[GatedLayer], values: Tensor, folds: Mapping[GatedLayer, Fold]
) -> Draw:
    """A draw that lists, for every port, the features that the compact model has.

    They are those that arrive at a port: gates without a producer close columns, not features.
    Units that stand for closed ones are among them.
    """
    z = torch.cat((values, values.new_ones(1)))
    z = torch.where(_is_unused(gates, layers, z), 0.0, z)
    group_offsets, maps, port_offsets = gates.layout
    born = torch.stack((maps[0], torch.full_like(maps[1], gates.count)))
    layout = GateLayout(group_offsets, born, port_offsets)
    places = gates.port_starts, [False] * len(gates.port_maps)
    kept = z.clone()
    for layer, fold in folds.items():
        kept[gates.port_maps[layer.in_port][0, fold.feature]] = 1.0
    draw = Draw(z, open_lists(kept, layout), *places, False, gates.log_alpha._version)
    draw.masks = gates.masks_of(values)
    return draw


def _is_unused(gates: Gates, layers: list[GatedLayer], z: Tensor) -> Tensor:
    """Producers' gates whose unit is read, but nowhere with a scale other than zero."""
    read, used = torch.zeros_like(z, dtype=torch.bool), torch.zeros_like(z, dtype=torch.bool)
    for layer in layers:
        if layer.in_port >= 0:
            made, extra = gates.port_maps[layer.in_port]
            read[made] = True
            used[made[z[made] * z[extra] != 0]] = True
    unused = read & ~used
    unused[gates.count] = False
    return unused


def _cut(layer: GatedLayer, draw: Draw, fold: Fold | None) -> None:
    """Replace parameters and buffers by the packed ones, and set the widths."""
    inputs, outputs = layer._in_width(), layer._out_width()
    if layer.in_port >= 0:
        inputs = draw.index[layer.in_port].numel()
    if layer.out_port >= 0:
        outputs = draw.index[layer.out_port].numel()
    if layer.depthwise:
        inputs = outputs
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        _cut_statistics(layer, draw)
    if layer.weight is not None:
        weight, bias = layer.packed_parameters(draw)
        if layer.reads_constants:
            weight = fold_columns(layer, weight, draw, fold)
        for name, packed in (("weight", weight), ("bias", bias)):
            old = layer._parameters.get(name)
            if old is not None and packed is not old:
                assert packed is not None
                packed = packed.contiguous(memory_format=LAYOUTS[is_channels_last(old)])
                setattr(layer, name, nn.Parameter(packed, requires_grad=old.requires_grad))
    layer.resize(inputs, outputs)


def _cut_statistics(norm: GatedLayer, draw: Draw) -> None:
    # Mean 0 and variance 1 let the zeros of units that only fill up pass as zeros; before a norm
    # nobody reads these, and the others need their own.
    index, is_open = draw.index[norm.out_port], norm.open_rows(draw) | norm.makes_constants
    for name, neutral in (("running_mean", 0.0), ("running_var", 1.0)):
        full = norm._buffers[name]
        if full is not None:
            norm._buffers[name] = torch.where(is_open, full.index_select(0, index), neutral)


def _forget(whole: nn.Module, gates: Gates) -> None:
    """Make layers plain that never had gates, and replace gates that have a second place."""
    for module in whole.modules():
        if isinstance(module, GatedLayer):
            module.__class__ = module.plain_class  # pyright: ignore[reportAttributeAccessIssue]
            for name in REFERENCES:
                module.__dict__.pop(name, None)
        for name, child in module._modules.items():
            if child is gates:
                module._modules[name] = nn.Identity()


def _verify(whole: nn.Module, values: Tensor, example_inputs: Inputs) -> dict[str, Tensor]:
    """Compare masked and compact outputs on a copy in fp64, which is used up.

    Returns:
        What layers read of closed units, see `watching_constants`.
    """
    inputs = to_double(example_inputs)
    whole.eval()
    gates = gates_of(whole)
    _make_finite(whole)
    try:
        with use_impl("reference"), gates.using(values), watching_constants(whole) as constants:
            masked = _outputs(whole, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"example_inputs: the model's forward fails with them: {error}") from error
    shrink(whole, values, constants)
    try:
        small = _outputs(whole, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise RuntimeError(f"compact: the compact model's forward fails: {error}") from error
    error, where = worst_difference(masked, small)
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"compact: expected masked and compact outputs to agree to {TOLERANCE:.0e}, "
            f"got {error:.1e} in {where}"
        )
    return constants


def _make_finite(whole: nn.Module) -> None:
    """Replace NaN and Inf in gated layers: a mask would spread those of closed units."""
    for layer in whole.modules():
        if isinstance(layer, GatedLayer):
            for tensor in (*layer._parameters.values(), *layer._buffers.values()):
                if tensor is not None:
                    tensor.nan_to_num_(0.0, 0.0, 0.0)


def _outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    devices = {p.device for p in model.parameters()}
    with same_randomness(devices), NoDropout(), InDouble():
        # Clones: the forward may change its inputs in place.
        found = outputs_of(model, tree_map_only(Tensor, torch.clone, inputs))
    return {f"output {i}": _comparable(t) for i, t in enumerate(found)}


def _comparable(t: Tensor) -> Tensor:
    # Complex numbers as pairs: both parts count. A clone, for the model may keep what it returns.
    return torch.view_as_real(t.resolve_conj()).clone() if t.is_complex() else t.clone()
