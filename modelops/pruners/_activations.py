"""How much the channels that weights read vary on real samples: what goes with them when their mean is made up for."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
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
_AT_ONCE = 16
# Elements that are in float64 at a time.
_ELEMENTS = 1 << 17


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

        def told(_: int, values: Feed, uses: list[Use] = uses) -> list[Moments]:
            return [Moments.of(values[readers[use][0]], readers[use][1]) for use in uses]

        for batch in flight.advance([str(use[0].name) for use in uses], list(dict.fromkeys(names)), told):
            for moment, more in zip(moments, batch, strict=True):
                moment.add(more)
        result.update(zip(uses, (moment.variance() for moment in moments), strict=True))
    progress("looking at activations", len(ordered), len(ordered))
    shutil.rmtree(scratch / "activations")
    return result


@dataclass
class Moments:
    """Mean and variance along one axis, over everything else."""

    _count: int = 0
    _sum: Any = 0.0
    _squares: Any = 0.0

    @classmethod
    def of(cls, array: NDArray[Any], axis: int) -> Moments:
        """Those of one array."""
        import numpy as np

        axis %= array.ndim
        channels = array.shape[axis]
        blocks = array.reshape(math.prod(array.shape[:axis]), channels, math.prod(array.shape[axis + 1 :]))
        sums, squares = np.zeros(channels), np.zeros(channels)
        step = max(1, _ELEMENTS // max(1, blocks[:1].size))
        for first in range(0, len(blocks), step):
            wide = blocks[first : first + step].astype(np.float64)
            sums += wide.sum((0, 2))
            squares += np.einsum("bcp,bcp->c", wide, wide)
        return cls(array.size // channels, sums, squares)

    def add(self, more: Moments) -> None:
        """Those of other arrays too."""
        self._sum = self._sum + more._sum
        self._squares = self._squares + more._squares
        self._count += more._count

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
