"""Arithmetic on the few numbers that shapes, slices and counters are made of.

Exporters compute the arguments of Expand, Reshape or Loop with chains of small nodes; so do files that mean harm.
Arrays here are numpy object arrays of Python numbers, with None where an element is unknown.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

from modelops.graphs.values import FEW, INT32, INT64, Value

_FLOATS: Final = frozenset({1, 10, 11, 16})


def _truncated(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    return a / b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and b >= 0:
        return pow(a, b, 1 << 64)  # what is left after overflow; never a number of a million digits
    return float(a) ** float(b)


_BINARY: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _truncated,
    "Mod": operator.mod,
    "Pow": _power,
    "Max": max,
    "Min": min,
    "Sum": operator.add,
    "Equal": operator.eq,
    "Less": operator.lt,
    "Greater": operator.gt,
    "LessOrEqual": operator.le,
    "GreaterOrEqual": operator.ge,
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
    "Xor": lambda a, b: bool(a) != bool(b),
}
_UNARY: Final[dict[str, Callable[[Any], Any]]] = {
    "Abs": abs,
    "Neg": operator.neg,
    "Not": operator.not_,
    "Floor": math.floor,
    "Ceil": math.ceil,
    "Round": round,
    "Sqrt": math.sqrt,
    "Exp": math.exp,
    "Log": math.log,
    "Sign": lambda a: (a > 0) - (a < 0),
    "Reciprocal": lambda a: 1 / a,
    "Relu": lambda a: max(a, 0),
    "Identity": lambda a: a,
}
_REDUCERS: Final[dict[str, Callable[[Sequence[Any]], Any]]] = {
    "ReduceProd": math.prod,
    "ReduceSum": sum,
    "ReduceMax": max,
    "ReduceMin": min,
}
#: The operators that :func:`evaluate` knows; the rest of a graph costs nothing here.
FOLLOWED: Final = frozenset(
    {*_BINARY, *_UNARY, *_REDUCERS, "Cast", "CastLike", "Where", "Concat", "Gather", "Slice", "Transpose"}
    | {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "ConstantOfShape", "Range", "ScatterND"}
)


def evaluate(op: str, inputs: Sequence[Value | None], outcome: Value, read: Callable[[str, Any], Any]) -> Any:
    """The elements of the first output of a node, or None where they are many or not known.

    ``outcome`` is what is known about that output already; ``read`` gives an attribute of the node.
    """
    if op not in FOLLOWED or outcome.elements > FEW or outcome.dims is None or None in outcome.dims:
        return None
    arrays = [None if value is None else value.array() for value in inputs]
    if not arrays or arrays[0] is None:
        return None
    import numpy as np

    try:
        result = _compute(op, arrays, outcome, read)
        return None if result is None else _fitting(np.asarray(result, dtype=object), outcome)
    except (ArithmeticError, ValueError, TypeError, IndexError, KeyError):
        return None  # a node that no runtime would accept either, or one whose numbers are not all known


def _compute(op: str, arrays: list[Any], outcome: Value, read: Callable[[str, Any], Any]) -> Any:
    import numpy as np

    first = arrays[0]
    if op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return first.reshape(outcome.dims)
    if op in ("Expand", "ConstantOfShape", "Tile", "Range", "Cast", "CastLike"):
        return _spread(op, arrays, outcome, read)
    if op == "Transpose":
        return first.transpose(read("perm", None) or range(first.ndim)[::-1])
    if any(array is None for array in arrays):
        return None
    if op in _UNARY:
        return _lifted(_UNARY[op], 1)(first)
    if op in _BINARY:
        result = first
        for array in arrays[1:]:
            result = _lifted(_BINARY[op], 2)(result, array)
        return result
    if op in _REDUCERS:
        if outcome.elements != 1 or any(number is None for number in first.ravel()):
            return None
        return np.full(outcome.dims, _REDUCERS[op](first.ravel().tolist()), dtype=object)
    if op == "Where":
        return _lifted(lambda chosen, a, b: a if chosen else b, 3)(*arrays)
    if op == "Concat":
        return np.concatenate(arrays, axis=read("axis", 0))
    if op == "Gather":
        return np.take(first, arrays[1].astype(np.int64), axis=read("axis", 0))
    if op == "Slice":
        return _slice(first, arrays[1:], read)
    return _scatter(first, *arrays[1:3])


def _spread(op: str, arrays: list[Any], outcome: Value, read: Callable[[str, Any], Any]) -> Any:
    import numpy as np

    first: Any = arrays[0]
    dims: Any = outcome.dims
    if op == "Expand":
        return np.broadcast_to(first, dims)
    if op == "ConstantOfShape":
        return np.full(dims, read("value", 0), dtype=object)
    if op == "Tile":
        return np.tile(first, arrays[1].astype(np.int64).tolist())
    if op == "Range":
        start, _, step = (array.item() for array in arrays)
        result: Any = np.empty(dims, dtype=object)
        result[:] = [start + index * step for index in range(len(result))]
        return result
    return _lifted(lambda number: _as(number, outcome.dtype), 1)(first)


def _slice(first: Any, bounds: list[Any], read: Callable[[str, Any], Any]) -> Any:
    numbers: list[Any] = [None if array is None else array.ravel().tolist() for array in bounds]
    starts = numbers[0] if numbers else read("starts", [])
    ends = numbers[1] if len(numbers) > 1 else read("ends", [])
    axes = (numbers[2] if len(numbers) > 2 else read("axes", None)) or list(range(len(starts)))
    steps = (numbers[3] if len(numbers) > 3 else None) or [1] * len(starts)
    index = [slice(None)] * first.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0 and end < -first.shape[axis]:
            end = None
        index[axis] = slice(start, end, step)
    return first[tuple(index)]


def _scatter(first: Any, indices: Any, updates: Any) -> Any:
    import numpy as np

    result = first.copy()
    for place in np.ndindex(indices.shape[:-1]):
        result[tuple(indices[place])] = updates[place]
    return result


def _lifted(function: Callable[..., Any], arguments: int) -> Callable[..., Any]:
    import numpy as np

    def careful(*numbers: Any) -> Any:
        if any(number is None for number in numbers):
            return None
        try:
            return function(*numbers)
        except (ArithmeticError, ValueError, TypeError):
            return None

    lifted = np.frompyfunc(careful, arguments, 1)
    # A 0-d array would come back as a bare number.
    return lambda *arrays: np.asarray(lifted(*arrays), dtype=object)


def _as(number: Any, dtype: int) -> Any:
    if number is None or isinstance(number, (str, bytes)):
        return None
    if dtype == 9:
        return bool(number)
    return float(number) if dtype in _FLOATS else int(number)


def _fitting(array: Any, outcome: Value) -> Any:
    """The array with integers wrapped as their type wraps them; None when it is not what the shape rule expected."""
    if tuple(array.shape) != outcome.dims:
        return None
    bits = {INT32: 32, INT64: 64}.get(outcome.dtype)
    if bits is None:
        huge = any(isinstance(number, int) and number.bit_length() > 64 for number in array.flat)
        return None if huge else array
    half = 1 << (bits - 1)
    return _lifted(lambda number: (int(number) + half) % (2 * half) - half, 1)(array)
