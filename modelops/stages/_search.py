"""The search of ``quantize --method auto``: every candidate made, judged and timed, the best one kept.

::

    for each candidate, the most promising first        until the budget ends
        make it, hold it against the source             not accurate enough: no timing
        a short look at its speed beside float          three launches of the paired protocol
    the fastest that is accurate enough                 of those that a look can't tell apart, the one that loses least

Which one is best is decided on short looks; that it is faster than float, the stage then proves in a race of its own,
so that a lucky look does not decide. A task metric is judged at a level shared among all candidates (Bonferroni).

What came of a candidate is remembered as soon as it is known, by the content of everything that it depends on: a
search that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import modelops
from modelops.core import cache, machine
from modelops.core.component import described
from modelops.core.manifest import digest
from modelops.core.progress import progress
from modelops.errors import Inconclusive, ResourceExhausted, StageFailed
from modelops.measures.distributions import t_quantile
from modelops.quantizers.auto import Auto, Candidate, Facts
from modelops.stages import _speed
from modelops.stages._attempts import MODEL, Attempt, Attempts
from modelops.stages._race import Contender, Plan, measure

_KIND = "candidates"
_LAUNCHES = 3
_LOOK_SECONDS = 6.0
_PLAN = Plan(rounds=10, most_rounds=40, warm_most_seconds=1.0)
# Speeds nearer to each other than this are not told apart by a short look.
_ALIKE = 1.02


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


class Search:
    """A search on the attempts of one run. ``rows`` holds what was tried, in order; ``best`` what came out ahead."""

    def __init__(self, auto: Auto, attempts: Attempts, feed: Mapping[str, Any]) -> None:
        self.auto, self.attempts, self.feed = auto, attempts, feed
        self.tried: list[Tried] = []
        self.untried: list[dict[str, str]] = []
        self.remembered = 0
        self._started = time.monotonic()
        self._longest = 0.0
        self._facts = _facts(attempts)

    def run(self) -> Tried | None:
        """The best candidate, its file in place; None when none could be made."""
        plan = self.auto.plan(Facts.of(self.attempts.source.model, has_data=self.attempts.stage.data is not None))
        with self.attempts.remembering():
            for number, candidate in enumerate(plan):
                progress("searching", number, len(plan))
                if reason := self._needless(candidate):
                    self.untried.append({"name": candidate.name, "reason": reason})
                    continue
                started = time.monotonic()
                tried = self._try(candidate, len(plan))
                self._longest = max(self._longest, time.monotonic() - started)
                self.tried.append(tried)
                self._forget_files()
            best = self._best()
            if best is not None and best.attempt.place is None:
                self._made_again(best, next(one for one in plan if one.name == best.attempt.name), len(plan))
        self._tell(best)
        return best

    def _needless(self, candidate: Candidate) -> str:
        """Why a candidate is passed over, empty when it is tried."""
        for tried in self.tried:
            if tried.attempt.name in candidate.unless and tried.attempt.verdict == "pass":
                return f"{tried.attempt.name} is accurate enough, and this is not faster"
        spent = time.monotonic() - self._started
        if self.tried and spent + self._longest > self.auto.budget:
            return f"the budget of {self.auto.budget:g} s was spent"
        return ""

    def _try(self, candidate: Candidate, count: int) -> Tried:
        """What came of a candidate: what is remembered of it, and the rest measured and remembered."""
        keys = self._keys(candidate, count)
        known = cache.get(_KIND, keys["accuracy"]) if keys else None
        if known is not None:
            tried = Tried(Attempt.parse(known))
            self.remembered += 1
        else:
            tried = Tried(self._attempt(candidate, count))
            if keys:
                cache.put(_KIND, keys["accuracy"], tried.attempt.remembered)
        if tried.attempt.failed:
            tried.untimed = "not accurate enough" if not tried.attempt.impossible else "there is nothing to time"
            return tried
        look = cache.get(_KIND, keys["speed"]) if keys else None
        if look is None:
            if tried.attempt.place is None:
                self._made_again(tried, candidate, count)
            look = self._look(tried.attempt)
            if keys and look["ratios"]:
                cache.put(_KIND, keys["speed"], look)
        tried.ratios, tried.untimed = look["ratios"], look["untimed"]
        tried.latency_ms, tried.float_ms = look["latency_ms"], look["float_ms"]
        return tried

    def _attempt(self, candidate: Candidate, count: int) -> Attempt:
        folder = self.attempts.scratch / f"candidate-{len(self.tried)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            attempt = self.attempts.made(candidate, folder / MODEL)
            if not attempt.impossible:
                self.attempts.judge(attempt, count)
        except (StageFailed, ResourceExhausted) as error:  # of this candidate alone; bad data ends the search
            method = described(candidate.method) if candidate.method is not None else {"name": "float"}
            return Attempt(candidate.name, method, impossible=error.message, hint=error.hint)
        return attempt

    def _made_again(self, tried: Tried, candidate: Candidate, count: int) -> None:
        """The file of a candidate that is only remembered; measured anew in the case that other bytes come out."""
        fresh = self._attempt(candidate, count)
        if fresh.sha256 == tried.attempt.sha256:
            tried.attempt.place = fresh.place
        else:
            tried.attempt, tried.ratios = fresh, []

    def _look(self, attempt: Attempt) -> dict[str, Any]:
        """The speed-up over float in each of a few launches, as JSON values."""
        stage = self.attempts.stage
        assert attempt.place is not None
        contenders = [
            Contender(attempt.name, stage.backend, attempt.place),
            Contender("float32", stage.backend, self.attempts.source.model),
        ]
        try:
            records = measure(
                contenders,
                self.feed,
                budget_seconds=min(_LOOK_SECONDS, self.auto.budget),
                launches=_LAUNCHES,
                seed=stage.seed,
                plan=_PLAN,
            )
        except (Inconclusive, StageFailed, ResourceExhausted) as error:
            return {"ratios": [], "untimed": error.message, "latency_ms": None, "float_ms": None}
        clock = _speed.clock(records)
        ratios = [launch.log_ratio(clock) for launch in _speed.launches(records, "float32", attempt.name)]
        return {
            "ratios": [ratio for ratio in ratios if ratio is not None],
            "untimed": "",
            "latency_ms": _speed.block_ms(records, attempt.name),
            "float_ms": _speed.block_ms(records, "float32"),
        }

    def _best(self) -> Tried | None:
        """The fastest that is accurate enough, in doubt the more accurate; else the most accurate of those that fail.

        What surely is accurate enough goes before what could not be decided.
        """
        made = [tried for tried in self.tried if not tried.attempt.impossible]
        for verdict in ("pass", "inconclusive"):
            able = [one for one in made if one.attempt.verdict == verdict and one.speedup is not None]
            if able:
                fastest = max(one.speedup or 0.0 for one in able)
                alike = [one for one in able if (one.speedup or 0.0) * _ALIKE >= fastest]
                return max(alike, key=lambda one: (one.attempt.sqnr, one.speedup or 0.0))
        return max(made, key=lambda one: (not one.attempt.failed, one.attempt.sqnr), default=None)

    def _forget_files(self) -> None:
        """Keep the file of the best so far alone."""
        best = self._best()
        for tried in self.tried:
            if tried is not best and tried.attempt.place is not None:
                shutil.rmtree(tried.attempt.place.parent, ignore_errors=True)
                tried.attempt.place = None

    def _tell(self, best: Tried | None) -> None:
        """Say of every candidate what became of it, and why."""
        for tried in self.tried:
            attempt = tried.attempt
            if tried is best:
                tried.outcome = "best"
            elif attempt.impossible:
                tried.outcome, tried.reason = "not possible", attempt.impossible
            elif attempt.failed:
                check = next(check for check in attempt.checks if check.verdict == "fail")
                tried.outcome, tried.reason = "not accurate enough", check.message
            elif tried.speedup is None:
                tried.outcome, tried.reason = "not timed", tried.untimed
            elif best is not None and best.speedup is not None:
                alike = tried.speedup * _ALIKE >= best.speedup
                tried.outcome = "less accurate" if alike else "slower"
                tried.reason = f"{tried.speedup:.2f}x, {best.attempt.name} {best.speedup:.2f}x"
            if tried is best and attempt.failed:
                check = next(check for check in attempt.checks if check.verdict == "fail")
                tried.reason = check.message

    def table(self) -> list[dict[str, Any]]:
        """All candidates as rows of JSON values; ``pareto`` marks those that no other one beats in every respect."""
        rows = [tried.row() for tried in self.tried]
        for row, tried in zip(rows, self.tried, strict=True):
            row["pareto"] = tried.speedup is not None and not any(
                _beats(other, tried) for other in self.tried if other is not tried
            )
        return rows + [{"name": one["name"], "outcome": "not tried", "reason": one["reason"]} for one in self.untried]

    def notes(self) -> list[str]:
        """One line for every candidate, and what was taken from memory."""
        lines = [_line(tried) for tried in self.tried]
        lines += [f"{one['name']}: not tried, {one['reason']}" for one in self.untried]
        if self.remembered:
            lines.append(f"{self.remembered} of {len(self.tried)} candidates were remembered from a search before")
        return lines

    def _keys(self, candidate: Candidate, count: int) -> dict[str, str] | None:
        """What a candidate's accuracy, and its speed, depend on; None where that can't be known."""
        if self._facts is None:
            return None
        method = described(candidate.method) if candidate.method is not None else {"name": "float"}
        accuracy = digest({**self._facts["accuracy"], "method": method, "candidates": count})
        return {
            "accuracy": f"accuracy {accuracy}",
            "speed": f"speed {digest({**self._facts['speed'], 'candidate': accuracy})}",
        }


def _line(tried: Tried) -> str:
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


def _beats(one: Tried, other: Tried) -> bool:
    """Whether ``one`` is at least as good in accuracy, speed and size, and better in one of them."""
    if one.speedup is None or other.speedup is None:
        return False
    mine = (one.attempt.sqnr, one.speedup, -one.attempt.bytes)
    theirs = (other.attempt.sqnr, other.speedup, -other.attempt.bytes)
    return all(a >= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def _facts(attempts: Attempts) -> dict[str, Any] | None:
    """What all candidates of a search depend on; None where the user's own code gives the data, which may change."""
    stage, source = attempts.stage, attempts.source
    if attempts.code_executed():
        return None
    inputs = {
        name: cache.digest_of(path) if path.exists() else str(path)
        for name, path in stage.inputs(str(source.path)).items()
    }
    options = stage.to_dict()
    own = {name: options[name] for name in ("dataset", "samples", "batch", "metric", "max_drop", "seed")}
    accuracy = {
        "source": source.id,
        "inputs": inputs,
        "options": own,
        "tools": {"modelops": modelops.__version__, **machine.versions(machine.LIBRARIES)},
        "code": _code(),
        "cpu": list(machine.cpu_features()),
    }
    from modelops.quantizers._kernels import fingerprint

    return {"accuracy": accuracy, "speed": {"machine": fingerprint(), "backend": options["backend"]}}


def _code() -> str:
    """The digest of the code that makes and judges candidates: other code may make others."""
    root = Path(modelops.__file__).parent
    total = hashlib.sha256()
    for folder in ("quantizers", "measures"):
        for file in sorted((root / folder).glob("*.py")):
            total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()
