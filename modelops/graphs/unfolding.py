"""Linear layers written with Gemm, on activations of three dimensions and more.

Exporters flatten the activations, call Gemm, and shape its result back::

    Reshape(x, [-1, k]) → Gemm(·, w, b) → Reshape(·, [batch, sequence, n])      →      MatMul(x, w) + b

Attention is only found where the shapes stay what they are; and onnxscript's fusions go wrong around such a Reshape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def unfold(model: ir.Model) -> int:
    """Rewrite every such layer in place where the shapes prove that it is one; how many there were."""
    found = 0
    for node in list(model.graph):
        if node.op_type == "Gemm" and not node.domain:
            found += _unfold(model.graph, node)
    return found


def _unfold(graph: ir.Graph, gemm: ir.Node) -> bool:
    import onnx_ir as ir

    flat, weight = gemm.inputs[0], _weight(graph, gemm)
    before = flat.producer() if flat is not None else None
    uses = [use.node for use in gemm.outputs[0].uses()]
    if weight is None or before is None or before.op_type != "Reshape" or gemm.outputs[0].is_graph_output():
        return False
    x = before.inputs[0]
    split = _rows(x, int(weight.shape[0]))
    wide = [use.op_type == "Reshape" and _is_wide(use, x, split, int(weight.shape[1])) for use in uses]
    if x is None or split is None or not uses or not all(wide):
        return False
    name = gemm.name or gemm.outputs[0].name
    new: list[ir.Node] = []
    if split != len(x.shape or ()) - 1:
        shape = _constant(graph, [0] * split + [int(weight.shape[0])])
        new.append(ir.node("Reshape", [x, shape], name=f"{name}_joined"))
        x = new[-1].outputs[0]
    new.append(ir.node("MatMul", [x, weight], name=f"{name}_product"))
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is not None:
        new.append(ir.node("Add", [new[-1].outputs[0], bias], name=f"{name}_sum"))
    for number, one in enumerate(new):
        one.outputs[0].name = f"{name}_unfolded{number}"
        one.outputs[0].type = flat.type if flat is not None else None
    lead = list((before.inputs[0].shape or ())[:split]) if before.inputs[0] is not None else []
    if split != len(before.inputs[0].shape or ()) - 1:
        new[0].outputs[0].shape = ir.Shape([*lead, int(weight.shape[0])])
    for one in new:
        if one.op_type != "Reshape":
            one.outputs[0].shape = ir.Shape([*lead, int(weight.shape[1])])
    graph.insert_before(gemm, new)
    for use in uses:
        ir.convenience.replace_all_uses_with(use.outputs[0], new[-1].outputs[0], replace_graph_outputs=True)
    return True


def _weight(graph: ir.Graph, gemm: ir.Node) -> ir.Value | None:
    """The weights as [k, n], where they lie in the file and the Gemm does nothing but multiply and add."""
    import numpy as np
    import onnx_ir as ir

    plain: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if any(name in plain and value.value != plain[name] for name, value in gemm.attributes.items()):
        return None
    weight = gemm.inputs[1]
    if weight is None or weight.const_value is None or weight.shape is None or len(weight.shape) != 2:
        return None
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is not None and (bias.shape is None or len(bias.shape) != 1):
        return None
    transposed = gemm.attributes.get("transB")
    if transposed is None or not transposed.as_int():
        return weight
    name = f"{weight.name}_turned"
    if name not in graph.initializers:
        turned = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=name)
        graph.register_initializer(ir.val(name, const_value=turned, shape=turned.shape, type=weight.type))
    return graph.initializers[name]


def _rows(x: ir.Value | None, width: int) -> int | None:
    """How many leading dimensions of x count rows, when the others hold ``width`` elements together."""
    if x is None or x.shape is None or len(x.shape) < 3:
        return None
    dims = list(x.shape)
    for split in range(len(dims) - 1, 0, -1):
        rest = dims[split:]
        if not all(isinstance(dim, int) for dim in rest):
            return None
        if math.prod(int(dim) for dim in rest) == width:
            return split
    return None


def _is_wide(reshape: ir.Node, x: ir.Value | None, split: int | None, width: int) -> bool:
    """Whether a Reshape brings back the rows that x had."""
    shape = reshape.outputs[0].shape
    if x is None or x.shape is None or split is None or shape is None or len(shape) != split + 1:
        return False
    return list(shape[:split]) == list(x.shape[:split]) and shape[split] == width and None not in map(_known, shape)


def _known(dim: Any) -> Any:
    return dim if isinstance(dim, int) else dim.value


def _constant(graph: ir.Graph, values: list[int]) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    name = "modelops_shape_" + "_".join(map(str, values))
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
        graph.register_initializer(
            ir.val(name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64))
        )
    return graph.initializers[name]
