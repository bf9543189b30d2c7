"""A node about to be sized, and how the rules for its outputs are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modelops.graphs.values import BOOL, FLOAT, INT32, INT64, Dims, Value, blob

if TYPE_CHECKING:
    import onnx


@dataclass(slots=True)
class Call:
    """A node about to be sized: its operator, what is known of its inputs, its attributes, its number of outputs."""

    op: str
    inputs: Sequence[Value | None]
    attributes: Mapping[str, onnx.AttributeProto]
    outputs: int

    def value(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def dims(self, index: int) -> Dims | None:
        value = self.value(index)
        return value.dims if value else None

    def read(self, name: str, default: Any = None) -> Any:
        """The attribute's number, numbers, text or tensor's first element; ``default`` where there is none."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type == 2:
            return attribute.i
        if attribute.type == 1:
            return attribute.f
        if attribute.type == 3:
            return attribute.s.decode("utf-8", "replace")
        if attribute.type == 7:
            return list(attribute.ints)
        if attribute.type == 6:
            return list(attribute.floats)
        return _first_element(attribute.t) if attribute.type == 4 else default

    def numbers(self, index: int, attribute: str = "") -> list[Any] | None:
        """What an input holds, or the attribute that older operator sets used in its place; None when unknown."""
        value = self.value(index)
        if value is not None:
            return value.numbers()
        found = self.read(attribute) if attribute else None
        return [found] if isinstance(found, (int, float)) else found

    def number(self, index: int, attribute: str = "") -> Any:
        numbers = self.numbers(index, attribute)
        return numbers[0] if numbers else None


Rule = Callable[[Call], list[Value]]


def registrar(rules: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator that enters a function into ``rules`` under the names of the operators it is for."""

    def rule(*operators: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            rules.update(dict.fromkeys(operators, function))
            return function

        return register

    return rule


def outputs(call: Call, rules: Mapping[str, Rule]) -> list[Value]:
    """What is known of each output of a node; operators whose arguments make no sense have unknown outputs."""
    function = rules.get(call.op)
    try:
        found = function(call) if function else []
    except (TypeError, ValueError, IndexError, ArithmeticError):
        found = []
    if len(found) != call.outputs:
        found = found[: call.outputs] + [blob() for _ in range(call.outputs - len(found))]
    _set_types(call, found)
    return found


def _first_element(tensor: onnx.TensorProto) -> Any:
    import onnx

    if tensor.data_location == 1 or math.prod(tensor.dims) != 1:
        return None
    return onnx.numpy_helper.to_array(tensor).item()


_CODES: Final = {"Shape": INT64, "Size": INT64, "NonZero": INT64, "ArgMax": INT64, "ArgMin": INT64, "IsNaN": BOOL}
_CODES.update(dict.fromkeys(("IsInf", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not"), BOOL))
_CODES.update(dict.fromkeys(("And", "Or", "Xor"), BOOL))
_CODES.update(dict.fromkeys(("ConvInteger", "MatMulInteger"), INT32))
#: Operators whose output has the type of another input than the first.
_TYPED_BY: Final = {"CastLike": 1, "Where": 1, "OneHot": 2, "DequantizeLinear": 1, "QuantizeLinear": 2}
_TYPED_BY.update({"QLinearConv": 7, "QLinearMatMul": 7})


def _set_types(call: Call, found: list[Value]) -> None:
    for index, value in enumerate(found):
        if value.dtype:
            continue
        if call.op in _CODES:
            value.dtype = _CODES[call.op]
        elif call.op == "TopK" and index == 1:
            value.dtype = INT64
        elif "to" in call.attributes or "dtype" in call.attributes:
            value.dtype = call.read("to") or call.read("dtype") or FLOAT
        elif call.op == "ConstantOfShape":
            value.dtype = call.attributes["value"].t.data_type if "value" in call.attributes else FLOAT
        else:
            source = call.value(_TYPED_BY.get(call.op, 0))
            value.dtype = source.dtype if source else FLOAT
