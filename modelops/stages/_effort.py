"""How much work one row of a model is: it decides on how many rows, and threads, a conversion is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from modelops.sources._first_run import FirstRun

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelops.stages._eager import Eager

ROWS = 32
LEAST_ROWS = 16
"""Rows that a model is checked on at least, those of the corners included, however large it is."""
_AFFORDABLE = 140e9  # operations: some seconds on a core, less than exporting such a model takes
_WORTH_THREADS = 2e12  # what takes a core most of a minute: longer than the export beside which it can run
_WORTH_THREADS_IN_FLOAT64 = 50e9
# However many CPUs there are: sums come out in another order on another number of threads, at some shapes and dtypes.
_THREADS = 2


@dataclass(frozen=True)
class Effort:
    """The multiplications and additions in matrix products and convolutions for one row; 0 where it is not known.

    ``convolutions`` is the share of the latter, ``seconds`` what a row takes on one thread.
    """

    operations: float = 0.0
    convolutions: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, run: FirstRun, rows: int) -> Self:
        """The effort of one row, from a run on so many."""
        rows = max(1, rows)
        share = run.convolutions / run.operations if run.operations else 0.0
        return cls(run.operations / rows, share, run.seconds / rows)

    @property
    def high(self) -> bool:
        """Whether 32 rows are more than can be afforded."""
        return self.operations * ROWS > _AFFORDABLE

    def rows(self, wanted: int | None) -> int:
        """How many rows to check: as many as were asked for, else 32, or of an expensive model fewer with corners."""
        if wanted is not None or not self.high:
            return wanted or ROWS
        return max(LEAST_ROWS, int(_AFFORDABLE / self.operations))

    def threads(self, rows: int, *, double: bool = False) -> int:
        """How many threads to run that many rows on: the same on every machine, as the last bits depend on it.

        Convolutions stay on one.
        """
        worth = _WORTH_THREADS_IN_FLOAT64 if double else _WORTH_THREADS
        if self.operations * rows <= worth or self.convolutions > 0.5:
            return 1
        return _THREADS


def settle_threads(
    eager: Eager, feed: Mapping[str, NDArray[Any]], first: Mapping[str, NDArray[Any]], many: int
) -> str | None:
    """Choose how many threads the module runs on, by running it again on a feed.

    ``first`` is what one thread gave for it. Several are used only where they give the same, bit for bit; what they
    give at other sizes may differ from what one thread gives, and is repeatable since their number is fixed. Gives the
    name of an output that differs between two runs on one thread, if there is one.
    """
    known, differing = [first], None
    for threads in (many, 1, 1) if many > 1 else (1, 1):
        eager.threads = threads
        found = eager.run(feed)
        apart = [_differing(other, found) for other in known]
        if None in apart:
            return None
        known, differing = ([first, found] if threads == 1 else [first]), apart[0]
    return differing


def _differing(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> str | None:
    import numpy as np

    pairs = ((name, value, other[name]) for name, value in one.items())
    return next(
        (name for name, a, b in pairs if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f")),
        None,
    )
