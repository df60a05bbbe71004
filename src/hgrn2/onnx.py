"""Export to ONNX, with options that `torch.onnx.export` does not have.

Models and operators of this package export with plain `torch.onnx.export(..., dynamo=True)`: scans become matrix
products and one loop over chunks, which every runtime supports. `export` adds ONNX's own operator for the recurrence,
and export of programs made by `torch.export`.
"""

from __future__ import annotations

from typing import Any

import torch

from hgrn2.errors import UserError
from hgrn2.ops.export import LINEAR_ATTENTION, STANDARD, decompose, use_linear_attention

# the first opset with LinearAttention, and the last one that the exporter converts to
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
        opset_version: version of the ONNX standard; the default is the exporter's, and 27 for "ai.onnx".
        **options: further options of `torch.onnx.export`.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        UserError: an option is invalid or contradicts another.
    """
    if linear_attention is not None and linear_attention not in LINEAR_ATTENTION:
        names = ", ".join(map(repr, LINEAR_ATTENTION))
        raise UserError(f"linear_attention is {linear_attention!r}; wanted {names}, or None for ordinary operations")
    if options.pop("dynamo", True) is not True:
        raise UserError("dynamo is False, but the TorchScript exporter has no loops; leave it out", "unsupported")
    is_standard = linear_attention == STANDARD
    if is_standard and opset_version not in (None, FIRST_OPSET):
        raise UserError(
            f"opset_version is {opset_version}; LinearAttention came with {FIRST_OPSET}, leave it out", "contradiction"
        )
    with use_linear_attention(linear_attention):
        if isinstance(model, torch.export.ExportedProgram):
            model = decompose(model)
        if not is_standard:
            return torch.onnx.export(model, args, f, opset_version=opset_version, dynamo=True, **options)
        external_data = options.pop("external_data", True)
        program: Any = torch.onnx.export(model, args, None, opset_version=CONVERTED_OPSET, dynamo=True, **options)
    # the exporter converts no further; later opsets only added operators, and types for Range
    for graph in (program.model, *program.model.functions.values()):
        graph.opset_imports[""] = FIRST_OPSET
    if f is not None:
        program.save(f, external_data=external_data)
    return program
