"""Races: which of two models is faster, surely; and where several stand beside the first."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelops.core.progress import progress as say
from modelops.measures.distributions import t_quantile
from modelops.stages._launches import Measurement, Plan, Record, measuring
from modelops.stages._runner import Contender

__all__ = ["Contender", "Plan", "RaceResult", "Standing", "Standings", "race", "standings"]

Progress = Callable[[str, int, int | None], None]
LOOKS = (5, 8, 12, 20)


@dataclass(frozen=True)
class SpeedVerdict:
    verdict: Literal["pass", "fail", "inconclusive"]
    ratio: float
    interval: tuple[float, float]
    confidence: float
    launches: int


@dataclass(frozen=True)
class RaceResult:
    """What a race found. The verdict's ratio is the time of ``a`` over the time of ``b``: below 1, ``a`` is faster.

    ``records`` are the raw blocks, from which the verdict can be derived again; ``seconds`` is what the race took.
    """

    verdict: SpeedVerdict
    records: Sequence[Record]
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """One model beside the first: ``speedup`` is the first's time over this one's, with its 95 % interval."""

    name: str
    latency_ms: float
    speedup: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Standings:
    """The standings of all contenders, in the order given, and the raw records."""

    standings: tuple[Standing, ...]
    launches: int
    records: Sequence[Record]
    seconds: float

    def of(self, name: str) -> Standing:
        """The standing of the contender of that name; KeyError when there is none."""
        for standing in self.standings:
            if standing.name == name:
                return standing
        raise KeyError(name)


def race(
    a: Contender,
    b: Contender,
    feed: Mapping[str, Any],
    *,
    budget_seconds: float = 60.0,
    ignore: float = 0.02,
    detect: float = 0.05,
    at_least: float | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    progress: Progress = say,
) -> RaceResult:
    """Whether ``a`` is surely slower than ``b`` by more than ``ignore`` (fail), or surely not by ``detect`` (pass).

    With ``at_least``, whether ``a`` is surely that many times as fast. Fresh processes for every launch; a verdict is
    looked for after a few launches, and the race ends with the first one, or with the budget (inconclusive).
    """
    started = time.monotonic()
    with measuring((a, b), feed, seed=seed, plan=plan) as measurement:
        for count in launched(measurement, LOOKS[-1], budget_seconds, LOOKS[0], progress):
            if count in LOOKS:
                found = judge(measurement.records, a.name, b.name, ignore=ignore, detect=detect, at_least=at_least)
                if found.verdict != "inconclusive":
                    break
    found = judge(measurement.records, a.name, b.name, ignore=ignore, detect=detect, at_least=at_least)
    return RaceResult(found, measurement.records, time.monotonic() - started)


def standings(
    contenders: Sequence[Contender],
    feed: Mapping[str, Any],
    *,
    budget_seconds: float = 60.0,
    most_launches: int = 8,
    seed: int = 0,
    plan: Plan | None = None,
    progress: Progress = say,
) -> Standings:
    """Every contender's latency, and its speed-up over the first, measured side by side in the same launches."""
    started = time.monotonic()
    with measuring(contenders, feed, seed=seed, plan=plan) as measurement:
        for _ in launched(measurement, most_launches, budget_seconds, 3, progress):
            pass
    records = measurement.records
    first = contenders[0].name
    rows = []
    for contender in contenders:
        ratios = log_ratios(records, first, contender.name)
        mean = statistics.fmean(ratios)
        interval = None
        if len(ratios) > 1 and contender.name != first:
            half = t_quantile(0.975, len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))
            interval = (math.exp(mean - half), math.exp(mean + half))
        times = [block["wall_ns"] / block["n"] for block in blocks_of(records, contender.name)]
        rows.append(Standing(contender.name, statistics.median(times) * 1e-6, math.exp(mean), interval))
    return Standings(tuple(rows), measurement.launches, records, time.monotonic() - started)


def launched(
    measurement: Measurement, most: int, budget_seconds: float, planned: int, progress: Progress
) -> Iterator[int]:
    """Launch after launch until there are ``most``, or the next would go beyond the budget; yields their count.

    The size of a launch is chosen so that ``planned`` of them fit into the budget; two are always made.
    """
    started = time.monotonic()
    what = "measuring " + " and ".join(contender.name for contender in measurement.contenders)
    while measurement.launches < most:
        spent = time.monotonic() - started
        if measurement.launches >= 2 and spent + measurement.longest_seconds > budget_seconds:
            return
        progress(what, measurement.launches, most)
        measurement.launch(0.9 * budget_seconds / planned)
        yield measurement.launches
    progress(what, most, most)


def blocks_of(records: Sequence[Record], side: str) -> list[Record]:
    """The blocks of one side, in the order in which they were run."""
    return [record for record in records if record["kind"] == "block" and record["side"] == side]


def log_ratios(records: Sequence[Record], a: str, b: str) -> list[float]:
    """One figure for every launch: the median over its rounds of log(time of a / time of b)."""
    rounds: dict[tuple[int, int], dict[str, float]] = {}
    for record in records:
        if record["kind"] == "block":
            rounds.setdefault((record["launch"], record["round"]), {})[record["side"]] = record["wall_ns"] / record["n"]
    launches: dict[int, list[float]] = {}
    for (launch, _), times in rounds.items():
        launches.setdefault(launch, []).append(math.log(times[a] / times[b]))
    return [statistics.median(values) for values in launches.values()]


def judge(
    records: Sequence[Record], a: str, b: str, *, ignore: float, detect: float, at_least: float | None
) -> SpeedVerdict:
    """The verdict that these records support."""
    values = log_ratios(records, a, b)
    mean, count = statistics.fmean(values), len(values)
    half = t_quantile(0.9975, count - 1) * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.inf
    low, high = mean - half, mean + half
    verdict: Literal["pass", "fail", "inconclusive"] = "inconclusive"
    if at_least is not None:
        verdict = "pass" if high < -math.log(at_least) else "fail" if low > -math.log(at_least) else "inconclusive"
    elif low > math.log1p(ignore):
        verdict = "fail"
    elif high < math.log1p(detect):
        verdict = "pass"
    if count < LOOKS[0]:
        verdict = "inconclusive"
    return SpeedVerdict(verdict, math.exp(mean), (math.exp(low), math.exp(min(high, 700))), 0.995, count)
