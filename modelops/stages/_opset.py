"""Another version of ONNX's operators: onnx's own converter, and repairs of what it is known to get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import StageFailed, UsageError, tool

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Since this version the slope of PRelu is broadcast from the right; before, it lay along the channels.
_PRELU_BROADCASTS = 7
# The converter takes one message, which can't hold more than 2 GB: larger models go there without their large weights.
_LARGE = 1 << 30
_ASIDE = 1 << 16


def convert(source: str, target: str, opset: int) -> dict[str, Any]:
    """The worker's side: write the model in another version of the default domain; what was repaired, in words."""
    from modelops.graphs import files

    aside: dict[str, ir.TensorProtocol] = {}
    if files.size_of(Path(source)) > _LARGE:
        proto, aside = _without_large_weights(Path(source))
    else:
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
        if not aside:
            onnx.save(converted, target)
    if aside:
        files.save(_with_weights(converted, aside), Path(target))
    return {"notes": notes, "before": before}


def _without_large_weights(source: Path) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model with its large weights as further inputs, and these weights by name, which stay on disk.

    Small ones are read into the message: a reference to a file means nothing to who gets the message alone.
    """
    import onnx_ir as ir

    from modelops.graphs import files

    model = files.load(source)
    graph, aside = model.graph, {}
    given = {value.name for value in graph.inputs}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _ASIDE and name not in given:
            aside[name] = tensor
            del graph.initializers[name]
            value.type, value.shape, value.const_value = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape), None
            graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=name)
    return ir.to_proto(model), aside


def _with_weights(proto: onnx.ModelProto, aside: dict[str, ir.TensorProtocol]) -> ir.Model:
    """The converted model, with the weights that were set aside in the place of inputs."""
    import onnx_ir as ir

    model = ir.from_proto(proto)
    for value in [value for value in model.graph.inputs if value.name in aside]:
        model.graph.inputs.remove(value)
        value.const_value = aside[str(value.name)]
        model.graph.register_initializer(value)
    return model


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
