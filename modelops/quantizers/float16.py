"""Half precision: weights and activations in float16, what would overflow in float32; inputs and outputs are kept.

For GPUs, and for files of half the size; CPUs compute most operators in float32 all the same, and convert in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelops.core.workbench import Done, Workbench
from modelops.errors import tool
from modelops.quantizers._options import Selective
from modelops.quantizers._plan import Facts
from modelops.quantizers._scope import described_nodes, excluded_nodes, nothing_to_quantize, refuse_quantized

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# float16 ends at 65504; a node that came within half of that on some samples may pass it on others.
_MOST = 65504.0 / 2
# What stands for "never" in a mask becomes this: as good as never to a Softmax, and safe to add to.
_NEVER = -3e4


class Float16(Selective):
    """Half precision; nodes that would overflow on the data stay float32."""

    tools = ("onnx", "onnx-ir", "onnxruntime")

    def quantize(self, source: Path, target: Path, workbench: Workbench) -> Done:
        import onnx

        from modelops.graphs import files
        from modelops.quantizers import _qdq
        from modelops.quantizers._preparation import prepared
        from modelops.quantizers._weights import cleaned

        refuse_quantized(source)
        model = onnx.load(str(prepared(source, workbench.scratch)))
        if not any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer):
            raise nothing_to_quantize("the model has no float32 weights")
        clipped = _clip_masks(model)
        writes = {node.name: list(node.output) for node in model.graph.node}
        excluded = excluded_nodes(self.exclude, writes)
        overflowing = _overflowing(model, workbench)
        kept = [node for node in model.graph.node if node.name in excluded | overflowing]
        nodes = len(model.graph.node)
        with tool("onnxruntime's float16 converter", hint="leave the node out with --exclude"):
            from onnxruntime.transformers.float16 import convert_float_to_float16

            converted = convert_float_to_float16(
                model,
                keep_io_types=True,
                disable_shape_infer=True,
                node_block_list=[node.name for node in kept],
            )
        with tool("writing the float16 graph"):
            graph = _qdq.read(converted)
            _join(graph.graph)
            files.save(cleaned(graph), target)
        return Done(
            notes=tuple(_notes(overflowing, clipped, workbench.has_data)),
            details={
                "quantized": {"nodes": nodes - len(kept)},
                "left_float": described_nodes(kept),
                "weights": "float16",
                "overflowing": sorted(overflowing),
                "masks_clipped": clipped,
            },
        )


def _join(graph: ir.Graph) -> None:
    """Let float32 pass between nodes that stay float32: the converter halves it in between, where it may overflow."""
    import onnx_ir as ir

    for node in list(graph):
        widened, result = _cast(node, ir.DataType.FLOAT), node.outputs[0]
        halved = widened.producer() if widened is not None else None
        original = _cast(halved, ir.DataType.FLOAT16) if halved is not None else None
        if original is not None and original.dtype == ir.DataType.FLOAT and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, original)


def _cast(node: ir.Node, dtype: ir.DataType) -> ir.Value | None:
    """What a node casts to this type; None when it does anything else."""
    return node.inputs[0] if node.op_type == "Cast" and node.attributes["to"].as_int() == dtype else None


def _clip_masks(model: onnx.ModelProto) -> int:
    """Make mask constants as large as float16 allows; how many tensors were changed."""
    import numpy as np
    import onnx

    from modelops.quantizers._calibration import MASK_FROM, weights_of

    weights, changed = weights_of(model), 0
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in weights and 0 not in tensor.dims:
            values = onnx.numpy_helper.to_array(tensor)
            if (values < min(_NEVER, MASK_FROM)).any():
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.maximum(values, np.float32(_NEVER)), tensor.name))
                changed += 1
    return changed


def _overflowing(model: onnx.ModelProto, workbench: Workbench) -> set[str]:
    """The nodes that read or write values beyond half of what float16 holds, by weights and by the data."""
    import numpy as np
    import onnx

    from modelops.quantizers._calibration import extents

    facts = Facts(model)
    large = {
        name
        for name, tensor in facts.initializers.items()
        if facts.is_float(name)
        and 0 not in tensor.dims
        and float(np.abs(onnx.numpy_helper.to_array(tensor)).max()) > _MOST
    }
    if workbench.has_data:
        names = dict.fromkeys(
            name for node in model.graph.node for name in (*facts.activations(node), *facts.results(node))
        )
        seen = extents(model, list(names), workbench.batches, workbench.scratch)
        large |= {name for name, extent in seen.items() if not (-_MOST <= extent.low <= extent.high <= _MOST)}
    return {node.name for node in model.graph.node if large & {*node.input, *node.output}}


def _notes(overflowing: set[str], clipped: int, has_data: bool) -> list[str]:
    notes = []
    if overflowing:
        notes.append(f"{len(overflowing)} nodes stay float32, since their values come near the end of float16")
    if clipped:
        notes.append(f"{clipped} mask constants were raised to {_NEVER:g}, which float16 can hold")
    if not has_data:
        notes.append("without --data only weights were looked at: activations may overflow on real inputs")
    return notes
