"""Histograms of bounded size, and the range that each rule finds in one.

A range is what 256 levels are spread over, zero always among them; what lies outside is clipped. A wide range rounds
everything coarsely, a narrow one clips outliers::

    minmax       nothing is clipped
    average      the mean of the extremes of every batch: what only one batch held is clipped (found without histograms)
    percentile   a fixed share of values is clipped on each side
    mse          least mean squared error of rounding and clipping together
    entropy      least information lost: Kullback–Leibler divergence of the quantized distribution from the real one
                 (Migacz 2017, *8-bit inference with TensorRT*), here with both ends free
    auto         of these, the one with the least squared error on samples that it was not found on

mse and entropy are searched for, end by end, over fractions of the whole range.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Rule = Literal["minmax", "average", "percentile", "entropy", "mse", "auto"]
Range = tuple[float, float]

BINS = 2048
LEVELS = 256
# Each end is tried at these fractions of its extreme; a narrower range never won on real activations.
_FRACTIONS = 120
_SWEEPS = 4


class Histogram:
    """How often values fell into equal bins between two ends that are known beforehand; zeros are counted apart.

    Zeros are exact under every range, and after a Relu they are most of all values.
    """

    def __init__(self, low: float, high: float) -> None:
        import numpy as np

        self.low, self.high = min(low, 0.0), max(high, 0.0)
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.zeros = 0

    @property
    def centres(self) -> NDArray[Any]:
        """The middle of each bin."""
        import numpy as np

        return np.asarray(self.low + (self.high - self.low) / BINS * (np.arange(BINS) + 0.5))

    def add(self, values: NDArray[Any]) -> None:
        """Count values; those beyond the ends, which only rounding can give, count at the end."""
        import numpy as np

        flat = np.asarray(values, dtype=np.float32).reshape(-1)
        self.zeros += int(flat.size - np.count_nonzero(flat))
        flat = flat[flat != 0]
        if self.high > self.low:
            places = ((flat - np.float32(self.low)) * np.float32(BINS / (self.high - self.low))).astype(np.int32)
            self.counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)

    def __add__(self, other: Histogram) -> Histogram:
        """What both counted, between the same ends."""
        both = Histogram(self.low, self.high)
        both.counts, both.zeros = self.counts + other.counts, self.zeros + other.zeros
        return both

    def to_list(self) -> list[Any]:
        """For the cache: ends, zeros, and the counts as text."""
        packed = base64.b64encode(zlib.compress(self.counts.astype("<i8").tobytes())).decode()
        return [self.low, self.high, self.zeros, packed]

    @classmethod
    def of_list(cls, values: Any) -> Histogram:
        """What ``to_list`` wrote; ValueError for anything else."""
        import numpy as np

        low, high, zeros, packed = values
        found = cls(float(low), float(high))
        try:
            counts = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype="<i8")
        except zlib.error as error:
            raise ValueError(f"no histogram: {error}") from error
        if counts.shape != (BINS,) or counts.min() < 0 or int(zeros) < 0 or (found.low, found.high) != (low, high):
            raise ValueError("no histogram")
        found.counts, found.zeros = counts.astype(np.int64), int(zeros)
        return found

    def error(self, found: Range) -> float:
        """The mean squared error of quantizing what was counted with this range."""
        total = int(self.counts.sum()) + self.zeros
        return float(_errors(self, [found])[0]) / total if total else 0.0


def best(
    histogram: Histogram,
    rule: Rule,
    percentile: float,
    held_out: Histogram | None = None,
    average: Range | None = None,
) -> Range:
    """The range that the rule finds.

    ``auto`` judges by ``held_out``, or by the squared error where that is missing; ``average`` is one more to choose.
    """
    if rule == "minmax" or not histogram.counts.any():
        return histogram.low, histogram.high
    if rule == "percentile":
        return _percentile(histogram, percentile)
    if rule == "mse":
        return _searched(histogram, lambda candidates: _errors(histogram, candidates))
    if rule == "entropy":
        return _searched(histogram, lambda candidates: _divergences(histogram, candidates))
    judge = held_out if held_out is not None and held_out.counts.any() else histogram
    rules: tuple[Rule, ...] = ("minmax", "percentile", "entropy", "mse")
    found = [best(histogram, one, percentile) for one in rules]
    found += [(min(average[0], 0.0), max(average[1], 0.0))] if average is not None else []
    return found[int(_errors(judge, found).argmin())]


def _percentile(histogram: Histogram, percentile: float) -> Range:
    """The ends beyond each of which lies the rest of ``percentile``, interpolated within a bin."""
    import numpy as np

    counts = histogram.counts.astype(np.float64)
    width = (histogram.high - histogram.low) / BINS
    counts[min(BINS - 1, int(-histogram.low / width))] += histogram.zeros
    share = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    edges = histogram.low + width * np.arange(BINS + 1)
    rest = 1 - percentile / 100
    low, high = (float(np.interp(part, share, edges)) for part in (rest, 1 - rest))
    return min(low, 0.0), max(high, 0.0)


def _searched(histogram: Histogram, costs: Callable[[list[Range]], NDArray[np.float64]]) -> Range:
    """The range of least cost, by moving one end at a time until neither gains."""
    low, high = histogram.low, histogram.high
    fractions = [(_FRACTIONS - step) / _FRACTIONS for step in range(_FRACTIONS)]
    for _ in range(_SWEEPS):
        before = (low, high)
        if histogram.high > 0:
            candidates = [(low, histogram.high * fraction) for fraction in fractions]
            high = candidates[int(costs(candidates).argmin())][1]
        if histogram.low < 0:
            candidates = [(histogram.low * fraction, high) for fraction in fractions]
            low = candidates[int(costs(candidates).argmin())][0]
        if (low, high) == before:
            break
    return low, high


def quantization(found: Range) -> tuple[float, int]:
    """(step, zero point) of 256 levels over the range, as the runtime will have them."""
    step = (found[1] - found[0]) / (LEVELS - 1)
    return (step, round(-found[0] / step)) if step > 0 else (1.0, 0)


def _errors(histogram: Histogram, candidates: list[Range]) -> NDArray[np.float64]:
    """The summed squared error of every candidate; a bin's values are spread evenly around its middle."""
    import numpy as np

    used = histogram.counts > 0
    centres, counts = histogram.centres[used], histogram.counts[used].astype(np.float64)
    steps, zeros = np.array([quantization(found) for found in candidates]).T[:, :, None]
    levels = np.clip(np.rint(centres / steps) + zeros, 0, LEVELS - 1)
    errors = (centres - (levels - zeros) * steps) ** 2
    result: NDArray[np.float64] = errors @ counts
    return result


def _divergences(histogram: Histogram, candidates: list[Range]) -> NDArray[np.float64]:
    """KL(real ‖ quantized) of every candidate; clipped values count in the real one where they are clipped to."""
    import numpy as np

    centres, counts = histogram.centres, histogram.counts.astype(np.float64)
    result = np.full(len(candidates), math.inf)
    for number, found in enumerate(candidates):
        step, zero = quantization(found)
        inside = np.flatnonzero((centres >= found[0]) & (centres <= found[1]))
        if not len(inside):
            continue
        kept = counts[inside]
        real = kept.copy()
        real[0] += counts[: inside[0]].sum()
        real[-1] += counts[inside[-1] + 1 :].sum()
        levels = np.clip(np.rint(centres[inside] / step) + zero, 0, LEVELS - 1).astype(np.int64)
        full = kept > 0
        mass = np.bincount(levels, weights=kept, minlength=LEVELS)
        bins = np.bincount(levels, weights=full, minlength=LEVELS)
        quantized = np.where(full, mass[levels] / np.maximum(bins[levels], 1), 0)
        if not quantized.any():
            continue
        p, q = real / real.sum(), quantized / quantized.sum()
        seen = p > 0
        result[number] = float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-9))).sum())
    return result
