# SPDX-License-Identifier: Apache-2.0
"""Compact models on disk: tensors and a JSON manifest of the widths."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0kernels._files import write_whole
from l0kernels._version import __version__
from l0kernels.compact.inputs import check_plain
from l0kernels.compact.shrink import LAYOUTS
from l0kernels.nn import GatedLayer, gated_class
from l0kernels.ops.pack_weight.reference import is_channels_last

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def save_compact(small: nn.Module, folder: str | Path, format: str = "safetensors") -> None:
    """Save a compact model, so that :func:`load_compact` can rebuild it without pickle.

    ``manifest.json`` names the widths of every layer that can be cut, shape and dtype of every
    tensor, names that share one tensor, and the tensor file with its hash: a pair of files that do
    not belong together is refused by :func:`load_compact`. The tensor file is named by its hash,
    and the manifest is written after it: at any time the folder holds the earlier save or the new
    one. At last the tensor file of the earlier manifest is removed.

    Args:
        small: a model from :func:`compact`, trained on or not.
        folder: made if missing; an earlier save in it is replaced, other files stay.
        format: ``"safetensors"`` (``model-<hash>.safetensors``) or ``"state_dict"``
            (``model-<hash>.pt``, read with ``weights_only=True``).

    Raises:
        TypeError: ``small`` is not a module, or its state_dict holds other things than its
            parameters and buffers, such as extra state.
        ValueError: another format, or a model that still has gates.
        ImportError: ``"safetensors"`` without that package.
    """
    check_plain("save_compact", small)
    if format not in _FORMATS:
        raise ValueError(f"save_compact: expected format among {list(_FORMATS)}, got {format!r}")
    suffix, dump, _ = _FORMATS[format]
    state = _own_state(small)
    tied = _tied(state)
    own = {name: t.detach() for name, t in state.items() if name not in tied}
    # Contiguous copies: a view would bring all of its storage along.
    content = dump(
        {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in own.items()}
    )
    digest = hashlib.sha256(content).hexdigest()
    manifest = {
        "format_version": FORMAT_VERSION,
        "l0kernels": __version__,
        "file": f"model-{digest[:12]}{suffix}",
        "sha256": digest,
        "modules": _widths(small),
        "tensors": {name: _describe(t) for name, t in own.items()},
        "tied": tied,
    }
    _write(Path(folder), content, manifest)


def load_compact(model: nn.Module, folder: str | Path) -> nn.Module:
    """Cut a fresh instance of the original architecture to a saved compact model, in place.

    Everything is checked before the model changes. Parameters stay the same objects, on the
    model's device, in its dtype, with its ``requires_grad``.

    Args:
        model: built as the model that was converted, at its full widths, without gates.
        folder: where :func:`save_compact` wrote.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged, of another version or do not belong together, or a
            model of another architecture; it names the first thing that does not fit.
        ImportError: a safetensors file without that package.
    """
    check_plain("load_compact", model)
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    tensors = _read_tensors(folder, manifest)
    modules = _check_modules(model, manifest["modules"])
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    _check_state(state, tensors, _new_shapes(model, modules))
    _check_ties(state, manifest["tied"])
    new = {}
    with torch.inference_mode(False):  # else they could not train
        for name, target in state.items():
            layout = LAYOUTS[_entry(manifest, name)["channels_last"]]
            new[name] = tensors[name].to(target, copy=True, memory_format=layout)
    for name, (inputs, outputs) in modules.items():
        module = model.get_submodule(name)
        _gated(module).resize(module, inputs, outputs)  # pyright: ignore[reportArgumentType]
    for name, tensor in new.items():
        # .data rather than a new parameter: tied names and an optimizer's references stay.
        state[name].data = tensor
    return model


def _own_state(small: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = small.state_dict(keep_vars=True)
    own = {id(t) for t in (*small.parameters(), *small.buffers())}
    strange = [name for name, value in state.items() if id(value) not in own]
    if strange:
        raise TypeError(
            f"save_compact: expected parameters and buffers only in the state_dict, got {strange}"
        )
    return state


def _write(folder: Path, content: bytes, manifest: dict[str, Any]) -> None:
    """Write the tensor file, then the manifest, then remove the tensor file of the old one."""
    text = json.dumps(manifest, indent=1).encode()
    folder.mkdir(parents=True, exist_ok=True)
    new, old = manifest["file"], _earlier_file(folder / MANIFEST)
    write_whole(folder / new, lambda file: file.write(content))
    try:
        write_whole(folder / MANIFEST, lambda file: file.write(text))
    except BaseException:
        if new != old:
            (folder / new).unlink(missing_ok=True)
        raise
    if old is not None and old != new:
        (folder / old).unlink(missing_ok=True)


def _earlier_file(manifest: Path) -> str | None:
    """The tensor file that a manifest names, or None if there is none that can be trusted."""
    try:
        return _read_manifest(manifest)["file"]
    except (OSError, ValueError):
        return None


def _dump_state_dict(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _parse_state_dict(content: bytes) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "the format 'safetensors' needs a package: pip install 'l0kernels[export]', or save "
            "with format='state_dict'"
        ) from error
    return safetensors.torch


def _dump_safetensors(tensors: dict[str, Tensor]) -> bytes:
    return _safetensors().save(tensors, {"format": "pt"})


def _parse_safetensors(content: bytes) -> dict[str, Tensor]:
    return _safetensors().load(content)


_Dump = Callable[[dict[str, Tensor]], bytes]
_Parse = Callable[[bytes], dict[str, Tensor]]
_FORMATS: dict[str, tuple[str, _Dump, _Parse]] = {
    "safetensors": (".safetensors", _dump_safetensors, _parse_safetensors),
    "state_dict": (".pt", _dump_state_dict, _parse_state_dict),
}
_PARSERS = {suffix: parse for suffix, _, parse in _FORMATS.values()}
_FILE_NAME = re.compile(r"model-[0-9a-f]{12}\.(safetensors|pt)")


def _tied(state: dict[str, Tensor]) -> dict[str, str]:
    """Further names of a tensor -> its first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in state.items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "channels_last": is_channels_last(tensor),
    }


