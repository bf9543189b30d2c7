"""Parts of a network that run by themselves: from values that are there to values that are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelops.errors import tool

if TYPE_CHECKING:
    import onnx_ir as ir

Arrays = Mapping[str, Any]


class Parts:
    """A flat model by its names, from which segments are cut."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = list(model.graph)
        self.makers = {str(value.name): node for node in self.nodes for value in node.outputs if value.name}
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.by_name = {str(node.name): node for node in self.nodes}

    def before(self, wanted: Iterable[str], there: Iterable[str]) -> list[ir.Node]:
        """The nodes that make the wanted values from those that are there, in order."""
        there, found, pending = set(there), set(), list(wanted)
        while pending:
            name = pending.pop()
            node = None if name in there else self.makers.get(name)
            if node is None or node in found:
                continue
            found.add(node)
            pending += read_by(node)
        return sorted(found, key=self.place.__getitem__)

    def live(self, done: Iterable[str]) -> list[str]:
        """The values that are read, or put out, after these nodes (by name) and all before them have run."""
        last = max(self.place[self.by_name[name]] for name in done)
        made = {str(value.name) for value in self.model.graph.inputs}
        made |= {str(value.name) for node in self.nodes[: last + 1] for value in node.outputs if value.name}
        later = {name for node in self.nodes[last + 1 :] for name in read_by(node)}
        later |= {str(value.name) for value in self.model.graph.outputs}
        weights = set(self.model.graph.initializers)
        return sorted((made & later) - weights)


def read_by(node: ir.Node) -> list[str]:
    """The names of all values that a node reads, inside its branches and loops too."""
    import onnx_ir as ir

    names = [str(value.name) for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs: Sequence[Any] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.value,)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.value
        for graph in graphs:
            names += [name for inner in graph for name in read_by(inner)]
    return names


class Segment:
    """The nodes between values that are there and values that are wanted, ready to run on one thread."""

    def __init__(self, parts: Parts, there: Arrays, wanted: Sequence[str]) -> None:
        """``there`` holds arrays like those that the segment will be run on."""
        self._wanted = list(wanted)
        self._session: Any = None
        nodes = parts.before(wanted, there)
        if nodes:
            made = {str(value.name) for node in nodes for value in node.outputs}
            self._outputs = [name for name in self._wanted if name in made]
            self._inputs = sorted({name for node in nodes for name in read_by(node)} & set(there))
            self._session = self._open(parts.model, nodes, there)

    def _open(self, model: ir.Model, nodes: list[ir.Node], there: Arrays) -> Any:
        import onnx
        import onnx_ir as ir
        import onnxruntime as ort

        read = {name for node in nodes for name in read_by(node)}
        weights = []
        for name in sorted(read & set(model.graph.initializers)):
            tensor = model.graph.initializers[name].const_value
            if tensor is not None:
                proto = onnx.TensorProto(
                    name=name, data_type=int(tensor.dtype), dims=[int(dim) for dim in tensor.shape.numpy()]
                )
                if tensor.dtype == ir.DataType.STRING:
                    proto = ir.to_proto(tensor)
                else:
                    proto.raw_data = tensor.tobytes()
                weights.append(proto)
        graph = onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes],
            "segment",
            [onnx.helper.make_tensor_value_info(name, _dtype(there[name]), None) for name in self._inputs],
            [onnx.helper.make_tensor_value_info(name, 0, None) for name in self._outputs],
            weights,
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
        for value in proto.graph.output:  # onnxruntime infers the type where none is given
            value.ClearField("type")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        with tool("onnxruntime"):
            return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, there: Arrays) -> dict[str, Any]:
        """The wanted values."""
        found = {name: there[name] for name in self._wanted if name in there}
        if self._session is not None:
            with tool("onnxruntime"):
                values = self._session.run(self._outputs, {name: there[name] for name in self._inputs})
            found.update(zip(self._outputs, values, strict=True))
        return found


def _dtype(array: Any) -> int:
    import onnx_ir as ir

    return int(ir.DataType.from_numpy(array.dtype))
