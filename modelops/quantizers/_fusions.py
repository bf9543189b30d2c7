"""Transformers fused for onnxruntime before they are quantized: the integer kernels are not all that takes time.

Around the products of a transformer, softmax, normalization and masks take most of the time that int8 leaves. Fused,
MiniLM runs 1.1 to 1.4 times as fast again. onnxscript's rewriter finds the patterns; it is held against the source
before its graph is used. Where it packs the projections into one Attention node, whose int8 form takes no additive
mask, the product is taken out again, so that it can be quantized::

    Attention(x, [Wq Wk Wv], b, mask)   →   MultiHeadAttention(Split(x · [Wq Wk Wv]), b, mask)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.errors import ModelOpsError

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger(__name__)

_DOMAIN = "com.microsoft"
_PRODUCT, _PARTS = "_projection", "_parts"
# Split takes its sizes as an input since opset 13.
_OPSET = 13
_ROWS = 4
# Fusing changes the order of a few sums: 126 dB on MiniLM.
_LEAST_SQNR = 80.0


def fused(source: Path, scratch: Path, keep: set[str]) -> tuple[Path, dict[str, int], str]:
    """(the fused model, how many fusions of each sort, a remark); the source itself where nothing is gained.

    ``keep`` names nodes that the user spoke of: a graph that would lose one of them stays as it is.
    """
    from modelops.graphs import files
    from modelops.quantizers._weights import read

    model = read(source)
    if not _attends(model.graph):
        return source, {}, ""
    types = {value.name: value.type for node in model.graph for value in node.outputs}
    target = scratch / "fused.onnx"
    try:
        counts = _fuse(model)
        if not counts:
            return source, {}, ""
        if lost := sorted(keep - {str(node.name) for node in model.graph}):
            return source, {}, f"attention was not fused, since that would swallow {lost[0]!r} of --exclude"
        for node in model.graph:
            for value in node.outputs:
                value.type = value.type or types.get(value.name) or _type_of(node)
        files.save(model, target)
        found = _sqnr(source, target)
    except ModelOpsError as error:
        log.debug("fusing failed", exc_info=True)
        return source, {}, f"attention was not fused: {error.message}"
    except Exception as error:
        log.debug("fusing failed", exc_info=True)
        return source, {}, f"attention was not fused: onnxscript's rewriter failed ({type(error).__name__})"
    if not found >= _LEAST_SQNR:
        return source, {}, f"attention was not fused: the fused graph differs from the source ({found:.0f} dB)"
    return target, counts, "fused for onnxruntime before it was quantized: other runtimes may not know these operators"


def _attends(graph: ir.Graph) -> bool:
    """Whether two activations are multiplied with each other after a Softmax."""
    softmax = any(node.op_type == "Softmax" for node in graph)
    return softmax and any(
        node.op_type == "MatMul" and all(value is not None and value.const_value is None for value in node.inputs)
        for node in graph
    )


def _fuse(model: ir.Model) -> dict[str, int]:
    """Fuse in place; the fusions that happened, by name."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fused_model, counts = optimize_for_ort(model)
    assert fused_model is model or fused_model.graph is model.graph
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain == _DOMAIN:
            _take_apart(model.graph, node)
    return {name: count for name, count in sorted(counts.items()) if count}


def _type_of(node: ir.Node) -> ir.TypeProtocol | None:
    """The type of what a node that we brought in gives; later passes need to know it."""
    import onnx_ir as ir

    floats = node.domain == _DOMAIN or str(node.name).endswith((_PRODUCT, _PARTS))
    return ir.TensorType(ir.DataType.FLOAT) if floats else None


def _take_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Replace an Attention by one product and a MultiHeadAttention, where its weights are in the file."""
    import onnx_ir as ir

    inputs = [*node.inputs, *([None] * (7 - len(node.inputs)))]
    x, packed, bias, mask_index, past, mask = inputs[:6]
    weight = _matrix(graph, packed)
    unlike = mask_index is not None or past is not None or inputs[6] is not None or not _is_plain(node)
    if weight is None or unlike or (graph.opset_imports.get("") or 0) < _OPSET:
        return
    product = ir.node("MatMul", [x, weight], name=f"{node.name}{_PRODUCT}")
    sizes = _sizes(graph, node, weight)
    parts = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=3, name=f"{node.name}{_PARTS}")
    attributes: dict[str, Any] = {"num_heads": node.attributes["num_heads"].as_int()}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    heads = ir.node(
        "MultiHeadAttention",
        [*parts.outputs, bias, None, mask],
        attributes,
        domain=_DOMAIN,
        name=f"{node.name}_heads",
    )
    for value, name in zip((*product.outputs, *parts.outputs), ("qkv", "query", "key", "value"), strict=True):
        value.name = f"{node.name}_{name}"
    new = [product, parts, heads]
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs[:1], heads.outputs)


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


def _sqnr(source: Path, candidate: Path) -> float:
    """The least ratio of signal to noise among the outputs, on a few made-up rows."""
    from modelops.graphs import runs
    from modelops.graphs.batches import row_axes
    from modelops.measures.comparison import Comparison

    with runs.session(source, trusted=True) as before, runs.session(candidate) as after:
        comparison = Comparison(axes=row_axes(before.signature))
        for feed in _feeds(source, before.signature):
            comparison.add(runs.run(before, feed), runs.run(after, feed))
    values = [difference.sqnr for difference in comparison.differences().values() if not difference.problem]
    found = [value for value in values if value is not None]
    return min(found) if found and len(values) == len(comparison.differences()) else float("nan")


def _feeds(source: Path, signature: Any) -> Iterator[dict[str, Any]]:
    from modelops.graphs.seeded import index_bounds, random_feeds

    yield from random_feeds(signature, _ROWS, bounds=index_bounds(source))
