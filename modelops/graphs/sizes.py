"""A walk over a graph that follows the sizes of its values, before any tool that would compute them is let near.

Tools fold constants, infer shapes and inline functions without a budget, so that a file of a kilobyte can cost
gigabytes or never end. The walk visits every node about once, allocates nothing of the sizes it finds, and refuses
what no honest model needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from modelops.graphs import constants, shapes, tensors
from modelops.graphs.lean import Lean, Refusal
from modelops.graphs.limits import GraphLimits, readable
from modelops.graphs.values import BOOL, FEW, INT64, Dims, Value, blob, known, sized

if TYPE_CHECKING:
    import onnx

_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
#: What a body may compute from outside itself is still constant for these; others with a body are never folded.
_CONTROL: Final = frozenset({"If", "Loop", "Scan"})
_CALLS_REMEMBERED: Final = 10_000
_OUTGROWN: Final = 1 << 80

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

    def run(self) -> list[Value]:
        """What is known of the model's outputs."""
        return self.graph(self.lean.proto.graph, Frame("the graph"), [])

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
        if value.elements <= FEW and tensor.data_type != tensors.STRING:
            value.few = lambda: self.elements(tensor)
        return value

    def elements(self, tensor: onnx.TensorProto) -> Any:
        import numpy as np
        import onnx_ir

        dtype = onnx_ir.DataType(tensor.data_type)
        if dtype.bitwidth < 8:
            return None
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
        label = ""
        inputs: list[Value | None] = []
        for name in node.input:
            inputs.append(frame.find(name) if name else None)
            if name and inputs[-1] is None:
                self.named(name, frame, f"{tensors.node_label(node)} reads")
        attributes = {attribute.name: _resolved(attribute, frame) for attribute in node.attribute}
        found = {name: value for name, value in attributes.items() if value is not None}
        for name, value in zip(node.output, self.outcome(node, inputs, found, frame), strict=False):
            if not name:
                continue
            if value.nbytes > self.limits.fold_bytes or value.constant:
                label = label or tensors.node_label(node)
                self.account(value, label, folds=value.constant and node.op_type not in ("Constant", *_CONTROL))
            frame.define(name, value)

    def outcome(
        self,
        node: onnx.NodeProto,
        inputs: list[Value | None],
        attributes: Mapping[str, onnx.AttributeProto],
        frame: Frame,
    ) -> list[Value]:
        """What is known of each output of a node."""
        key = function_key(node)
        if key in self.functions:
            return self.call(self.functions[key], inputs, attributes, frame, len(node.output))
        call = shapes.Call(node.op_type, inputs, attributes, len(node.output))
        constant = all(value is None or value.constant for value in inputs) and node.op_type not in _RANDOM
        if node.op_type in _CONTROL and not key[0]:
            return self.control(node, call, frame, constant)
        for attribute in attributes.values():  # bodies of operators that we don't know
            constant = constant and not (attribute.HasField("g") or attribute.graphs)
            for graph in tensors.graphs_of(attribute):
                self.graph(graph, self.inner(frame, node, 1), [blob() for _ in graph.input])
        if node.op_type == "Constant" and "value" in attributes:
            return [self.weight(attributes["value"].t)]
        found = shapes.outputs(call)
        if node.op_type == "Constant" and "sparse_value" in attributes:
            sparse = attributes["sparse_value"].sparse_tensor
            found = [sized(sparse.dims, sparse.values.data_type)]
        if found and node.op_type in constants.FOLLOWED:
            found[0].few = constants.evaluate(node.op_type, inputs, found[0], call.read)
        if node.op_type in ("Shape", "Size"):  # of fixed dimensions, whatever the values in between
            numbers = found[0].numbers() if found else None
            constant = constant or (numbers is not None and None not in numbers)
        for value in found:
            value.constant = constant
            if constant and (value.dims is None or None in value.dims):  # then the size is bounded from above instead
                value.elements = max([value.elements, *(given.elements for given in inputs if given)])
        return found

    def account(self, value: Value, who: str, *, folds: bool) -> None:
        """Refuse a value beyond the limits; ``folds`` says that a tool may compute it while loading."""
        if value.nbytes > self.largest_value:
            raise Refusal(
                f"{who} makes a value of {readable(value.nbytes)}; the limit is {readable(self.largest_value)}",
                "this file would exhaust any tool that computes it: make the model's shapes smaller",
            )
        if folds:
            self.folded += value.nbytes
            if self.folded > self.largest_fold:
                raise Refusal(
                    f"constants computed by its nodes take more than {readable(self.largest_fold)} by {who}",
                    "this file would exhaust any tool that folds constants: store large constants as weights",
                )

    @staticmethod
    def inner(frame: Frame, node: onnx.NodeProto, trips: int) -> Frame:
        where = f"a body of {tensors.node_label(node)}"
        return Frame(where, frame, frame.attributes, trips=frame.trips * max(trips, 1), depth=frame.depth + 1)

    def call(
        self,
        function: onnx.FunctionProto,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, onnx.AttributeProto],
        frame: Frame,
        outputs: int,
    ) -> list[Value]:
        """The outputs of a function of the model; a call like an earlier one is not followed again."""
        texts = tuple((name, attribute.SerializeToString()) for name, attribute in sorted(attributes.items()))
        key = (function_key_of(function), tuple(value and value.key() for value in inputs), texts, frame.trips)
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
            self.folded += self.calls[key][1]
        found = self.calls[key][0]
        return [_copy(value) for value in found[:outputs]] + [blob() for _ in range(outputs - len(found))]

    def control(self, node: onnx.NodeProto, call: shapes.Call, frame: Frame, constant: bool) -> list[Value]:
        if node.op_type == "If":
            found = self.branches(node, call, frame)
        elif node.op_type == "Loop":
            found = Loop(self, node, call, frame, constant).outputs()
        else:
            found = self.scan(node, call, frame)
        found = [_copy(value) for value in found[: call.outputs]] + [blob() for _ in range(call.outputs - len(found))]
        for value in found:
            value.constant = value.constant and constant
        return found

    def branches(self, node: onnx.NodeProto, call: shapes.Call, frame: Frame) -> list[Value]:
        """The larger of both branches, output by output."""
        results = [
            self.graph(_body(node, call, name, 0), self.inner(frame, node, 1), [])
            for name in ("then_branch", "else_branch")
        ]
        merged = []
        for pair in zip(*results, strict=False):
            larger = _copy(max(pair, key=lambda value: value.elements))
            if any(value.dims != larger.dims for value in pair):
                larger.dims = _agreed([value.dims for value in pair])
            larger.few = None
            larger.constant = all(value.constant for value in pair)
            merged.append(larger)
        return merged

    def scan(self, node: onnx.NodeProto, call: shapes.Call, frame: Frame) -> list[Value]:
        count = call.read("num_scan_inputs", 1)
        body = _body(node, call, "body", 0)
        carried, scanned = list(call.inputs[: len(call.inputs) - count]), call.inputs[len(call.inputs) - count :]
        lengths = [value.dims[0] for value in scanned if value and value.dims and value.dims[0] is not None]
        trips = max(lengths, default=1)
        self.iterate(trips, frame, tensors.node_label(node), foldable=False)
        slices = [sized(value.dims[1:], value.dtype) if value and value.dims else blob() for value in scanned]
        arguments = [_varying(value) for value in carried] + slices
        found = self.graph(body, self.inner(frame, node, trips), arguments)
        kept = len(carried)
        return found[:kept] + [stacked(value, trips) for value in found[kept:]]

    def iterate(self, trips: int, frame: Frame, label: str, *, foldable: bool) -> None:
        """Refuse a number of iterations that would take for ever."""
        total = trips * frame.trips
        limit = self.limits.folded_trips if foldable else self.limits.trips
        if total > limit:
            what = "constant inputs and " if foldable else ""
            raise Refusal(
                f"{label} has {what}{total:,} iterations; the limit is {limit:,}",
                "this file would keep any tool busy for ever: give the loop a condition or a smaller trip count",
            )


