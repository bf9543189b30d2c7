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

import functools
import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelops
from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend
from modelops.core import cache, machine
from modelops.core.component import described
from modelops.core.manifest import digest
from modelops.core.progress import progress
from modelops.errors import Inconclusive, ResourceExhausted, StageFailed
from modelops.measures.judging import judge
from modelops.quantizers.auto import Auto, Candidate, Facts
from modelops.stages import _speed
from modelops.stages._attempts import MODEL, Attempt, Attempts
from modelops.stages._measuring import Side, compare_models
from modelops.stages._race import Contender, Plan, measure
from modelops.stages._tried import Tried, beats, line

_KIND = "candidates"
_LAUNCHES = 3
_LOOK_SECONDS = 9.0
_PLAN = Plan(rounds=10, most_rounds=40, warm_most_seconds=0.6)
# The modules of this folder that have a say in what is remembered.
_JUDGES = ("_attempts", "_compare", "_feed", "_losses", "_measuring", "_search", "_transitions", "_tried", "_workbench")
_MAKERS = ("quantizers", "measures", "graphs", "backends")
# Speeds nearer to each other than this are not told apart by a short look.
_ALIKE = 1.02


class Search:
    """A search on the attempts of one run. ``rows`` holds what was tried, in order; ``best`` what came out ahead."""

    def __init__(self, auto: Auto, attempts: Attempts, feed: Mapping[str, Any]) -> None:
        self.auto, self.attempts, self.feed = auto, attempts, feed
        self.tried: list[Tried] = []
        self.untried: list[dict[str, str]] = []
        self.elsewhere: Tried | None = None
        self.remembered = 0
        self._started = time.monotonic()
        self._longest = 0.0
        # Whether the last attempt ended in an error: of too little memory or disk, say, which may be there next time.
        self._broke = False
        # The first such error: where nothing can be made, it says why.
        self.broken: StageFailed | ResourceExhausted | None = None
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
        self.elsewhere = self._elsewhere()
        return best

    def _elsewhere(self) -> Tried | None:
        """The float model as it is on OpenVINO, in the precision that is fast here; None where that can't be had."""
        stage = self.attempts.stage
        if (
            stage.backend.name != "onnxruntime-cpu"
            or self.attempts.foreign
            or time.monotonic() - self._started > self.auto.budget
        ):
            return None
        bf16 = {"amx_bf16", "avx512_bf16"} & set(machine.cpu_features())
        precision = "bf16" if bf16 else "f32"
        backend = BACKENDS.load("openvino-cpu").parse(
            {"threads": stage.backend.to_dict()["threads"], "precision": precision}
        )
        if backend.missing():
            return None
        name = f"float on openvino-cpu, {precision}"
        key = f"speed {digest({**self._facts, 'elsewhere': described(backend)})}" if self._facts else None
        found = cache.get(_KIND, key) if key else None
        if found is None:
            try:
                found = {"attempt": self._on(backend, name).remembered}
            except (StageFailed, ResourceExhausted):
                return None
            found |= self._beside_float(Contender(name, backend, self.attempts.source.model))
            if key and found["ratios"]:
                cache.put(_KIND, key, found)
        tried = Tried(Attempt.parse(found["attempt"]), found["ratios"], found["latency_ms"], found["float_ms"])
        tried.outcome = "another runtime"
        return tried

    def _on(self, backend: Backend, name: str) -> Attempt:
        """How far the float model's outputs move on another backend."""
        from modelops.stages._compare import running
        from modelops.stages._losses import figures

        source = self.attempts.source
        attempt = Attempt(name, {"name": "float"}, bytes=source.size)
        with self.attempts.remembering(), running(source.model, backend) as session:
            assert self.attempts.memory is not None
            after = Side(session, source.signature)
            differences = compare_models(self.attempts.memory, after, self.attempts.rows.stream(source)).differences
        attempt.metrics += figures(differences)
        attempt.checks += judge(differences, backend.loses(), agreement_evaluated=False)
        return attempt

    def _needless(self, candidate: Candidate) -> str:
        """Why a candidate is passed over, empty when it is tried."""
        for tried in self.tried:
            if tried.attempt.name in candidate.unless and tried.attempt.verdict == "pass":
                return f"{tried.attempt.name} is accurate enough, and this is not faster"
            least = float(getattr(candidate.method, "least_sqnr", 0.0))
            if tried.attempt.name in candidate.unless and 0 < least <= tried.attempt.sqnr:
                return f"{tried.attempt.name} keeps {tried.attempt.sqnr:.0f} dB already"
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
            if keys and not self._broke:
                cache.put(_KIND, keys["accuracy"], tried.attempt.remembered)
        if tried.attempt.failed:
            tried.untimed = "not accurate enough" if not tried.attempt.impossible else "there is nothing to time"
            return tried
        if self.attempts.foreign:
            tried.untimed = self.attempts.foreign
            return tried
        look = cache.get(_KIND, keys["speed"]) if keys else None
        if look is None:
            if tried.attempt.place is None and self._made_again(tried, candidate, count).failed:
                tried.untimed = "made again, it came out otherwise"
                return tried
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
        self._broke = False
        try:
            attempt = self.attempts.made(candidate, folder / MODEL)
            if not attempt.impossible:
                self.attempts.judge(attempt, count)
        except (StageFailed, ResourceExhausted) as error:  # of this candidate alone; bad data ends the search
            self._broke, self.broken = True, self.broken or error
            method = described(candidate.method) if candidate.method is not None else {"name": "float"}
            return Attempt(candidate.name, method, impossible=error.message, hint=error.hint)
        return attempt

    def _made_again(self, tried: Tried, candidate: Candidate, count: int) -> Attempt:
        """The file of a candidate that is only remembered; measured anew in the case that other bytes come out."""
        fresh = self._attempt(candidate, count)
        if fresh.sha256 == tried.attempt.sha256:
            tried.attempt.place = fresh.place
        else:
            tried.attempt, tried.ratios = fresh, []
        return tried.attempt

    def _look(self, attempt: Attempt) -> dict[str, Any]:
        """The speed-up over float in each of a few launches, as JSON values."""
        assert attempt.place is not None
        return self._beside_float(Contender(attempt.name, self.attempts.stage.backend, attempt.place))

    def _beside_float(self, contender: Contender) -> dict[str, Any]:
        stage = self.attempts.stage
        floating = Contender("float32", stage.backend, self.attempts.source.model)
        try:
            records = measure(
                [contender, floating],
                self.feed,
                budget_seconds=min(_LOOK_SECONDS, self.auto.budget),
                launches=_LAUNCHES,
                seed=stage.seed,
                plan=_PLAN,
            )
        except (Inconclusive, StageFailed, ResourceExhausted) as error:
            return {"ratios": [], "untimed": error.message, "latency_ms": None, "float_ms": None}
        clock = _speed.clock(records)
        ratios = [launch.log_ratio(clock) for launch in _speed.launches(records, "float32", contender.name)]
        return {
            "ratios": [ratio for ratio in ratios if ratio is not None],
            "untimed": "",
            "latency_ms": _speed.block_ms(records, contender.name),
            "float_ms": _speed.block_ms(records, "float32"),
        }

    def _best(self) -> Tried | None:
        """The fastest that is accurate enough, in doubt the more accurate; else the most accurate of those that fail.

        Of a float and an int8 model that are as fast as each other, it is the smaller one.

        What surely is accurate enough goes before what could not be decided.
        """
        made = [tried for tried in self.tried if not tried.attempt.impossible]
        for verdict in ("pass", "inconclusive"):
            accurate = [one for one in made if one.attempt.verdict == verdict]
            able = [one for one in accurate if one.speedup is not None]
            if able:
                fastest = max(one.speedup or 0.0 for one in able)
                alike = [one for one in able if (one.speedup or 0.0) * _ALIKE >= fastest]
                return max(alike, key=lambda one: (one.quantized, one.attempt.sqnr, one.speedup or 0.0))
            if accurate:  # for kernels that can't be timed here, the most promising
                return max(accurate, key=lambda one: one.quantized)
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
                beats(other, tried) for other in self.tried if other is not tried
            )
        rows += [{"name": one["name"], "outcome": "not tried", "reason": one["reason"]} for one in self.untried]
        return rows + ([{**self.elsewhere.row(), "pareto": False}] if self.elsewhere is not None else [])

    def notes(self) -> list[str]:
        """One line for every candidate, and what was taken from memory."""
        lines = [line(tried) for tried in self.tried]
        lines += [f"{one['name']}: not tried, {one['reason']}" for one in self.untried]
        if advice := self._advice():
            lines.append(advice)
        if self.remembered:
            lines.append(f"{self.remembered} of {len(self.tried)} candidates were remembered from a search before")
        return lines

    def _advice(self) -> str:
        """That the float model is faster on another runtime than the best candidate is here; empty where it is not."""
        other, best = self.elsewhere, self._best()
        if other is None or other.interval is None or other.attempt.failed:
            return ""
        beaten = best.speedup if best is not None and best.speedup is not None and not best.attempt.failed else 1.0
        if other.interval[0] <= max(beaten, 1.0):
            return ""
        return (
            f"keeping float and running it on another backend is faster still: {line(other)}; "
            "see `modelops bench --backend openvino-cpu`"
        )

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
    own["backend"] = options["backend"]
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


@functools.cache
def _code() -> str:
    """The digest of the code that makes and judges candidates: other code may make others."""
    root = Path(modelops.__file__).parent
    total = hashlib.sha256()
    files = [file for folder in _MAKERS for file in sorted((root / folder).glob("*.py"))]
    for file in (*files, *(root / "stages" / f"{name}.py" for name in _JUDGES)):
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()
