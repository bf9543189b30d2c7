"""A walk over a graph that follows the sizes of its values, before any tool that would compute them is let near.

Tools fold constants, infer shapes and inline functions without a budget, so that a file of a kilobyte can cost
gigabytes or never end. The walk visits every node about once, allocates nothing of the sizes it finds, and refuses
what no honest model needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from modelops.core.wording import size_text
from modelops.graphs import bodies, calls, constants, products, shapes, tensors
from modelops.graphs.lean import Lean, Refusal
from modelops.graphs.limits import GraphLimits
from modelops.graphs.values import FEW, Value, blob, sized

if TYPE_CHECKING:
    import onnx

_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
#: No value with fewer elements than this comes near a limit.
_MANY: Final = 1 << 20
_RULES: Final = shapes.RULES | products.RULES
_CALLS_REMEMBERED: Final = 10_000

FunctionKey = tuple[str, str, str]


def plain_domain(domain: str) -> str:
    """The operator domain under the one name that means it."""
    return "" if domain == "ai.onnx" else domain


def function_key(node: onnx.NodeProto) -> FunctionKey:
    """The function that a node calls, where the model has one of that name."""
    return (plain_domain(node.domain), node.op_type, node.overload)


@dataclass(slots=True)
class Frame:
    """The names that nodes of one body see: its own, then those of the bodies around it."""

    where: str
    parent: Frame | None = None
    attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    trips: int = 1  # how many times the bodies around run, together
    depth: int = 0

    def find(self, name: str) -> Value | None:
        frame: Frame | None = self
        while frame is not None:
            if name in frame.values:
                return frame.values[name]
            frame = frame.parent
        return None

    def define(self, name: str, value: Value) -> None:
        if name in self.values:
            raise Refusal(f"{name!r} is defined twice in {self.where}", "give every value a name of its own")
        self.values[name] = value


class Walk:
    """One walk over one model; :meth:`run` raises Refusal at the first thing that is out of all proportion."""

    def __init__(self, lean: Lean, limits: GraphLimits, weight_bytes: int) -> None:
        self.lean = lean
        self.limits = limits
        self.functions = {(plain_domain(f.domain), f.name, f.overload): f for f in lean.proto.functions}
        self.largest_value = max(limits.value_bytes, 4 * weight_bytes)
        self.largest_fold = limits.fold_bytes + 16 * weight_bytes
        self.folded = 0
        self.visits = 0
        self.calls: dict[object, tuple[list[Value], int]] = {}
        self.called: set[FunctionKey] = set()

    def run(self) -> list[Value]:
        """What is known of the model's outputs."""
        found = self.graph(self.lean.proto.graph, Frame("the graph"), [])
        for key, function in self.functions.items():  # tools optimize those that nothing calls, too
            if key not in self.called:
                self.call(function, calls.Call(function.name, [blob() for _ in function.input], {}, 0), Frame(""))
        return found

    def graph(self, graph: onnx.GraphProto, frame: Frame, arguments: Sequence[Value | None]) -> list[Value]:
        """The values of a graph's outputs; ``arguments`` are for its inputs, in order, where they are known."""
        own = set()
        for tensor in graph.initializer:
            frame.define(tensor.name, self.weight(tensor))
            own.add(tensor.name)
        for sparse in graph.sparse_initializer:
            value = sized(sparse.dims, sparse.values.data_type)
            value.constant = True
            self.account(value, f"sparse initializer {sparse.values.name!r}", folds=True)
            frame.define(sparse.values.name, value)
            own.add(sparse.values.name)
        for index, info in enumerate(graph.input):
            if info.name not in own:  # else the initializer is its default
                given = arguments[index] if index < len(arguments) else None
                value = given or self.declared(info)
                self.account(value, f"input {info.name!r}", folds=False)
                frame.define(info.name, value)
        for node in graph.node:
            self.node(node, frame)
        return [self.named(info.name, frame, f"{frame.where} gives out") for info in graph.output]

    def named(self, name: str, frame: Frame, reader: str) -> Value:
        value = frame.find(name)
        if value is None:
            raise Refusal(
                f"{reader} {name!r}, which nothing before it defines",
                "repair the model: its nodes must stand in the order they run, and every name must be defined",
            )
        return value

    def weight(self, tensor: onnx.TensorProto) -> Value:
        value = sized(tensor.dims, tensor.data_type)
        value.constant = True
        if value.elements <= FEW and tensors.TYPES.get(tensor.data_type, ("", 0))[1] >= 8:
            value.few = lambda: self.elements(tensor)
        return value

    def elements(self, tensor: onnx.TensorProto) -> Any:
        import numpy as np
        import onnx_ir

        dtype = onnx_ir.DataType(tensor.data_type)
        array = np.frombuffer(self.lean.packed(tensor), dtype=dtype.numpy().newbyteorder("<"))
        return np.array(array.tolist(), dtype=object).reshape(tuple(tensor.dims))

    @staticmethod
    def declared(info: onnx.ValueInfoProto) -> Value:
        kind = info.type.tensor_type if info.type.HasField("tensor_type") else info.type.sparse_tensor_type
        if not kind.HasField("shape"):
            return blob(dtype=kind.elem_type)
        return sized((dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim), kind.elem_type)

    def node(self, node: onnx.NodeProto, frame: Frame) -> None:
        self.visits += 1
        if self.visits > self.limits.visits:
            raise Refusal(f"the graph takes more than {self.limits.visits:,} steps to follow", "split the model")
        inputs: list[Value | None] = []
        for name in node.input:
            inputs.append(frame.find(name) if name else None)
            if name and inputs[-1] is None:
                self.named(name, frame, f"{tensors.node_label(node)} reads")
        attributes = {}
        for attribute in node.attribute:
            if (given := _resolved(attribute, frame)) is not None:
                attributes[attribute.name] = given
        op, names = node.op_type, list(node.output)
        found = self.outcome(node, calls.Call(op, inputs, attributes, len(names)), frame)
        computed = op not in bodies.CONTROL and (op != "Constant" or "sparse_value" in attributes)
        for name, value in zip(names, found, strict=False):
            if name:
                if value.constant or value.elements > _MANY:
                    self.account(value, node, folds=value.constant and computed)
                frame.define(name, value)

    def outcome(self, node: onnx.NodeProto, call: calls.Call, frame: Frame) -> list[Value]:
        """What is known of each output of a node."""
        op, inputs, attributes = call.op, call.inputs, call.attributes
        if self.functions and (function := self.functions.get(function_key(node))) is not None:
            return self.call(function, call, frame)
        constant = op not in _RANDOM and all(value is None or value.constant for value in inputs)
        if op in bodies.CONTROL and not plain_domain(node.domain):
            return bodies.control(self, node, call, frame, constant)
        for attribute in attributes.values():  # bodies of operators that we don't know
            for graph in tensors.graphs_of(attribute):
                constant = False
                self.graph(graph, self.inner(frame, node, 1), [blob() for _ in graph.input])
        if op == "Constant":
            return self.literal(call)
        found = calls.outputs(call, _RULES)
        if op in constants.FOLLOWED and found and found[0].elements <= FEW:
            found[0].few = constants.evaluate(op, inputs, found[0], call.read)
        if op in ("Shape", "Size"):  # of fixed dimensions, whatever the values in between
            numbers = found[0].numbers() if found else None
            constant = constant or (numbers is not None and None not in numbers)
        for value in found:
            value.constant = constant
            if constant and (value.dims is None or None in value.dims):  # then the size is bounded from above instead
                value.elements = max([value.elements, *(given.elements for given in inputs if given)])
        return found

    def literal(self, call: calls.Call) -> list[Value]:
        """The output of a Constant."""
        if "value" in call.attributes:
            return [self.weight(call.attributes["value"].t)]
        found = calls.outputs(call, _RULES)
        if "sparse_value" in call.attributes:
            sparse = call.attributes["sparse_value"].sparse_tensor
            found = [sized(sparse.dims, sparse.values.data_type)]
        for value in found:
            value.constant = True
        return found

    def account(self, value: Value, who: str | onnx.NodeProto, *, folds: bool) -> None:
        """Refuse a value beyond the limits; ``folds`` says that a tool may compute it while loading."""
        if value.nbytes > self.largest_value:
            raise Refusal(
                f"{_label(who)} makes a value of {size_text(value.nbytes)}; "
                f"the limit is {size_text(self.largest_value)}",
                "this file would exhaust any tool that computes it: make the model's shapes smaller",
            )
        if folds:
            self.fold(value.nbytes, who)

    def fold(self, size: int, who: str | onnx.NodeProto) -> None:
        self.folded += size
        if self.folded > self.largest_fold:
            raise Refusal(
                f"constants computed by its nodes take more than {size_text(self.largest_fold)} by {_label(who)}",
                "this file would exhaust any tool that folds constants: store large constants as weights",
            )

    @staticmethod
    def inner(frame: Frame, node: onnx.NodeProto, trips: int) -> Frame:
        where = f"a body of {tensors.node_label(node)}"
        return Frame(where, frame, frame.attributes, trips=frame.trips * max(trips, 1), depth=frame.depth + 1)

    def call(self, function: onnx.FunctionProto, call: calls.Call, frame: Frame) -> list[Value]:
        """The outputs of a function of the model; a call like an earlier one is not followed again."""
        inputs, attributes = call.inputs, call.attributes
        identity = function_key_of(function)
        self.called.add(identity)
        texts = tuple((name, attribute.SerializeToString()) for name, attribute in sorted(attributes.items()))
        key = (identity, tuple(value and value.key() for value in inputs), texts, frame.trips)
        if key not in self.calls:
            before = self.folded
            given = {attribute.name: attribute for attribute in function.attribute_proto} | dict(attributes)
            body = Frame(f"function {function.name!r}", None, given, trips=frame.trips, depth=frame.depth + 1)
            for index, name in enumerate(function.input):
                value = inputs[index] if index < len(inputs) else None
                body.define(name, value or Value((0,), 0, constant=True))
            for node in function.node:
                self.node(node, body)
            found = [self.named(name, body, f"{body.where} gives out") for name in function.output]
            if len(self.calls) >= _CALLS_REMEMBERED:
                self.calls.clear()
            self.calls[key] = (found, self.folded - before)
        else:
            self.fold(self.calls[key][1], f"function {function.name!r}")
        found = self.calls[key][0]
        found = [bodies.copied(value) for value in found[: call.outputs]]
        return found + [blob() for _ in range(call.outputs - len(found))]


def function_key_of(function: onnx.FunctionProto) -> FunctionKey:
    return (plain_domain(function.domain), function.name, function.overload)


def _label(who: str | onnx.NodeProto) -> str:
    return who if isinstance(who, str) else tensors.node_label(who)


def _resolved(attribute: onnx.AttributeProto, frame: Frame) -> onnx.AttributeProto | None:
    """The attribute itself, or what the call of the function around gives in its place."""
    return frame.attributes.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
