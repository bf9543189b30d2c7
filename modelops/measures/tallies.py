"""Streaming tallies of bounded size: what a comparison keeps of outputs that it can't keep whole."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 1 << 20  # elements treated at once: a few temporaries of 8 MB each
_MANTISSA_BITS = 5  # of a histogram bin: bins are at most 1/32 = 3.1 % wide
_ROW_SAMPLE = 1 << 16  # elements of a row that are watched for variation
_SHAPES = 64  # row shapes that are remembered
_NEIGHBOUR_BYTES = 64 << 20  # kept for nearest neighbours, of each side
TIE = 1e-5  # scores nearer than this share of the best one's size are a tie
_FLOOR = 1e-10  # probabilities below this count as this much, so that one rounded zero does not make KL infinite

# dtype name → (bits of the mantissa, exponent of the smallest subnormal)
_PRECISION = {"float16": (10, -24), "bfloat16": (7, -133), "float32": (23, -149), "float64": (52, -1074)}


class Histogram:
    """Counts of non-negative values in bins 3 % wide, over all magnitudes; every value is counted, none is sampled.

    A bin is the top of a float64's bit pattern (exponent and five bits of mantissa), which orders like the value.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.n = 0
        self.largest = 0.0
        self.total = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        import numpy as np

        if values.size == 0:
            return
        values = np.abs(np.ascontiguousarray(values, dtype=np.float64).reshape(-1))  # -0.0 would be a bin of its own
        bins = values.view(np.int64) >> (52 - _MANTISSA_BITS)
        first = int(bins.min())
        counts = np.bincount(bins - first)
        for index in np.flatnonzero(counts).tolist():
            self.counts[first + index] = self.counts.get(first + index, 0) + int(counts[index])
        self.n += values.size
        self.largest = max(self.largest, float(values.max()))
        self.total += float(values.sum())

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None

    def quantile(self, share: float) -> float | None:
        """The upper edge of the bin that holds the quantile: never understated, at most 3.1 % overstated."""
        import numpy as np

        if self.n == 0:
            return None
        rank, seen = math.ceil(share * self.n), 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= rank:
                if index == 0:
                    return 0.0
                edge = np.array([(index + 1) << (52 - _MANTISSA_BITS)], dtype=np.int64).view(np.float64)
                return min(float(edge[0]), self.largest)
        return self.largest


class Norm:
    """The Euclidean norm of a stream, safe from overflow and underflow (the scaled sum of LAPACK's ``dlassq``)."""

    def __init__(self) -> None:
        self.scale = 0.0
        self.sum = 0.0
        self.n = 0

    def add(self, values: NDArray[np.float64]) -> None:
        import numpy as np

        self.n += values.size
        largest = float(np.abs(values).max(initial=0.0))
        if largest == 0.0:
            return
        if largest > self.scale:
            self.sum *= (self.scale / largest) ** 2
            self.scale = largest
        scaled = (values / self.scale).reshape(-1)
        self.sum += float(scaled @ scaled)

    @property
    def value(self) -> float:
        return self.scale * math.sqrt(self.sum)


