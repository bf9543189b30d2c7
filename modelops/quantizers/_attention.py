"""What lies between integer products, in the forms that run fastest on a CPU.

::

    MultiHeadAttention(Split(x), bias, mask)   →   Attention(Split(x + bias), Max(mask, -1e38))
    BiasGelu(x, bias), Gelu(x)                 →   Gelu(x + bias, approximate="tanh")

The standard's Attention takes two thirds of the time of onnxruntime's own MultiHeadAttention (1.32, 12 heads of 32,
16 to 128 tokens, AVX2), and biases cost nothing next to a product: integer kernels add them on their way out. Gelu by
tanh differs by 0.0005 at most, far less than a step of its result in 8 bits, and takes two thirds of the time too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from modelops.graphs import guards
from modelops.graphs.fusions import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

# Attention came with opset 23, and with it a version of the file format; Gelu came with 20.
_OPSET, _IR_VERSION, _GELU = 23, 11, 20
# From here on, onnxscript's converter knows what changed between opsets.
_CONVERTIBLE = 18
_BIAS, _PADDING, _MASK, _PAST = 3, 4, 5, 6
# Added to a score, it leaves nothing of it, just as -3.4e38 would.
_LEAST = -1e38
_FREE = frozenset({"num_heads", "scale"})


def rewritten(model: ir.Model, *, fuse: bool, approximate: bool) -> list[str]:
    """Attention and Gelu made cheaper in place, where that is asked for; what was done, in words."""
    notes = []
    before = model.graph.opset_imports.get("") or 0
    if fuse and (count := standard(model)):
        after = model.graph.opset_imports.get("") or 0
        raised = f"; opset {before} → {after}: it needs onnxruntime 1.23 or newer" if after != before else ""
        notes.append(f"{count} attentions are the standard's own operator{raised}")
    if approximate and (count := approximated(model)):
        notes.append(f"{count} Gelu are computed by tanh; --no-approximate leaves them exact")
    return notes


def standard(model: ir.Model) -> int:
    """Turn every MultiHeadAttention that is plain into the standard's Attention, in place; how many there were.

    Left alone are those with padding masks, with keys and values of earlier tokens, or with masks that may hide whole
    rows: what the two make of those is not the same.
    """
    graph = model.graph
    found = [node for node in graph if node.op_type == "MultiHeadAttention" and node.domain == DOMAIN]
    plain = [node for node in found if _is_plain(node) and _biased(node) is not None]
    if not plain or not _raised(model):
        return 0
    for node in plain:
        _replace(graph, node)
    return len(plain)


def approximated(model: ir.Model) -> int:
    """Let every Gelu be computed by tanh, in place; how many there were."""
    import onnx_ir as ir

    graph, count = model.graph, 0
    if (graph.opset_imports.get("") or 0) < _GELU:
        return 0
    for node in list(graph):
        own = node.domain == DOMAIN and node.op_type in ("BiasGelu", "Gelu")
        if not own and (node.op_type != "Gelu" or node.domain or "approximate" in node.attributes):
            continue
        x, out = node.inputs[0], node.outputs[0]
        new: list[ir.Node] = []
        if node.op_type == "BiasGelu":
            new.append(ir.node("Add", [x, node.inputs[1]], name=f"{node.name}_bias"))
            _like(new[-1].outputs[0], out)
            x = new[-1].outputs[0]
        new.append(ir.node("Gelu", [x], {"approximate": "tanh"}, name=f"{node.name}_tanh"))
        _like(new[-1].outputs[0], out)
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [out], new[-1].outputs)
        count += 1
    return count


def _is_plain(node: ir.Node) -> bool:
    """Whether it does nothing but attend, with a mask that leaves something of every row."""
    inputs = [*node.inputs, *([None] * _PAST)]
    if None in inputs[:3] or inputs[_PADDING] is not None or any(value is not None for value in node.inputs[_PAST:]):
        return False
    if any(list(value.uses()) or value.is_graph_output() for value in node.outputs[1:]):
        return False
    mask = inputs[_MASK]
    return set(node.attributes) <= _FREE and (mask is None or guards.is_finite(mask))


@dataclass(frozen=True)
class _Biased:
    """A value that a reader takes as one of its inputs, and the columns of a bias that belong to it."""

    reader: ir.Node
    place: int
    start: int
    stop: int


def _biased(node: ir.Node) -> list[_Biased] | None:
    """Where its bias can be added beforehand; None where that is not known."""
    parts = [value for value in node.inputs[:3] if value is not None]
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    if bias is None:
        return []
    if bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    size, split = int(bias.const_value.shape[0]), parts[0].producer()
    if split is not None and split.op_type == "Split" and len(split.outputs) == len(parts):
        axis, alone = split.attributes.get("axis"), all(len(list(part.uses())) == 1 for part in parts)
        whole = alone and axis is not None and axis.as_int() == -1
        same = all(part is output for part, output in zip(parts, split.outputs, strict=True))
        return [_Biased(split, 0, 0, size)] if whole and same else None
    widths = [part.shape[-1] if part.shape is not None else None for part in parts]
    ends = list(accumulate(width if isinstance(width, int) else size for width in widths))
    if ends[-1] != size:
        return None
    return [_Biased(node, at, start, stop) for at, (start, stop) in enumerate(pairwise([0, *ends]))]


def _raised(model: ir.Model) -> bool:
    """Raise the opset to that of Attention where that is known to change nothing else."""
    import onnxscript.version_converter

    found = model.graph.opset_imports.get("") or 0
    if found < _CONVERTIBLE:
        return False
    if found < _OPSET:
        onnxscript.version_converter.convert_version(model, _OPSET)
        model.ir_version = max(model.ir_version, _IR_VERSION)
    return (model.graph.opset_imports.get("") or 0) >= _OPSET


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    from modelops.quantizers._folding import initializer

    bias, out = (node.inputs[_BIAS] if len(node.inputs) > _BIAS else None), node.outputs[0]
    for one in _biased(node) or []:
        value = one.reader.inputs[one.place]
        assert value is not None and bias is not None and bias.const_value is not None
        part = initializer(graph, f"{bias.name}_added", bias.const_value.numpy()[one.start : one.stop])
        add = ir.node("Add", [value, part], name=f"{node.name}_bias{one.place}")
        _like(add.outputs[0], value)
        graph.insert_before(one.reader, add)
        one.reader.replace_input_with(one.place, add.outputs[0])
    mask = node.inputs[_MASK] if len(node.inputs) > _MASK else None
    heads = node.attributes["num_heads"].as_int()
    attributes: dict[str, int | float] = {"q_num_heads": heads, "kv_num_heads": heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    inputs = [*node.inputs[:3], *([_clipped(graph, mask, node)] if mask is not None else [])]
    attention = ir.node("Attention", inputs, attributes, name=f"{node.name}_standard")
    _like(attention.outputs[0], out)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [attention], [out], attention.outputs)


def _clipped(graph: ir.Graph, mask: ir.Value, reader: ir.Node) -> ir.Value:
    """The mask without the least number there is, which onnxruntime takes for -inf: once for all readers."""
    import numpy as np
    import onnx_ir as ir

    from modelops.quantizers._folding import initializer

    for use in mask.uses():
        if str(use.node.name) == f"{mask.name}_clipped":
            return use.node.outputs[0]
    least = initializer(graph, "modelops_least", np.array(_LEAST, np.float32))
    node = ir.node("Max", [mask, least], name=f"{mask.name}_clipped")
    _like(node.outputs[0], mask)
    graph.insert_before(reader, node)
    return node.outputs[0]


def _like(value: ir.Value, model: ir.Value) -> None:
    value.type, value.shape = model.type, model.shape
