"""Guards behind Softmax: torch's exporter turns rows that are NaN, since nothing in them may be seen, into zeros::

    Where(IsNaN(softmax), 0, softmax)

Where no row can be masked wholly they are dead; where attention is fused, they belong behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators that give nothing but elements of these inputs.
_PASSES_ON: Final = {
    "Where": (1, 2), "Expand": (0,), "Unsqueeze": (0,), "Squeeze": (0,), "Reshape": (0,), "Slice": (0,),
    "Transpose": (0,), "Identity": (0,), "Flatten": (0,), "Gather": (0,), "Tile": (0,),
}  # fmt: skip
_MOST: Final = 1000  # values that a mask is made of; with more, nothing is proven
_MASK_AT: Final = 5


def guarded(graph: ir.Graph) -> bool:
    """Whether some Softmax has a guard behind it."""
    return any(_softmax(node) is not None for node in graph)


def drop_dead(model: ir.Model) -> int:
    """Remove, in place, the guards behind rows that have no mask or a finite one; how many there were."""
    import onnx_ir as ir

    found = 0
    for node in list(model.graph):
        softmax = _softmax(node)
        if softmax is None or node.outputs[0].is_graph_output() or not _never_empty(softmax):
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], softmax.outputs[0])
        found += 1
    return found


def keep_behind(graph: ir.Graph, domain: str) -> int:
    """Put a guard behind every fused attention whose mask may hide a whole row; how many there were."""
    import numpy as np
    import onnx_ir as ir

    found = 0
    for node in list(graph):
        if node.domain != domain or node.op_type not in ("Attention", "MultiHeadAttention"):
            continue
        mask = node.inputs[_MASK_AT] if len(node.inputs) > _MASK_AT else None
        if mask is None or is_finite(mask):
            continue
        out = node.outputs[0]
        kind = out.dtype or ir.DataType.FLOAT
        name = "modelops_zero" if kind == ir.DataType.FLOAT else f"modelops_zero_{kind.name.lower()}"
        if name not in graph.initializers:
            zero = ir.tensor(np.zeros((), kind.numpy()), kind, name=name)
            graph.register_initializer(ir.val(name, const_value=zero))
        uses = list(out.uses())
        empty = ir.node("IsNaN", [out], name=f"{out.name}_is_empty")
        kept = ir.node("Where", [empty.outputs[0], graph.initializers[name], out], name=f"{out.name}_guard")
        empty.outputs[0].name, kept.outputs[0].name = f"{out.name}_empty", f"{out.name}_guarded"
        empty.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        kept.outputs[0].type, kept.outputs[0].shape = ir.TensorType(kind), out.shape
        graph.insert_after(node, [empty, kept])
        for use in uses:
            use.node.replace_input_with(use.idx, kept.outputs[0])
        found += 1
    return found


def is_finite(value: ir.Value) -> bool:
    """Whether a mask is provably finite: chosen from, and spread out of, constants that are.

    Finite is what stays so when a score is added: for float16, at most half of the largest value.
    """
    seen, open_ends = {id(value)}, [value]
    while open_ends:
        value = open_ends.pop()
        if value.const_value is not None:
            if not _all_finite(value.const_value.numpy()):
                return False
            continue
        node = value.producer()
        if node is None or len(seen) > _MOST or node.domain:
            return False
        places = range(len(node.inputs)) if node.op_type == "Concat" else _PASSES_ON.get(node.op_type, ())
        inputs = [node.inputs[at] for at in places]
        if not inputs or None in inputs:
            return False
        for one in inputs:
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                open_ends.append(one)
    return True


def _all_finite(array: Any) -> bool:
    import numpy as np

    if array.dtype.kind in "biu":
        return True
    most = np.finfo(np.float16).max / 2 if array.dtype == np.float16 else np.inf
    return bool((np.isfinite(array.astype(np.float64)) & (np.abs(array.astype(np.float64)) <= most)).all())


def _softmax(node: ir.Node) -> ir.Node | None:
    """The Softmax behind which this Where is a guard."""
    if node.op_type != "Where" or node.domain or len(node.inputs) != 3:
        return None
    condition, zero, value = node.inputs
    asked = condition.producer() if condition is not None else None
    softmax = value.producer() if value is not None else None
    if asked is None or asked.op_type != "IsNaN" or asked.inputs[0] is not value:
        return None
    constant = zero.const_value if zero is not None else None
    if constant is None or constant.size != 1 or float(constant.numpy().ravel()[0]) != 0.0:
        return None
    return softmax if softmax is not None and softmax.op_type == "Softmax" else None


def _never_empty(softmax: ir.Node) -> bool:
    """Whether no row of what goes in can be −∞ throughout: products alone, or with a finite mask added to them."""
    scores = softmax.inputs[0]
    node = scores.producer() if scores is not None else None
    if node is not None and node.op_type == "Add" and not node.domain:
        parts = [one for one in node.inputs if one is not None and not is_finite(one)]
        node = parts[0].producer() if len(parts) == 1 else None
    while node is not None and node.op_type in ("Mul", "Div") and not node.domain:
        other = node.inputs[1]
        if other is None or not is_finite(other) or node.inputs[0] is None:
            return False
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "MatMul" and not node.domain
