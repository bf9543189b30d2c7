"""Summaries of latencies: a percentile only where enough samples hold it, and an interval with each figure.

How many samples a percentile needs is the rule of MLPerf's LoadGen: so many that more than one of them lies beyond it
with 99 % probability (64 for the 90th, 662 for the 99th). Samples of one process resemble each other, so wherever there
are three launches or more, the interval of the mean and the median is taken over launches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, stdev

from modelops.core.report import Metric
from modelops.errors import InputRefused
from modelops.measures.distributions import binomial_cdf, t_quantile

PERCENTILES = (0.5, 0.9, 0.95, 0.99)
CONFIDENCE = 0.99

_BATCHES = 20
_LAUNCHES_MIN = 3


@dataclass(frozen=True)
class Latency:
    """What ``n`` latencies of ``launches`` processes say, in milliseconds.

    ``values`` holds ``mean``, ``p50`` and so on; ``intervals`` those of them that have one; ``needs`` the percentiles
    left out, with the number of samples that each would need.
    """

    n: int
    launches: int
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)
    confidence: float = CONFIDENCE

    @property
    def per_second(self) -> float:
        """Runs in a second, one after another."""
        return 1000.0 / self.values["mean"]

    def metrics(self, prefix: str = "latency") -> tuple[Metric, ...]:
        """One metric for each figure, such as ``latency_p50`` in ms."""
        return tuple(
            Metric(f"{prefix}_{name}", value, "ms", interval, self.confidence if interval else None, self.n)
            for name, value in self.values.items()
            for interval in (self.intervals.get(name),)
        )


def summarize(launches_ms: Sequence[Sequence[float]], *, confidence: float = CONFIDENCE) -> Latency:
    """The summary of the latencies in milliseconds, one sequence a launch in the order of time.

    InputRefused when there is none, or one that is no time.
    """
    launches = [list(launch) for launch in launches_ms if len(launch)]
    samples = sorted(itertools.chain.from_iterable(launches))
    for sample in (*samples[:1], *samples[-1:], *(s for s in samples if s != s)):
        if not (math.isfinite(sample) and sample > 0):
            raise InputRefused(f"a latency of {sample} ms is no time")
    if not samples:
        raise InputRefused("there is no latency to summarize")
    n = len(samples)
    values, intervals, needs = {"mean": fmean(samples)}, {}, {}
    mean = _over_launches([fmean(launch) for launch in launches], confidence)
    intervals["mean"] = mean or (_batch_means(launches[0], confidence) if len(launches) == 1 else None)
    for share in PERCENTILES:
        name = f"p{100 * share:g}"
        if share > 0.5 and n < samples_needed(share):
            needs[name] = samples_needed(share)
            continue
        values[name] = percentile(samples, share)
        over = _over_launches([percentile(sorted(launch), share) for launch in launches], confidence)
        intervals[name] = (over if share == 0.5 else None) or order_interval(samples, share, confidence)
    held = {name: _holding(values[name], interval) for name, interval in intervals.items() if interval}
    return Latency(n, len(launches), values, held, needs, confidence)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest sample that this share of the samples does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@cache
def samples_needed(share: float, confidence: float = 0.99) -> int:
    """The fewest samples of which two lie beyond the percentile with this probability (MLPerf LoadGen's floor)."""
    n = 2
    while binomial_cdf(1, n, 1 - share) > 1 - confidence:
        n += 1
    return n


def order_interval(ordered: Sequence[float], share: float, confidence: float) -> tuple[float, float] | None:
    """The interval of a percentile between two of the samples, whatever their distribution; None when n is too small.

    The number of samples below the percentile is binomial (David and Nagaraja, *Order Statistics*, 3rd ed., §7.1).
    """
    n, tail = len(ordered), (1 - confidence) / 2

    def smallest(probability: float) -> int:
        """The smallest count whose cumulated probability exceeds the given one."""
        low, high = -1, n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if binomial_cdf(middle, n, share) > probability else (middle, high)
        return high

    first, last = smallest(tail), smallest(1 - tail)
    if first < 1 or last >= n:
        return None
    return ordered[first - 1], ordered[last]


def _over_launches(figures: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Student's interval of the mean of the launches' own figures."""
    if len(figures) < _LAUNCHES_MIN:
        return None
    half = t_quantile((1 + confidence) / 2, len(figures) - 1) * stdev(figures) / math.sqrt(len(figures))
    return max(0.0, fmean(figures) - half), fmean(figures) + half


def _batch_means(samples: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """The interval of the mean of samples that depend on their neighbours: batch means (Schmeiser 1982), 20 of them."""
    size = len(samples) // _BATCHES
    if size < 2:
        return None
    return _over_launches([fmean(samples[i * size : (i + 1) * size]) for i in range(_BATCHES)], confidence)


def _holding(value: float, interval: tuple[float, float]) -> tuple[float, float]:
    """The interval over launches of unequal length may leave out the pooled figure: it is widened to hold it."""
    return min(value, interval[0]), max(value, interval[1])
