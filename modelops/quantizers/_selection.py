"""Which nodes go back to float, so that what is left of the error is small enough: those that cost least speed.

What a node is worth is the time that it takes in float: that is what quantizing it can make shorter. Nodes go back in
the order of error per time, until the errors that are left add up to the budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from modelops.quantizers._sensitivity import Cost

_RUNS = 5
_SUFFIX = "_kernel_time"
# Errors do not add up exactly, and the outputs that prove it are not those that were measured.
_SAFETY = 0.9


@dataclass(frozen=True)
class Decision:
    """What becomes of a node: ``share`` of the model's time in float is spent in it."""

    cost: Cost
    share: float
    kept: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "node": self.cost.node,
            "op": self.cost.op,
            "error_db": round(self.cost.decibels, 2),
            "time_share": round(self.share, 4),
            "decision": "float" if self.kept else "int8",
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
    return Decision(cost, share, kept, reason)


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