class Variation:
    """How far the rows of an output move from input to input: no movement means that a comparison has no power.

    Each row is held against the first one of its shape (at up to 65,536 positions), and all rows by their means.
    """

    def __init__(self) -> None:
        self.spread = 0.0
        self.rows = 0
        self._first: dict[tuple[int, ...], NDArray[np.float64]] = {}
        self._means: tuple[float, float] | None = None

    def add(self, rows: NDArray[Any]) -> None:
        """``rows`` has the shape (row, element)."""
        if rows.shape[0] and rows.shape[1]:
            step = max(1, CHUNK // rows.shape[1])
            for start in range(0, rows.shape[0], step):
                self._add(rows[start : start + step])

    def _add(self, rows: NDArray[Any]) -> None:
        import numpy as np

        self.rows += rows.shape[0]
        sample = rows[:, :: max(1, rows.shape[1] // _ROW_SAMPLE)].astype(np.float64)
        sample = np.where(np.isfinite(sample), sample, 0.0)
        first = self._first.get(rows.shape[1:])
        if first is None and len(self._first) < _SHAPES:
            first = self._first.setdefault(rows.shape[1:], sample[0].copy())
        if first is not None:
            self.spread = max(self.spread, float(np.abs(sample - first).max()))
        means = sample.mean(axis=1)
        low, high = float(means.min()), float(means.max())
        if self._means is not None:
            low, high = min(low, self._means[0]), max(high, self._means[1])
        self._means = (low, high)
        self.spread = max(self.spread, high - low)

    def relative(self, scale: float) -> float | None:
        """The movement as a share of ``scale``; None when there were not two rows to compare."""
        if self.rows < 2:
            return None
        return self.spread / scale if scale > 0 else 0.0


class Classes:
    """Agreement of two sets of class scores: same first class, first class among five, KL divergence."""

    def __init__(self) -> None:
        self.n = 0
        self.top1 = 0
        self.top5 = 0
        self.classes = 0
        self.kl = Histogram()
        self._probabilities: bool | None = None

    def add(self, reference: NDArray[Any], actual: NDArray[Any]) -> None:
        """Both have the shape (..., class). Vectors whose reference holds a NaN are left out."""
        import numpy as np

        self.classes = reference.shape[-1]
        y_all, x_all = reference.reshape(-1, self.classes), actual.reshape(-1, self.classes)
        step = max(1, CHUNK // self.classes)
        for start in range(0, len(y_all), step):
            y = y_all[start : start + step].astype(np.float64)
            x = x_all[start : start + step].astype(np.float64)
            known = ~np.isnan(y).any(axis=1)
            y, x = y[known], x[known]
            if len(y):
                if self._probabilities is None:
                    self._probabilities = are_probabilities(y)
                self._add_ranks(y, x)
                self._add_divergence(y, x)

    def _add_ranks(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> None:
        """A choice whose reference score ties with the best one (within 1e-5 of its size) is the same choice."""
        import numpy as np

        rows = np.arange(len(y))
        broken = np.isnan(x).any(axis=1)
        filled = np.where(np.isnan(x), -np.inf, x)
        best, chosen = y.argmax(axis=1), filled.argmax(axis=1)
        tolerance = TIE * float(np.abs(y[rows, best]).max(initial=0.0, where=np.isfinite(y[rows, best])))
        with np.errstate(invalid="ignore"):
            same = (best == chosen) | (y[rows, best] - y[rows, chosen] <= tolerance)
        before = (filled > filled[rows, best][:, None]).sum(axis=1)
        self.n += len(y)
        self.top1 += int((same & ~broken).sum())
        self.top5 += int(((before < 5) & ~broken).sum())

    def _add_divergence(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> None:
        """KL(reference ‖ actual) of each vector, in nats, of softmax at temperature 1 (or of the probabilities)."""
        import numpy as np

        usable = ~np.isnan(x).any(axis=1) & ~np.isposinf(y).any(axis=1) & ~np.isposinf(x).any(axis=1)
        usable &= np.isfinite(y).any(axis=1) & np.isfinite(x).any(axis=1)
        y, x = y[usable], x[usable]
        if len(y) == 0:
            return
        log_p, log_q = (_log_probabilities(v) if self._probabilities else _log_softmax(v) for v in (y, x))
        p = np.exp(log_p)
        terms = p * (np.maximum(log_p, -745.0) - np.maximum(log_q, -745.0))  # exp(-745) is float64's smallest
        self.kl.add(np.maximum(terms.sum(axis=1), 0.0))


class Neighbours:
    """Whether rows keep their nearest neighbour by cosine: the first 2,048 rows (fewer when they are wide) are kept."""

    def __init__(self, most: int = 2048) -> None:
        self.most = most
        self._reference: list[NDArray[Any]] = []
        self._actual: list[NDArray[Any]] = []
        self._kept = 0

    def add(self, reference: NDArray[Any], actual: NDArray[Any]) -> None:
        """Both have the shape (row, feature)."""
        limit = min(self.most, max(2, _NEIGHBOUR_BYTES // max(1, reference.shape[1] * reference.dtype.itemsize)))
        take = max(0, min(len(reference), limit - self._kept))
        if take:
            self._reference.append(reference[:take].copy())
            self._actual.append(actual[:take].copy())
            self._kept += take

    def agreement(self) -> tuple[float | None, int]:
        """(share of rows whose neighbour is the same, rows); None below three rows, where there is no choice."""
        import numpy as np

        if len({part.shape[1] for part in self._reference}) != 1:
            return None, 0
        y, x = (_unit_rows(np.concatenate(parts)) for parts in (self._reference, self._actual))
        finite = np.isfinite(y).all(axis=1)
        y, x = y[finite], x[finite]
        n = len(y)
        if n < 3:
            return None, n
        same = 0
        for start in range(0, n, 256):
            rows = np.arange(start, min(start + 256, n))
            near_y, near_x = y[rows] @ y.T, np.nan_to_num(x[rows] @ x.T, nan=-2.0)
            near_y[rows - start, rows] = near_x[rows - start, rows] = -3.0
            chosen = near_x.argmax(axis=1)
            broken = ~np.isfinite(x[rows]).all(axis=1)
            tied = near_y.max(axis=1) - near_y[rows - start, chosen] <= 1e-6
            same += int((tied & ~broken).sum())
        return same / n, n


def tied_rows(scores: NDArray[Any]) -> NDArray[np.bool_]:
    """For scores of shape (row, class): the rows whose two best ones tie, so that either index is right."""
    import numpy as np

    values = np.nan_to_num(scores.astype(np.float64), nan=-np.inf)
    best = np.partition(values, -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        result: NDArray[np.bool_] = best[:, 1] - best[:, 0] < TIE * np.abs(best[:, 1]).max(initial=0.0)
    return result


def ulps(delta: NDArray[np.float64], reference: NDArray[np.float64], dtype: str) -> NDArray[np.float64] | None:
    """``delta`` in units of the last place of ``reference`` as ``dtype``; None for dtypes that are not floating."""
    import numpy as np

    if dtype not in _PRECISION:
        return None
    mantissa, smallest = _PRECISION[dtype]
    exponent = np.frexp(reference)[1]
    scaled: NDArray[np.float64] = np.ldexp(delta, -np.maximum(exponent - 1 - mantissa, smallest))
    return scaled


def is_float(dtype: Any) -> bool:
    """Whether a numpy dtype holds floating-point numbers, those of ml_dtypes included."""
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


def are_probabilities(values: NDArray[np.float64]) -> bool:
    """Whether every vector is non-negative and sums to one."""
    import numpy as np

    return bool((values >= 0).all() and np.abs(values.sum(axis=-1) - 1).max(initial=0.0) < 1e-2)


def _log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    shifted = values - values.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _log_probabilities(values: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    result: NDArray[np.float64] = np.log(np.maximum(values, _FLOOR))
    return result


def _unit_rows(values: NDArray[Any]) -> NDArray[np.float64]:
    import numpy as np

    rows: NDArray[np.float64] = values.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return rows / np.where(lengths == 0, 1.0, lengths)
