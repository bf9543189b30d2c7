"""Tensors inside an ONNX file: where they hide, what they are called in numpy, how many bytes they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import onnx

#: ``TensorProto.data_type`` → (numpy or ml_dtypes name, bits of one element). Strings are numpy objects of any size.
TYPES: Final[dict[int, tuple[str, int]]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("object", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8),
    18: ("float8_e4m3fnuz", 8),
    19: ("float8_e5m2", 8),
    20: ("float8_e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4_e2m1fn", 4),
    24: ("float8_e8m0fnu", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
    27: ("float6_e2m3fn", 6),
    28: ("float6_e3m2fn", 6),
}
STRING: Final = 8
EXTERNAL: Final = 1
#: The fields that may hold the elements of a tensor outside ``raw_data``.
TYPED_FIELDS: Final = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def dtype_name(data_type: int) -> str:
    """The numpy name of an ONNX element type; ``undefined`` for a number that ONNX doesn't know."""
    return TYPES[data_type][0] if data_type in TYPES else "undefined"


def count(dims: Iterable[int]) -> int:
    """The number of elements of a tensor with these dimensions."""
    return math.prod(dims)


def packed_bytes(elements: int, data_type: int) -> int:
    """Bytes of that many elements as ONNX packs them: types below 8 bits share bytes."""
    return (elements * TYPES[data_type][1] + 7) // 8


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements, told from its dimensions and type; for strings the length of its texts."""
    if tensor.data_type == STRING:
        return sum(map(len, tensor.string_data))
    return packed_bytes(count(tensor.dims), tensor.data_type) if tensor.data_type in TYPES else 0


class Scope(NamedTuple):
    """A body of nodes: the main graph, a subgraph, a function, or a training graph (``kind``)."""

    body: onnx.GraphProto | onnx.FunctionProto
    kind: str
    where: str
    depth: int


class Place(NamedTuple):
    """A tensor and where it was found: ``role`` is initializer, sparse or attribute."""

    tensor: onnx.TensorProto
    role: str
    where: str

    def __str__(self) -> str:
        return f"{self.where} {self.tensor.name!r}" if self.tensor.name else self.where


def node_label(node: onnx.NodeProto) -> str:
    """How messages name a node: its operator and its name, or its first output where it has none."""
    operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
    return f"node {node.name or (node.output[0] if node.output else '')!r} ({operator})"


def scopes(model: onnx.ModelProto) -> Iterator[Scope]:
    """Every body of nodes in the file, outer ones first; fields are followed whatever an attribute's type claims."""
    stack = [Scope(model.graph, "graph", "the graph", 0)]
    for function in model.functions:
        stack.append(Scope(function, "function", f"function {function.name!r}", 0))
    for info in model.training_info:
        stack += [Scope(graph, "training", "training_info", 0) for graph in (info.initialization, info.algorithm)]
    stack.reverse()
    while stack:
        scope = stack.pop()
        yield scope
        for owner, attribute in attributes(scope):
            if attribute.HasField("g") or attribute.graphs:
                where = f"subgraph {attribute.name!r} of {owner}"
                for graph in graphs_of(attribute):
                    stack.append(Scope(graph, "subgraph", where, scope.depth + 1))


def attributes(scope: Scope) -> Iterator[tuple[str, onnx.AttributeProto]]:
    """The attributes of the nodes of one body, not of the bodies inside it, with the label of their owner."""
    for node in scope.body.node:
        if node.attribute:
            label = node_label(node)
            for attribute in node.attribute:
                yield label, attribute
    if scope.kind == "function":
        for attribute in scope.body.attribute_proto:
            yield f"default of {scope.where}", attribute


