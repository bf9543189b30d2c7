"""How much the channels that weights read vary on real samples: what goes with them when their mean is made up for."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.progress import progress
from modelops.graphs.batches import BatchAxis
from modelops.pruners._flight import Feed, Flight, small
from modelops.pruners._segments import Parts

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from modelops.pruners._groups import Anatomy

Use = tuple["ir.Node", int]
# Nodes whose inputs are looked at in one go; their values are in memory together.
_AT_ONCE = 8


def variances(
    anatomy: Anatomy, batches: Iterable[Feed], axis: BatchAxis, scratch: Path
) -> dict[Use, NDArray[np.float64]]:
    """For every use of a weight that sums over channels, the variance of each channel on these samples."""
    readers = {
        found.place.use: place
        for found in anatomy.axes.axes
        if found.role == "in" and found.place.use is not None and (place := _read(*found.place.use)) is not None
    }
    parts = Parts(anatomy.network.model)
    ordered = sorted(readers, key=lambda use: parts.place[use[0]])
    flight = Flight(parts, scratch / "activations")
    flight.start(small(batches, axis))
    result: dict[Use, NDArray[np.float64]] = {}
    for first in range(0, len(ordered), _AT_ONCE):
        progress("looking at activations", first, len(ordered))
        uses = ordered[first : first + _AT_ONCE]
        moments = [Moments() for _ in uses]
        names = [readers[use][0] for use in uses]
        for values in flight.advance([str(use[0].name) for use in uses], list(dict.fromkeys(names))):
            for moment, use, name in zip(moments, uses, names, strict=True):
                moment.add(values[name], readers[use][1])
        result.update(zip(uses, (moment.variance() for moment in moments), strict=True))
    progress("looking at activations", len(ordered), len(ordered))
    shutil.rmtree(scratch / "activations")
    return result


class Moments:
    """Mean and variance along one axis, over everything else."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, array: NDArray[Any], axis: int) -> None:
        import numpy as np

        axis %= array.ndim
        others = tuple(k for k in range(array.ndim) if k != axis)
        self._sum = self._sum + array.sum(others, dtype=np.float64)
        self._squares = self._squares + np.square(array, dtype=np.float64).sum(others)
        self._count += array.size // array.shape[axis]

    def variance(self) -> NDArray[np.float64]:
        import numpy as np

        mean = self._sum / self._count
        found: NDArray[np.float64] = np.maximum(self._squares / self._count - mean * mean, 0.0)
        return found


def _read(node: ir.Node, number: int) -> tuple[str, int] | None:
    """(the value that meets a weight, its axis that the weight sums over)."""
    other = node.inputs[1 - number] if number < 2 else None
    if other is None or other.name is None or other.const_value is not None:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return other.name, 1
    if node.op_type == "MatMul":
        return other.name, -1 if number == 1 else -2
    if node.op_type == "Gemm":
        turned = node.attributes.get_int("transA" if number == 1 else "transB", 0)
        return other.name, (0 if turned else 1) if number == 1 else (1 if turned else 0)
    return None
