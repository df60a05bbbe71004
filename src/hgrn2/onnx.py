"""Export to ONNX beyond what `torch.onnx.export` does by itself.

Models and operators of this package export with plain `torch.onnx.export(..., dynamo=True)`: scans then are matrix
products and one loop over chunks, which every runtime has. `export` here adds two things: ONNX's own operator for the
recurrence, and programs that `torch.export` made.
"""

from __future__ import annotations

from typing import Any

import torch

from hgrn2.errors import UserError
from hgrn2.ops.export import LINEAR_ATTENTION, STANDARD, decompose, use_linear_attention

# the version of the standard that is the first with LinearAttention, and the last that the exporter converts to
FIRST_OPSET, CONVERTED_OPSET = 27, 25


def export(
    model: Any,
    args: tuple[Any, ...] = (),
    f: Any = None,
    *,
    linear_attention: str | None = None,
    opset_version: int | None = None,
    **options: Any,
) -> Any:
    """Export a model to ONNX, as `torch.onnx.export(..., dynamo=True)` does.

    Args:
        model: a module, or a `torch.export.ExportedProgram`.
        args: example inputs.
        f: the file to write; None to return the program only.
        linear_attention: None writes scans in ordinary operations, which run anywhere. "com.microsoft" writes ONNX
            Runtime's operator LinearAttention, the fastest there, and "ai.onnx" that of the standard's opset 27. Both
            take float32 models.
        opset_version: of the standard; by default the exporter's, and 27 for "ai.onnx".
        **options: see `torch.onnx.export`.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        UserError: options that do not fit together.
    """
    if linear_attention is not None and linear_attention not in LINEAR_ATTENTION:
        names = ", ".join(map(repr, LINEAR_ATTENTION))
        raise UserError(f"linear_attention is {linear_attention!r}; wanted {names}, or None for ordinary operations")
    if options.pop("dynamo", True) is not True:
        raise UserError("dynamo is False, but the exporter that traces TorchScript knows no loops; leave it out")
    is_standard = linear_attention == STANDARD
    if is_standard and opset_version not in (None, FIRST_OPSET):
        raise UserError(f"opset_version is {opset_version}; LinearAttention came with {FIRST_OPSET}, leave it out")
    with use_linear_attention(linear_attention):
        if isinstance(model, torch.export.ExportedProgram):
            model = decompose(model)
        if not is_standard:
            return torch.onnx.export(model, args, f, opset_version=opset_version, dynamo=True, **options)
        external_data = options.pop("external_data", True)
        program: Any = torch.onnx.export(model, args, None, opset_version=CONVERTED_OPSET, dynamo=True, **options)
    # the exporter converts no further; since then the standard only gained operators, and types for Range
    for graph in (program.model, *program.model.functions.values()):
        graph.opset_imports[""] = FIRST_OPSET
    if f is not None:
        program.save(f, external_data=external_data)
    return program
