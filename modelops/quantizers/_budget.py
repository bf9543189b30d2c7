"""Nodes go back to float until what quantization costs stays within a budget, on samples held out from what is fitted.

Ranges of activations by rules that fit nothing, such as minmax, take in these samples too.

The whole model is quantized and measured first; only when it is not good enough are its nodes measured one by one, and
those chosen that cost least speed for the error that they make. Then it is quantized and measured again: where errors
add up to more than their sum, the next choice is that much stricter.

Of the products that went back to float, those lose little that find the ranges of what they read as they run. They are
integer again when the whole model, measured once more, is within the budget, and faster than with them in float.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelops.core.manifest import digest
from modelops.core.report import Metric
from modelops.core.workbench import Done
from modelops.errors import GateFailed
from modelops.quantizers._histograms import Range
from modelops.quantizers._memory import Memory, graph_digest
from modelops.quantizers._rounding import Scheme, decibels
from modelops.quantizers._selection import Decision, decided, faster, moving, time_shares
from modelops.quantizers._sensitivity import Cost, costs, held_out, noise

if TYPE_CHECKING:
    import onnx

_ROUNDS = 4
_STRICTER = 1.5
# The part of the time for measuring nodes that goes to all of them; the rest is for those that went back to float.
_FIRST = 2 / 3


@dataclass(frozen=True)
class Left:
    """The nodes that are not quantized as the method does it: in float, or with ranges that are found as they run."""

    floats: frozenset[str] = frozenset()
    moving: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Grounds:
    """What a method quantized: the float graph just before, the nodes of it, and how.

    ``movable`` are those of the nodes that the method can also write with ranges that are found as they run. ``exact``
    says that it is for kernels that don't overflow, where this machine's may.
    """

    model: onnx.ModelProto
    names: tuple[str, ...]
    ranges: Mapping[str, Range]
    scheme: Scheme
    memory: Memory
    movable: frozenset[str] = frozenset()
    exact: bool = False

    def noise(self, source: Path, target: Path) -> float:
        """What the model at ``target`` loses, on the batches that judge."""
        return noise(source, target, self.memory.feeds, exact=self.exact)


Make = Callable[[Left], tuple[Done, Grounds | None]]


def within(make: Make, source: Path, target: Path, *, least_sqnr: float, explain: bool, seconds: float) -> Done:
    """The model that ``make`` writes with the fewest nodes left in float that are needed for this ratio in dB.

    ``make`` takes the names of those nodes. GateFailed when no choice of them is good enough.
    """
    done, grounds = make(Left())
    if grounds is None or not (explain or least_sqnr):
        return done
    feeds, budget = grounds.memory.feeds, 10 ** (-least_sqnr / 10) if least_sqnr else 0.0
    found = grounds.noise(source, target)
    if not explain and found <= budget:
        return _told(done, [], found, least_sqnr)
    measured = _costs(grounds, grounds.names, grounds.scheme, seconds * _FIRST)
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
        done, _ = make(Left(kept))
        found = grounds.noise(source, target)
        left = sum(cost.error for cost in measured if cost.node not in kept) or total
        correction = max(correction, found / left)
    if budget and found > budget:
        raise GateFailed(
            f"held-out outputs keep {decibels(found):.1f} dB with {len(kept)} of {len(measured)} nodes in float, "
            f"not {least_sqnr:g}",
            hint="ask for less with --least-sqnr, or keep the float model",
        )
    decisions = [one.returned(kept) for one in decisions]
    if kept & grounds.movable:
        rest = seconds * (1 - _FIRST)
        found_costs = _costs(grounds, sorted(kept & grounds.movable), replace(grounds.scheme, rule=None), rest)
        wanted = moving(found_costs, decisions, shares, budget - found, correction)
        if wanted and (better := _moved(make, Left(kept - wanted, wanted), source, target, grounds, budget)):
            done, found = better
            decisions = [one.moved(wanted) for one in decisions]
    return _told(done, decisions, found, least_sqnr)


def _moved(
    make: Make, left: Left, source: Path, target: Path, grounds: Grounds, budget: float
) -> tuple[Done, float] | None:
    """What was made with these nodes integer again, where it is within the budget and faster; else all is as it was."""
    feed = next(iter(held_out(grounds.memory.feeds)))
    with _kept(target, grounds.memory.scratch) as before:
        done, _ = make(left)
        found = grounds.noise(source, target)
        if found <= budget and faster(target, before, feed):
            return done, found
        _copied_to(before, target)
    return None


@contextmanager
def _kept(model: Path, scratch: Path) -> Iterator[Path]:
    """A copy of a model's files, removed afterwards."""
    folder = scratch / "kept"
    folder.mkdir()
    try:
        _copied_to(model, folder / model.name)
        yield folder / model.name
    finally:
        shutil.rmtree(folder)


def _copied_to(model: Path, target: Path) -> None:
    for suffix in ("", ".data"):
        place, to = model.with_name(model.name + suffix), target.with_name(target.name + suffix)
        to.unlink(missing_ok=True)
        if place.is_file():
            shutil.copyfile(place, to)


def _costs(grounds: Grounds, names: Sequence[str], scheme: Scheme, seconds: float) -> list[Cost]:
    """What each of these nodes costs alone, quantized by the scheme: remembered, or measured now."""

    def found(missing: list[str]) -> dict[str, Cost]:
        chosen, memory = set(missing), grounds.memory
        nodes = [node for node in grounds.model.graph.node if node.name in chosen]
        measured = costs(grounds.model, nodes, grounds.ranges, scheme, memory.feeds, memory.scratch, seconds)
        return {cost.node: cost for cost in measured}

    ranges = sorted((name, *map(float, pair)) for name, pair in grounds.ranges.items())
    how = digest([graph_digest(grounds.model), asdict(scheme), seconds, [list(map(str, one)) for one in ranges]])
    known = grounds.memory.recalled(f"costs {how}", names, found, Cost.to_list, Cost.of_list)
    return sorted(known.values(), key=lambda cost: -cost.error)


def _shares(grounds: Grounds, feed: Mapping[str, object]) -> dict[str, float]:
    """The share of every node in the time of the float graph that was quantized."""
    from modelops.quantizers._preparation import save

    place = grounds.memory.scratch / "timed.onnx"
    save(grounds.model, place)
    return time_shares(place, feed, grounds.memory.scratch)


def _told(done: Done, decisions: list[Decision], found: float, least_sqnr: float) -> Done:
    """The same with its table, and what was measured in the end."""
    notes, kept = list(done.notes), [one for one in decisions if one.becomes == "float"]
    if kept:
        share = 100 * sum(one.share for one in kept)
        nodes = ", ".join(one.cost.node for one in kept[:3]) + (" …" if len(kept) > 3 else "")
        notes.append(
            f"{len(kept)} of {len(decisions)} nodes stay float for --least-sqnr {least_sqnr:g}, with {share:.0f} % of "
            f"the float model's time: {nodes}"
        )
    if found_moving := [one.cost.node for one in decisions if one.becomes == "dynamic"]:
        notes.append(
            f"{len(found_moving)} nodes find the ranges of what they read as they run, which keeps more: "
            f"{', '.join(found_moving[:3])}{' …' if len(found_moving) > 3 else ''}"
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
