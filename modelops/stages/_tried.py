"""What is known of every candidate of a search: the rows of its table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from modelops.measures.distributions import t_quantile
from modelops.stages._attempts import Attempt


@dataclass
class Tried:
    """One row of the table: an attempt, how it did in the short look, and what was made of it."""

    attempt: Attempt
    ratios: list[float] = field(default_factory=list)
    latency_ms: float | None = None
    float_ms: float | None = None
    untimed: str = ""
    outcome: str = ""
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times as fast as float, the geometric mean over the launches of the look."""
        return math.exp(fmean(self.ratios)) if self.ratios else None

    @property
    def quantized(self) -> bool:
        """Whether it is anything but the float graph."""
        return bool(self.attempt.method["name"] != "float")

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true speed-up lies, at 95 % (Student's t over launches)."""
        if len(self.ratios) < 2:
            return None
        half = t_quantile(0.975, len(self.ratios) - 1) * stdev(self.ratios) / math.sqrt(len(self.ratios))
        mean = fmean(self.ratios)
        return math.exp(mean - half), math.exp(mean + half)

    def row(self) -> dict[str, Any]:
        """The row as JSON values, for the manifest."""
        attempt = self.attempt
        figures = {metric.name: metric.value for metric in attempt.metrics}
        return {
            "name": attempt.name,
            "method": dict(attempt.method),
            "bytes": attempt.bytes or None,
            "seconds": round(attempt.seconds, 2),
            "accuracy": None if attempt.impossible else attempt.verdict,
            "figures": {name: figures[name] for name in sorted(figures) if name in _FIGURES or name.endswith("_drop")},
            "speedup": self.speedup,
            "interval": list(self.interval) if self.interval else None,
            "latency_ms": self.latency_ms,
            "outcome": self.outcome,
            "reason": self.reason,
        }


_FIGURES = ("agreement", "cosine_mean", "cosine_min", "nearest", "sqnr", "top1", "top1_before")


def line(tried: Tried) -> str:
    attempt = tried.attempt
    if attempt.impossible:
        return f"{attempt.name}: {attempt.impossible}"
    figures = {metric.name: metric.value for metric in attempt.metrics}
    parts = [f"{attempt.bytes / 2**20:.3g} MiB"]
    if tried.speedup is not None:
        interval = tried.interval
        parts.insert(0, f"{tried.speedup:.2f}x" + (f" ({interval[0]:.2f}…{interval[1]:.2f})" if interval else ""))
    for name in ("top1", "cosine_mean", "sqnr"):
        if isinstance(figures.get(name), (int, float)):
            parts.append(f"{name} {figures[name]:.4g}")
    reason = f": {tried.reason}" if tried.reason and tried.outcome in ("not accurate enough", "not timed") else ""
    return f"{attempt.name}: {', '.join(parts)}, {tried.outcome}{reason}"


def beats(one: Tried, other: Tried) -> bool:
    """Whether ``one`` is at least as good in accuracy, speed and size, and better in one of them."""
    if one.speedup is None or other.speedup is None:
        return False
    mine = (one.attempt.sqnr, one.speedup, -one.attempt.bytes)
    theirs = (other.attempt.sqnr, other.speedup, -other.attempt.bytes)
    return all(a >= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs
