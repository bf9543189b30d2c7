"""How large the outputs of If, Loop and Scan are, and how often their bodies run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from modelops.graphs import tensors
from modelops.graphs.lean import Refusal
from modelops.graphs.values import BOOL, INT64, Dims, Value, blob, known, sized

if TYPE_CHECKING:
    import onnx

    from modelops.graphs.calls import Call
    from modelops.graphs.sizes import Frame, Walk

#: The operators of the standard that are rules of this file.
CONTROL: Final = frozenset({"If", "Loop", "Scan"})
_OUTGROWN: Final = 1 << 80


def control(walk: Walk, node: onnx.NodeProto, call: Call, frame: Frame, constant: bool) -> list[Value]:
    """What is known of each output of a node with bodies; ``constant`` says that its inputs are."""
    if node.op_type == "If":
        found = _branches(walk, node, call, frame)
    elif node.op_type == "Loop":
        found = _Loop(walk, node, call, frame, constant).outputs()
    else:
        found = _scan(walk, node, call, frame)
    found = [copied(value) for value in found[: call.outputs]] + [blob() for _ in range(call.outputs - len(found))]
    for value in found:
        value.constant = value.constant and constant
    return found


def _branches(walk: Walk, node: onnx.NodeProto, call: Call, frame: Frame) -> list[Value]:
    """The larger of both branches, output by output."""
    results = [
        walk.graph(_body(node, call, name, 0), walk.inner(frame, node, 1), [])
        for name in ("then_branch", "else_branch")
    ]
    merged = []
    for pair in zip(*results, strict=False):
        larger = copied(max(pair, key=lambda value: value.elements))
        if any(value.dims != larger.dims for value in pair):
            larger.dims = _agreed([value.dims for value in pair])
        larger.few = None
        larger.constant = all(value.constant for value in pair)
        merged.append(larger)
    return merged


def _scan(walk: Walk, node: onnx.NodeProto, call: Call, frame: Frame) -> list[Value]:
    count = call.read("num_scan_inputs", 1)
    body = _body(node, call, "body", 0)
    carried, scanned = list(call.inputs[: len(call.inputs) - count]), call.inputs[len(call.inputs) - count :]
    axes = call.read("scan_input_axes") or [0] * len(scanned)
    lengths, slices = [1], []
    for value, axis in zip(scanned, axes, strict=False):
        if value is None or value.dims is None or not -len(value.dims) <= axis < len(value.dims):
            slices.append(blob())
            continue
        axis %= len(value.dims)
        lengths.append(value.dims[axis] or 1)
        slices.append(sized([*value.dims[:axis], *value.dims[axis + 1 :]], value.dtype))
    trips = max(lengths)
    _iterate(walk, trips, frame, tensors.node_label(node), foldable=False)
    found = walk.graph(body, walk.inner(frame, node, trips), [_varying(value) for value in carried] + slices)
    kept = len(carried)
    return found[:kept] + [_stacked(value, trips) for value in found[kept:]]


def _iterate(walk: Walk, trips: int, frame: Frame, label: str, *, foldable: bool) -> None:
    """Refuse a number of iterations that would take for ever."""
    total = trips * frame.trips
    limit = walk.limits.folded_trips if foldable else walk.limits.trips
    if total > limit:
        what = "constant inputs and " if foldable else ""
        raise Refusal(
            f"{label} has {what}{total:,} iterations; the limit is {limit:,}",
            "this file would keep any tool busy for ever: give the loop a condition or a smaller trip count",
        )


class _Loop:
    """The rule for Loop: how often it runs, and how large what it carries along becomes."""

    def __init__(self, walk: Walk, node: onnx.NodeProto, call: Call, frame: Frame, constant: bool) -> None:
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
        found = state + [_stacked(value, trips) for value in first[kept + 1 :]]
        for value in found:
            self.walk.account(value, self.label, folds=foldable)
        return found

    def turn(self, carried: Sequence[Value]) -> list[Value]:
        """One iteration: the condition, what is carried, what is collected."""
        iteration = sized((), INT64)
        iteration.constant = True
        condition = copied(self.condition)
        most = self.most if self.most is not None and self.most <= self.walk.limits.trips else 1
        frame = self.walk.inner(self.frame, self.node, most)
        return self.walk.graph(self.body, frame, [iteration, condition, *carried])

    def judge(self, endless: bool, foldable: bool) -> None:
        if endless and not self.limited:
            raise Refusal(f"{self.label} has no trip count and a condition that is always true", "give the loop an end")
        if self.most is not None and (endless or foldable):
            _iterate(self.walk, self.most, self.frame, self.label, foldable=foldable)


def _body(node: onnx.NodeProto, call: Call, name: str, outputs: int) -> onnx.GraphProto:
    attribute = call.attributes.get(name)
    if attribute is None or not attribute.HasField("g") or len(attribute.g.output) < outputs:
        raise Refusal(f"{tensors.node_label(node)} has no {name} that gives out what it needs", "repair the model")
    return attribute.g


def _stacked(value: Value, trips: int) -> Value:
    """What a body's output becomes when it is collected over all iterations."""
    whole = Value(None, value.elements * max(trips, 1), value.dtype)
    whole.constant = value.constant
    return whole


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


def copied(value: Value) -> Value:
    return Value(value.dims, value.elements, value.dtype, value.constant, value.item, value.array())


def _agreed(shapes_given: Sequence[Dims | None]) -> Dims | None:
    known_dims = [dims for dims in shapes_given if dims is not None]
    if len(known_dims) < len(shapes_given) or len({len(dims) for dims in known_dims}) > 1:
        return None
    return tuple(column[0] if len(set(column)) == 1 else None for column in zip(*known_dims, strict=True))
