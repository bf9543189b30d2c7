"""What products read, in samples: a bounded number of rows from all of the calibration data.

The extremes of every column are taken over all rows, batch by batch, since a dynamic kernel finds its range in a batch.
Of every four batches one is held out: what is fitted on the others is judged there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.quantizers._calibration import Extent, Feeds, bands, streamed

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

ROWS = 2048
# Of every four batches, one judges.
HELD_OUT = 4


@dataclass(frozen=True)
class Batch:
    """Some rows of one batch, and the extremes of its columns over all of its rows."""

    rows: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


@dataclass
class Capture:
    """The input of some products over the calibration data: rows × columns, batch by batch."""

    fitting: list[Batch] = field(default_factory=list)
    held_out: list[Batch] = field(default_factory=list)

    @property
    def judging(self) -> list[Batch]:
        """The batches that judge: those held out, or all where there are too few to hold any out."""
        return self.held_out or self.fitting

    @property
    def columns(self) -> int:
        return int(self.fitting[0].rows.shape[1])

    def thinned(self, step: int) -> Capture:
        """Every so many-th row of each batch; the extremes stay those of all."""

        def few(batches: list[Batch]) -> list[Batch]:
            return [Batch(batch.rows[::step], batch.low, batch.high) for batch in batches]

        return Capture(few(self.fitting), few(self.held_out))

    def low(self) -> NDArray[Any]:
        """The least value of every column in the batches that fit."""
        import numpy as np

        return np.asarray(np.min([batch.low for batch in self.fitting], axis=0))

    def high(self) -> NDArray[Any]:
        import numpy as np

        return np.asarray(np.max([batch.high for batch in self.fitting], axis=0))


def captured(
    model: onnx.ModelProto, columns: Mapping[str, int], extents: Mapping[str, Extent], feeds: Feeds, scratch: Path
) -> Iterator[tuple[str, Capture]]:
    """Every tensor's capture, a few tensors at a time; ``columns`` maps each to the size of its last axis."""
    import numpy as np

    for band in bands({name: 4 * max(extents[name].elements, ROWS * size) for name, size in columns.items()}):
        found = {name: Capture() for name in band}
        rng = np.random.default_rng(0)
        for count, values in enumerate(streamed(model, band, feeds, scratch, "sampling activations")):
            held_out = count % HELD_OUT == HELD_OUT - 1
            for name, array in values.items():
                batch = _sampled(array, -(-ROWS // extents[name].runs), rng)
                (found[name].held_out if held_out else found[name].fitting).append(batch)
        yield from found.items()


def _sampled(array: NDArray[Any], most: int, rng: Any) -> Batch:
    import numpy as np

    rows = array.reshape(-1, array.shape[-1])
    kept = rows if len(rows) <= most else rows[np.sort(rng.choice(len(rows), most, replace=False))]
    return Batch(np.array(kept), rows.min(axis=0), rows.max(axis=0))
