"""From what was asked to what goes: how many channels every group loses to reach a target."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.workbench import Workbench
from modelops.errors import UsageError
from modelops.graphs.batches import BatchAxis
from modelops.pruners._allocation import Allocation, competing, gone_of, step_of, uniform
from modelops.pruners._costs import Cost, channel_cost, channels_of, mac_cost
from modelops.pruners._groups import Anatomy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Cuts that are timed on the way to a share of the time, and how near to it is near enough.
_TRIALS = 7
_NEAR = 0.03


@dataclass(frozen=True)
class Plan:
    """By group, how many channels go; what was ``asked``, and ``facts`` on how it was found."""

    removed: Sequence[int]
    asked: dict[str, Any]
    more: tuple[dict[str, Any], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    saved: Sequence[float] | None = None
    """By group, the seconds that its cut saves by the tables; None when nothing was timed."""


@dataclass(frozen=True)
class Planner:
    """What plans are made from; ``reopened`` gives the anatomy anew, to cut it for a trial."""

    anatomy: Anatomy
    score: NDArray[np.float64]
    allocation: Allocation
    round_to: int
    source: Path
    workbench: Workbench
    reopened: Callable[[], Anatomy]

    def by_channels(self, share: float, heads: float | None) -> Plan:
        """This share of the channels of all groups; of attention heads another one, where it is given."""
        apart, cut, more = self._apart(heads)
        rest = [k for k in range(len(self.anatomy.groups)) if k not in apart]
        removed = self._channels(share, rest)
        outside = sum(channels_of(self.anatomy.groups[k]) for k in apart)
        whole = self.anatomy.hidden_channels() - outside
        asked = {"what": "channels", "removed": share, "reached": self._lost(removed, rest) / whole if whole else 0.0}
        return Plan([a + b for a, b in zip(removed, cut, strict=True)], asked, more)

    def _apart(self, heads: float | None) -> tuple[list[int], list[int], tuple[dict[str, Any], ...]]:
        """(groups of heads that have a share of their own, by group how many of them go, what was asked of them)."""
        groups = self.anatomy.groups
        if heads is None:
            return [], [0] * len(groups), ()
        apart = [k for k, group in enumerate(groups) if group.heads]
        if not apart:
            raise UsageError("--heads: this model has no attention heads that can be cut", hint="leave --heads out")
        cut = self._channels(heads, apart, round_to=1)
        reached = self._lost(cut, apart) / sum(channels_of(groups[k]) for k in apart)
        return apart, cut, ({"what": "attention heads", "removed": heads, "reached": reached},)

    def _channels(self, share: float, among: Sequence[int], round_to: int | None = None) -> list[int]:
        groups, step = self.anatomy.groups, round_to or self.round_to
        wide = [k for k in among if groups[k].size > step_of(groups[k], step)]
        cost = channel_cost(self.anatomy, wide)
        # 16.67 % of 72 heads are 12, not 13.
        target = (1 - share + 1e-4) * sum(channels_of(groups[k]) for k in wide)
        return self._allotted(cost, target, step, wide)

    def by_macs(self, left: float, heads: float | None) -> Plan:
        """At most this share of the multiply-accumulates is left; of attention heads a share that goes first."""
        cost = mac_cost(self.anatomy)
        whole = cost.total([0] * len(self.anatomy.groups))
        apart, cut, more = self._apart(heads)
        rest = [k for k in range(len(self.anatomy.groups)) if k not in apart]
        removed = self._allotted(cost, left * whole, self.round_to, rest, cut)
        reached = 1 - cost.total(removed) / whole if whole else 0.0
        return Plan(removed, {"what": "multiply-accumulates", "removed": 1 - left, "reached": reached}, more)

    def _allotted(
        self,
        cost: Cost,
        target: float,
        round_to: int,
        among: Sequence[int] | None = None,
        start: Sequence[int] | None = None,
    ) -> list[int]:
        """By group, how many channels go until this much of the cost is left."""
        if self.allocation == "uniform":
            return uniform(self.anatomy, self.score, cost, target, round_to, among, start)
        # Where channels or work are what was asked for, time may still decide where they go.
        guide = self._tables if self.allocation == "latency" else None
        return competing(self.anatomy, self.score, cost, target, round_to, among, guide, start)

    def by_latency(self, left: float) -> Plan:
        """About this share of the time is left: cuts of less and less work are timed until one is near.

        Tables of the time of every product say where channels go; how far is told by timing the network that was cut.
        """
        nothing = [0] * len(self.anatomy.groups)
        cost, tables = mac_cost(self.anatomy), self._tables
        work, seconds = cost.total(nothing), tables.total(nothing)
        feed = one_sample(self.workbench, self.source)
        fast, slow = (0.0, 0.0), (1.0, 1.0)  # (share of the work, share of the time)
        best, found, trials = nothing, 1.0, []
        for _ in range(_TRIALS):
            ahead = (left - _NEAR / 2 - fast[1]) / max(slow[1] - fast[1], 1e-9)
            aim = fast[0] + min(0.8, max(0.2, ahead)) * (slow[0] - fast[0])
            removed = self._allotted(cost, aim * work, self.round_to)
            share = self._timed_share(removed, feed)
            row = {"work": cost.total(removed) / work, "by_tables": tables.total(removed) / seconds, "timed": share}
            trials.append(row)
            # The slowest that is fast enough, else the fastest.
            if (share <= left, -abs(share - left)) > (found <= left, -abs(found - left)):
                best, found = removed, share
            if left - _NEAR <= share <= left:
                break
            if share <= left:
                fast = (aim, share)
            else:
                slow = (aim, share)
        asked = {"what": "time", "removed": 1 - left, "reached": 1 - found, "timed": True}
        return Plan(best, asked, (), {"trials": trials, "seconds_before": seconds}, _saved(tables, best))

    def _timed_share(self, removed: Sequence[int], feed: dict[str, Any]) -> float:
        """The time of the network that was cut so, as a share of the source's."""
        from modelops.graphs import files
        from modelops.pruners import _latency, _surgery

        anatomy = self.reopened()
        _surgery.cut(anatomy, gone_of(anatomy, self.score, removed))
        place = self.workbench.scratch / "trial" / "model.onnx"
        place.parent.mkdir()
        try:
            files.save(anatomy.network.model, place)
            return _latency.ratio(place, self.source, feed)
        finally:
            shutil.rmtree(place.parent)

    @cached_property
    def _tables(self) -> Cost:
        from modelops.pruners import _latency
        from modelops.pruners._network import Network, observe

        feed = one_sample(self.workbench, self.source)
        one = Network(self.anatomy.network.model, rows=1)
        observe(one, feed, self.workbench.scratch)
        return _latency.tables(self.anatomy, one, self.source, feed)

    def _lost(self, removed: Sequence[int], among: Sequence[int]) -> float:
        return sum(channels_of(self.anatomy.groups[k], removed[k]) for k in among)


def _saved(cost: Cost, removed: Sequence[int]) -> list[float]:
    """By group, what bringing its channels back would cost."""
    return [-cost.gain(removed, k, -count) for k, count in enumerate(removed)]


def one_sample(workbench: Workbench, source: Path) -> dict[str, Any]:
    """A feed of one sample: the user's first, else a made-up one."""
    from modelops.graphs.seeded import index_bounds, random_feed

    axis = BatchAxis.of(workbench.signature)
    rows = axis.size or 1
    if workbench.has_data:
        feed = next(iter(workbench.batches()))
        return {name: array[:rows] if name in axis.inputs else array for name, array in feed.items()}
    return random_feed(workbench.signature, rows, bounds=index_bounds(source))