def _gated(module: nn.Module) -> type[GatedLayer]:
    found = gated_class(type(module))
    assert found is not None
    return found


def _view(module: nn.Module) -> GatedLayer:
    """The same layer seen through its gated class, which knows widths and layout."""
    view = copy.copy(module)
    view.__class__ = _gated(module)
    assert isinstance(view, GatedLayer)
    return view


def _widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    widths = {}
    for name, module in model.named_modules():
        if gated_class(type(module)) is not None:
            view = _view(module)
            widths[name] = {
                "class": type(module).__name__,
                "inputs": view._in_width(),
                "outputs": view._out_width(),
            }
    return widths


_KINDS: dict[str, type] = {
    "file": str,
    "sha256": str,
    "modules": dict,
    "tensors": dict,
    "tied": dict,
}
_MODULE_KINDS: dict[str, type] = {"class": str, "inputs": int, "outputs": int}
_TENSOR_KINDS: dict[str, type] = {"shape": list, "dtype": str, "channels_last": bool}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")
    _check_kinds(str(path), manifest, _KINDS)
    for name, entry in manifest["modules"].items():
        _check_kinds(f"{path}: module {name!r}", entry, _MODULE_KINDS)
    for name, entry in manifest["tensors"].items():
        _check_kinds(f"{path}: tensor {name!r}", entry, _TENSOR_KINDS)
        if entry["channels_last"] and len(entry["shape"]) != 4:
            raise ValueError(
                f"{path}: tensor {name!r}: expected 4 dimensions for channels_last, "
                f"got shape {entry['shape']}"
            )
    for name, first in manifest["tied"].items():
        if not isinstance(first, str) or first not in manifest["tensors"]:
            raise ValueError(f"{path}: expected {name!r} tied to a tensor, got {first!r}")
    if not _FILE_NAME.fullmatch(manifest["file"]):
        raise ValueError(
            f"{path}: expected file as model-<12 hexadecimal digits> with a suffix among "
            f"{list(_PARSERS)}, got {manifest['file']!r}"
        )
    return manifest


