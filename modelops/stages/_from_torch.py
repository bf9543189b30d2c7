"""From a torch module to a validated ONNX model: run it, export it by the ladder, hold every shape against it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core import worker
from modelops.core.artifact import Draft
from modelops.core.progress import progress
from modelops.core.report import Check, Metric, Report
from modelops.errors import ModelOpsError, ResourceExhausted, StageFailed, UsageError
from modelops.graphs import reference
from modelops.graphs.reference import Case
from modelops.sources import Loaded
from modelops.stages._aside import Aside, aside
from modelops.stages._cases import Cases, observe
from modelops.stages._causes import Cause, classify
from modelops.stages._exporters import Job, NothingSuggested, Rung, ladder
from modelops.stages._given import Given
from modelops.stages._prepare import Prepared, prepare
from modelops.stages._trial import Trial, try_out

if TYPE_CHECKING:
    from modelops.stages.convert import Convert

log = logging.getLogger(__name__)

# In float64 weights take twice their size, on top of what they take already.
_MOST_IN_FLOAT64 = 1 << 30
_MOST_TWICE = 1 << 30


@dataclass
class _Work:
    """What is found out on the way."""

    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: list[tuple[str, Cause]] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds that the block takes, those of timed blocks inside of it left out."""
        progress(what)
        started, before = time.monotonic(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[what] = round(self.seconds.get(what, 0.0) + time.monotonic() - started - inside, 3)


class _Undefined(Exception):
    """The source gives nothing that could be compared with."""

    def __init__(self, cases: Cases) -> None:
        super().__init__(cases)
        self.cases = cases


class _Observed:
    """What the source gives at every shape: run when it is first asked for, unless a copy of the process did that."""

    def __init__(self, observing: Callable[[], Cases], copy: Aside[Cases] | None, patience: float, work: _Work) -> None:
        self._observing, self._copy, self._patience, self._work = observing, copy, patience, work
        self._cases: Cases | None = None
        self._error: StageFailed | None = None

    def __call__(self) -> Cases:
        if self._error is not None:  # it would fail again, at the price of another run
            raise self._error
        if self._cases is None:
            with self._work.timed("running the source"):
                found = self._copy.result(self._patience) if self._copy is not None else None
                self._copy = None
                # Where the copy failed this fails alike, and says why.
                try:
                    self._cases = found or self._observing()
                except StageFailed as error:
                    self._error = error
                    raise
        if self._cases.problem is not None:
            raise _Undefined(self._cases)
        return self._cases

    def dims(self) -> Mapping[str, Sequence[int | str | None]]:
        return self().layout.dims


@dataclass(frozen=True)
class _Made:
    """What one rung made, and what came of trying it out."""

    rung: str
    opset: int
    trial: Trial
    checks: list[Check]

    @property
    def failed(self) -> Check | None:
        return next((check for check in self.checks if check.verdict == "fail"), None)


def convert(loaded: Loaded, stage: Convert, draft: Draft, *, opening: float = 0.0) -> Report:
    """Write model.onnx and reference.npz into the draft, and report what was checked.

    ``opening`` is how long it took to load the source, in seconds.
    """
    import torch

    with torch.no_grad():
        running = loaded.first.seconds if loaded.first is not None else 0.0
        seconds = {"opening": round(opening - running, 3), "running the source": round(running, 3)}
        return _convert(loaded, stage, draft, _Work(seconds, list(loaded.notes)))


def _convert(loaded: Loaded, stage: Convert, draft: Draft, work: _Work) -> Report:
    given = stage.given(loaded)
    with work.timed("running the source"):
        prepared = prepare(loaded, stage, given)
    if prepared.samples is not None:
        work.notes += prepared.samples.notes
    rungs = ladder(stage.exporter, loaded.exporters)
    observing = partial(observe, prepared, rows=stage.rows, seed=stage.seed)
    try:
        with _settled_objects(), aside(observing, wanted=_worth_a_copy(prepared, stage)) as copy:
            patience = _patience(prepared.effort.seconds * prepared.effort.rows(stage.rows))
            observed = _Observed(observing, copy, patience, work)
            if copy is None:
                observed()
            made = _climb(prepared, observed, rungs, stage, draft.file("model.onnx"), work)
    except _Undefined as error:
        check, work.notes = error.cases.problem, [*work.notes, *error.cases.notes]
        details = _details(loaded, given, error.cases, work)
        return Report(checks=(check,) if check is not None else (), notes=tuple(work.notes), details=details)
    cases = observed()
    work.notes += cases.notes
    if made.failed is None:
        with work.timed("float64"):
            made = _with_float64(made, prepared, work)
        stored = [case for case in made.trial.cases if case.name in cases.stored]
        with work.timed("writing"):
            reference.write(draft.file(reference.FILE_NAME), stored)
            for name, path in loaded.files.items():
                draft.copy(path, name)
    work.notes += [f"{rung} failed: {cause.kind}: {cause.text}; {cause.hint}" for rung, cause in work.failed]
    details = _details(loaded, given, cases, work) | {
        "exporter": made.rung.partition("-")[0],
        "rung": made.rung,
        "opset": made.opset,
        "shapes": _tried(made, cases),
    }
    return Report(_metrics(made), tuple(made.checks), tuple(work.notes), details)


def _patience(seconds: float) -> float:
    """How long to wait for a copy whose work takes so long, in seconds: as long as time is left to do it oneself."""
    granted = worker.granted()
    wall = granted.wall_seconds if granted is not None else None
    longest = 30.0 + 10.0 * seconds
    return longest if wall is None else max(0.0, min(longest, wall / 2 - 2.0 * seconds))


def _worth_a_copy(prepared: Prepared, stage: Convert) -> bool:
    """Whether the source runs so long that a copy of the process shall do it during the export.

    Not where the weights are so large that a second process that holds them is too much.
    """
    effort, rows = prepared.effort, prepared.effort.rows(stage.rows)
    return effort.high and effort.threads(rows) == 1 and prepared.eager.weight_bytes <= _MOST_TWICE


def _climb(
    prepared: Prepared, observed: _Observed, rungs: Sequence[Rung], stage: Convert, target: Path, work: _Work
) -> _Made:
    """The first rung whose result holds; else what the very first made, if it made anything; StageFailed otherwise."""
    first: _Made | None = None
    with tempfile.TemporaryDirectory(prefix="modelops-") as scratch:
        eager, place = prepared.eager, Path(scratch)
        job = Job(eager, eager.tensors, prepared.envelope, observed.dims, stage.opset, place)
        for rung, export in rungs:
            try:
                with work.timed("export"):
                    model = export(job)
                with work.timed("writing"):
                    written = _written(model, target)
                    del model
                    _release()
                cases = observed()
                with work.timed("onnxruntime"):
                    trial = try_out(target, cases.cases, cases.layout, stage.gates, few=cases.few)
                    _trim()
                with work.timed("judging"):
                    made = _Made(rung, written, trial, trial.checks())
            except NothingSuggested:
                continue
            except UsageError:
                raise
            except Exception as error:
                log.debug("%s failed", rung, exc_info=True)
                observed()  # what the source itself refuses says more than an exporter
                work.failed.append((rung, classify(error)))
                _release()
                continue
            if made.failed is None:
                return made
            work.failed.append((rung, Cause(_kind(made), made.failed.message)))
            first = first or (made if len(work.failed) == 1 else None)
    if first is not None:
        return first
    raise _no_rung(work.failed)


def _kind(made: _Made) -> str:
    """What kind of failure it is when a graph was written and does not hold."""
    if len(made.trial.working) == len(made.trial.cases):
        return "wrong numbers"
    return "frozen dimension" if made.trial.working else "graph that onnxruntime refuses"


@contextlib.contextmanager
def _settled_objects() -> Iterator[None]:
    """Spare the garbage collector the million objects of torch and transformers, which stay anyway."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _release() -> None:
    """Give memory back: exporters leave cycles that hold weights."""
    gc.collect()
    _trim()


def _trim() -> None:
    """Give back what malloc keeps after sessions have freed it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _written(model: Any, target: Path) -> int:
    """Write the model; gives its opset."""
    from modelops.graphs.files import save

    save(model, target)
    return int(model.opset_imports.get("", 0))


def _no_rung(failed: Sequence[tuple[str, Cause]]) -> ModelOpsError:
    said = "; ".join(f"{rung}: {cause.kind}: {cause.text}" for rung, cause in failed)
    first = next((cause for _, cause in failed if cause.kind == "frozen dimension"), failed[0][1])
    kind = ResourceExhausted if first.kind == "memory" else StageFailed
    return kind(f"no exporter could convert the model: {said[:1200]}", hint=first.hint)


def _with_float64(made: _Made, prepared: Prepared, work: _Work) -> _Made:
    """The same, judged also against what the source gives in float64, where it runs in that."""
    if prepared.eager.weight_bytes > _MOST_IN_FLOAT64:
        work.notes.append(f"float64 was left out: the weights take more than {_MOST_IN_FLOAT64 >> 30} GiB")
        return made
    found = _judged_in_float64(made, prepared)
    if found is None:
        work.notes.append("the source does not run in float64: its own error is not known")
    return found or made


def _judged_in_float64(made: _Made, prepared: Prepared) -> _Made | None:
    if not prepared.eager.to_double():
        return None
    effort = prepared.effort
    prepared.eager.threads = effort.threads(effort.rows(None), double=True)
    cases: list[Case] = []
    for case in made.trial.cases:
        try:
            outputs = prepared.eager.run(case.feed, double=True)
        except Exception as error:
            log.debug("no float64: %s", error)
            return None
        floats = {name: value for name, value in outputs.items() if case.outputs[name].dtype.kind == "f"}
        if any(value.dtype.name != "float64" for value in floats.values()):
            return None
        cases.append(replace(case, outputs64=case.take(floats) or None))
    trial = replace(made.trial, cases=cases)
    return replace(made, trial=trial, checks=trial.checks())


def _metrics(made: _Made) -> tuple[Metric, ...]:
    differences = made.trial.differences().values() if not made.failed or made.failed.name != "runs" else ()
    sqnr = [d.sqnr for d in differences if d.sqnr is not None]
    scaled = [d.max_scaled for d in differences if d.max_scaled is not None and math.isfinite(d.max_scaled)]
    rows = max((d.rows for d in differences), default=0)
    found = [Metric("opset", made.opset)]
    if sqnr:
        least = min(sqnr)
        found.append(Metric("sqnr", round(least, 2) if math.isfinite(least) else "identical", "dB", n=rows))
    if scaled:
        found.append(Metric("max_error_of_scale", max(scaled), n=rows))
    return tuple(found)


def _tried(made: _Made, cases: Cases) -> list[dict[str, Any]]:
    """The table of the shapes tried: what each case fed, and what came of it."""
    verdicts = {check.name.removeprefix("shapes."): check for check in made.checks if check.name.startswith("shapes.")}
    table = []
    for case in made.trial.cases:
        check = verdicts.get(case.name)
        verdict = check.verdict if check else Report(checks=tuple(made.checks)).verdict
        shapes = {name: list(array.shape) for name, array in case.feed.items()}
        table.append({"case": case.name, "inputs": shapes, "verdict": verdict})
    return table + [
        {"case": name, "sizes": sizes, "verdict": "refused", "why": why} for name, sizes, why in cases.refused
    ]


def _details(loaded: Loaded, given: Given | None, cases: Cases, work: _Work) -> dict[str, Any]:
    envelope = cases.envelope
    code = given.code_executed() if given is not None else ()
    bounds = {dim: [envelope.low(dim), envelope.high(dim)] for dim in envelope.dims}
    return {
        "dimensions": {dim: {"traced": envelope.traced[dim], "bounds": bounds[dim]} for dim in envelope.dims},
        "static": not envelope.dims,
        "failed_rungs": [{"rung": rung, **cause.to_dict()} for rung, cause in work.failed],
        "outputs": {name: list(dims) for name, dims in cases.layout.dims.items()},
        "seconds": work.seconds,
        "code_executed": [dict(entry) for entry in (*loaded.code_executed, *code)],
    }
