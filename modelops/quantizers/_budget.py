"""Nodes go back to float until what quantization costs stays within a budget, on samples held out from what is fitted.

Ranges of activations by rules that fit nothing, such as minmax, take in these samples too.

The whole model is quantized and measured first; only when it is not good enough are its nodes measured one by one, and
those chosen that cost least speed for the error that they make. Then it is quantized and measured again: where errors
add up to more than their sum, the next choice is that much stricter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.core.report import Metric
from modelops.core.workbench import Done
from modelops.errors import GateFailed
from modelops.quantizers._histograms import Range
from modelops.quantizers._memory import Memory
from modelops.quantizers._rounding import Scheme, decibels
from modelops.quantizers._selection import Decision, decided, time_shares
from modelops.quantizers._sensitivity import costs, held_out, noise

if TYPE_CHECKING:
    import onnx

_ROUNDS = 4
_STRICTER = 1.5


@dataclass(frozen=True)
class Grounds:
    """What a method quantized: the float graph just before, the nodes of it, and how."""

    model: onnx.ModelProto
    names: tuple[str, ...]
    ranges: Mapping[str, Range]
    scheme: Scheme
    memory: Memory


Make = Callable[[frozenset[str]], tuple[Done, Grounds | None]]


def within(make: Make, source: Path, target: Path, *, least_sqnr: float, explain: bool, seconds: float) -> Done:
    """The model that ``make`` writes with the fewest nodes left in float that are needed for this ratio in dB.

    ``make`` takes the names of those nodes. GateFailed when no choice of them is good enough.
    """
    done, grounds = make(frozenset())
    if grounds is None or not (explain or least_sqnr):
        return done
    feeds, budget = grounds.memory.feeds, 10 ** (-least_sqnr / 10) if least_sqnr else 0.0
    found = noise(source, target, feeds)
    if not explain and found <= budget:
        return _told(done, [], found, least_sqnr)
    chosen = set(grounds.names)
    nodes = [node for node in grounds.model.graph.node if node.name in chosen]
    measured = costs(grounds.model, nodes, grounds.ranges, grounds.scheme, feeds, grounds.memory.scratch, seconds)
    shares = _shares(grounds, next(iter(held_out(feeds))))
    total = sum(cost.error for cost in measured) or 1.0
    correction, kept = found / total, frozenset[str]()
    decisions = decided(measured, shares, 0.0)
    for _ in range(_ROUNDS):
        if found <= budget or not budget:
            break
        decisions = decided(measured, shares, budget, correction)
        again = frozenset(one.cost.node for one in decisions if one.kept)
        if again <= kept:
            correction *= _STRICTER
            continue
        kept = kept | again
        done, _ = make(kept)
        found = noise(source, target, feeds)
        left = sum(cost.error for cost in measured if cost.node not in kept) or total
        correction = max(correction, found / left)
    if budget and found > budget:
        raise GateFailed(
            f"held-out outputs keep {decibels(found):.1f} dB with {len(kept)} of {len(measured)} nodes in float, "
            f"not {least_sqnr:g}",
            hint="ask for less with --least-sqnr, or keep the float model",
        )
    return _told(done, decisions, found, least_sqnr)


def _shares(grounds: Grounds, feed: Mapping[str, object]) -> dict[str, float]:
    """The share of every node in the time of the float graph that was quantized."""
    from modelops.quantizers._preparation import save

    place = grounds.memory.scratch / "timed.onnx"
    save(grounds.model, place)
    return time_shares(place, feed, grounds.memory.scratch)


def _told(done: Done, decisions: list[Decision], found: float, least_sqnr: float) -> Done:
    """The same with its table, and what was measured in the end."""
    notes, kept = list(done.notes), [one for one in decisions if one.kept]
    if kept:
        share = 100 * sum(one.share for one in kept)
        nodes = ", ".join(one.cost.node for one in kept[:3]) + (" …" if len(kept) > 3 else "")
        notes.append(
            f"{len(kept)} of {len(decisions)} nodes stay float for --least-sqnr {least_sqnr:g}, with {share:.0f} % of "
            f"the float model's time: {nodes}"
        )
    details = {**done.details, "sensitivity": [one.to_dict() for one in decisions]} if decisions else done.details
    metric = Metric("held_out_sqnr", decibels(found), "dB")
    return replace(done, notes=tuple(notes), metrics=(*done.metrics, metric), details=details)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of its own, since writers change the one they get."""
    import onnx

    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    return fresh
