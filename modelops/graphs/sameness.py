"""Whether two files hold the same computation: the same nodes on the same weights, whatever their values are called."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelops.graphs.lean import Lean, opened
from modelops.graphs.tensors import STRING

if TYPE_CHECKING:
    import onnx

#: Operators whose results differ although their inputs don't: of two such nodes it matters which one is read.
_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}
)


def computation(path: Path) -> str:
    """A digest of what a model computes; empty for one with functions, sparse weights or random numbers.

    Names of inputs and outputs, types, versions of operators, attributes, weights and how nodes are joined enter it;
    names inside the graph, the order of independent nodes, inferred shapes and remarks do not.
    """
    with opened(path) as lean:
        model = lean.proto
        if model.functions or model.training_info:
            return ""
        try:
            body = _body(lean, model.graph, {})
        except _Unknown:
            return ""
        versions = sorted((entry.domain, entry.version) for entry in model.opset_import)
        return _digest(str(versions), body)


class _Unknown(Exception):
    """The graph holds what can't be told apart by a digest."""


def _body(lean: Lean, graph: onnx.GraphProto, outer: dict[str, str]) -> str:
    """The digest of a body; ``outer`` are the digests of the values that it sees from outside."""
    if graph.sparse_initializer:
        raise _Unknown
    known = dict(outer)
    for tensor in graph.initializer:
        known[tensor.name] = _tensor(lean, tensor)
    inputs = []
    for number, value in enumerate(graph.input):
        # Of a body in a body, those of the outer one are other values, though they stand at the same place.
        place = value.name if not outer else f"{outer['']}{number}"
        inputs.append(_digest(place, _type(value), known.get(value.name, "")))
        known[value.name] = inputs[-1]
    nodes = []
    for node in graph.node:
        if node.op_type in _RANDOM:
            raise _Unknown
        read = ",".join(_of(known, name) if name else "" for name in node.input)
        attributes = sorted(_attribute(lean, attribute, known) for attribute in node.attribute)
        nodes.append(_digest(node.domain, node.op_type, node.overload, read, *attributes))
        for number, name in enumerate(node.output):
            known[name] = _digest(nodes[-1], str(number))
    outputs = [_digest(value.name if not outer else "", _type(value), _of(known, value.name)) for value in graph.output]
    return _digest(",".join(inputs), ",".join(outputs), ",".join(sorted(nodes)))


def _of(known: dict[str, str], name: str) -> str:
    if name not in known:
        raise _Unknown
    return known[name]


def _attribute(lean: Lean, attribute: onnx.AttributeProto, known: dict[str, str]) -> str:
    head = (attribute.name, str(attribute.type))
    if attribute.HasField("sparse_tensor") or attribute.sparse_tensors or attribute.ref_attr_name:
        raise _Unknown
    if attribute.HasField("g") or attribute.graphs:
        graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        inside = {**known, "": f"{known.get('', '')}inside "}
        return _digest(*head, *(_body(lean, graph, inside) for graph in graphs))
    if attribute.HasField("t") or attribute.tensors:
        tensors = [attribute.t] if attribute.HasField("t") else list(attribute.tensors)
        return _digest(*head, *(_tensor(lean, tensor) for tensor in tensors))
    plain = type(attribute)()
    plain.CopyFrom(attribute)
    plain.ClearField("doc_string")
    return _digest(*head, plain.SerializeToString(deterministic=True).hex())


def _tensor(lean: Lean, tensor: onnx.TensorProto) -> str:
    total = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)} ".encode())
    if tensor.data_type == STRING:
        for text in tensor.string_data:
            total.update(len(text).to_bytes(8, "little") + text)
    elif span := lean.span(tensor):
        for chunk in span.chunks():
            total.update(chunk)
    else:
        total.update(lean.packed(tensor))
    return total.hexdigest()


def _type(value: onnx.ValueInfoProto) -> str:
    kind: Any = value.type
    return str(kind.SerializeToString(deterministic=True).hex())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