def _check_kinds(where: str, entry: Any, kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind:
            raise ValueError(f"{where}: expected {key} of type {kind.__name__}, got {value!r}")


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / manifest["file"]
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest["sha256"]:
        raise ValueError(
            f"{path}: expected the file with sha256 {manifest['sha256']}, got {digest}: it is "
            f"damaged or of another save"
        )
    tensors = _PARSERS[path.suffix](content)
    stored = {name: _signature(_describe(t)) for name, t in tensors.items()}
    listed = {name: _signature(entry) for name, entry in manifest["tensors"].items()}
    for name in sorted(set(stored) | set(listed)):
        if stored.get(name) != listed.get(name):
            raise ValueError(
                f"{path}: tensor {name!r}: expected {listed.get(name)} as in the manifest, "
                f"got {stored.get(name)}"
            )
    return tensors | {name: tensors[first] for name, first in manifest["tied"].items()}


def _signature(entry: dict[str, Any]) -> tuple[Any, Any]:
    return entry["shape"], entry["dtype"]


def _entry(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return manifest["tensors"][manifest["tied"].get(name, name)]


def _check_modules(
    model: nn.Module, listed: dict[str, dict[str, Any]]
) -> dict[str, tuple[int, int]]:
    """New widths of the layers to cut; the model must have every listed one, as wide or wider."""
    modules = dict(model.named_modules())
    widths = {}
    for name, entry in listed.items():
        module = modules.get(name)
        got = "none" if module is None else type(module).__name__
        if got != entry["class"] or module is None or gated_class(type(module)) is None:
            raise ValueError(f"load_compact: module {name!r}: expected {entry['class']}, got {got}")
        view = _view(module)
        full = (view._in_width(), view._out_width())
        new = (entry["inputs"], entry["outputs"])
        if not all(1 <= n <= f for n, f in zip(new, full, strict=True)):
            raise ValueError(
                f"load_compact: module {name!r}: expected widths (inputs, outputs) of at least "
                f"{new} to cut, got {full}"
            )
        if new != full:
            widths[name] = new
    return widths


def _new_shapes(model: nn.Module, widths: dict[str, tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Shapes of all parameters and buffers of the cut layers, by id of the tensor."""
    shapes = {}
    for name, (inputs, outputs) in widths.items():
        view = _view(model.get_submodule(name))
        for tensor in (*view._parameters.values(), *view._buffers.values()):
            if tensor is not None:
                shapes[id(tensor)] = _new_shape(view, tensor, inputs, outputs)
    return shapes


def _new_shape(view: GatedLayer, tensor: Tensor, inputs: int, outputs: int) -> tuple[int, ...]:
    if tensor.dim() < 2:  # a counter, or one entry per feature
        return (outputs,) if tensor.dim() else ()
    _, columns, *kernel = view._out_in(tensor).shape
    columns = columns if view.depthwise else inputs
    new = torch.empty(outputs, columns, *kernel, device="meta")
    return tuple(view._out_in(new).shape)


def _check_state(
    state: dict[str, Tensor], tensors: dict[str, Tensor], shapes: dict[int, tuple[int, ...]]
) -> None:
    if set(state) != set(tensors):
        missing = sorted(set(state) - set(tensors))[:3]
        unknown = sorted(set(tensors) - set(state))[:3]
        raise ValueError(
            f"load_compact: expected a model with the saved tensors, got one with {missing} "
            f"besides and without {unknown}"
        )
    for name, target in state.items():
        expected = shapes.get(id(target), tuple(target.shape))
        if tuple(tensors[name].shape) != expected:
            raise ValueError(
                f"load_compact: tensor {name!r}: expected shape {expected} for this model, "
                f"got {tuple(tensors[name].shape)}"
            )


def _check_ties(state: dict[str, Tensor], saved: dict[str, str]) -> None:
    """Names that are one tensor in the model must be one in the file: it can hold but one value."""
    for name, first in _tied(state).items():
        if saved.get(name, name) != saved.get(first, first):
            raise ValueError(
                f"load_compact: expected {name!r} and {first!r}, one tensor in this model, to be "
                f"one in the file, got two"
            )