class Loop:
    """The rule for Loop: how often it runs, and how large what it carries along becomes."""

    def __init__(self, walk: Walk, node: onnx.NodeProto, call: shapes.Call, frame: Frame, constant: bool) -> None:
        self.walk, self.node, self.frame = walk, node, frame
        self.label = tensors.node_label(node)
        self.body = _body(node, call, "body", 1)
        self.carried = [_varying(value) for value in call.inputs[2:]]
        limit, condition = call.value(0), call.value(1)
        self.limited = limit is not None
        self.most: int | None = call.number(0)
        self.condition = known(_true(), BOOL) if condition is None else condition
        self.constant = constant

    def outputs(self) -> list[Value]:
        first = self.turn(self.carried)
        endless = self.condition.numbers() == [True] and first[0].numbers() == [True]
        foldable = self.constant and all(value.constant for value in first)
        self.judge(endless, foldable)
        trips = self.most if self.most is not None and (endless or foldable) else 1
        kept = len(self.carried)
        state = first[1 : kept + 1]
        if trips > 1 and any(new.elements > old.elements for old, new in zip(self.carried, state, strict=False)):
            second = self.turn([_varying(value) for value in state])[1 : kept + 1]
            state = [_grown(*three, trips) for three in zip(self.carried, state, second, strict=False)]
        for value in state:
            value.few = None
        found = state + [stacked(value, trips) for value in first[kept + 1 :]]
        for value in found:
            self.walk.account(value, self.label, folds=foldable)
        return found

    def turn(self, carried: Sequence[Value]) -> list[Value]:
        """One iteration: the condition, what is carried, what is collected."""
        iteration = sized((), INT64)
        iteration.constant = True
        condition = _copy(self.condition)
        most = self.most if self.most is not None and self.most <= self.walk.limits.trips else 1
        frame = self.walk.inner(self.frame, self.node, most)
        return self.walk.graph(self.body, frame, [iteration, condition, *carried])

    def judge(self, endless: bool, foldable: bool) -> None:
        if endless and not self.limited:
            raise Refusal(f"{self.label} has no trip count and a condition that is always true", "give the loop an end")
        if self.most is not None and (endless or foldable):
            self.walk.iterate(self.most, self.frame, self.label, foldable=foldable)


