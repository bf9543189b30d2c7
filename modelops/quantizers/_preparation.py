"""Makes a graph ready for quantization: BatchNormalization inside Conv, constants folded, every tensor's type known.

onnxruntime's own optimizer does the first two at its basic level, which adds no operators of its own. Without it only
half of the convolutions of a ResNet-18 ran as integer kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.errors import tool
from modelops.graphs.files import size_of
from modelops.quantizers._scope import name_nodes

if TYPE_CHECKING:
    import onnx

# Protobuf ends at 2 GiB: beyond this, weights go to a file beside the graph.
_EXTERNAL_ABOVE = 1 << 30
# DequantizeLinear takes an axis, for scales by channel, since opset 13.
_OPSET = 13


def prepared(source: Path, scratch: Path) -> Path:
    """A model below ``scratch``: optimized where that is safe, every node named, every tensor's type in value_info."""
    import onnx

    place = scratch / "prepared.onnx"
    model = _optimized(source, place)
    model = _at_least_opset(model)
    name_nodes(model.graph.node)
    typed = scratch / "typed.onnx"
    with tool("onnx shape inference"):
        save(model, typed)
        onnx.shape_inference.infer_shapes_path(str(typed), str(typed), data_prop=True)
    return typed


def _optimized(source: Path, place: Path) -> onnx.ModelProto:
    import onnx

    before = onnx.load(str(source), load_external_data=False)
    beside = size_of(source) > _EXTERNAL_ABOVE or any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in before.graph.initializer
    )
    model = _optimize(source, place, [], beside=beside)
    if _count(model, "Reshape") > _count(before, "Reshape"):
        # MatMul and Add of three dimensions have become Gemm between two Reshapes each: more nodes, and slower.
        model = _optimize(source, place, ["MatMulAddFusion"], beside=beside)
    return model


def _optimize(source: Path, place: Path, without: Sequence[str], *, beside: bool) -> onnx.ModelProto:
    """``beside`` writes weights to a file of their own: else those that lay in one would still be looked for there."""
    import onnx

    from modelops.graphs import runs

    config = {"optimization.disable_specified_optimizers": ";".join(without)} if without else {}
    if beside:
        config["session.optimized_model_external_initializers_file_name"] = f"{place.name}.data"
    place.unlink(missing_ok=True)
    runs.session(source, optimization="basic", config=config, optimized=place).close()
    return onnx.load(str(place))


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model, with its weights beside it where one file could not hold them."""
    import onnx

    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    if beside := weights > _EXTERNAL_ABOVE:
        own = onnx.ModelProto()
        own.CopyFrom(model)
        model = own  # onnx leaves mere references in what it writes so, and the caller goes on with his weights
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=beside,
        location=f"{path.name}.data",
        size_threshold=1024,
    )


def _at_least_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    found = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), _OPSET)
    if found >= _OPSET:
        return model
    with tool(f"raising the opset from {found} to {_OPSET}", hint=f"export the model with opset {_OPSET} or later"):
        return onnx.version_converter.convert_version(model, _OPSET)


def _count(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)
