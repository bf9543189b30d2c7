"""Running a recipe: each step into a directory of its own, reusing every step whose work is unchanged."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelops.core import machine, worker
from modelops.core.artifact import Artifact
from modelops.core.manifest import FILE_NAME, digest
from modelops.core.worker import Limits
from modelops.errors import Inconclusive, InputRefused, ModelOpsError, UsageError, from_os_error
from modelops.pipeline._stage import Outcome, Surroundings, execute, kept, resolved
from modelops.pipeline._work import Work, bind, difference, input_digest
from modelops.recipe import Recipe, RecipeStep, directory_name
from modelops.stages import Stage

RUN_FILE = "run.json"
_SCHEMA = "modelops.run/1"
# What a run calls its directories: nothing else that a run.json lists is ever removed.
_OWN = re.compile(r"\d{2,}-[^/\0]+")


@dataclass(frozen=True)
class RunOutcome:
    """What came of a recipe: one outcome per step that was reached, and the closing table."""

    steps: tuple[Outcome, ...]
    table: Mapping[str, Any] = field(default_factory=dict)
    error: ModelOpsError | None = None
    removed: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        if self.error is not None:
            return self.error.exit_code
        return next((step.exit_code for step in self.steps if step.exit_code), 0)

    def document(self) -> dict[str, Any]:
        """The run as the JSON document that every renderer reads."""
        steps = [step.document() for step in self.steps]
        failed = next((step for step in steps if step["exit_code"]), None)
        error = self.error.to_dict() if self.error else failed["error"] if failed else None
        verdict = failed["verdict"] if failed else "pass"
        return {
            "schema": "modelops.document/1",
            "command": "run",
            "exit_code": self.exit_code,
            "verdict": None if self.error else verdict,
            "advisory": False,
            "source": None,
            "target": None,
            "reused": "",
            "ran_because": "",
            "seconds": sum(step.seconds or 0.0 for step in self.steps if not step.reused),
            "peak_memory_bytes": max((step.peak_memory_bytes or 0 for step in self.steps), default=0) or None,
            "report": None,
            "error": error,
            "steps": steps,
            "table": dict(self.table),
            "removed": list(self.removed),
        }


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    surroundings: Surroundings | None = None,
    on_step: Callable[[Outcome], None] | None = None,
) -> RunOutcome:
    """Run a recipe below ``out``: ``01-convert``, ``02-simplify`` … and ``run.json``, which lists what it owns.

    Stops at the first failed gate; the failed step's directory, and those after it, are then removed, so that nothing
    which this run did not make can be mistaken for its result.
    """
    surroundings = surroundings or Surroundings()
    with _owned(out) as run:
        outcomes: list[Outcome] = []
        error: ModelOpsError | None = None
        places: dict[str, Path] = {}
        current = recipe.source
        for number, step in enumerate(recipe.steps, 1):
            place = out / directory_name(number, step.stage.name)
            try:
                run.check_own(place)
                outcome = _step(step, step.bound(places), current, place, surroundings, run)
            except ModelOpsError as failure:
                error = failure
                run.forget_from(number)
                break
            outcome = replace(outcome, advisory=step.advisory)
            outcomes.append(outcome)
            if on_step is not None:
                on_step(outcome)
            if outcome.artifact is not None:
                run.record(place, outcome)
            if outcome.exit_code != 0:
                run.forget_from(number if outcome.artifact is None else number + 1)
                break
            if step.stage.writes == "model":
                current = str(place)
                places[step.stage.name] = places[place.name] = place
        finished = error is None and len(outcomes) == len(recipe.steps) and not any(o.exit_code for o in outcomes)
        removed = (
            run.forget_others({directory_name(n, s.stage.name) for n, s in enumerate(recipe.steps, 1)})
            if finished
            else ()
        )
        table: Mapping[str, Any] = {}
        if error is None:
            try:
                table = run.table(
                    recipe, [o for o in outcomes if o.artifact and o.artifact.manifest.kind == "model"], surroundings
                )
            except ModelOpsError as failure:
                error = failure
        return RunOutcome(tuple(outcomes), _with_steps(table, outcomes), error, tuple(removed))


def _step(step: RecipeStep, stage: Stage, source: str, place: Path, surroundings: Surroundings, run: _Run) -> Outcome:
    """One step: reused when its directory holds this very work's result, else run."""
    with resolved(stage, source, surroundings) as given:
        work = bind(stage, given)
        because = _why(work, place, advisory=step.advisory)
        if because == "":
            return replace(kept(Artifact.open(place)), source={"path": source, "id": work.source_id})
        if surroundings.on_progress is not None:
            surroundings.on_progress(f"{place.name}: {because}", 0, None)
        run.claim(place, stage.name)
        outcome = execute(work, place, force=place.exists(), surroundings=surroundings)
        return replace(outcome, source={"path": source, "id": work.source_id}, ran_because=because)


def _why(work: Work, place: Path, *, advisory: bool) -> str:
    """Why the step has to run; an empty string when what is there is its result, and is not worth another try."""
    if not os.path.lexists(place):
        return "not made yet"
    try:
        artifact = Artifact.open(place)
        because = difference(work, artifact)
    except ModelOpsError as error:
        return f"what is there can't be used: {error.message}"
    undecided = artifact.manifest.history and artifact.manifest.history[-1].report.exit_code == Inconclusive.exit_code
    if undecided and work.stage.machine_dependent and not advisory:
        return because or "it was inconclusive, and may be told now"
    return because


