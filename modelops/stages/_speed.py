"""What raw records of launches say: pure functions, so that a verdict can be derived again from evidence alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from modelops.core.report import Metric
from modelops.measures.distributions import t_quantile
from modelops.measures.latency import Latency, summarize
from modelops.measures.verdicts import Clock, Launch, Pair, Rules, SpeedVerdict, decide

Record = dict[str, Any]

# A neighbour that takes more of our CPUs than this makes wall time a poor witness for one thread.
_BUSY = 0.5


def headers(records: Sequence[Record]) -> list[Record]:
    """The records of launches, in order."""
    return [record for record in records if record["kind"] == "launch"]


def blocks(records: Sequence[Record], side: str) -> list[Record]:
    """The blocks of one side, in the order in which they were run."""
    return [record for record in records if record["kind"] == "block" and record["side"] == side]


def clock(records: Sequence[Record]) -> Clock:
    """The clock that verdicts go by: CPU time where others kept our CPUs busy and every model has one thread.

    Which it is depends on the preflight and the models alone, never on what was measured.
    """
    busy = next((record["busy"] for record in records if record["kind"] == "preflight"), None)
    sides = [side for header in headers(records) for side in header["sides"].values()]
    alone = all(side["facts"].get("threads") == 1 and "device" not in side["facts"] for side in sides)
    return "cpu" if busy is not None and busy > _BUSY and alone and sides else "wall"


def launches(records: Sequence[Record], a: str, b: str) -> list[Launch]:
    """The launches as verdicts read them: ``a`` is the model that is judged."""
    found: dict[int, dict[int, dict[str, Record]]] = {}
    for record in records:
        if record["kind"] == "block" and record["side"] in (a, b):
            found.setdefault(record["launch"], {}).setdefault(record["round"], {})[record["side"]] = record
    result = []
    for header in headers(records):
        rounds = found.get(header["launch"], {})
        pairs = tuple(_pair(sides[a], sides[b]) for _, sides in sorted(rounds.items()) if a in sides and b in sides)
        steady = all(header["sides"][side]["warm"]["steady"] is not False for side in (a, b))
        result.append(Launch(pairs, steady))
    return result


def _pair(a: Record, b: Record) -> Pair:
    first = "A" if a["position"] < b["position"] else "B"
    return Pair(first, a["wall_ns"], b["wall_ns"], a["cpu_ns"], b["cpu_ns"], a["n"])  # type: ignore[arg-type]


def judge(
    records: Sequence[Record], a: str, b: str, rules: Rules | None = None, *, final: bool = True
) -> SpeedVerdict | None:
    """The verdict that these records support; None when more launches are wanted and ``final`` is False."""
    return decide(launches(records, a, b), rules, final=final, clock=clock(records), names=(a, b))


def speedup(records: Sequence[Record], a: str, b: str, confidence: float = 0.95) -> tuple[float, Any]:
    """How many times as fast as ``a`` the side ``b`` is, and the interval over launches (None for fewer than two)."""
    by = clock(records)
    ratios = [ratio for launch in launches(records, a, b) if (ratio := launch.log_ratio(by)) is not None]
    mean = fmean(ratios)
    if len(ratios) < 2:
        return math.exp(mean), None
    half = t_quantile((1 + confidence) / 2, len(ratios) - 1) * stdev(ratios) / math.sqrt(len(ratios))
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))


def latency(records: Sequence[Record], side: str) -> Latency:
    """The side's single latencies, summarised over its launches."""
    found: dict[int, list[float]] = {}
    for block in blocks(records, side):
        found.setdefault(block["launch"], []).extend(ns * 1e-6 for ns in block["latencies_ns"])
    return summarize([found[launch] for launch in sorted(found)])


def block_ms(records: Sequence[Record], side: str) -> float:
    """The side's median time of one inference in milliseconds, from whole blocks."""
    return 1e-6 * float(median(block["wall_ns"] / block["n"] for block in blocks(records, side)))


def metrics(records: Sequence[Record], side: str, rows: int, prefix: str = "") -> tuple[Metric, ...]:
    """The figures of one side: latency, throughput, loading, first inference, memory; device time where there is one.

    ``rows`` is how many samples one inference takes in.
    """
    found = latency(records, side)
    sides = [header["sides"][side] for header in headers(records)]
    launches = len(sides)
    mean = found.values["mean"]
    between = found.intervals.get("mean")
    rate = tuple(sorted(rows * 1000.0 / edge for edge in between)) if between and min(between) > 0 else None
    metrics = [
        *found.metrics(f"{prefix}latency"),
        Metric(
            f"{prefix}throughput",
            rows * 1000.0 / mean,
            "samples/s",
            (rate[0], rate[1]) if rate else None,
            found.confidence if rate else None,
            found.n,
        ),
        Metric(f"{prefix}load", 1e3 * median(s["load_seconds"] for s in sides), "ms", n=launches),
        Metric(f"{prefix}first_inference", 1e3 * median(s["first_seconds"] for s in sides), "ms", n=launches),
        Metric(f"{prefix}memory_after_load", _most(sides, "memory_after_load_bytes"), "bytes", n=launches),
        Metric(f"{prefix}peak_memory", _most(sides, "memory_peak_bytes"), "bytes", n=launches),
        Metric(
            f"{prefix}memory_of_model",
            max(s["memory_peak_bytes"] - s["memory_before_load_bytes"] for s in sides),
            "bytes",
            n=launches,
        ),
    ]
    metrics += at_once(records, side, rows, prefix)
    device = [block["device_ns"] / block["n"] for block in blocks(records, side) if block["device_ns"] is not None]
    if device:
        metrics.append(Metric(f"{prefix}device_time", median(device) * 1e-6, "ms", n=len(device)))
    if any(s["device_memory_bytes"] is not None for s in sides):
        metrics.append(Metric(f"{prefix}device_memory", _most(sides, "device_memory_bytes"), "bytes", n=launches))
    return tuple(metrics)


def at_once(records: Sequence[Record], side: str, rows: int, prefix: str = "") -> tuple[Metric, ...]:
    """Samples in a second with several inferences at once, one metric for each number of them that was timed."""
    rates: dict[int, list[float]] = {}
    for record in records:
        if record["kind"] == "many" and record["side"] == side:
            done = rows * record["n"] * record["threads"]
            rates.setdefault(record["threads"], []).append(done / (record["wall_ns"] * 1e-9))
    found = []
    for threads, values in sorted(rates.items()):
        interval = None
        if len(values) > 2:
            half = t_quantile(0.995, len(values) - 1) * stdev(values) / math.sqrt(len(values))
            interval = (max(0.0, fmean(values) - half), fmean(values) + half)
        confidence = 0.99 if interval else None
        name = f"{prefix}throughput_{threads}_at_once"
        found.append(Metric(name, fmean(values), "samples/s", interval, confidence, len(values)))
    return tuple(found)


def _most(sides: Sequence[Mapping[str, Any]], key: str) -> int:
    return max(int(side[key]) for side in sides if side[key] is not None)
