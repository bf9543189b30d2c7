"""Puts QuantizeLinear and DequantizeLinear around the nodes of a plan, so that onnxruntime's integer kernels fuse.

onnxruntime's own ``QDQQuantizer`` does the writing, from our ranges and our choice of nodes. It is no public API: this
is the one place that touches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import StageFailed, tool
from modelops.quantizers._plan import PRODUCTS

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from modelops.quantizers._histograms import Range
    from modelops.quantizers._plan import Plan
    from modelops.quantizers._targets import Target

_KERNELS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "QGemm")


def inserted(
    model: onnx.ModelProto,
    plan: Plan,
    ranges: Mapping[str, Range],
    *,
    per_channel: bool,
    reduced: bool,
    target: Target,
) -> onnx.ModelProto:
    """The model with integer weights and QDQ pairs; ``model`` itself is used up."""
    import numpy as np
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    if not plan.nodes:
        raise ValueError("an empty list of nodes would mean all of them")
    # Without this mark the quantizer would write the whole model to disk and infer its shapes once more.
    add_infer_metadata(model)
    data = {name: tuple(np.array(value, dtype=np.float32) for value in pair) for name, pair in ranges.items()}
    with tool("onnxruntime's QDQ quantizer", hint="leave the node out with --exclude, or use --method dynamic"):
        quantizer = QDQQuantizer(
            model,
            per_channel,
            reduced,
            QuantType.QInt8,
            # The wrong sign can cost a factor of 60: see _targets.
            QuantType.QInt8 if target.signed else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            plan.names,
            [],
            sorted({node.op_type for node in plan.nodes}),
            {**target.options, **({"OpTypesToExcludeOutputQuantization": list(PRODUCTS)} if plan.attention else {})},
        )
        quantizer.quantize_model()
    result: onnx.ModelProto = quantizer.model.model
    properties = [item for item in result.metadata_props if item.key != "onnx.infer"]
    del result.metadata_props[:]
    result.metadata_props.extend(properties)
    return result


def drop_idle_pairs(model: ir.Model, quantized: Sequence[str]) -> int:
    """Remove the pairs between a product and readers that are float: they cost precision and time for nothing.

    ``quantized`` names the nodes of the plan. Gives the number of pairs removed.
    """
    import onnx_ir as ir

    graph, planned, removed = model.graph, set(quantized), 0
    for quantize in list(graph):
        raw = quantize.inputs[0] if quantize.op_type == "QuantizeLinear" else None
        producer = raw.producer() if raw is not None else None
        if raw is None or producer is None or producer.op_type not in PRODUCTS or len(list(raw.uses())) != 1:
            continue
        readers = list(quantize.outputs[0].consumers())
        if len(readers) != 1 or readers[0].op_type != "DequantizeLinear":
            continue
        result = readers[0].outputs[0]
        if any(node.name in planned for node in result.consumers()):
            continue
        name, raw.type, raw.shape = result.name, result.type, result.shape
        ir.convenience.replace_all_uses_with(result, raw, replace_graph_outputs=True)
        graph.remove([quantize, readers[0]], safe=True)
        raw.name = name
        removed += 1
    return removed


def kernels(model: Path) -> dict[str, dict[str, int]]:
    """What onnxruntime makes of a quantized model: ``fused`` integer kernels, and weighted nodes ``unfused``, by op.

    Costs one load of the model with all optimizations.
    """
    import tempfile

    import onnx

    from modelops.graphs import runs

    with tempfile.TemporaryDirectory(prefix="modelops-kernels-") as folder:
        place = Path(folder) / "optimized.onnx"
        config = {"session.optimized_model_external_initializers_file_name": "optimized.data"}
        runs.session(model, config=config, optimized=place, trusted=True).close()
        graph = onnx.load(str(place), load_external_data=False).graph
    fused: dict[str, int] = {}
    unfused: dict[str, int] = {}
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for node in graph.node:
        if node.op_type.startswith("QLinear") or node.op_type in _KERNELS:
            fused[node.op_type] = fused.get(node.op_type, 0) + 1
        elif len(node.input) > 1 and node.input[1] in dequantized and _weighted(node):
            unfused[node.op_type] = unfused.get(node.op_type, 0) + 1
    return {"fused": dict(sorted(fused.items())), "unfused": dict(sorted(unfused.items()))}


def _weighted(node: Any) -> bool:
    return node.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def read(model: onnx.ModelProto) -> ir.Model:
    """The written graph for passes of our own; StageFailed when what was written is not consistent."""
    import onnx_ir as ir

    try:
        graph = ir.from_proto(model)
        graph.graph.sort()
        return graph
    except Exception as error:
        raise StageFailed(f"the quantizer wrote a graph that can't be read: {error}") from error
