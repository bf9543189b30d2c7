"""A graph taken apart: pieces of it run alone, band after band, so that every value inside is seen in bounded memory.

Pieces run in onnxruntime without graph optimisation: nodes that are the same give the same bits on the same inputs.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modelops import errors
from modelops.graphs import tensors

if TYPE_CHECKING:
    import onnx

    from modelops.graphs.lean import Lean

#: What is added to the name of a value that a piece makes while its other nodes read what they are fed in its place.
MADE: Final = "::made"
_BAND_BYTES: Final = 128 << 20  # of the values that one band gives
_WEIGHT_BYTES: Final = 512 << 20  # of the weights that one band holds
_FIRST_BAND: Final = 64  # nodes, before it is known how large values are


@dataclass(frozen=True)
class Node:
    """A node of the main graph. ``inputs`` are the values that it reads, those that only its bodies read included."""

    index: int
    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Pieces:
    """An opened model of which any set of nodes can be run alone. Its file must stay open as long as this is used."""

    def __init__(self, lean: Lean, *, threads: int = 1) -> None:
        self._lean, self._threads = lean, threads
        graph = lean.proto.graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._sparse = {sparse.values.name: sparse for sparse in graph.sparse_initializer}
        self.weights = frozenset(self._tensors) | frozenset(self._sparse)
        self.inputs = tuple(info.name for info in graph.input if info.name not in self.weights)
        self.outputs = tuple(info.name for info in graph.output)
        self.nodes = [_node(index, proto) for index, proto in enumerate(graph.node)]
        self.producer = {name: node.index for node in self.nodes for name in node.outputs}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                self.readers[name].append(node.index)

    def weight(self, name: str) -> Any:
        """The elements of a dense weight."""
        import onnx
        from onnx import numpy_helper

        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._tensors[name])
        self._inline(tensor)
        return numpy_helper.to_array(tensor)

    def weight_bytes(self, nodes: Iterable[int]) -> int:
        """The size of the weights that these nodes read."""
        names = {name for index in nodes for name in self.nodes[index].inputs if name in self._tensors}
        return sum(tensors.tensor_bytes(self._tensors[name]) for name in names)

    def segment(self, target: str, boundary: frozenset[str] | set[str]) -> list[int]:
        """The nodes that make a value out of values of the boundary, inputs and weights, in their order."""
        found, pending = set(), [self.producer[target]]
        while pending:
            index = pending.pop()
            if index in found:
                continue
            found.add(index)
            for name in self.nodes[index].inputs:
                if name not in boundary and name in self.producer:
                    pending.append(self.producer[name])
        return sorted(found)

    def trace(self, feed: Mapping[str, Any], wanted: set[str]) -> Iterator[dict[str, Any]]:
        """The values that are wanted of one run, band by band; each band starts from values that the ones before gave.

        Raises StageFailed, with node and operator in its text, where a node can't run.
        """
        last = {name: max(readers) for name, readers in self.readers.items()}
        live, start, length = dict(feed), 0, _FIRST_BAND
        while start < len(self.nodes):
            stop = self._end(start, length, last)
            made = [name for node in self.nodes[start:stop] for name in node.outputs]
            names = [name for name in made if name in wanted or last.get(name, -1) >= stop]
            values = self.run(range(start, stop), live, names)
            yield {name: values[name] for name in names if name in wanted}
            live = {name: v for name, v in {**live, **values}.items() if last.get(name, -1) >= stop}
            size = sum(_bytes(value) for value in values.values())
            length = max(1, int((stop - start) * min(8.0, _BAND_BYTES / max(1, size))))
            start = stop

    def _end(self, start: int, length: int, last: Mapping[str, int]) -> int:
        """Where a band that starts there ends: by nodes and weights, never between a sequence and its reader."""
        stop, held = start, 0
        while stop < len(self.nodes) and stop - start < length:
            held += self.weight_bytes([stop])
            if held > _WEIGHT_BYTES and stop > start:
                break
            stop += 1
        opaque = [node for node in self.nodes[start:stop] if "Sequence" in node.op or "Optional" in node.op]
        needed = max((last.get(name, -1) for node in opaque for name in node.outputs), default=-1)
        if stop <= needed < len(self.nodes):
            return self._end(start, needed + 1 - start, last)
        return max(stop, start + 1)

    def run(
        self,
        nodes: Iterable[int],
        feed: Mapping[str, Any],
        outputs: Sequence[str],
        *,
        cut: frozenset[str] | None = None,
    ) -> dict[str, Any]:
        """Run these nodes on what they read of ``feed``, and give some of the values that they make.

        Values of ``cut`` are made, and still fed to the nodes that read them: every node sees right inputs.
        """
        model = self.piece(nodes, feed, outputs, cut=cut)
        session = self._session(model)
        names = {info.name: name for info, name in zip(model.graph.output, outputs, strict=True)}
        given = {info.name: feed[info.name] for info in model.graph.input}
        with errors.tool("onnxruntime"):
            values = session.run(list(names), given)
        return dict(zip(names.values(), values, strict=True))

    def piece(
        self,
        nodes: Iterable[int],
        feed: Mapping[str, Any],
        outputs: Sequence[str],
        *,
        cut: frozenset[str] | None = None,
    ) -> onnx.ModelProto:
        """These nodes as a model of their own, which takes what they read as inputs of the shapes found in ``feed``."""
        from onnx import helper

        model, cut = self._empty(), cut or frozenset()
        chosen = sorted(set(nodes))
        made = {name for index in chosen for name in self.nodes[index].outputs} - cut
        for index in chosen:
            node = model.graph.node.add()
            node.CopyFrom(self._lean.proto.graph.node[index])
            for place, name in enumerate(node.output):
                if name in cut:
                    node.output[place] = name + MADE
        read = dict.fromkeys(name for index in chosen for name in self.nodes[index].inputs if name not in made)
        self._add_weights(model, read)
        for name in read:
            if name not in self.weights and name in feed:
                array = feed[name]
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
        for name in outputs:
            model.graph.output.add(name=name + MADE if name in cut else name)
        self._inline_all(model)
        return model

    def overridden(self, names: Sequence[str], feed: Mapping[str, Any], dtypes: Mapping[str, Any]) -> _Overridden:
        """The whole model, in which values can be replaced at run time by other ones."""
        from onnx import helper

        model = self._empty()
        flags = {name: f"::replace{number}" for number, name in enumerate(names)}
        others = {name: f"::other{number}" for number, name in enumerate(names)}
        for name in names:
            if name in self.weights:
                model.graph.node.append(helper.make_node("Where", [flags[name], others[name], name + MADE], [name]))
        for index, proto in enumerate(self._lean.proto.graph.node):
            node = model.graph.node.add()
            node.CopyFrom(proto)
            for place, name in enumerate(self._lean.proto.graph.node[index].output):
                if name in flags:
                    node.output[place] = name + MADE
                    model.graph.node.append(helper.make_node("Where", [flags[name], others[name], name + MADE], [name]))
        self._add_weights(model, dict.fromkeys(self.weights))
        for tensor in model.graph.initializer:
            tensor.name += MADE if tensor.name in flags else ""
        for name in self.inputs:
            kind = helper.np_dtype_to_tensor_dtype(feed[name].dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, feed[name].shape))
        for name in names:
            model.graph.input.append(helper.make_tensor_value_info(flags[name], 9, []))
            kind = helper.np_dtype_to_tensor_dtype(dtypes[name])
            model.graph.input.append(helper.make_tensor_value_info(others[name], kind, None))
        for name in self.outputs:
            model.graph.output.add(name=name)
        self._inline_all(model)
        return _Overridden(self._session(model), flags, others, dict(feed), dict(dtypes), self.outputs)

    def _empty(self) -> onnx.ModelProto:
        import onnx

        proto = self._lean.proto
        model = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
        model.functions.extend(proto.functions)
        model.graph.name = "piece"
        return model

    def _add_weights(self, model: onnx.ModelProto, names: Iterable[str]) -> None:
        for name in names:
            if name in self._tensors:
                model.graph.initializer.add().CopyFrom(self._tensors[name])
            elif name in self._sparse:
                model.graph.sparse_initializer.add().CopyFrom(self._sparse[name])

    def _inline_all(self, model: onnx.ModelProto) -> None:
        for place in tensors.tensors(model):
            self._inline(place.tensor)

    def _inline(self, tensor: onnx.TensorProto) -> None:
        if span := self._lean.span(tensor):
            tensor.raw_data = span.read()
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")

    def _session(self, model: onnx.ModelProto) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)
        with errors.tool("onnxruntime"):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Overridden:
    """A model that is open, and some of whose values can be replaced."""

    def __init__(
        self,
        session: Any,
        flags: Mapping[str, str],
        others: Mapping[str, str],
        feed: Mapping[str, Any],
        dtypes: Mapping[str, Any],
        outputs: Sequence[str],
    ) -> None:
        self._session, self._flags, self._others = session, flags, others
        self._feed, self._dtypes, self._outputs = feed, dtypes, outputs

    def run(self, name: str, value: Any) -> dict[str, Any]:
        """The outputs when this one value is replaced."""
        import numpy as np

        feed = dict(self._feed)
        if name in feed:
            feed[name] = np.asarray(value, dtype=feed[name].dtype)
        for known in self._flags:
            feed[self._flags[known]] = np.array(known == name)
            other = value if known == name else np.zeros((), self._dtypes[known])
            feed[self._others[known]] = np.asarray(other, dtype=self._dtypes[known])
        with errors.tool("onnxruntime"):
            found = self._session.run(list(self._outputs), feed)
        return dict(zip(self._outputs, found, strict=True))


def _node(index: int, proto: onnx.NodeProto) -> Node:
    read = dict.fromkeys(name for name in proto.input if name)
    for attribute in proto.attribute:
        for body in tensors.graphs_of(attribute):
            read.update(dict.fromkeys(sorted(_captured(body))))
    outputs = tuple(name for name in proto.output if name)
    name = proto.name or (outputs[0] if outputs else f"node {index}")
    return Node(index, name, f"{proto.domain}:{proto.op_type}" if proto.domain else proto.op_type, tuple(read), outputs)


def _captured(body: onnx.GraphProto) -> set[str]:
    """The values of outer graphs that a body reads."""
    known = {info.name for info in body.input} | {tensor.name for tensor in body.initializer}
    known |= {sparse.values.name for sparse in body.sparse_initializer}
    read = {info.name for info in body.output}
    for node in body.node:
        known.update(node.output)
        read.update(name for name in node.input if name)
        for attribute in node.attribute:
            for inner in tensors.graphs_of(attribute):
                read |= _captured(inner)
    return read - known


def _bytes(value: Any) -> int:
    size = getattr(value, "nbytes", None)
    return size if isinstance(size, int) else sum(math.prod(part.shape) * 8 for part in value if hasattr(part, "shape"))
