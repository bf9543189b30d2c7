"""Races: which of two models is faster, surely; and where several stand beside the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelops.core.progress import progress as say
from modelops.measures.verdicts import Rules, SpeedVerdict
from modelops.stages import _preflight, _speed
from modelops.stages._launches import Measurement, Plan, Record, measuring
from modelops.stages._runner import Contender

__all__ = ["Contender", "Plan", "RaceResult", "Standing", "Standings", "measure", "race", "standings"]

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class RaceResult:
    """What a race found. The verdict's ratio is the time of ``a`` over the time of ``b``: below 1, ``a`` is faster.

    ``records`` are the raw blocks, from which ``_speed.judge`` derives the verdict again.
    """

    verdict: SpeedVerdict
    records: Sequence[Record]
    seconds: float


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
    rules: Rules | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    progress: Progress = say,
) -> RaceResult:
    """Whether ``a`` is surely slower than ``b`` by more than ``ignore`` (fail), or surely not by ``detect`` (pass).

    With ``at_least``, whether ``a`` is surely that many times as fast. Every launch is fresh processes; the race ends
    with the first verdict, or with the budget. ``rules`` replaces the margins by rules of its own.

    StageFailed when a model fails, is killed, or its outputs change or turn NaN; Inconclusive when CPUs are taken away.
    """
    started = time.monotonic()
    rules = rules or Rules(ignore=ignore, detect=detect, at_least=at_least)
    found: SpeedVerdict | None = None
    with measuring((a, b), feed, seed=seed, plan=plan) as measurement:
        measurement.records.append(_preflight.look())
        for _ in _launched(measurement, rules.looks[-1], budget_seconds, rules.looks[0], progress):
            found = _speed.judge(measurement.records, a.name, b.name, rules, final=False)
            if found is not None:
                break
    if found is None:
        found = _speed.judge(measurement.records, a.name, b.name, rules)
    assert found is not None
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
    records = measure(
        contenders, feed, budget_seconds=budget_seconds, launches=most_launches, seed=seed, plan=plan, progress=progress
    )
    first = contenders[0].name
    rows = []
    for contender in contenders:
        ratio, interval = (1.0, None) if contender.name == first else _speed.speedup(records, first, contender.name)
        rows.append(Standing(contender.name, _speed.block_ms(records, contender.name), ratio, interval))
    return Standings(tuple(rows), len(_speed.headers(records)), records, time.monotonic() - started)


def measure(
    contenders: Sequence[Contender],
    feed: Mapping[str, Any],
    *,
    budget_seconds: float,
    launches: int,
    seed: int = 0,
    plan: Plan | None = None,
    progress: Progress = say,
) -> list[Record]:
    """The raw records of up to so many launches of all contenders side by side; no verdict is looked for."""
    with measuring(contenders, feed, seed=seed, plan=plan) as measurement:
        measurement.records.append(_preflight.look())
        for _ in _launched(measurement, launches, budget_seconds, launches, progress):
            pass
    return measurement.records


def _launched(
    measurement: Measurement, most: int, budget_seconds: float, planned: int, progress: Progress
) -> Iterator[int]:
    """Launch after launch until there are ``most``, or the next would go beyond the budget; yields their count.

    The size of a launch is chosen so that ``planned`` of them fit into the budget; one is always made.
    """
    started = time.monotonic()
    what = "timing " + " and ".join(contender.name for contender in measurement.contenders)
    while measurement.launches < most:
        spent = time.monotonic() - started
        if measurement.launches and spent + measurement.longest_seconds > budget_seconds:
            return
        progress(what, measurement.launches, most)
        measurement.launch(0.9 * budget_seconds / planned)
        yield measurement.launches
    progress(what, most, most)