class _Run:
    """The run's own record: which directories it made, and its table."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / RUN_FILE
        self.steps: dict[str, dict[str, str]] = {}
        self.saved_table: dict[str, Any] = {}
        if self.path.is_file():
            try:
                values = json.loads(self.path.read_bytes())
                if values["schema"] != _SCHEMA:
                    raise ValueError(f"unknown schema {values['schema']!r}")
                self.steps = {str(entry["directory"]): dict(entry) for entry in values["steps"]}
                if foreign := next((name for name in self.steps if not _OWN.fullmatch(name)), None):
                    raise ValueError(f"no step is called {foreign!r}")
                self.saved_table = dict(values.get("table", {}))
            except (ValueError, KeyError, TypeError) as error:
                raise InputRefused(
                    f"{self.path} is not readable: {error}", hint="remove the folder, or choose another"
                ) from error

    def check_own(self, place: Path) -> None:
        if os.path.lexists(place) and place.name not in self.steps:
            raise UsageError(f"{place} was not made by this run, and is left alone", hint="choose another --out")

    def claim(self, place: Path, stage: str) -> None:
        """List a directory before it is made, so that a run that is killed in between knows its own."""
        if place.name not in self.steps:
            self.steps[place.name] = {"directory": place.name, "stage": stage}
            self.save()

    def record(self, place: Path, outcome: Outcome) -> None:
        assert outcome.artifact is not None
        step = outcome.artifact.manifest.history[-1]
        self.steps[place.name] = {
            "directory": place.name,
            "stage": step.stage,
            "key": step.key,
            "id": outcome.artifact.id,
        }
        self.save()

    def forget_from(self, number: int) -> None:
        """Remove the directories of this step and later ones that an earlier run made."""
        self._remove([name for name in self.steps if int(name.partition("-")[0]) >= number])

    def forget_others(self, names: set[str]) -> list[str]:
        """Remove the directories that an earlier form of the recipe made."""
        others = [name for name in self.steps if name not in names]
        self._remove(others)
        return others

    def _remove(self, names: list[str]) -> None:
        for name in names:
            shutil.rmtree(self.out / name, ignore_errors=True)
            del self.steps[name]
        if names:
            self.save()

    def save(self) -> None:
        values = {
            "schema": _SCHEMA,
            "steps": [self.steps[name] for name in sorted(self.steps)],
            "table": self.saved_table,
        }
        fresh = self.out / f".{RUN_FILE}.{uuid.uuid4().hex[:8]}"
        try:
            fresh.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
            os.replace(fresh, self.path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise from_os_error(error, f"writing {self.path}") from error

    def table(self, recipe: Recipe, models: list[Outcome], surroundings: Surroundings) -> Mapping[str, Any]:
        """The closing table, measured once for a given chain of models."""
        if not models:
            return {}
        artifacts = [outcome.artifact for outcome in models if outcome.artifact is not None]
        options = recipe.table.to_dict()
        data = recipe.table.data
        work: dict[str, Any] = {
            "ids": [artifact.id for artifact in artifacts],
            "options": {**options, "data": None},
            "tools": machine.versions(("onnxruntime", "numpy")),
            "cpu": machine.cpu_model(),
        }
        if data is not None:
            work["data"] = input_digest("data", data)
        key = digest(work)
        if self.saved_table.get("key") == key:
            return dict(self.saved_table["rows"])
        size = sum(artifact.size for artifact in artifacts)
        result = worker.call(
            "modelops.stages._overview:overview",
            {"models": [str(artifact.path) for artifact in artifacts], "options": options},
            limits=Limits(
                surroundings.time_limit or 600.0 + 3.0 * size / 2**20 + 2 * recipe.table.budget,
                surroundings.memory_limit,
            ),
            what="measuring the table",
            on_progress=surroundings.on_progress,
            log_to=surroundings.log_to,
        )
        self.saved_table = {"key": key, "rows": result.value}
        self.save()
        return dict(result.value)


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[_Run]:
    """The run's record, locked against a second run on the same folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder", hint="choose another --out")
    if (out / FILE_NAME).exists():
        raise UsageError(f"{out} is an artifact, which a run would alter", hint="choose another --out")
    lock = out / ".run.lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise from_os_error(error, f"can't write {out}") from error
    try:
        busy = UsageError(f"another run is writing {out}", hint="wait for it, or choose another --out")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise busy  # it ended between the two calls, and took its folder away
        try:
            yield _Run(out)
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(out) == [lock.name]:  # nothing was made
                    lock.unlink()
                    out.rmdir()
    finally:
        os.close(descriptor)


def _with_steps(table: Mapping[str, Any], outcomes: list[Outcome]) -> Mapping[str, Any]:
    """The table with what each step cost, which the models themselves do not tell."""
    if not table:
        return {}
    made = [outcome for outcome in outcomes if outcome.artifact and outcome.artifact.manifest.kind == "model"]
    rows = [
        [*row, outcome.seconds, outcome.peak_memory_bytes] for row, outcome in zip(table["rows"], made, strict=True)
    ]
    return {**table, "columns": [*table["columns"], "seconds", "peak memory"], "rows": rows}
