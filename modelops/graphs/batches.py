"""The batch axis: which inputs have one, and how single samples become a feed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelops.core.tensors import Signature, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class BatchAxis:
    """The inputs whose first axis counts samples, and how many samples the model takes at once.

    ``symbol`` names the dynamic dimension; ``size`` is the fixed number of samples, None when it is dynamic.
    """

    inputs: frozenset[str]
    symbol: str | None = None
    size: int | None = None

    @classmethod
    def of(cls, signature: Signature) -> BatchAxis:
        """The batch axis is the first dynamic dimension that an input starts with, else the first fixed one.

        Dimensions without a name of their own ("x_dim0") count as the same.
        """
        leading = [(spec, spec.shape[0]) for spec in signature.inputs if spec.shape]
        dynamic = [(spec, dim) for spec, dim in leading if isinstance(dim, str)]
        if dynamic:
            symbol = next((dim for spec, dim in dynamic if not _anonymous(spec)), dynamic[0][1])
            names = (spec.name for spec, dim in dynamic if dim == symbol or _anonymous(spec))
            return cls(frozenset(names), symbol=str(symbol))
        if leading:
            size = leading[0][1]
            return cls(frozenset(spec.name for spec, dim in leading if dim == size), size=int(size))
        return cls(frozenset())

    def sample_shape(self, spec: TensorSpec) -> tuple[int | str, ...]:
        """The shape of one sample of this input."""
        return spec.shape[1:] if spec.name in self.inputs else spec.shape

    def rows(self, feed: Mapping[str, Any]) -> int:
        """How many samples a feed holds."""
        return next((len(feed[name]) for name in feed if name in self.inputs), 1)


def _anonymous(spec: TensorSpec) -> bool:
    return spec.shape[0] == f"{spec.name}_dim0"


def row_axes(signature: Signature) -> dict[str, int]:
    """By output: the axis on which its samples lie, where that is not the first one."""
    symbol = BatchAxis.of(signature).symbol
    outputs = [spec for spec in signature.outputs if symbol in spec.shape and spec.shape[0] != symbol]
    return {spec.name: spec.shape.index(symbol) for spec in outputs if symbol is not None}


def collate(samples: Sequence[Mapping[str, Any]], signature: Signature) -> dict[str, NDArray[Any]]:
    """One feed of several samples (name → array without batch axis).

    Where samples differ in length they are filled with zeros at the end; where the batch is fixed and larger, the last
    sample is repeated. Inputs without a batch axis are taken from the first sample.
    """
    import numpy as np

    axis = BatchAxis.of(signature)
    rows = [*samples, *([samples[-1]] * ((axis.size or 0) - len(samples)))]
    feed: dict[str, NDArray[Any]] = {}
    for spec in signature.inputs:
        if spec.name not in axis.inputs:
            feed[spec.name] = np.asarray(samples[0][spec.name])
            continue
        arrays = [np.asarray(row[spec.name]) for row in rows]
        largest = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
        stacked = np.zeros((len(arrays), *largest), dtype=arrays[0].dtype)
        for target, array in zip(stacked, arrays, strict=True):
            target[tuple(slice(size) for size in array.shape)] = array
        feed[spec.name] = stacked
    return feed


def split(feed: Mapping[str, Any], signature: Signature) -> list[dict[str, Any]]:
    """The samples of a feed: the inverse of ``collate``."""
    axis = BatchAxis.of(signature)
    return [
        {name: array[row] if name in axis.inputs else array for name, array in feed.items()}
        for row in range(axis.rows(feed))
    ]


def together(one: Mapping[str, Any], other: Mapping[str, Any], signature: Signature) -> bool:
    """Whether two samples may share a batch.

    Samples of different lengths may only where the model takes a mask, since filling would change them otherwise;
    inputs without a batch axis must be equal.
    """
    import numpy as np

    axis = BatchAxis.of(signature)
    if not axis.inputs:
        return False
    masked = _masked(spec.name for spec in signature.inputs)
    for name in one:
        if name not in axis.inputs:
            if not np.array_equal(one[name], other[name]):
                return False
        elif not masked and one[name].shape != other[name].shape:
            return False
    return True


def _masked(names: Iterable[str]) -> bool:
    return any("mask" in name.lower() for name in names)
