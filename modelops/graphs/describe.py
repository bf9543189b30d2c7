"""What a model says of itself: its inputs and outputs, its operators, the size of its weights. No weight is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelops.core.tensors import Signature, TensorSpec
from modelops.graphs import lean as lean_files
from modelops.graphs import tensors
from modelops.graphs.normalise import dim_names, dims_of
from modelops.graphs.sizes import function_key, function_key_of, plain_domain

if TYPE_CHECKING:
    import onnx

#: The shape of a value of unknown rank, and of one that is no tensor.
ANY_SHAPE: Final = ("...",)
_STANDARD_DOMAINS: Final = frozenset(
    {"", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "ai.onnx.preview"}
)


def signature(path: Path) -> Signature:
    """The inputs and outputs of the model in an .onnx file, in the order of the graph.

    Dtypes are numpy or ml_dtypes names (``float32``, ``bfloat16``; strings are ``object``), other types are spelled
    out (``sequence(map(int64,float32))``). Anonymous dimensions are named ``<value>_dim<axis>``; an unknown rank is
    ``ANY_SHAPE``. Inputs that have a default (an initializer of the same name) are left out, as onnxruntime does.
    Raises InputRefused for a file that is no model.
    """
    with lean_files.opened(path) as lean:
        return signature_of(lean.proto)


def signature_of(model: onnx.ModelProto) -> Signature:
    """The same for a model that is parsed already."""
    graph = model.graph
    defaults = {tensor.name for tensor in graph.initializer}
    defaults.update(sparse.values.name for sparse in graph.sparse_initializer)
    taken = dim_names(graph)

    def spec(info: onnx.ValueInfoProto) -> TensorSpec:
        dims = dims_of(info, taken)
        return TensorSpec(info.name, type_name(info.type), ANY_SHAPE if dims is None else tuple(dims))

    inputs = tuple(spec(info) for info in graph.input if info.name not in defaults)
    return Signature(inputs, tuple(spec(info) for info in graph.output))


def type_name(kind: onnx.TypeProto) -> str:
    """The numpy dtype of a tensor type; other types spelled out."""
    which = kind.WhichOneof("value")
    if which == "tensor_type":
        return tensors.dtype_name(kind.tensor_type.elem_type)
    if which == "sequence_type":
        return f"sequence({type_name(kind.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({type_name(kind.optional_type.elem_type)})"
    if which == "map_type":
        return f"map({tensors.dtype_name(kind.map_type.key_type)},{type_name(kind.map_type.value_type)})"
    if which == "sparse_tensor_type":
        return f"sparse({tensors.dtype_name(kind.sparse_tensor_type.elem_type)})"
    return "undefined"


def summary(path: Path) -> dict[str, Any]:
    """What the model in an .onnx file is made of.

    ``ir_version``, ``opsets`` {domain: version}, ``producer``, ``nodes`` and ``operators`` {operator: count} (of the
    graph, its subgraphs and functions, each as written; operators outside the standard are ``domain:name``),
    ``parameters`` (elements) and ``weight_bytes`` {dtype: bytes} of all initializers and constants,
    ``custom_domains`` (of operators that neither the standard nor a function of the model explains), ``functions``
    (their number) and ``external_data``. Raises InputRefused for a file that is no model.
    """
    with lean_files.opened(path) as lean:
        model = lean.proto
        operators, custom = _operators(model)
        parameters, weight_bytes = 0, Counter[str]()
        external = False
        for place in tensors.tensors(model):
            external = external or place.tensor.data_location == tensors.EXTERNAL
            if place.role != "training" and place.tensor.data_type in tensors.TYPES:
                parameters += tensors.count(place.tensor.dims)
                weight_bytes[tensors.dtype_name(place.tensor.data_type)] += tensors.tensor_bytes(place.tensor)
        producer = " ".join(part for part in (model.producer_name, model.producer_version) if part)
        return {
            "ir_version": model.ir_version,
            "opsets": {plain_domain(entry.domain): entry.version for entry in model.opset_import},
            "producer": producer,
            "nodes": operators.total(),
            "operators": dict(sorted(operators.items())),
            "parameters": parameters,
            "weight_bytes": dict(sorted(weight_bytes.items())),
            "custom_domains": custom,
            "functions": len(model.functions),
            "external_data": external,
        }


def _operators(model: onnx.ModelProto) -> tuple[Counter[str], list[str]]:
    """How often each operator stands in the file, and the domains that nothing in it explains."""
    functions = {function_key_of(function) for function in model.functions}
    operators, custom = Counter[str](), set[str]()
    for scope in tensors.scopes(model):
        if scope.kind == "training":
            continue
        for node in scope.body.node:
            domain = plain_domain(node.domain)
            operators[f"{domain}:{node.op_type}" if domain else node.op_type] += 1
            if domain not in _STANDARD_DOMAINS and function_key(node) not in functions:
                custom.add(domain)
    return operators, sorted(custom)
