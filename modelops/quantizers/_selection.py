"""Which nodes go back to float, so that what is left of the error is small enough: those that cost least speed.

What a node is worth is the time that it takes in float: that is what quantizing it can make shorter. Nodes go back in
the order of error per time, until the errors that are left add up to the budget. Products among them may instead find
the ranges of what they read as they run, where that loses little and is faster than float.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from modelops.quantizers._sensitivity import Cost

_RUNS = 5
_SUFFIX = "_kernel_time"
# Errors do not add up exactly, and the outputs that prove it are not those that were measured.
_SAFETY = 0.9
# What ranges found as a node runs must leave of its error, at most, to be worth them; turns to time that.
_MOVING, _TURNS = 0.5, 9


@dataclass(frozen=True)
class Decision:
    """What becomes of a node: ``share`` of the model's time in float is spent in it."""

    cost: Cost
    share: float
    becomes: Literal["int8", "float", "dynamic"]
    reason: str

    @property
    def kept(self) -> bool:
        """Whether the method leaves the node as it is."""
        return self.becomes != "int8"

    def moved(self, nodes: frozenset[str]) -> Decision:
        """The same, when these nodes find the ranges of what they read as they run."""
        if self.cost.node not in nodes:
            return self
        return replace(self, becomes="dynamic", reason=f"{self.reason}; faster with ranges found as it runs")

    def returned(self, nodes: frozenset[str]) -> Decision:
        """The same, when an earlier and less strict choice returned these nodes to float too."""
        if self.kept or self.cost.node not in nodes:
            return self
        return replace(self, becomes="float", reason="returned to float before errors were seen to add up to more")

    def to_dict(self) -> dict[str, Any]:
        return {
            "node": self.cost.node,
            "op": self.cost.op,
            "error_db": round(self.cost.decibels, 2),
            "time_share": round(self.share, 4),
            "decision": self.becomes,
            "reason": self.reason,
        }


def decided(
    costs: Sequence[Cost], shares: Mapping[str, float], budget: float, correction: float = 1.0
) -> list[Decision]:
    """A decision for every node: all int8 without a budget.

    ``correction`` is how much larger the real error was than the sum of those measured.
    """
    if not budget:
        return [_decision(cost, shares.get(cost.node, 0.0), False, budget) for cost in costs]
    left = correction * sum(cost.error for cost in costs)
    order = sorted(costs, key=lambda cost: (-cost.error / max(shares.get(cost.node, 0.0), 1e-6), cost.node))
    kept: set[str] = set()
    for cost in order:
        if left <= _SAFETY * budget:
            break
        kept.add(cost.node)
        left -= correction * cost.error
    for cost in sorted((c for c in costs if c.node in kept), key=lambda c: -shares.get(c.node, 0.0)):
        # What was taken early may no longer be needed.
        if left + correction * cost.error <= _SAFETY * budget:
            kept.remove(cost.node)
            left += correction * cost.error
    return [_decision(cost, shares.get(cost.node, 0.0), cost.node in kept, budget) for cost in costs]


def _decision(cost: Cost, share: float, kept: bool, budget: float) -> Decision:
    part = f"{100 * cost.error / budget:.0f} % of the error allowed" if budget else f"{cost.decibels:.1f} dB alone"
    if kept:
        reason = f"{part} for {100 * share:.1f} % of the time"
    else:
        reason = f"{part}; worth its {100 * share:.1f} % of the time" if budget else part
    return Decision(cost, share, "float" if kept else "int8", reason)


def moving(
    costs: Sequence[Cost],
    decisions: Sequence[Decision],
    shares: Mapping[str, float],
    budget: float,
    correction: float = 1.0,
) -> frozenset[str]:
    """The nodes, now in float, that may be quantized with ranges found as they run: the longest first.

    ``costs`` are what they cost then. Each must lose less than with ranges found beforehand, and all of them together
    no more than the budget.
    """
    before = {one.cost.node: one.cost.error for one in decisions if one.kept}
    better = [cost for cost in costs if cost.error <= _MOVING * before.get(cost.node, 0.0)]
    found: set[str] = set()
    left = _SAFETY * budget
    for cost in sorted(better, key=lambda cost: (-shares.get(cost.node, 0.0), cost.node)):
        if (spent := max(correction, 1.0) * cost.error) <= left:
            found.add(cost.node)
            left -= spent
    return frozenset(found)


def faster(one: Path, other: Path, feed: Mapping[str, Any]) -> bool:
    """Whether one model takes less time than another on this input, by turns on one thread."""
    from modelops.graphs import runs

    times: dict[Path, list[float]] = {one: [], other: []}
    with runs.session(one, trusted=True) as first, runs.session(other, trusted=True) as second:
        for number in range(_TURNS + 1):
            for place, session in ((one, first), (other, second)):
                started = time.process_time()
                runs.run(session, feed)
                if number:  # the first one warms up
                    times[place].append(time.process_time() - started)
    return median(times[one]) < median(times[other])


def time_shares(model: Path, feed: Mapping[str, Any], scratch: Path) -> dict[str, float]:
    """The share of every node in the time of one inference in float, by onnxruntime's own profile on one thread."""
    from modelops.graphs import runs

    with runs.session(model, optimization="basic", trusted=True, profile=scratch / "profile") as session:
        for _ in range(_RUNS):
            runs.run(session, feed)
        place = Path(session.handle.end_profiling())
    spans: dict[str, list[float]] = {}
    for event in json.loads(place.read_text()):
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            spans.setdefault(name.removesuffix(_SUFFIX), []).append(float(event["dur"]))
    place.unlink()
    times = {name: median(values) for name, values in spans.items()}
    total = sum(times.values()) or 1.0
    return {name: value / total for name, value in times.items()}
