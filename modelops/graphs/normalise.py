"""One form for every model that is let in: nothing in it that leaks or differs by chance, nothing that tools drop.

Exporters leave stack traces and paths of their machine in metadata, nodes without names and dimensions without names;
most tools silently lose sparse weights and training information.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from modelops.graphs import tensors
from modelops.graphs.lean import Lean, Refusal
from modelops.graphs.values import Value

if TYPE_CHECKING:
    import onnx

#: A stack trace, or the path of a file on somebody's machine. Names such as /encoder/layer.0/MatMul are no paths.
_PRIVATE: Final = re.compile(
    r"""File\ "[^"]+",\ line\ \d+
    |(?:^|[\s"'(=\[,:])(?:
        (?:file://)?/(?:home|root|Users|usr|tmp|var|opt|mnt|media|srv|data|work|workspace|workspaces|private|build|content
            |kaggle|nix|scratch|gpfs|lustre|Volumes|etc|proc|run)/\S
        |(?:file://)?/[^\s"']+\.(?:py|pyc|pt|pth|pt2|ckpt|onnx|so|bin|safetensors|json|yaml|ipynb)\b
        |~/\S
        |[A-Za-z]:\\\S
    )""",
    re.VERBOSE,
)
_TRACE_KEY: Final = re.compile(r"stack_?trace|traceback|source_?(?:file|path)|file_?name", re.IGNORECASE)


def normalise(lean: Lean, outputs: Sequence[Value] = ()) -> list[str]:
    """Bring a model that passed the check into that form; what was changed, in words.

    ``outputs`` is what the check found out about them: tools insist on a rank, which exporters may leave out.

    Raises Refusal for sparse weights whose indices lie outside their shape.
    """
    model = lean.proto
    model.DiscardUnknownFields()
    notes = []
    if model.training_info:
        del model.training_info[:]
        notes.append("training information dropped")
    if count := dense(lean):
        notes.append(f"{count:,} sparse weights made dense")
    if count := strip(model):
        notes.append(f"{count:,} stack traces and paths removed")
    if count := name_nodes(model):
        notes.append(f"{count:,} nodes given a name of their own")
    rank_outputs(model, outputs)
    name_dims(model)
    for place in tensors.tensors(model):
        if place.tensor.data_location != tensors.EXTERNAL:
            place.tensor.ClearField("data_location")
            place.tensor.ClearField("external_data")
    return notes


def strip(model: onnx.ModelProto) -> int:
    """Remove stack traces and paths from descriptions and metadata; how many there were."""
    removed = 0
    for message in _described(model):
        if message.doc_string and _PRIVATE.search(message.doc_string):
            message.ClearField("doc_string")
            removed += 1
        entries = getattr(message, "metadata_props", ())
        if not entries:
            continue
        kept = {
            entry.key: entry.value
            for entry in entries
            if not (_TRACE_KEY.search(entry.key) or _PRIVATE.search(entry.value))
        }
        if len(kept) < len(entries):
            removed += len({entry.key for entry in entries}) - len(kept)
            del message.metadata_props[:]
            for key, value in kept.items():
                message.metadata_props.add(key=key, value=value)
    return removed


def _described(model: onnx.ModelProto) -> Iterator[Any]:
    """Every message that has a description."""
    yield model
    for scope in tensors.scopes(model):
        yield scope.body
        for node in scope.body.node:
            yield node
            yield from node.attribute
        yield from scope.body.value_info
        if scope.kind != "function":
            yield from scope.body.input
            yield from scope.body.output
    for place in tensors.tensors(model):
        yield place.tensor


def name_nodes(model: onnx.ModelProto) -> int:
    """Give every node without a name, or with one that is taken, a name of its own; how many there were."""
    changed = 0
    counters: defaultdict[str, int] = defaultdict(int)
    taken: set[str] = set()  # one for the graph and all its subgraphs; each function starts anew
    for scope in tensors.scopes(model):
        if scope.kind == "function":
            taken, counters = set(), defaultdict(int)
        unnamed = []
        for node in scope.body.node:
            if node.name and node.name not in taken:
                taken.add(node.name)
            else:
                unnamed.append(node)
        for node in unnamed:
            stem = node.name or node.op_type
            while f"{stem}_{counters[stem]}" in taken:
                counters[stem] += 1
            node.name = f"{stem}_{counters[stem]}"
            taken.add(node.name)
        changed += len(unnamed)
    return changed


def dims_of(info: onnx.ValueInfoProto, taken: set[str]) -> list[int | str] | None:
    """The dimensions of a value, anonymous ones named ``<value>_dim<axis>``; None when the rank is unknown."""
    if not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
        return None
    dims: list[int | str] = []
    for axis, dim in enumerate(info.type.tensor_type.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
            continue
        name = dim.dim_param or f"{info.name}_dim{axis}"
        while not dim.dim_param and name in taken:
            name += "_"
        dims.append(name)
    return dims


def dim_names(graph: onnx.GraphProto) -> set[str]:
    """The names that the inputs and outputs give to dimensions."""
    values = [*graph.input, *graph.output]
    return {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim} - {""}


def rank_outputs(model: onnx.ModelProto, known: Sequence[Value]) -> None:
    """Give outputs without a shape as many anonymous dimensions as they are known to have."""
    for info, value in zip(model.graph.output, known, strict=False):
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape") and value.dims is not None:
            info.type.tensor_type.shape.SetInParent()
            for _ in value.dims:
                info.type.tensor_type.shape.dim.add()


def name_dims(model: onnx.ModelProto) -> None:
    """Name the anonymous dimensions of inputs and outputs."""
    taken = dim_names(model.graph)
    for info in (*model.graph.input, *model.graph.output):
        for dim, known in zip(info.type.tensor_type.shape.dim, dims_of(info, taken) or (), strict=False):
            if isinstance(known, str):
                dim.dim_param = known


def dense(lean: Lean) -> int:
    """Turn sparse weights, and sparse constants, into dense ones; how many there were."""
    count = 0
    for scope in tensors.scopes(lean.proto):
        if scope.kind != "function":
            for sparse in scope.body.sparse_initializer:
                scope.body.initializer.append(_dense(lean, sparse, f"sparse initializer {sparse.values.name!r}"))
                count += 1
            del scope.body.sparse_initializer[:]
        for node in scope.body.node:
            for attribute in node.attribute:
                if (
                    node.op_type == "Constant"
                    and attribute.name == "sparse_value"
                    and attribute.HasField("sparse_tensor")
                ):
                    attribute.t.CopyFrom(_dense(lean, attribute.sparse_tensor, tensors.node_label(node)))
                    attribute.ClearField("sparse_tensor")
                    attribute.name, attribute.type = "value", 4
                    count += 1
    return count


def _dense(lean: Lean, sparse: onnx.SparseTensorProto, who: str) -> onnx.TensorProto:
    import numpy as np
    import onnx
    import onnx_ir

    def array(tensor: onnx.TensorProto) -> Any:
        plain = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=lean.packed(tensor))
        return onnx_ir.serde.TensorProtoTensor(plain).numpy()

    if sparse.values.data_type == tensors.STRING or sparse.indices.data_type not in (3, 5, 6, 7):
        raise Refusal(f"{who}: only numbers with integer indices can be sparse")
    values, indices, dims = array(sparse.values).ravel(), array(sparse.indices), tuple(sparse.dims)
    outside = f"{who}: its indices do not fit its shape {list(dims)[:8]}"
    if not dims or any(dim <= 0 for dim in dims) or indices.ndim not in (1, 2) or len(indices) != len(values):
        raise Refusal(outside)
    if indices.ndim == 2:
        if indices.shape[1] != len(dims) or (indices < 0).any() or (indices >= np.array(dims)).any():
            raise Refusal(outside)
        indices = np.ravel_multi_index(tuple(indices.T.astype(np.int64)), dims) if len(indices) else indices[:, 0]
    if len(indices) and (indices.min() < 0 or indices.max() >= tensors.count(dims)):
        raise Refusal(outside)
    whole = np.zeros(tensors.count(dims), dtype=values.dtype)
    whole[indices.astype(np.int64)] = values
    packed = onnx_ir.Tensor(whole.reshape(dims), dtype=onnx_ir.DataType(sparse.values.data_type)).tobytes()
    return onnx.TensorProto(name=sparse.values.name, dims=dims, data_type=sparse.values.data_type, raw_data=packed)
