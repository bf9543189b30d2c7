"""A model opened for surgery: one flat graph, its constants folded, and the shapes that its values really have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.tensors import Signature
from modelops.errors import StageFailed, tool
from modelops.graphs.batches import BatchAxis

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

Slot = tuple[Literal["in", "out"], int]
PLAIN_DOMAINS = ("", "ai.onnx")

_INTEGER_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits"}
    | {"MatMulBnb4", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QGemm"}
    | {"GatherBlockQuantized"}
)
# What exporters compute from constants at run time: weights turned around, the arguments of Pad and Reshape.
_FOLDED_OPS = frozenset(
    {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Cast", "Concat", "Slice", "Gather", "Identity"}
    | {"Shape", "ConstantOfShape", "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal"}
)
_FOLDED_ELEMENTS = 1 << 28
_NO_TENSOR_OPS = frozenset(
    {"SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SplitToSequence", "SequenceMap"}
    | {"Optional", "OptionalGetElement", "If", "Loop", "Scan", "ZipMap"}
)


@dataclass
class Network:
    """A model as a graph of nodes in topological order, with the sizes that its values had in one run.

    ``rows`` is how many samples that run held.
    """

    model: ir.Model
    rows: int
    _shapes: dict[ir.Value, tuple[int, ...]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return int(self.model.opset_imports.get("", 1))

    @property
    def nodes(self) -> list[ir.Node]:
        return list(self.model.graph)

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape that the value had; None where it was no tensor, or never seen."""
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(int(dim) for dim in value.const_value.shape)
        return self._shapes.get(value)

    def weight(self, value: ir.Value | None) -> bool:
        """Whether the value is a constant that nobody outside can set."""
        return value is not None and value.const_value is not None and not value.is_graph_input()

    def constant(self, value: ir.Value | None) -> NDArray[Any] | None:
        """The elements of a constant; None for everything else."""
        if value is None or value.const_value is None or not self.weight(value):
            return None
        array: NDArray[Any] = value.const_value.numpy()
        return array

    def ints(self, node: ir.Node, number: int) -> NDArray[np.int64] | None:
        """A small constant input in one row; None where it is left out or only a run can tell."""
        found = self.constant(node.inputs[number]) if number < len(node.inputs) else None
        return None if found is None else found.reshape(-1).astype("int64")


def label(node: ir.Node) -> str:
    """How messages name a node: operator, and its name or its first output's where it has none."""
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}"


def following(node: ir.Node, most: int = 6) -> list[str]:
    """The names of a node and of those that it alone feeds, and of what they write: fused, they go by one of them."""
    found = [str(node.name), str(node.outputs[0].name)]
    while len(found) < 2 * most and len(node.outputs) == 1:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type in ("Conv", "MatMul", "Gemm", "ConvTranspose"):
            break
        node = uses[0].node
        found += [str(node.name), str(node.outputs[0].name)]
    return found


def value_at(node: ir.Node, slot: Slot) -> ir.Value | None:
    """The value that a node has in a slot; None for an input that is left out."""
    values = node.inputs if slot[0] == "in" else node.outputs
    return values[slot[1]] if slot[1] < len(values) else None


def opened(source: Path, signature: Signature, feed: Mapping[str, Any], scratch: Path) -> Network:
    """The model in a file; ``feed`` is run once, to see shapes. StageFailed when it does not run, or is quantized."""
    from modelops.graphs import files

    model = files.load(source)
    refuse_quantized(model)
    with tool("onnx_ir"):
        flatten(model)
    network = Network(model, rows=max(1, BatchAxis.of(signature).rows(feed)))
    fold(network)
    observe(network, feed, scratch)
    return network


