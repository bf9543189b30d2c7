"""Opsets: raised when the operators of a method need it, and only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.errors import tool

if TYPE_CHECKING:
    import onnx_ir as ir


def at_least(model: ir.Model, opset: int) -> ir.Model:
    """The model with at least this opset of the standard operators; the same object when it has it already."""
    found = model.graph.opset_imports.get("")
    if found is None or found >= opset:
        return model
    import onnx
    import onnx_ir as ir

    with tool(f"raising the opset from {found} to {opset}", hint=f"export the model again with opset {opset} or later"):
        return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), opset))