def _body(node: onnx.NodeProto, call: shapes.Call, name: str, outputs: int) -> onnx.GraphProto:
    attribute = call.attributes.get(name)
    if attribute is None or not attribute.HasField("g") or len(attribute.g.output) < outputs:
        raise Refusal(f"{tensors.node_label(node)} has no {name} that gives out what it needs", "repair the model")
    return attribute.g


def stacked(value: Value, trips: int) -> Value:
    """What a body's output becomes when it is collected over all iterations."""
    whole = Value(None, value.elements * max(trips, 1), value.dtype)
    whole.constant = value.constant
    return whole


def function_key_of(function: onnx.FunctionProto) -> FunctionKey:
    return (plain_domain(function.domain), function.name, function.overload)


def _true() -> Any:
    import numpy as np

    return np.array(True, dtype=object)


def _grown(before: Value, once: Value, twice: Value, trips: int) -> Value:
    """A carried value after all iterations, told from the first two: growing by steps, or by a factor."""
    step, next_step = once.elements - before.elements, twice.elements - once.elements
    if step <= 0 or next_step <= 0:
        return Value(None, once.elements, once.dtype, once.constant)
    if next_step <= step:
        return Value(None, before.elements + step * trips, once.dtype, once.constant)
    factor = next_step / step
    exponent = min(trips * math.log2(factor), 80)
    return Value(None, min(int(step * 2**exponent), _OUTGROWN), once.dtype, once.constant)


def _varying(value: Value | None) -> Value:
    """A value whose size is known for the first iteration, and whose elements are not."""
    if value is None:
        return blob()
    return Value(value.dims, value.elements, value.dtype, value.constant, value.item)


def _copy(value: Value) -> Value:
    return Value(value.dims, value.elements, value.dtype, value.constant, value.item, value.array())


def _agreed(shapes_given: Sequence[Dims | None]) -> Dims | None:
    known_dims = [dims for dims in shapes_given if dims is not None]
    if len(known_dims) < len(shapes_given) or len({len(dims) for dims in known_dims}) > 1:
        return None
    return tuple(column[0] if len(set(column)) == 1 else None for column in zip(*known_dims, strict=True))


def _resolved(attribute: onnx.AttributeProto, frame: Frame) -> onnx.AttributeProto | None:
    """The attribute itself, or what the call of the function around gives in its place."""
    return frame.attributes.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