def graphs_of(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs that an attribute holds."""
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def sparse_tensors(scope: Scope) -> Iterator[tuple[str, onnx.SparseTensorProto]]:
    """Every sparse tensor of one body, with where it is."""
    if scope.kind != "function":
        for sparse in scope.body.sparse_initializer:
            yield f"sparse initializer {sparse.values.name!r}", sparse
    for owner, attribute in attributes(scope):
        if attribute.HasField("sparse_tensor"):
            yield f"sparse attribute {attribute.name!r} of {owner}", attribute.sparse_tensor
        for sparse in attribute.sparse_tensors:
            yield f"sparse attribute {attribute.name!r} of {owner}", sparse


def tensors(model: onnx.ModelProto) -> Iterator[Place]:
    """Every dense tensor in the file, in a fixed order.

    That is initializers, attributes, and the values and indices of sparse tensors, in the graph, its subgraphs,
    functions and training information.
    """
    for scope in scopes(model):
        if scope.kind != "function":
            role = "initializer" if scope.kind in ("graph", "subgraph") else "training"
            suffix = "" if scope.kind == "graph" else f" in {scope.where}"
            for tensor in scope.body.initializer:
                yield Place(tensor, role, f"initializer{suffix}")
        for owner, attribute in attributes(scope):
            if attribute.HasField("t"):
                yield Place(attribute.t, "attribute", f"attribute {attribute.name!r} of {owner}")
            for tensor in attribute.tensors:
                yield Place(tensor, "attribute", f"attribute {attribute.name!r} of {owner}")
        for where, sparse in sparse_tensors(scope):
            yield Place(sparse.values, "sparse", f"values of {where}")
            yield Place(sparse.indices, "sparse", f"indices of {where}")


def missing_elements(tensor: onnx.TensorProto, raw_length: int) -> str:
    """What is wrong with the amount of inline data of a tensor, or an empty string.

    ``raw_length`` is the length of ``raw_data``, which may still be lying in the file.
    """
    elements = count(tensor.dims)
    filled = [field for field in TYPED_FIELDS if len(getattr(tensor, field))]
    if len(filled) + (raw_length > 0) > 1:
        return f"holds its elements twice ({', '.join([*filled, 'raw_data'] if raw_length else filled)})"
    if tensor.data_type == STRING:
        found = len(tensor.string_data)
        return "" if found == elements and not raw_length else f"has {found} strings where its shape needs {elements}"
    expected = packed_bytes(elements, tensor.data_type)
    if raw_length or not filled:
        return "" if raw_length == expected else f"has {raw_length} bytes where its shape needs {expected}"
    return _typed_elements(tensor, filled[0], elements)


def _typed_elements(tensor: onnx.TensorProto, field: str, elements: int) -> str:
    name, bits = TYPES[tensor.data_type]
    if field not in _FIELDS_OF.get(name, ("int32_data",)):
        return f"holds {name} elements in {field}"
    allowed = {elements * (2 if name.startswith("complex") else 1)}
    if bits < 8:  # packed like raw_data, or one element to an int32
        allowed.add(packed_bytes(elements, tensor.data_type))
    found = len(getattr(tensor, field))
    return "" if found in allowed else f"has {found} elements where its shape needs {elements}"


_FIELDS_OF: Final[dict[str, Sequence[str]]] = {
    "float32": ("float_data",),
    "complex64": ("float_data",),
    "float64": ("double_data",),
    "complex128": ("double_data",),
    "int64": ("int64_data",),
    "uint64": ("uint64_data",),
    "uint32": ("uint64_data",),
}


def garbled(model: onnx.ModelProto) -> str:
    """Where a name or text is not UTF-8, or an empty string; protobuf hands such texts out as bytes."""
    where = "the model"
    try:
        _joined([model], "producer_name", "producer_version", "domain", "doc_string")
        _joined(model.metadata_props, "key", "value")
        _joined(model.opset_import, "domain")
        for function in model.functions:
            "".join((function.domain, function.overload, *function.input, *function.output, *function.attribute))
            _joined(function.opset_import, "domain")
        for scope in scopes(model):
            where = scope.where
            body = scope.body
            _joined([body], "name", "doc_string")
            _joined(body.metadata_props, "key", "value")
            for node in body.node:
                where = f"a node of {scope.where}"
                "".join(
                    (node.name, node.op_type, node.domain, node.overload, node.doc_string, *node.input, *node.output)
                )
                _joined(node.metadata_props, "key", "value")
                _joined(node.attribute, "name", "doc_string", "ref_attr_name")
            where = f"a value of {scope.where}"
            values = list(body.value_info)
            if scope.kind != "function":
                values += [*body.input, *body.output]
                for annotation in body.quantization_annotation:
                    _joined(annotation.quant_parameter_tensor_names, "key", "value")
                _joined(body.quantization_annotation, "tensor_name")
            for value in values:
                _joined([value], "name", "doc_string")
                _joined(value.metadata_props, "key", "value")
                _joined(value.type.tensor_type.shape.dim, "dim_param", "denotation")
        for place in tensors(model):
            where = place.where
            _joined([place.tensor], "name", "doc_string")
            _joined(place.tensor.external_data, "key", "value")
            _joined(place.tensor.metadata_props, "key", "value")
    except TypeError:
        return where
    return ""


def _joined(messages: Iterable[Any], *fields: str) -> None:
    """Raise TypeError where one of the fields is bytes."""
    for message in messages:
        "".join([getattr(message, field) for field in fields])
