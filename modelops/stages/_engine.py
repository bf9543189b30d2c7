"""Runs engines of the simplify stage in workers of their own, where they may crash, hang or eat memory."""

from __future__ import annotations

import contextvars
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.core import cache, worker
from modelops.core.artifact import Artifact
from modelops.core.component import described
from modelops.core.progress import progress
from modelops.core.report import Check, Metric
from modelops.core.workbench import Done
from modelops.core.worker import Limits
from modelops.errors import ResourceExhausted
from modelops.graphs.files import size_of
from modelops.simplifiers import REGISTRY, Pace, Simplifier
from modelops.stages._compare import Pairs, source_outputs, structural_checks
from modelops.stages._workbench import SampleBench

_GIB = 1 << 30
# What the stage itself holds while an engine runs: onnxruntime's library, a parsed graph.
_RESERVED_BYTES = _GIB
# What an engine's process holds before it has read a model: Python, onnx, its own library.
_BARE_BYTES = 600 << 20
# A process that is not given a CPU all the time takes longer; one that takes this much longer hangs.
_PATIENCE = 4.0
# A file may grow by this much without being called larger: inferred shapes that are written down, names.
_SLACK_SHARE, _SLACK_BYTES = 0.01, 1 << 16
# Nodes that move no data, or next to none: a graph with more of them is not a slower one.
_FREE = frozenset({"Constant", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size"})
_FREE_COST = 0.1
# Larger models are not loaded once more for their cost: a session takes twice the size, and minutes.
_LARGEST_WEIGHED = 1 << 30
_WEIGHED_INSIDE = 128 << 20
# Outputs of the source that are kept for the next candidate.
_REMEMBERED_BYTES = 256 << 20
# Engines copy whole models again and again. With large pages, which glibc then asks for, onnxslim on MiniLM has 45
# thousand page faults instead of 620 thousand. Other C libraries pass this over.
_LARGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Allowance:
    """What all engines together may use: memory at a time, wall time, and CPU time for each of them."""

    wall_seconds: float
    memory_bytes: int
    cpu_seconds: float

    @classmethod
    def of(cls, limits: Limits, seconds: float | None, memory: int | None, share: float) -> Allowance:
        """A share of a stage's limits; ``seconds`` and ``memory`` are what the user allows one engine."""
        wall = limits.wall_seconds or 3600.0
        whole = max(_GIB, (limits.memory_bytes or 8 * _GIB) - _RESERVED_BYTES)
        return cls(0.7 * wall, whole if memory is None else memory, share * wall if seconds is None else seconds)


class EngineBench(SampleBench):
    """The workbench of the simplify stage: it runs engines apart, and judges what they made."""

    def __init__(self, source: Artifact, scratch: Path, allowance: Allowance) -> None:
        super().__init__(source, scratch)
        self._allowance = allowance
        self._memory = allowance.memory_bytes
        self._ends = time.monotonic() + allowance.wall_seconds
        self._numbers = itertools.count(1)
        self._judged: dict[str, list[Check]] = {}
        self._pairs: Pairs | None = None

    def side_by_side(self, works: Sequence[Callable[[], None]], needs: Sequence[int]) -> None:
        """Do all works: those that fit beside each other into memory in parallel, then the others one by one."""
        slots = max(1, min(len(works), len(os.sched_getaffinity(0))))
        share = self._allowance.memory_bytes // slots
        fit = [slots > 1 and need + _BARE_BYTES <= share for need in needs]
        self._memory = share
        with ThreadPoolExecutor(slots) as pool:
            together = [work for work, fits in zip(works, fit, strict=True) if fits]
            for future in [pool.submit(contextvars.copy_context().run, work) for work in together]:
                future.result()
        self._memory = self._allowance.memory_bytes
        for work, fits in zip(works, fit, strict=True):
            if not fits:
                work()

    def attempt(self, engine: Simplifier, source: Path, target: Path, beside: Path | None = None) -> Done:
        """Run an engine in a worker, which writes its result at ``target``: checked, self-contained."""
        limits = self._left(engine)
        # Works side by side ask for numbers at the same time.
        raw = self.scratch / f"engine-{next(self._numbers)}-{engine.name}" / "model.onnx"
        raw.parent.mkdir()
        arguments = {
            "engine": described(engine),
            "source": str(source),
            "raw": str(raw),
            "target": str(target),
            "artifact": str(self.source.path),
            "beside": str(beside or ""),
        }
        try:
            return _done(self._call(f"{__name__}:run", arguments, limits, f"the engine {engine.name}"))
        finally:
            shutil.rmtree(raw.parent, ignore_errors=True)

    def upgrade(self, source: Path, target: Path, opset: int) -> list[str]:
        """Write the source in another version of ONNX's operators; what was repaired on the way, in words."""
        from modelops.graphs import files

        place = self.scratch / "converted.onnx"
        limits = Limits(self._seconds_left(), self._memory, self._allowance.cpu_seconds)
        arguments = {"source": str(source), "target": str(place), "opset": opset}
        done = self._call("modelops.stages._opset:convert", arguments, limits, f"converting to opset {opset}").value
        target.parent.mkdir(exist_ok=True)
        files.rewrite(place, target)
        if done["before"] == opset:
            return [f"the model has opset {opset} already"]
        return [f"converted from opset {done['before']} to {opset}", *done["notes"]]

    def cost(self, model: Path) -> float:
        """What onnxruntime has left to do once it has loaded a model; of large ones, what the file says."""
        from modelops.graphs.describe import summary

        if size_of(model) > _LARGEST_WEIGHED:
            return weight(summary(model)["operators"])
        place = self.scratch / f"loaded-{time.monotonic_ns()}.onnx"
        limits = Limits(self._seconds_left(), self._memory, self._allowance.cpu_seconds)
        arguments = {"model": str(model), "place": str(place)}
        return float(self._call(f"{__name__}:loaded", arguments, limits, "loading the model").value)

    def pace(self, candidate: Path, than: Path, seconds: float) -> Pace:
        """How fast a candidate is beside another model, timed by turns on one sample."""
        from modelops.backends import REGISTRY as BACKENDS
        from modelops.stages import _speed
        from modelops.stages._feed import timing_feed
        from modelops.stages._race import Contender, race

        backend = BACKENDS.load("onnxruntime-cpu").parse({})
        feed, _ = timing_feed(self.source, batch=1, sizes={})
        pair = Contender("candidate", backend, candidate), Contender("other", backend, than)
        result = race(*pair, feed, budget_seconds=seconds)
        speedup, interval = _speed.speedup(result.records, "other", "candidate")
        text = f"{speedup:.2f}x the speed"
        if interval and interval[1] < 4 * interval[0]:
            text += f" ({interval[0]:.2f}…{interval[1]:.2f})"
        metric = Metric("speedup", speedup, "x", interval, 0.95 if interval else None, result.verdict.launches)
        return Pace(result.verdict.verdict, text, speedup, metric)

    def judge(self, candidate: Path) -> list[Check]:
        """The structural gate against the source, and that the file did not grow."""
        # What auto has judged comes back as the stage's result.
        data = candidate.with_name(f"{candidate.name}.data")
        key = cache.sha256_of(candidate) + (cache.sha256_of(data) if data.is_file() else "")
        if key not in self._judged:
            size = size_check(self.source.size, size_of(candidate))
            # A file that grew is out, whatever it gives.
            proof = structural_checks(self.source, candidate, self, self._outputs) if size else []
            self._judged[key] = [*proof, size]
        return self._judged[key]

    def _outputs(self) -> Pairs:
        """What the source gives; it runs once for all candidates, unless that is too much to keep."""
        if self._pairs is not None:
            return self._pairs
        pairs = source_outputs(self.source, self)
        arrays = [array for pair in pairs for feed in (pair.feed, pair.wanted) for array in feed.values()]
        self._pairs = pairs if sum(getattr(array, "nbytes", 0) for array in arrays) <= _REMEMBERED_BYTES else None
        return pairs

    def _call(self, function: str, arguments: Mapping[str, Any], limits: Limits, what: str) -> worker.Outcome:
        try:
            return worker.call(
                function, arguments, limits=limits, what=what, on_progress=progress, environment=_large_pages()
            )
        except ResourceExhausted as error:
            hint = error.hint.replace("--memory-limit", "--memory-limit or --engine-memory")
            hint = hint.replace("--time-limit", "--time-limit or --engine-time")
            raise ResourceExhausted(error.message, hint=hint) from error

    def _seconds_left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def _left(self, engine: Simplifier) -> Limits:
        """The limits of the next engine; ResourceExhausted when it would not fit into them."""
        left = self._seconds_left()
        if left < 1.0:
            raise ResourceExhausted(
                f"no time is left for the engine {engine.name}", hint="name fewer with --engines, or raise --time-limit"
            )
        need, most = int(engine.appetite * self.source.size), self._memory
        if need > most:
            raise ResourceExhausted(
                f"the engine {engine.name} would need about {need / _GIB:.1f} GiB, the limit is {most / _GIB:.1f} GiB",
                hint="raise it with --memory-limit or --engine-memory, or choose another --engine",
            )
        cpu = self._allowance.cpu_seconds
        return Limits(min(left, _PATIENCE * cpu), most, cpu)


def run(engine: Mapping[str, Any], source: str, raw: str, target: str, artifact: str, beside: str) -> dict[str, Any]:
    """The worker's side: build the engine, run it on files, write its result anew, and give back what was done."""
    from modelops.graphs import files

    component = REGISTRY.ready(engine["name"]).parse({k: v for k, v in engine.items() if k != "name"})
    bench = SampleBench(Artifact.open(artifact, verify=False), Path(raw).parent)
    place = Path(target) if component.saves else Path(raw)
    done = component.simplify(Path(source), place, bench)  # type: ignore[arg-type]  # plain engines try no others
    if place != Path(target) and place.is_file():
        files.rewrite(place, Path(target))
    made = {"made": _made(Path(target), Path(beside))} if beside and Path(target).is_file() else {}
    return {
        "notes": list(done.notes),
        "metrics": [metric.to_dict() for metric in done.metrics],
        "details": {**done.details, **made},
    }


def _made(model: Path, beside: Path) -> dict[str, Any]:
    """What a model is, beside the one that it is to be simpler than."""
    from modelops.graphs.describe import summary
    from modelops.graphs.sameness import computation

    found, operators = summary(model), summary(beside)["operators"]
    changed = found["operators"] != operators
    same = not changed and (digest := computation(model)) != "" and digest == computation(beside)
    cost = None
    # A large one is weighed apart: what the engine still holds leaves less room.
    if changed and size_of(model) <= _WEIGHED_INSIDE:
        cost = loaded(str(model), str(model.with_name(f"{model.name}-loaded.onnx")))
    made = {"nodes": found["nodes"], "bytes": size_of(model), "operators": found["operators"]}
    return {**made, "changed": changed, "same": same, "cost": cost}


def loaded(model: str, place: str) -> float:
    """The worker's side: load a model, and weigh what onnxruntime makes of it on any machine."""
    from modelops.graphs import runs
    from modelops.graphs.describe import summary

    config = {
        "session.disable_prepacking": "1",  # it is never run
        "session.optimized_model_external_initializers_file_name": f"{Path(place).name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    runs.session(Path(model), optimization="extended", config=config, optimized=Path(place)).close()
    found = weight(summary(Path(place))["operators"])
    for suffix in ("", ".data"):
        Path(place + suffix).unlink(missing_ok=True)
    return found


def _large_pages() -> dict[str, str]:
    own = os.environ.get("GLIBC_TUNABLES", "")
    return {"GLIBC_TUNABLES": f"{own}:{_LARGE_PAGES}" if own else _LARGE_PAGES}


def weight(operators: Mapping[str, int]) -> float:
    """The number of nodes, those that move no data counted little."""
    return round(sum(count * (_FREE_COST if op in _FREE else 1.0) for op, count in operators.items()), 1)


def size_check(before: int, after: int) -> Check:
    """That a file did not grow by more than what shapes and names may add."""
    most = int(before * (1 + _SLACK_SHARE)) + _SLACK_BYTES
    text = f"{before:,} → {after:,} bytes"
    if after <= most:
        return Check("size", "pass", text, after, f"<= {most:,} bytes")
    grown = 100 * (after / before - 1)
    text += f": {grown:.0f} % larger, as happens when weights that were shared are written twice"
    return Check("size", "fail", text, after, f"<= {most:,} bytes")


def _done(outcome: worker.Outcome) -> Done:
    values = outcome.value
    metrics = tuple(Metric.parse(item) for item in values["metrics"])
    spent = {"seconds": round(outcome.seconds, 3), "peak_memory_bytes": outcome.peak_memory_bytes}
    return Done(tuple(values["notes"]), metrics, {**values["details"], **spent})
