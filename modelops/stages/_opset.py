"""Another version of ONNX's operators: onnx's own converter, and repairs of what it is known to get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import StageFailed, UsageError, tool

if TYPE_CHECKING:
    import onnx

# Since this version the slope of PRelu is broadcast from the right; before, it lay along the channels.
_PRELU_BROADCASTS = 7


def convert(source: str, target: str, opset: int) -> dict[str, Any]:
    """The worker's side: write the model in another version of the default domain; what was repaired, in words."""
    from modelops.graphs import files

    proto = files.load_proto(Path(source))
    before = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    notes = []
    with tool("onnx", hint="leave --opset out, or choose another version"):
        import onnx
        from onnx import version_converter

        newest = onnx.defs.onnx_opset_version()
        if not 1 <= opset <= newest:
            raise UsageError(f"--opset {opset} does not exist", hint=f"onnx {onnx.__version__} knows 1 to {newest}")
        try:
            converted = version_converter.convert_version(proto, opset)
        except RuntimeError as error:
            raise StageFailed(
                f"onnx can't convert this model from opset {before} to {opset}: {error}", hint="choose another version"
            ) from error
        if before < _PRELU_BROADCASTS <= opset and (count := _spread_slopes(converted)):
            notes.append(f"{count} slopes of PRelu given the shape that opset {_PRELU_BROADCASTS} asks for")
        onnx.save(converted, target)
    return {"notes": notes, "before": before}


def _spread_slopes(model: onnx.ModelProto) -> int:
    """Give slopes that lie along the channels the ones behind that broadcasting needs; how many there were."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    spread = 0
    for node in model.graph.node:
        slope = weights.get(node.input[1]) if node.op_type == "PRelu" else None
        rank = ranks.get(node.input[0], 0) if slope is not None else 0
        if slope is not None and len(slope.dims) == 1 and slope.dims[0] > 1 and rank > 2:
            slope.dims.extend([1] * (rank - 2))
            spread += 1
    for value in model.graph.input:
        if value.name in weights:
            del value.type.tensor_type.shape.dim[:]
            for dim in weights[value.name].dims:
                value.type.tensor_type.shape.dim.add(dim_value=dim)
    return spread
