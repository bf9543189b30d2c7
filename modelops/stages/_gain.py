"""What a smaller model gains in time: measured by turns in fresh processes, and what may be said of it.

The rules are those of ``bench``: launches are what is counted, few of them give no interval, and a demand is met when
the bound of the interval meets it, not when the mean does. On a machine whose CPUs others keep busy a factor is told
and nothing is concluded from it: threads of a large model wait for those CPUs, and a small one has no threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelops.core.report import Check, Metric, Verdict
from modelops.measures.verdicts import Rules
from modelops.stages import _preflight, _speed
from modelops.stages._race import Contender, Standing, standings

Feed = Mapping[str, Any]

_LAUNCHES = 5
#: Two launches that happen to agree would make a narrow interval out of nothing.
_FEWEST = 3
_BUSY = 0.25
# Time is asked for in shares, which timing can't tell more exactly than this.
MISSED_MOST = 0.02


@dataclass(frozen=True)
class Timing:
    """The source and smaller models beside it; ``busy`` is the share of the CPUs that other work used meanwhile."""

    standings: tuple[Standing, ...]
    records: Sequence[dict[str, Any]]
    launches: int
    busy: float

    @property
    def quiet(self) -> bool:
        return self.busy <= _BUSY or _speed.clock(self.records) == "cpu"

    def of(self, name: str) -> Standing:
        """A model's standing; its interval only where launches were many enough and the machine quiet."""
        found = next(standing for standing in self.standings if standing.name == name)
        return found if self.launches >= _FEWEST and self.quiet else replace(found, interval=None)

    def metric(self, name: str) -> Metric:
        """How many times as fast as the source a model is, with its 95 % interval."""
        found = self.of(name)
        confidence = 0.95 if found.interval else None
        return Metric("speedup", found.speedup, "x", found.interval, confidence, self.launches)

    def remarks(self, name: str) -> list[str]:
        """What a person should know before trusting the factor."""
        found = self.of(name)
        if not self.quiet:
            return [
                f"other work used {self.busy:.0%} of the CPUs while the gain in speed was measured: it has no interval"
            ]
        if found.interval is None:
            times = "once" if self.launches == 1 else f"in {self.launches} launches"
            return [f"the gain in speed was measured {times}, of {_FEWEST}; a larger --speed-budget gives an interval"]
        if found.interval[0] <= 1.0:
            return ["this model is not surely faster than its source on this machine"]
        return []

    def removed(self, name: str, asked: float, *, best_effort: bool) -> Check:
        """Whether as much of the time is gone as was asked for: a pass only where the bound says so."""
        found = self.of(name)
        least = asked - MISSED_MOST
        reached = 1 - 1 / found.speedup
        text = f"asked to remove {asked:.1%} of the time, removed {reached:.1%}"
        verdict: Verdict = "inconclusive"
        if self.quiet and self.launches >= _FEWEST:
            rules = Rules(at_least=1 / (1 - least), looks=(_LAUNCHES,))
            judged = _speed.judge(self.records, name, "source", rules)
            if judged is not None and judged.low is not None and judged.high is not None:
                verdict = judged.verdict
                text += f" ({100 * judged.confidence:g} % bounds {1 - judged.high:.1%} to {1 - judged.low:.1%})"
            if verdict == "inconclusive":
                text += ": a larger --speed-budget makes the bounds narrower"
        elif not self.quiet:
            text += f"; other work used {self.busy:.0%} of the CPUs meanwhile, so nothing is concluded from it"
        else:
            text += f"; {self.launches} of the {_FEWEST} launches that are needed fitted into --speed-budget"
        if best_effort and verdict != "pass":
            verdict, text = "pass", f"{text}; --best-effort accepts it"
        return Check("removed", verdict, text, reached, f">= {least:.1%}", self.launches)


def not_timed(asked: float, *, best_effort: bool) -> Check:
    """The check of a time that was asked for where no model could be timed."""
    text = f"asked to remove {asked:.1%} of the time, which could not be measured"
    if best_effort:
        text += "; --best-effort accepts it"
    return Check("removed", "pass" if best_effort else "inconclusive", text, None, f">= {asked - MISSED_MOST:.1%}")


def timing(source: Path, models: Mapping[str, Path], feed: Feed, budget_seconds: float) -> Timing:
    """Time these models beside the source. StageFailed and Inconclusive as races raise them."""
    sides = [contender("source", source), *(contender(name, model) for name, model in models.items())]
    found = standings(sides, feed, budget_seconds=budget_seconds, most_launches=_LAUNCHES)
    before = next((record["busy"] for record in found.records if record["kind"] == "preflight"), None)
    busy = max(share or 0.0 for share in (before, _preflight.look()["busy"]))
    return Timing(found.standings, found.records, found.launches, busy)


def contender(name: str, model: Path) -> Contender:
    """The model as onnxruntime runs it by default."""
    from modelops.backends import REGISTRY

    return Contender(name, REGISTRY.load("onnxruntime-cpu").parse({}), model)


def by_group(groups: Sequence[dict[str, Any]], models: Sequence[Path], feed: Feed, scratch: Path) -> None:
    """Tell every group how much less time its nodes take in the second model, by the profiler of the runtime.

    StageFailed and Inconclusive where the profiler can't tell.
    """
    from modelops.stages._profile import profiled

    times: list[dict[str, float]] = []
    for number, model in enumerate(models):
        nodes = profiled(contender(f"model{number}", model), feed, scratch)
        times.append({str(node["name"]).removesuffix("_nchwc"): float(node["microseconds"]) for node in nodes})
    before, after = times
    for group in groups:
        # A runtime calls what it fused after one of the nodes that went into it.
        names = (next((n for n in fused if n in before and n in after), "") for fused in group.pop("fused_as", ()))
        known = [name for name in names if name]
        group["microseconds_gained"] = sum(before[name] - after[name] for name in known) if known else None
