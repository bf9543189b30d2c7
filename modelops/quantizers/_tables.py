"""Embedding tables in 8 bits: rows are gathered as integers and become floats after, never the table as a whole.

::

    Gather(table, ids)   →   Mul(Cast(Gather(rows, ids)), Gather(scales, ids))

Each row has a scale of its own, so that rare words keep their precision beside frequent ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.quantizers._int8 import quantized

if TYPE_CHECKING:
    import onnx_ir as ir

# Below this the file hardly shrinks, and three small nodes cost more than the reading saves.
_SMALLEST_ELEMENTS = 4096


def quantize_tables(model: ir.Model, *, excluded: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Replace every lookup in a large float32 table of the main graph; gives the names of the nodes replaced."""
    import onnx_ir as ir

    graph = model.graph
    shared: dict[str, tuple[ir.Value, ir.Value]] = {}
    replaced = []
    for node in list(graph):
        if node.name in excluded or not _looks_up(node):
            continue
        table, ids = node.inputs[0], node.inputs[1]
        assert table is not None and table.name is not None
        if table.name not in shared:
            shared[table.name] = _stored(graph, table)
        rows, scales = shared[table.name]
        base = node.name
        gathered = ir.node("Gather", [rows, ids], name=f"{base}_rows")
        cast = ir.node("Cast", [gathered.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{base}_float")
        scale = ir.node("Gather", [scales, ids], name=f"{base}_scales")
        product = ir.node("Mul", [cast.outputs[0], scale.outputs[0]], name=f"{base}_scaled")
        new = [gathered, cast, scale, product]
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, product.outputs)
        replaced.append(str(base))
    return replaced


def _looks_up(node: ir.Node) -> bool:
    import onnx_ir as ir

    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx"):
        return False
    axis = node.attributes.get("axis")
    table = node.inputs[0]
    if (axis is not None and axis.as_int() != 0) or table is None or not table.is_initializer():
        return False
    tensor = table.const_value
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == 2
        and tensor.size >= _SMALLEST_ELEMENTS
        and tensor.shape[0] > 1
    )


def _stored(graph: ir.Graph, table: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The table as integer rows and a column of scales, registered as initializers."""
    import onnx_ir as ir

    assert table.const_value is not None
    integers, scales = quantized(table.const_value.numpy(), axis=0, reduced=False)
    values = []
    for suffix, array in (("rows_int8", integers), ("row_scales", scales[:, None])):
        name = f"{table.name}_{suffix}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        graph.register_initializer(value)
        values.append(value)
    return values[0], values[1]
