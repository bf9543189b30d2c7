"""Sums before a normalization, in the form that runs fastest on a CPU.

onnxruntime's SkipLayerNormalization adds and normalizes one number after another; its LayerNormalization works on
vectors, and took a sixth of the time on 128 rows of 384 (AVX2). Left apart, onnxruntime would fuse the two again,
unless the sum is a Sum, which does the same::

    SkipLayerNormalization(x, skip, gamma, beta, bias)   →   LayerNormalization(Sum(x + bias, skip), gamma, beta)

The bias goes next to the product, where the integer kernels add it on their way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.quantizers._folding import OUTLIERS

if TYPE_CHECKING:
    import onnx_ir as ir

# LayerNormalization is a standard operator since opset 17.
_OPSET = 17
# The epsilon of a SkipLayerNormalization that says nothing.
_EPSILON = 1e-12
_BIAS, _SUM = 4, 3


def apart(model: ir.Model) -> int:
    """Take every SkipLayerNormalization apart, in place; gives how many there were."""
    import onnx_ir as ir

    graph, count = model.graph, 0
    if (graph.opset_imports.get("") or 0) < _OPSET:
        return 0
    for node in list(graph):
        statistics = any(list(output.uses()) or output.is_graph_output() for output in node.outputs[1:_SUM])
        if node.op_type != "SkipLayerNormalization" or statistics:
            continue
        x, skip, gamma = node.inputs[:3]
        beta = node.inputs[3] if len(node.inputs) > 3 else None
        bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
        new: list[ir.Node] = []
        terms = _terms(x)
        if bias is not None:
            new.append(ir.node("Add", [terms[0], bias], name=f"{node.name}_bias"))
            terms[0] = new[-1].outputs[0]
        total = ir.node("Sum", [*terms, skip], name=f"{node.name}_sum")
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else _EPSILON
        normal = ir.node(
            "LayerNormalization",
            [total.outputs[0], gamma, *([] if beta is None else [beta])],
            {"axis": -1, "epsilon": epsilon},
            name=f"{node.name}_normalization",
        )
        new += [total, normal]
        for item in new:
            item.outputs[0].type, item.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        old, made = [node.outputs[0]], [normal.outputs[0]]
        if len(node.outputs) > _SUM:
            old, made = [*old, node.outputs[_SUM]], [*made, total.outputs[0]]
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, old, made)
        count += 1
    return count


def _terms(x: ir.Value | None) -> list[ir.Value | None]:
    """The integer product and that of the columns in float, where x is their sum and nothing else reads it; else x."""
    add = x.producer() if x is not None else None
    if x is None or add is None or not str(add.name).endswith(f"{OUTLIERS}_sum") or len(list(x.uses())) != 1:
        return [x]
    return list(add.inputs)
