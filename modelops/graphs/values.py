"""What is known about a value of a graph before anything runs: its dimensions, and its elements where they are few."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modelops.graphs import tensors

#: One dimension each; None where only a run can tell.
Dims = tuple[int | None, ...]
#: Small constants are followed element by element up to this many: enough for shapes, pads, slices and counters.
FEW: Final = 64
INT32, INT64, FLOAT, BOOL = 6, 7, 1, 9


@dataclass(slots=True)
class Value:
    """A tensor, or a sequence of tensors.

    ``elements`` is a lower bound: unknown dimensions count as 1. ``constant`` means that no input of the model plays
    a part, so that a tool may compute the value while loading. ``item`` is the smallest tensor of a sequence.
    """

    dims: Dims | None
    elements: int
    dtype: int = 0
    constant: bool = False
    item: Value | None = None
    few: Any = None  # an object array (None where unknown), or a function that makes one when it is first asked for
    _asked: bool = field(default=False, repr=False)

    @property
    def nbytes(self) -> int:
        bits = tensors.TYPES[self.dtype][1] if self.dtype in tensors.TYPES else 0
        return (self.elements * (bits or 8) + 7) // 8

    def array(self) -> Any:
        """The elements as a numpy array of Python numbers, with None for unknown ones; None for large values."""
        if callable(self.few) and not self._asked:
            self._asked = True
            self.few = self.few()
        return self.few

    def numbers(self) -> list[Any] | None:
        """The elements in one row, or None when they aren't known at all."""
        array = self.array()
        return None if array is None else array.ravel().tolist()

    def key(self) -> tuple[object, ...]:
        """Equal for values of which the same is known."""
        numbers = self.numbers()
        item = self.item.key() if self.item else None
        return (self.dims, self.elements, self.dtype, self.constant, None if numbers is None else tuple(numbers), item)


def sized(dims: Iterable[int | None], dtype: int = 0) -> Value:
    """A tensor with these dimensions; negative ones can't be meant and count as unknown."""
    checked = tuple([None if dim is None or dim < 0 else int(dim) for dim in dims])
    return Value(checked, elements_of(checked), dtype)


def blob(elements: int = 1, dtype: int = 0) -> Value:
    """A tensor of unknown rank with at least so many elements."""
    return Value(None, elements, dtype)


def known(array: Any, dtype: int) -> Value:
    """A small tensor whose elements are in an object array."""
    value = sized(array.shape, dtype)
    value.few = array
    return value


def row(numbers: Sequence[Any], dtype: int = INT64) -> Value:
    """A small vector with these elements."""
    import numpy as np

    array = np.empty(len(numbers), dtype=object)
    array[:] = list(numbers)
    return known(array, dtype)


def elements_of(dims: Dims) -> int:
    return math.prod(1 if dim is None else dim for dim in dims)


def broadcast(shapes: Sequence[Dims]) -> Dims:
    """Numpy's rule, where an unknown dimension gives way to a known one above 1."""
    if len(shapes) > 1 and shapes.count(shapes[0]) == len(shapes):
        return shapes[0]
    rank = max(map(len, shapes), default=0)
    out: list[int | None] = []
    for axis in range(-rank, 0):
        dims = [shape[axis] for shape in shapes if len(shape) >= -axis]
        large = [dim for dim in dims if dim is not None and dim != 1]
        if large:
            out.append(0 if 0 in large else max(large))
        else:
            out.append(None if None in dims else 1)
    return tuple(out)


def together(values: Sequence[Value]) -> Value:
    """What elementwise operators make of their inputs."""
    shapes = [value.dims for value in values if value.dims is not None]
    if len(shapes) == len(values):
        return sized(broadcast(shapes))
    return blob(max((value.elements for value in values), default=1))
