"""auto: every engine that is worth it, each result held against the source, and the best of those that hold."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from modelops.core.component import option
from modelops.core.progress import progress
from modelops.core.report import Check, Metric, Report
from modelops.core.workbench import Done
from modelops.core.worker import WorkerBug
from modelops.errors import Inconclusive, ModelOpsError, UsageError, unknown_name
from modelops.simplifiers import REGISTRY, Arena, Pace, Simplifier
from modelops.simplifiers._changes import changes

# What a file has to lose to be worth having where its graph is the source's own.
_SMALLER = 0.01
# Chains that bring in onnxruntime's own operators, with --fuse: the first finds attention in what torch's newer
# exporter writes, the others in what the older one does.
_FUSERS = ("onnxscript-fusions", "onnxslim+onnxscript-fusions", "onnxruntime-transformers")
_GUARDS = "guards+"
# Outcomes of a chain that gave a graph which may be judged.
_MADE = ("valid", "not better")
# What makes one graph simpler than another: the cost of what onnxruntime makes of it, nodes, bytes.
Rank = tuple[float, int, int]


@dataclass
class _Attempt:
    """One chain of engines: where its result lies, and what came of it."""

    text: str
    chain: list[Simplifier]
    place: Path
    found: dict[str, Any] = field(default_factory=dict)
    rank: Rank | None = None

    @property
    def fuses(self) -> bool:
        return any(engine.fuses for engine in self.chain)

    @property
    def attention(self) -> int:
        """How many layers have their attention in one node."""
        return sum(count for op, count in self.found.get("fusions", {}).items() if op.endswith("Attention"))

    @property
    def need(self) -> float:
        return max(engine.appetite for engine in self.chain)

    def drop(self, outcome: str, reason: str = "") -> None:
        self.found |= {"outcome": outcome} | ({"reason": reason} if reason else {})
        self.rank = None

    def to_dict(self) -> dict[str, Any]:
        return {"engine": self.text, **self.found}


class Auto(Simplifier):
    """Run several engines, and keep the simplest result that still does what the source does."""

    arranges = True
    # Every engine that may be tried, whatever is chosen: a new version may give another result.
    tools = ("onnxsim", "onnxslim", "onnxscript", "onnxruntime", "onnx-ir", "onnx")

    engines: tuple[str, ...] = option(
        default=("onnxslim", "onnxscript", "onnxsim", "onnxruntime", "guards+onnxslim"),
        help="Engines to try; a+b runs b on what a made.",
    )
    fuse: Literal["none", "onnxruntime"] = option(
        default="none",
        help="Try the operators that only onnxruntime knows too, and keep them where they are measured faster.",
    )
    speed_budget: float = option(
        default=10.0,
        help="Time for timing a fused graph against the plain one; 0 leaves timing out.",
        min=0.0,
        unit="seconds",
    )

    def simplify(self, source: Path, target: Path, workbench: Arena) -> Done:
        if not self.engines:
            raise UsageError("--engines names no engine", hint=f"known: {', '.join(_known())}")
        texts = [*self.engines, *(_FUSERS if self.fuse == "onnxruntime" else ())]
        attempts = [
            _Attempt(text, _chain(text), workbench.scratch / f"auto-{number}" / target.name)
            for number, text in enumerate(texts)
        ]
        first, later = _in_turn(attempts, guarded=_operators(source).get("IsNaN", 0) > 0)
        before = self._run(first, source, workbench)
        notes: list[str] = []
        plain = _best([one for one in first if not one.fuses], before, workbench)
        if late := _still_wanted(later, first):
            before = self._run(late, source, workbench, before[0])
            plain = _best([*([plain] if plain else []), *late], before, workbench)
        fused = self._best_fused([one for one in attempts if one.fuses], plain, source, workbench)
        best = fused or plain
        if best is not None:
            _copy(best.place, target)
        for one in attempts:
            shutil.rmtree(one.place.parent, ignore_errors=True)
            notes.append(_line(one, before))
        chosen = best.text if best else None
        notes.append(
            f"kept the result of {chosen}" if chosen else "no engine made anything better: the source is kept as it is"
        )
        metrics = _pace_metrics(best)
        return Done(tuple(notes), metrics, {"attempts": [one.to_dict() for one in attempts], "chosen": chosen})

    def _run(self, attempts: Sequence[_Attempt], source: Path, workbench: Arena, cost: float = math.inf) -> Rank:
        """Let every chain do its work, side by side; gives the source's own rank.

        ``cost`` is the source's, where it was weighed before, and 0 where it can't be: nodes and bytes decide then.
        """
        done, weighing, weighed = 0, Lock(), math.isfinite(cost)

        def work(one: _Attempt) -> Callable[[], None]:
            def run() -> None:
                nonlocal cost, done
                one.place.parent.mkdir()
                _attempt(one, source, workbench)
                # Where nothing but names changed, nothing is to be weighed.
                real = one.rank is not None and not math.isnan(one.rank[0])
                if real and not weighed and weighing.acquire(blocking=False):
                    with contextlib.suppress(ModelOpsError, WorkerBug):
                        cost = workbench.cost(source)
                done += 1
                progress("trying engines", done, len(wanted))

            return run

        size = _size(source)
        # Those with the largest appetite take the longest: first, so that the others fill what is left.
        wanted = sorted((one for one in attempts if "outcome" not in one.found), key=lambda one: -one.need)
        workbench.side_by_side([work(one) for one in wanted], [int(one.need * size) for one in wanted])
        if math.isinf(cost) and any(one.rank is not None and math.isfinite(one.rank[0]) for one in wanted):
            cost = 0.0
        if cost == 0.0:
            for one in wanted:
                one.rank = one.rank and (0.0, *one.rank[1:])
        for one in wanted:
            if one.rank is not None and math.isnan(one.rank[0]):  # the same operators: nothing else is left to do
                one.rank = (cost, *one.rank[1:])
        return _rank(source, cost)

    def _best_fused(
        self, attempts: Sequence[_Attempt], plain: _Attempt | None, source: Path, workbench: Arena
    ) -> _Attempt | None:
        """The fused graph that is measured faster than the best plain one, if there is one."""
        best = None
        for one in sorted((one for one in attempts if one.rank), key=lambda one: (-one.attention, _by_rank(one))):
            if not _fusions(one):
                one.drop("not better", "it fused nothing")
            elif best is not None:
                one.drop("not better")
            elif _holds(one, workbench) and self._is_faster(one, plain.place if plain else source, workbench):
                best = one
        if best is not None and plain is not None:
            plain.drop("not better", "the fused graph is faster")
        return best

    def _is_faster(self, one: _Attempt, plain: Path, workbench: Arena) -> bool:
        if not self.speed_budget:
            return True
        pace = self._pace(one, plain, workbench)
        if pace is None:
            one.drop("not faster", f"its speed {one.found['speed']}")
            return False
        if pace.verdict == "fail" or pace.speedup < 1.0:
            one.drop("not faster", f"{pace.text} of the plain graph")
            return False
        if pace.verdict != "pass":
            one.drop("not faster", f"{pace.text} of the plain graph, which is not sure: raise --speed-budget")
            return False
        return True

    def _pace(self, one: _Attempt, than: Path, workbench: Arena) -> Pace | None:
        try:
            pace = workbench.pace(one.place, than, self.speed_budget)
        except Inconclusive as error:
            one.found["speed"] = f"could not be judged: {error.message}"
            return None
        except ModelOpsError as error:
            one.found["speed"] = f"was not measured: {error.message}"
            return None
        one.found |= {"speed": pace.text, "speedup": pace.speedup, "speed_metric": pace.metric.to_dict()}
        return pace


def _in_turn(attempts: Sequence[_Attempt], *, guarded: bool) -> tuple[list[_Attempt], list[_Attempt]]:
    """(what is tried first, what only where the same chain behind ``guards`` gives nothing).

    Without the nodes that guards look like (``guarded``), there is nothing for it to do.
    """
    behind = {one.text.removeprefix(_GUARDS): one for one in attempts if one.text.startswith(_GUARDS)}
    if not guarded:
        for one in behind.values():
            one.drop("not better", "guards changed nothing")
    later = [one for one in attempts if guarded and one.text in behind and not one.fuses]
    return [one for one in attempts if one not in later], later


def _still_wanted(later: Sequence[_Attempt], first: Sequence[_Attempt]) -> list[_Attempt]:
    """Those whose chain behind ``guards`` made nothing that holds; of the others it is said that they were left out."""
    made = {one.text: one for one in first if "nodes" in one.found and one.found.get("outcome") in _MADE}
    for one in later:
        if (further := _GUARDS + one.text) in made:
            one.drop("not better", f"not run: {further} starts from fewer nodes")
    return [one for one in later if "outcome" not in one.found]


def _best(attempts: Sequence[_Attempt], before: Rank, workbench: Arena) -> _Attempt | None:
    """The simplest that is simpler than the source, and holds; the others say why not."""
    best = None
    for one in sorted((one for one in attempts if one.rank), key=_by_rank):
        assert one.rank is not None
        if best is not None or one.rank >= before:
            one.drop("not better")
        elif _holds(one, workbench):
            best = one
    return best


def _chain(text: str) -> list[Simplifier]:
    names = text.split("+")
    for name in names:
        if name not in _known():
            raise unknown_name("engine", name, _known())
    return [REGISTRY.ready(name).parse({}) for name in names]


def _attempt(one: _Attempt, source: Path, workbench: Arena) -> None:
    """Run one chain of engines; its result, if there is one, is at its place."""
    current, seconds, peak, made = source, 0.0, 0, None
    try:
        for step, engine in enumerate(one.chain):
            last = step == len(one.chain) - 1
            place = one.place if last else one.place.with_name(f"step-{step}.onnx")
            done = workbench.attempt(engine, current, place, source if last else None)
            seconds += float(done.details.get("seconds") or 0.0)
            peak = max(peak, int(done.details.get("peak_memory_bytes") or 0))
            if done.details.get("fusions"):
                one.found["fusions"] = done.details["fusions"]
            if not place.is_file() and not last:
                one.drop("not better", f"{engine.name} changed nothing")
                return
            current, made = place, done.details.get("made")
        one.found |= {"seconds": round(seconds, 2), "peak_memory_bytes": peak}
        if made is None:
            one.drop("not better", "it changed nothing")
            return
        weighed = workbench.cost(one.place) if made["changed"] and made["cost"] is None else made["cost"]
        cost = math.nan if weighed is None else float(weighed)
        one.rank = (cost, int(made["nodes"]), int(made["bytes"]))
        one.found |= {key: made[key] for key in ("nodes", "bytes")}
        one.found["operators"] = changes(_operators(source), made["operators"])
        if made["same"] and one.rank[2] > (1 - _SMALLER) * _size(source):
            one.drop("not better", "the same graph")
    except ModelOpsError as error:
        one.drop(error.code, error.message)
    except WorkerBug as error:
        one.drop("crashed", str(error))


def _holds(one: _Attempt, workbench: Arena) -> bool:
    """Whether the result does what the source does; says why where it does not."""
    try:
        checks: list[Check] = workbench.judge(one.place)
    except ModelOpsError as error:
        one.drop(error.code, error.message)
        return False
    broken = next((check for check in checks if check.verdict == "fail"), None)
    if broken is not None:
        one.drop("refused", f"{broken.name}: {broken.message}")
        return False
    found = Report(checks=tuple(checks))
    if found.exit_code != 0:
        worst = found.worst()
        one.drop("not proven", f"{worst.name}: {worst.message}" if worst else "nothing could be compared")
        return False
    one.found["outcome"] = "valid"
    return True


def _operators(model: Path) -> dict[str, int]:
    from modelops.graphs.describe import summary

    return dict(summary(model)["operators"])


def _fusions(one: _Attempt) -> int:
    return sum(one.found.get("fusions", {}).values())


def _rank(model: Path, cost: float) -> Rank:
    from modelops.graphs.describe import summary

    return (cost, int(summary(model)["nodes"]), _size(model))


def _by_rank(one: _Attempt) -> Rank:
    assert one.rank is not None
    return one.rank


def _known() -> list[str]:
    return [name for name in REGISTRY.names() if name != "auto"]


def _size(model: Path) -> int:
    data = model.with_name(f"{model.name}.data")
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _copy(model: Path, target: Path) -> None:
    for name in (f"{target.name}.data", target.name):
        target.with_name(name).unlink(missing_ok=True)
    for suffix in ("", ".data"):
        place = model.with_name(model.name + suffix)
        if place.is_file():
            shutil.copyfile(place, target.with_name(target.name + suffix))  # the scratch may lie on another disk


def _pace_metrics(best: _Attempt | None) -> tuple[Metric, ...]:
    values = best.found.get("speed_metric") if best else None
    return (Metric.parse(values),) if values else ()


def _line(one: _Attempt, before: Rank) -> str:
    found = one.found
    figures = f"{before[1]} → {found['nodes']} nodes, {found['bytes']:,} bytes" if "nodes" in found else ""
    fused = ", ".join(f"{count} {name}" for name, count in found.get("fusions", {}).items() if count)
    outcome = "" if found["outcome"] == "valid" else found["outcome"]
    parts = [figures, f"fused {fused}" if fused else "", outcome, found.get("reason", "")]
    if found["outcome"] == "valid":
        parts.append(found.get("speed", ""))
    return f"{one.text}: {': '.join(part for part in parts if part)}"
