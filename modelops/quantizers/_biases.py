"""Where a constant can be added to what a product gives without a node more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelops.quantizers._folding import replace_input
from modelops.quantizers._weights import Product

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Op: which input is a bias of the columns of what it reads.
_BIASES = {"BiasGelu": 1, "FastGelu": 1, "SkipLayerNormalization": 4}
_HEADS_BIAS = 3


def shiftable(product: Product) -> bool:
    """Whether there is a bias that a shift can be added to."""
    return _place(product) is not None


def add(graph: ir.Graph, product: Product, shift: NDArray[Any]) -> None:
    """Add one number per column to what the product gives."""
    import numpy as np

    found = _place(product)
    assert found is not None
    node, index, start = found
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    array = np.array(value.const_value.numpy(), dtype=np.float32)
    array[start : start + len(shift)] += shift
    replace_input(graph, node, index, array)


def _place(product: Product) -> tuple[ir.Node, int, int] | None:
    """(node, which of its inputs is the bias, first column of it)."""
    size = product.shape[1]
    if product.bias is not None:
        return (product.node, 2, 0) if _fits(product.bias, size) else None
    value = product.node.outputs[0]
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader, at = uses[0].node, uses[0].idx
    if reader.op_type == "Add":
        return (reader, 1 - at, 0) if _fits(reader.inputs[1 - at], size) else None
    if (index := _BIASES.get(reader.op_type)) is not None:
        found = reader.inputs[index] if index < len(reader.inputs) else None
        return (reader, index, 0) if index != at and _fits(found, size) else None
    if reader.op_type == "Split":
        return _heads(reader, size)
    if reader.op_type == "MultiHeadAttention" and at < _HEADS_BIAS and len(reader.inputs) > _HEADS_BIAS:
        bias = reader.inputs[_HEADS_BIAS]
        whole = 0 if bias is None or bias.const_value is None else int(bias.const_value.shape[0])
        # Query and key have the same width, values may have their own.
        start = whole - size if at == 2 else at * size
        return (reader, _HEADS_BIAS, start) if start >= 0 and _fits(bias, whole) and whole else None
    return None


def _heads(split: ir.Node, size: int) -> tuple[ir.Node, int, int] | None:
    """The bias of an attention whose query, key and value are the parts of one product, in this order."""
    readers = [list(output.uses()) for output in split.outputs]
    if len(readers) != 3 or any(len(uses) != 1 for uses in readers):
        return None
    if "axis" not in split.attributes or split.attributes["axis"].as_int() != -1:
        return None
    nodes = [(uses[0].node, uses[0].idx) for uses in readers]
    attention = nodes[0][0]
    if attention.op_type != "MultiHeadAttention" or [(id(n), i) for n, i in nodes] != [
        (id(attention), place) for place in range(3)
    ]:
        return None
    if len(attention.inputs) <= _HEADS_BIAS or not _fits(attention.inputs[_HEADS_BIAS], size):
        return None
    return attention, _HEADS_BIAS, 0


def _fits(value: ir.Value | None, size: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return list(value.const_value.shape) == [size]
