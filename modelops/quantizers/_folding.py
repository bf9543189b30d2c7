"""Where a factor for every channel of an activation can go, so that a graph computes the same as before.

::

    normalization   its weights and bias, when all that it gives goes where the factor is wanted
    values          columns and bias of the product whose rows attention mixes: heads do not mix channels
    multiply        a node of its own, in front of the products: what else reads the activation stays as it was

The inverse goes into the rows of the products' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# What the names of nodes hold that multiply outliers: they stay float.
OUTLIERS = "_outliers"
Place = Literal["normalization", "values", "multiply"]

_NORMALIZATIONS = {
    # Op: inputs that scale with what it gives.
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
    "RMSNormalization": (1,),
}


def place_of(value: ir.Value, readers: Sequence[ir.Node]) -> Place:
    """Where a factor on ``value`` goes when these nodes alone are to see it."""
    producer = value.producer()
    alone = not value.is_graph_output() and {id(node) for node in value.consumers()} <= {id(node) for node in readers}
    if producer is None or not alone or value is not producer.outputs[0]:
        return "multiply"
    if (places := _NORMALIZATIONS.get(producer.op_type)) is not None:
        fits = all(_is_row(_input(producer, index), value) or _input(producer, index) is None for index in places)
        return "normalization" if fits and _input(producer, places[0]) is not None else "multiply"
    return "values" if _values_of(producer) is not None else "multiply"


def fold(graph: ir.Graph, value: ir.Value, readers: Sequence[ir.Node], factors: NDArray[Any]) -> Place:
    """Multiply the columns of what these nodes read as ``value`` by ``factors``; gives where they went."""

    place = place_of(value, readers)
    producer = value.producer()
    if place == "normalization":
        assert producer is not None
        for index in _NORMALIZATIONS[producer.op_type]:
            scale_input(graph, producer, index, factors)
    elif place == "values":
        assert producer is not None
        _scale_values(graph, producer, factors)
    else:
        multiply(graph, value, readers, factors)
    return place


def multiply(graph: ir.Graph, value: ir.Value, readers: Sequence[ir.Node], factors: NDArray[Any]) -> Place:
    """Multiply what these nodes read as ``value`` in a node of its own."""
    import onnx_ir as ir

    name = f"{value.name}_scaled"
    node = ir.node("Mul", [value, initializer(graph, f"{name}_factors", factors)], name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}_out", value.type, value.shape
    graph.insert_before(_first(graph, readers), node)
    for reader in readers:
        reader.replace_input_with(0, node.outputs[0])
    return "multiply"


def take_out(
    graph: ir.Graph,
    value: ir.Value,
    readers: Sequence[ir.Node],
    columns: NDArray[Any],
    weights: Sequence[NDArray[Any]],
) -> None:
    """Multiply these columns of ``value`` apart, in float, and add that to what the products give.

    ``weights`` are the rows of each product's weights; nothing of them is left in the products themselves.
    """
    import numpy as np
    import onnx_ir as ir

    base = f"{value.name}{OUTLIERS}"
    places = initializer(graph, f"{base}_columns", np.asarray(columns, dtype=np.int64))
    gather = ir.node("Gather", [value, places], {"axis": -1}, name=base)
    gather.outputs[0].name, gather.outputs[0].type = f"{base}_rows", value.type
    graph.insert_before(_first(graph, readers), gather)
    for reader, rows in zip(readers, weights, strict=True):
        result = reader.outputs[0]
        uses, name = list(result.uses()), f"{reader.name}{OUTLIERS}"
        matrix = initializer(graph, f"{name}_weights", rows)
        product = ir.node("MatMul", [gather.outputs[0], matrix], name=name)
        total = ir.node("Add", [result, product.outputs[0]], name=f"{name}_sum")
        product.outputs[0].name, product.outputs[0].type = f"{name}_out", value.type
        total.outputs[0].name, total.outputs[0].type = f"{name}_total", value.type
        total.outputs[0].shape = result.shape
        graph.insert_after(reader, [product, total])
        for use in uses:
            use.node.replace_input_with(use.idx, total.outputs[0])
        if result.is_graph_output():
            place = next(index for index, output in enumerate(graph.outputs) if output is result)
            given = result.name
            result.name, total.outputs[0].name = f"{name}_integer", given
            graph.outputs[place] = total.outputs[0]


def _first(graph: ir.Graph, nodes: Sequence[ir.Node]) -> ir.Node:
    """The first of these nodes in the order of the graph."""
    return next(item for item in graph if any(item is node for node in nodes))


def scale_input(graph: ir.Graph, node: ir.Node, index: int, factors: NDArray[Any]) -> None:
    """Multiply a constant input of a node by ``factors``; what else reads that constant keeps it as it was."""
    value = _input(node, index)
    if value is None:
        return
    assert value.const_value is not None
    replace_input(graph, node, index, value.const_value.numpy() * factors)


def replace_input(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[Any]) -> None:
    """Give a node another constant as this input."""
    import numpy as np

    value = node.inputs[index]
    assert value is not None
    node.replace_input_with(index, initializer(graph, str(value.name), np.asarray(array, dtype=np.float32)))


def initializer(graph: ir.Graph, base: str, array: NDArray[Any]) -> ir.Value:
    """A new constant of the graph, named after ``base``."""
    import numpy as np
    import onnx_ir as ir

    number, name = 1, base
    while name in graph.initializers:
        number += 1
        name = f"{base}_{number}"
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_row(constant: ir.Value | None, value: ir.Value) -> bool:
    """Whether this is a constant with one number for every column."""
    if constant is None or not constant.is_initializer() or constant.const_value is None:
        return False
    shape = constant.const_value.shape
    return len(shape) == 1 and (value.shape is None or value.shape[-1] in (shape[0], None))


def _values_of(attention: ir.Node) -> tuple[ir.Node, int] | None:
    """(product that gives the values of an attention, its first column of them); None where it is no plain product."""
    if attention.op_type != "MultiHeadAttention" or any(value is not None for value in attention.inputs[6:8]):
        return None
    # Keys and values that are kept for the next token would be scaled too.
    if any(list(output.uses()) or output.is_graph_output() for output in attention.outputs[1:]):
        return None
    value, bias = _input(attention, 2), _input(attention, 3)
    producer = value.producer() if value is not None else None
    if value is None or producer is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    if bias is not None and not bias.is_initializer():
        return None
    start, product = 0, producer
    if producer.op_type == "Split":
        sizes = _input(producer, 1)
        source = producer.inputs[0]
        if sizes is None or sizes.const_value is None or source is None or len(list(source.uses())) != 1:
            return None
        if source.is_graph_output():
            return None
        if "axis" not in producer.attributes or producer.attributes["axis"].as_int() != -1:
            return None
        position = next(index for index, output in enumerate(producer.outputs) if output is value)
        start = int(sizes.const_value.numpy()[:position].sum())
        found = source.producer()
        if found is None:
            return None
        product = found
    weight = _input(product, 1)
    if product.op_type != "MatMul" or weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    return (product, start) if len(weight.const_value.shape) == 2 else None


def _scale_values(graph: ir.Graph, attention: ir.Node, factors: NDArray[Any]) -> None:
    import numpy as np

    found = _values_of(attention)
    assert found is not None
    product, start = found
    for node, index, at in ((product, 1, start), (attention, 3, None)):
        value = _input(node, index)
        if value is None:
            continue
        assert value.const_value is not None
        array = np.array(value.const_value.numpy())
        # The bias of an attention is that of query, key and value in a row: values come last.
        first = array.shape[-1] - len(factors) if at is None else at
        array[..., first : first + len(factors)] *= factors
        replace_input(graph, node, index, array)
