"""Which nodes of a graph static quantization treats, and what they read and write.

Integer kernels pay in two shapes of graph::

    convolutional   Conv, Gemm and MatMul with constant weights, and what lies between them without leaving integers:
                    a node follows when everything that it reads comes from nodes that are integer already
    attention       products with constant weights alone; their results stay float, since what comes next (Softmax,
                    LayerNormalization, sums over long rows) needs the precision

A graph is of the second shape when it multiplies two activations with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

_FLOAT = 1
PRODUCTS = ("Gemm", "MatMul")
WEIGHTED = ("Conv", *PRODUCTS)
_FOLLOWERS = frozenset(
    {
        "Add",
        "AveragePool",
        "Clip",
        "Concat",
        "Flatten",
        "GlobalAveragePool",
        "LeakyRelu",
        "MaxPool",
        "Mul",
        "Relu",
        "Reshape",
        "Resize",
        "Sigmoid",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
OPS = tuple(sorted({*WEIGHTED, *_FOLLOWERS, "Gather"}))


@dataclass(frozen=True)
class Plan:
    """The nodes to quantize, in the order of the graph, and whether their products stay float."""

    nodes: tuple[onnx.NodeProto, ...]
    attention: bool

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]

    def tensors(self, facts: Facts) -> list[str]:
        """The activations that need a range, once each."""
        found: dict[str, None] = {}
        for node in self.nodes:
            found |= dict.fromkeys(facts.activations(node))
            if not (self.attention and node.op_type in PRODUCTS):
                found |= dict.fromkeys(facts.results(node))
        return list(found)

    @property
    def weighted(self) -> list[onnx.NodeProto]:
        """The nodes that hold weights."""
        return [node for node in self.nodes if node.op_type in WEIGHTED]


class Facts:
    """What is known of the tensors of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {
            info.name: info.type.tensor_type.elem_type
            for info in (*graph.input, *graph.output, *graph.value_info)
            if info.type.HasField("tensor_type")
        }
        self.types.update({name: tensor.data_type for name, tensor in self.initializers.items()})

    def is_float(self, name: str) -> bool:
        return self.types.get(name) == _FLOAT

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """The float tensors that a node reads and that are computed."""
        return [name for name in node.input if name and name not in self.initializers and self.is_float(name)]

    def results(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.output if name and self.is_float(name)]


def plan(model: onnx.ModelProto, ops: frozenset[str], excluded: set[str], special: set[str]) -> Plan:
    """The nodes to quantize among those of ``ops``; none of ``excluded``, none that touches a tensor of ``special``."""
    facts = Facts(model)
    attention = any(_multiplies_activations(node, facts) for node in model.graph.node)
    integer: set[str] = set()
    chosen = []
    for node in model.graph.node:
        if node.op_type not in ops or node.domain not in ("", "ai.onnx") or node.name in excluded:
            continue
        reads, writes = facts.activations(node), facts.results(node)
        if not reads or not writes or special & {*reads, *writes}:
            continue
        if _is_weighted(node, facts) or (not attention and _follows(node, reads, integer)):
            chosen.append(node)
            integer.update(writes)
    return Plan(tuple(chosen), attention)


def _multiplies_activations(node: onnx.NodeProto, facts: Facts) -> bool:
    if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return True
    return node.op_type == "MatMul" and len(facts.activations(node)) == 2


def _is_weighted(node: onnx.NodeProto, facts: Facts) -> bool:
    """Whether a node has float32 weights in the file, of a form that an integer kernel takes."""
    if node.op_type not in WEIGHTED or len(node.input) < 2:
        return False
    weight = facts.initializers.get(node.input[1])
    if weight is None or weight.data_type != _FLOAT or not weight.dims or 0 in weight.dims:
        return False
    if node.op_type == "Gemm":
        return not _attribute(node, "transA", 0) and bool(_attribute(node, "alpha", 1.0) == 1.0)
    return node.op_type == "Conv" or len(weight.dims) == 2


def _follows(node: onnx.NodeProto, reads: Sequence[str], integer: set[str]) -> bool:
    if node.op_type not in _FOLLOWERS or not all(name in integer for name in reads):
        return False
    if node.op_type in ("Add", "Mul"):
        # A float constant beside an integer tensor would be one more conversion than it saves.
        return len(reads) == len([name for name in node.input if name])
    if node.op_type == "Resize":
        return bool(_attribute(node, "mode", b"nearest") == b"nearest")
    return True


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default
