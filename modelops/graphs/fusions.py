"""Transformers in onnxruntime's own operators: attention, normalization and activations as one node each.

onnxscript's rewriter finds the patterns. What it gets wrong, or leaves undone, is put right here; the caller holds the
result against the source before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from modelops.graphs import guards
from modelops.graphs.unfolding import unfold

if TYPE_CHECKING:
    import onnx_ir as ir

#: The domain of onnxruntime's own operators.
DOMAIN: Final = "com.microsoft"
_PRODUCT, _PARTS = "_projection", "_parts"
# Split takes its sizes as an input since opset 13.
_OPSET = 13
_LAYER_NORMALIZATION = 17


def attends(graph: ir.Graph) -> bool:
    """Whether two activations are multiplied with each other after a Softmax."""
    softmax = any(node.op_type == "Softmax" for node in graph)
    return softmax and any(
        node.op_type == "MatMul" and all(value is not None and value.const_value is None for value in node.inputs)
        for node in graph
    )


def fuse(model: ir.Model, *, apart: bool = False, skips: bool = True) -> dict[str, int]:
    """Fuse in place; the fusions that happened, by name.

    ``apart`` takes the product of packed projections out of Attention again (see ``take_apart``); without ``skips``,
    sums and normalizations stay two operators (see ``part_skip``).
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    types = {value.name: value.type for node in model.graph for value in node.outputs}
    unfolded, guarded = unfold(model), guards.guarded(model.graph)
    fused_model, counts = optimize_for_ort(model)
    assert fused_model is model or fused_model.graph is model.graph
    for node in list(model.graph):
        if apart and node.op_type == "Attention" and node.domain == DOMAIN:
            take_apart(model.graph, node)
        if not skips and node.op_type == "SkipLayerNormalization" and node.domain == DOMAIN:
            counts["skip_layer_normalization"] -= part_skip(model.graph, node)
    if guarded:
        guards.keep_behind(model.graph, DOMAIN)
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or types.get(value.name) or _type_of(node)
    if unfolded and any(counts.values()):
        counts["linear"] = unfolded
    return {name: count for name, count in sorted(counts.items()) if count}


def _type_of(node: ir.Node) -> ir.TypeProtocol | None:
    """The type of what a node that fusing brought in gives; later passes need to know it."""
    import onnx_ir as ir

    floats = node.domain == DOMAIN or str(node.name).endswith((_PRODUCT, _PARTS))
    return ir.TensorType(ir.DataType.FLOAT) if floats else None


def take_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Replace an Attention by one product and a MultiHeadAttention, where its weights are in the file::

    Attention(x, [Wq Wk Wv], b, mask)   →   MultiHeadAttention(Split(x · [Wq Wk Wv]), b, mask)
    """
    import onnx_ir as ir

    inputs = [*node.inputs, *([None] * (7 - len(node.inputs)))]
    x, packed, bias, mask_index, past, mask = inputs[:6]
    name = node.name or node.outputs[0].name
    weight = _matrix(graph, packed)
    unlike = mask_index is not None or past is not None or inputs[6] is not None or not _is_plain(node)
    if weight is None or unlike or (graph.opset_imports.get("") or 0) < _OPSET:
        return
    product = ir.node("MatMul", [x, weight], name=f"{name}{_PRODUCT}")
    sizes = _sizes(graph, node, weight)
    parts = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=3, name=f"{name}{_PARTS}")
    attributes: dict[str, Any] = {"num_heads": node.attributes["num_heads"].as_int()}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    heads = ir.node(
        "MultiHeadAttention",
        [*parts.outputs, bias, None, mask],
        attributes,
        domain=DOMAIN,
        name=f"{name}_heads",
    )
    for value, part in zip((*product.outputs, *parts.outputs), ("qkv", "query", "key", "value"), strict=True):
        value.name = f"{name}_{part}"
    new = [product, parts, heads]
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs[:1], heads.outputs)


def part_skip(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a SkipLayerNormalization by a Sum and a LayerNormalization; whether it was one of the usual form.

    On the CPU, onnxruntime's kernel for both takes six times as long as its kernels for each (1.32: 330 against 60 µs
    on 128 × 384). It makes one of the other by itself where it finds Add, but not where it finds Sum.
    """
    import onnx_ir as ir

    inputs = [*node.inputs, *([None] * (5 - len(node.inputs)))]
    name = node.name or node.outputs[0].name
    x, skip, gamma, beta, bias = inputs[:5]
    statistics = any(list(value.uses()) or value.is_graph_output() for value in node.outputs[1:3])
    if statistics or (graph.opset_imports.get("") or 0) < _LAYER_NORMALIZATION:
        return False
    new = []
    if bias is not None:
        new.append(ir.node("Add", [x, bias], name=f"{name}_bias"))
        x = new[-1].outputs[0]
    total = ir.node("Sum", [x, skip], name=f"{name}_sum")
    attributes: dict[str, Any] = {"axis": -1}
    if "epsilon" in node.attributes:
        attributes["epsilon"] = node.attributes["epsilon"].as_float()
    else:
        attributes["epsilon"] = 1e-12
    scaled = [total.outputs[0], gamma, *([beta] if beta is not None else [])]
    normal = ir.node("LayerNormalization", scaled, attributes, name=f"{name}_normal")
    for number, one in enumerate([*new, total, normal]):
        one.outputs[0].name = f"{name}_part{number}"
        one.outputs[0].type, one.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    old, fresh = [node.outputs[0]], [normal.outputs[0]]
    if len(node.outputs) > 3:
        old.append(node.outputs[3])
        fresh.append(total.outputs[0])
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*new, total, normal], old, fresh)
    return True


def _matrix(graph: ir.Graph, packed: ir.Value | None) -> ir.Value | None:
    """The packed weights as one initializer; None where they are computed."""
    import numpy as np
    import onnx_ir as ir

    if packed is None or packed.is_initializer():
        return packed
    producer = packed.producer()
    if producer is None or producer.op_type != "Concat":
        return None
    tensors = [value.const_value if value is not None else None for value in producer.inputs]
    arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
    if len(arrays) != 3 or any(array.ndim != 2 for array in arrays):
        return None
    name = f"{producer.name}_packed"
    if name not in graph.initializers:
        whole = np.concatenate(arrays, axis=1)
        graph.register_initializer(ir.val(name, const_value=ir.tensor(whole, name=name)))
    return graph.initializers[name]


def _sizes(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value:
    """How the columns of the packed weights divide into query, key and value, as an initializer."""
    import numpy as np
    import onnx_ir as ir

    given = node.attributes.get("qkv_hidden_sizes")
    assert weight.const_value is not None
    sizes = given.as_ints() if given is not None else [int(weight.const_value.shape[1]) // 3] * 3
    name = "modelops_split_" + "_".join(map(str, sizes))
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(sizes, dtype=np.int64), name=name)
        graph.register_initializer(ir.val(name, const_value=tensor))
    return graph.initializers[name]


def _is_plain(node: ir.Node) -> bool:
    """Whether an Attention does nothing that the parts would not do."""
    unused = all(not list(value.uses()) and not value.is_graph_output() for value in node.outputs[1:])
    return unused and set(node.attributes) <= {"num_heads", "qkv_hidden_sizes", "scale"}
