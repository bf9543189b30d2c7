"""Running one stage: resolve, reuse or draft, time, hash, record, publish."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from modelops.core import machine, worker
from modelops.core.artifact import Artifact, Publication, drafting, target_exists
from modelops.core.manifest import Manifest, Step
from modelops.core.report import Report
from modelops.core.worker import Limits
from modelops.errors import (
    GateFailed,
    Inconclusive,
    ModelOpsError,
    UsageError,
)
from modelops.graphs.wrap import not_a_model
from modelops.pipeline._work import Work, bind, difference
from modelops.stages import REGISTRY, Stage

ProgressListener = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Surroundings:
    """How to run, none of which changes the result: limits, listeners, and where a worker's output goes."""

    time_limit: float | None = None
    memory_limit: int | None = None
    on_progress: ProgressListener | None = None
    log_to: IO[bytes] | None = None

    def limits(self, stage: Stage, model_bytes: int, source: str | None = None) -> Limits:
        limits = stage.limits(model_bytes) if source is None else stage.limits_on(source, model_bytes)
        if self.time_limit is not None:
            limits = replace(limits, wall_seconds=self.time_limit)
        if self.memory_limit is not None:
            limits = replace(limits, memory_bytes=self.memory_limit)
        return limits


@dataclass(frozen=True)
class Outcome:
    """What came of one stage. ``artifact`` is None when nothing was published; ``reused`` says why nothing was run."""

    stage: str
    report: Report
    source: Mapping[str, str]
    artifact: Artifact | None = None
    reused: str = ""
    ran_because: str = ""
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    advisory: bool = False

    @property
    def exit_code(self) -> int:
        return 0 if self.advisory else self.report.exit_code

    def document(self) -> dict[str, Any]:
        """The outcome as the JSON document that every renderer reads."""
        target = {"path": _near(self.artifact.path), "id": self.artifact.id} if self.artifact else None
        return {
            "schema": "modelops.document/1",
            "command": self.stage,
            "exit_code": self.exit_code,
            "verdict": self.report.verdict,
            "advisory": self.advisory,
            "source": dict(self.source),
            "target": target,
            "reused": self.reused,
            "ran_because": self.ran_because,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "report": self.report.to_dict(),
            "error": error.to_dict() if (error := self.error()) else None,
            "steps": [],
        }

    def error(self) -> ModelOpsError | None:
        """The failed or undecided gate as the error that scripts read, or None."""
        if self.exit_code == 0:
            return None
        worst = self.report.worst()
        message = f"{worst.name}: {worst.message}" if worst is not None else self.report.verdict
        kind = GateFailed if self.exit_code == GateFailed.exit_code else Inconclusive
        return kind(message, hint=str(self.report.details.get("hint", "")))


def _near(path: Path) -> str:
    """A path below the working directory without the way there, as a user writes it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@contextlib.contextmanager
def resolved(stage: Stage, source: str, surroundings: Surroundings) -> Iterator[Artifact | str]:
    """What a stage reads: the text itself for sources, else an artifact."""
    if stage.reads == "source":
        yield source
        return
    with opened(source, surroundings, evidence=stage.takes_evidence()) as artifact:
        yield artifact


@contextlib.contextmanager
def opened(source: str, surroundings: Surroundings, *, evidence: bool = False) -> Iterator[Artifact]:
    """The artifact at this path; a bare .onnx file is wrapped into a temporary one.

    Evidence is refused unless it is asked for, since it holds no model.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".onnx":
            raise not_a_model(path)
        with _scratch() as scratch:
            place = scratch / (path.stem or "model")
            worker.call(
                "modelops.pipeline._job:wrap",
                {"path": str(path.absolute()), "target": str(place)},
                limits=surroundings.limits(Stage(), _bytes_of(path)),
                what=f"reading {path}",
                log_to=surroundings.log_to,
            )
            yield Artifact.open(place)
        return
    artifact = Artifact.open(path)
    if not evidence:
        _ = artifact.model
    yield artifact


def _bytes_of(model: Path) -> int:
    """The size of a bare .onnx file with the weights that lie beside it: of files whose names begin as its own does."""
    total = model.stat().st_size
    with contextlib.suppress(OSError):  # a folder that can't be listed, a file that goes meanwhile
        others = (file for file in model.parent.iterdir() if file.name.startswith(model.stem) and file != model)
        total += sum(file.stat().st_size for file in others if file.is_file())
    return total


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="modelops-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def run_stage(
    stage: Stage,
    source: str,
    target: Path | str | None,
    *,
    force: bool = False,
    advisory: bool = False,
    surroundings: Surroundings | None = None,
) -> Outcome:
    """Run one stage on ``source`` and publish what it made at ``target``.

    A target that already is this very result is reused. Without a target (measuring stages only) nothing is kept.
    Raises ModelOpsError; a failed gate is no exception but the outcome's ``exit_code``.
    """
    surroundings = surroundings or Surroundings()
    if not source or target == "":
        raise UsageError(f"{'OUT' if source else 'IN'} is empty", hint="give a path")
    if target is not None:
        _refuse_overlap(source, Path(target))
    elif stage.writes == "model":
        raise UsageError(f"{stage.name} needs OUT, the directory to write", hint=f"modelops {stage.name} IN OUT")
    with resolved(stage, source, surroundings) as given:
        work = bind(stage, given)
        if target is not None and not force and (found := _already(work, Path(target))) is not None:
            return replace(found, advisory=advisory, source=_named(source, work))
        with contextlib.ExitStack() as stack:
            if target is None:
                target = stack.enter_context(_scratch()) / stage.name
                outcome = execute(work, target, force=False, surroundings=surroundings)
                outcome = replace(outcome, artifact=None)
            else:
                outcome = execute(work, Path(target), force=force, surroundings=surroundings)
        return replace(outcome, advisory=advisory, source=_named(source, work))