def refuse_quantized(model: ir.Model) -> None:
    """StageFailed, with the node, when the model holds integer arithmetic."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            if node.op_type in _INTEGER_OPS or node.op_type.startswith("QLinear"):
                raise StageFailed(
                    f"the model is quantized already: {label(node)}",
                    hint="prune the float model, then quantize what comes out",
                )


def flatten(model: ir.Model) -> None:
    """Inline functions, and turn Constant nodes and copies of values into plain ones; every node gets a name."""
    import onnx_ir.passes.common as passes

    if model.functions:
        passes.InlinePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)


def fold(network: Network) -> None:
    """Compute what depends on constants alone, as far as pruning has to look through it."""
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    graph = network.model.graph
    for node in network.nodes:
        if not _foldable(network, node):
            continue
        array = _computed(network, node)
        if array is None:
            continue
        output = node.outputs[0]
        value = ir.val(output.name, const_value=ir.tensor(array, name=output.name))
        output.name = f"{output.name}_folded"
        graph.register_initializer(value)
        output.replace_all_uses_with(value)
    with tool("onnx_ir"):
        passes.RemoveUnusedNodesPass()(network.model)


def _foldable(network: Network, node: ir.Node) -> bool:
    if node.domain not in PLAIN_DOMAINS or node.op_type not in _FOLDED_OPS or len(node.outputs) != 1:
        return False
    if node.outputs[0].is_graph_output() or not node.inputs:
        return False
    if not all(value is None or network.weight(value) for value in node.inputs):
        return False
    if node.op_type == "ConstantOfShape":
        sizes = network.constant(node.inputs[0])
        return sizes is not None and _product(sizes) <= _FOLDED_ELEMENTS
    return True


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= int(size)
    return product


def _computed(network: Network, node: ir.Node) -> NDArray[Any] | None:
    """The output of a node whose inputs are constants; None where onnx's own evaluator can't tell."""
    import onnx
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    arrays = {value.name: network.constant(value) for value in node.inputs if value is not None}
    inputs = [onnx.helper.make_tensor_value_info(str(name), 0, None) for name in arrays]
    output = onnx.helper.make_tensor_value_info(str(node.outputs[0].name), 0, None)
    opsets = [onnx.helper.make_opsetid("", network.opset)]
    graph = onnx.helper.make_graph([ir.to_proto(node)], "one", inputs, [output])
    try:
        evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
        found: NDArray[Any] = evaluator.run(None, arrays)[0]
    except Exception:  # whatever it can't do stays a node
        return None
    return found


def observe(network: Network, feed: Mapping[str, Any], scratch: Path) -> None:
    """Run the model once, and note the shape of every value."""
    import onnx_ir as ir

    from modelops.graphs import files

    graph = network.model.graph
    for value in graph.inputs:
        if value.name in feed:
            network._shapes[value] = tuple(feed[value.name].shape)
    watched = [value for node in graph for value in node.outputs if _is_tensor(node, value)]
    outputs, probes = list(graph.outputs), []
    for number, value in enumerate(watched):
        node = ir.node("Shape", [value], name=f"modelops_probe_{number}")
        node.outputs[0].name = f"modelops_shape_{number}"
        node.outputs[0].dtype = ir.DataType.INT64
        probes.append(node)
    graph.extend(probes)
    graph.outputs.clear()
    graph.outputs.extend(node.outputs[0] for node in probes)
    place = scratch / "probe" / "model.onnx"
    place.parent.mkdir()
    try:
        files.save(network.model, place)
        found = _run(place, feed)
    finally:
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        graph.remove(probes, safe=True)
        shutil.rmtree(place.parent)
    for value, shape in zip(watched, found, strict=True):
        network._shapes[value] = tuple(int(dim) for dim in shape)


def _is_tensor(node: ir.Node, value: ir.Value) -> bool:
    import onnx_ir as ir

    if not value.name:
        return False
    if value.type is not None:
        return isinstance(value.type, ir.TensorType)
    return node.op_type not in _NO_TENSOR_OPS


def _run(model: Path, feed: Mapping[str, Any]) -> list[NDArray[np.int64]]:
    """All outputs for this feed; unoptimised, so that every value of the graph exists."""
    session = plain_session(model)
    with tool("onnxruntime", hint="`modelops validate` shows whether the model runs at all"):
        names = {item.name for item in session.get_inputs()}
        found: list[NDArray[np.int64]] = session.run(None, {k: v for k, v in feed.items() if k in names})
    return found


def plain_session(model: Path) -> Any:
    """A session of onnxruntime on one thread that leaves the graph as it is."""
    with tool("onnxruntime", hint="`modelops validate` shows whether the model runs at all"):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Shapes are read as soon as they can be, so that values need not wait for it.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def weights_of(network: Network) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """Every use of a weight in the main graph: node, input and value."""
    for node in network.nodes:
        for number, value in enumerate(node.inputs):
            if value is not None and network.weight(value):
                yield node, number, value
