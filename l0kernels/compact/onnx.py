# SPDX-License-Identifier: Apache-2.0
"""ONNX export, checked with onnxruntime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from l0kernels._files import write_whole
from l0kernels.compact.inputs import check_inputs, check_plain, outputs_of
from l0kernels.convert.check import worst_difference
from l0kernels.convert.tensors import Inputs

# Rounding in fp32 gives 1e-7 to 1e-5 in networks of a hundred layers, more with other convolution
# algorithms; a wrong operator gives far more than 1e-3.
TOLERANCE = 1e-4


def export_onnx(small: nn.Module, example_inputs: Inputs, path: str | Path) -> float:
    """Export a compact model to ONNX and run it with onnxruntime before the file is written.

    The model is exported in eval mode on the CPU. Tensors that are as long as the first one hold
    the batch in their first dimension: it is dynamic in the graph if the model runs with the batch
    doubled, and the doubled batch is checked too. The weights are in the file, which can therefore
    not be larger than 2 GB.

    Args:
        small: a model from :func:`compact` in fp32; left as it is.
        example_inputs: arguments of the forward, a tuple (positional) or a mapping (keywords).
        path: the file, written whole or not at all.

    Returns:
        The largest difference between the outputs of PyTorch and onnxruntime, relative to the
        largest finite element of the output; at most 1e-4, which is fp32 rounding. Equal values
        that are not finite (masked logits) are no difference.

    Raises:
        TypeError: ``small`` is not a module, has floating tensors of another dtype than fp32, or
            ``example_inputs`` is neither tuple nor mapping.
        ValueError: the model still has gates, or its forward fails with ``example_inputs``.
        ImportError: onnx, onnxscript or onnxruntime is missing.
        RuntimeError: the outputs differ by more, or in number or shape.
    """
    check_inputs("export_onnx", small, example_inputs)
    check_plain("export_onnx", small)
    dtypes = {t.dtype for t in small.state_dict().values() if isinstance(t, Tensor)}
    odd = sorted(str(d) for d in dtypes if d.is_floating_point and d != torch.float32)
    if odd:
        raise TypeError(f"export_onnx: expected floating tensors in torch.float32, got {odd}")
    runtime = _runtime()
    model = copy.deepcopy(small).cpu().eval()
    inputs = tree_map_only(Tensor, lambda t: t.detach().cpu(), example_inputs)
    cases = [(inputs, _run_torch(model, inputs))]
    doubled = _doubled(model, inputs)
    content = _export(model, inputs if doubled is None else doubled[0], doubled is not None)
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    if doubled is not None and _is_dynamic(session):
        cases.append(doubled)
    errors = [_difference(expected, _run_session(session, case)) for case, expected in cases]
    error = max(errors)
    if error > TOLERANCE:
        raise RuntimeError(
            f"export_onnx: expected outputs of onnxruntime and PyTorch to agree to "
            f"{TOLERANCE:.0e}, got {error:.1e}"
        )
    write_whole(Path(path), lambda file: file.write(content))
    return error


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401  the exporter needs both
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs a package ({error}): pip install 'l0kernels[export]'"
        ) from error
    return onnxruntime


@torch.no_grad()
def _run_torch(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    try:
        return outputs_of(model, tree_map_only(Tensor, torch.clone, inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"example_inputs: the model's forward fails with them: {error}") from error


def _doubled(model: nn.Module, inputs: Inputs) -> tuple[Inputs, list[Tensor]] | None:
    """Inputs and outputs for a batch of twice the size, or None where the model takes no other."""
    wide = _map_batch(inputs, lambda t: torch.cat((t, t)), lambda leaf: leaf)
    try:
        return wide, _run_torch(model, wide)
    except ValueError:
        return None


def _map_batch(inputs: Inputs, of_batch: Callable[[Tensor], Any], of_rest: Any) -> Any:
    """Map the tensors whose first dimension is the batch, and the other leaves."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    batch = tensors[0].shape[0] if tensors else -1

    def apply(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
        return of_batch(leaf) if is_batch else of_rest(leaf)

    return tree_map(apply, inputs)


def _export(model: nn.Module, inputs: Inputs, dynamic: bool) -> bytes:
    program = torch.onnx.export(
        model,
        () if isinstance(inputs, Mapping) else inputs,
        kwargs=dict(inputs) if isinstance(inputs, Mapping) else None,
        dynamic_shapes=_map_batch(inputs, lambda t: {0: Dim.AUTO}, lambda leaf: None)
        if dynamic
        else None,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def _is_dynamic(session: Any) -> bool:
    return any(isinstance(size, str) for i in session.get_inputs() for size in i.shape)


def _run_session(session: Any, inputs: Inputs) -> list[Tensor]:
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(tensors):
        raise RuntimeError(
            f"export_onnx: expected {len(tensors)} inputs in the exported graph, got {names}"
        )
    feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _difference(expected: list[Tensor], got: list[Tensor]) -> float:
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (expected, got)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"export_onnx: expected outputs of shapes {shapes[0]}, got {shapes[1]}")
    return worst_difference(_named(expected), _named(got))[0]


def _named(outputs: list[Tensor]) -> dict[str, Tensor]:
    return {f"output {i}": t for i, t in enumerate(outputs)}