def _named(source: str, work: Work) -> dict[str, str]:
    return {"path": source, "id": work.source_id if isinstance(work.source, Artifact) else ""}


def _refuse_overlap(source: str, target: Path) -> None:
    here, there = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if here == there or here in there.parents:
        raise UsageError(f"{target} is, or lies inside, the source {source}", hint="choose another place for OUT")
    if there in here.parents and there.exists():
        raise UsageError(f"the source {source} lies inside {target}", hint="choose another place for OUT")


def _refuse_within(stage: Stage, target: Path) -> None:
    """What a stage writes apart can't lie in the target, which is put in place as a whole."""
    there = Path(os.path.realpath(target))
    for path in stage.outputs():
        if there in Path(os.path.realpath(path)).parents:
            raise UsageError(f"{path} lies inside {target}, which is written as a whole", hint="choose another place")


def _already(work: Work, target: Path) -> Outcome | None:
    """The outcome in place when the target is this very work's result; UsageError when it is something else."""
    if not os.path.lexists(target):
        return None
    try:
        artifact = Artifact.open(target)
    except ModelOpsError as error:
        raise target_exists(target) from error
    if changed := difference(work, artifact):
        raise UsageError(
            f"{target} exists already, and is another result ({changed})",
            hint="choose another name, or replace it with --force",
        )
    if gone := [str(path) for path in work.stage.outputs() if not path.exists()]:
        raise UsageError(
            f"{target} is there already, and {', '.join(gone)}, written with it, is not",
            hint="make both anew with --force",
        )
    return kept(artifact)


def kept(artifact: Artifact) -> Outcome:
    """The outcome that an existing artifact's last step recorded."""
    step = artifact.manifest.history[-1]
    return Outcome(
        stage=step.stage,
        report=step.report,
        source={},
        artifact=artifact,
        reused="same source, options, data and tools",
        seconds=step.seconds,
        peak_memory_bytes=step.peak_memory_bytes,
    )


def execute(work: Work, target: Path, *, force: bool, surroundings: Surroundings) -> Outcome:
    """Run the work in a worker on a draft of ``target``, and publish the draft when its report allows it."""
    _refuse_within(work.stage, target)
    source_size = work.source.size if isinstance(work.source, Artifact) else _source_bytes(work)
    with drafting(target, force=force) as publication:
        result = worker.call(
            "modelops.pipeline._job:run",
            {
                "stage": work.stage.name,
                "options": work.stage.to_dict(),
                "source": str(work.source.path.absolute()) if isinstance(work.source, Artifact) else work.source,
                "draft": str(publication.draft.path),
            },
            limits=surroundings.limits(work.stage, source_size, work.source if isinstance(work.source, str) else None),
            what=work.stage.name,
            on_progress=surroundings.on_progress,
            log_to=surroundings.log_to,
        )
        report = Report.parse(result.value["report"])
        outcome = Outcome(work.stage.name, report, {}, None, "", "", result.seconds, result.peak_memory_bytes)
        if work.stage.writes == "model" and report.exit_code != 0:
            return outcome
        manifest = _manifest(work, publication, result.value, outcome)
        return replace(outcome, artifact=publication.publish(manifest))


def _source_bytes(work: Work) -> int:
    """The size of the files that a source consists of, 0 where they are not files."""
    total = 0
    for path in work.stage.inputs(str(work.source)).values():
        with contextlib.suppress(OSError):
            files = [path] if path.is_file() else path.rglob("*")
            total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def _manifest(work: Work, publication: Publication, result: Mapping[str, Any], outcome: Outcome) -> Manifest:
    report = outcome.report
    details = dict(report.details)
    code = tuple(details.pop("code_executed", ()))
    if result["unseen_readers"]:
        details["unseen_readers"] = result["unseen_readers"]
    if result["files_read"]:
        known = {os.path.abspath(entry["path"]) for entry in code}
        details["files_read"] = {name: value for name, value in result["files_read"].items() if name not in known}
    step = Step(
        stage=work.stage.name,
        options=work.stage.to_dict(),
        key=work.key,
        source=work.source_id,
        seconds=round(outcome.seconds or 0.0, 3),
        peak_memory_bytes=outcome.peak_memory_bytes,
        report=replace(report, details=details),
        tools=work.tools,
        inputs=work.inputs,
    )
    before = work.source.manifest if isinstance(work.source, Artifact) else None
    evidence = work.stage.writes == "evidence"
    return Manifest(
        kind=work.stage.writes,
        files=publication.files(),
        graphs=result["graphs"],
        created=timestamp(),
        model=result["model"],
        history=(step,) if evidence or before is None else (*before.history, step),
        environment=machine.environment(),
        code_executed=code if evidence or before is None else (*before.code_executed, *code),
        parents=(before.id,) if before is not None else (),
        measured=dict(details.get("measured", {})) if evidence else {},
    )


def timestamp() -> str:
    """Now in UTC, or the time that SOURCE_DATE_EPOCH says."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = float(epoch) if epoch.isdecimal() else time.time()
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_stage(name: str, options: Mapping[str, Any]) -> Stage:
    """The stage of that name with these options; UsageError for either."""
    return REGISTRY.load(name).parse(options)
