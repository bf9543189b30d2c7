"""Who is timed: the judged model, the one that it is held against, and the same model on other backends and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend, Module, require_usable
from modelops.backends._sessions import OpenSession
from modelops.core.artifact import Artifact
from modelops.core.component import Component, option
from modelops.core.manifest import FILE_NAME
from modelops.core.registry import require
from modelops.core.report import Check
from modelops.errors import EnvironmentMissing, UsageError
from modelops.stages._correctness import first_run, output_checks
from modelops.stages._evidence import Beside
from modelops.stages._launch import write_arrays
from modelops.stages._race import Contender

Feed = Mapping[str, Any]


class AllBackends(Backend):
    """Every backend that is here and runs ONNX files, side by side; onnxruntime-cpu comes first."""

    name = "all"
    tools = ("onnxruntime", "onnxruntime-gpu", "openvino")

    threads: int = option(
        default=0, help="Threads inside one inference; 0 is what the process may use.", min=0, max=1024
    )

    def missing(self) -> str:
        return ""

    def open(self, model: Path | Module) -> OpenSession:
        raise UsageError("all backends can't open one model together", hint="name one of them")

    def first(self) -> Backend:
        """The one that the others stand beside."""
        return BACKENDS.load("onnxruntime-cpu").parse({"threads": self.threads})


def runs_onnx(cls: type[Component]) -> bool:
    """Whether a backend of that class opens ONNX files."""
    return issubclass(cls, Backend) and cls.opens == "onnx"


def as_many_threads(backend: Backend, like: Backend) -> Backend:
    """The backend with the other's number of threads, unless it was given one of its own."""
    wanted = getattr(like, "threads", 0)
    if wanted and getattr(backend, "threads", None) == 0:
        return replace(backend, threads=wanted)  # type: ignore[call-arg]
    return backend


@dataclass
class Entrants:
    """Collects the sides of a measurement, each checked for its outputs before it may be timed.

    ``sides`` starts with the judged one; ``beside`` tells what the others are that stand beside it without a verdict.
    """

    source: Artifact
    feeds: Sequence[tuple[int, Feed]]
    scratch: Path
    sides: list[Contender]
    beside: list[Beside]
    checks: list[Check]
    notes: list[str]

    @classmethod
    def of(cls, source: Artifact, backend: Backend, feeds: Sequence[tuple[int, Feed]], scratch: Path) -> Entrants:
        """The source on that backend, with every feed, as (samples, arrays); the first one's is the judged side."""
        made = cls(source, feeds, scratch, [], [], [], [])
        made._add(source.path.name, backend)
        return made

    @property
    def judged(self) -> Contender:
        return self.sides[0]

    def add_other_backends(self) -> None:
        """The source on every other backend that can run it here; a note says why on those that can't.

        Their outputs are checked too: a backend that is fast and wrong fails.
        """
        first = self.judged.backend
        for name in BACKENDS.names():
            try:
                cls = BACKENDS.load(name)
                if name == first.name or cls.opens != "onnx" or not cls.computes:
                    continue
                require(cls)
                backend = as_many_threads(cls.parse({}), first)
                require_usable(backend)
            except EnvironmentMissing as error:
                self.notes.append(f"not timed: {error.message}")
                continue
            self._add(f"{self.judged.name} on {name}", backend)

    def _add(self, name: str, backend: Backend) -> None:
        first = not self.sides
        for rows, feed in self.feeds:
            called = name if rows == self.feeds[0][0] else f"{name} at batch {rows}"
            own = None  # what all sides share, the one that the judged model is held against among them
            if rows != self.feeds[0][0]:
                own = self.scratch / f"feed-{rows}.npz"
                if not own.exists():
                    write_arrays(own, feed)
            side = Contender(called, backend, self.source.model, feed=own)
            self.sides.append(replace(side, expected=first_run(side, feed, self.scratch)))
            if len(self.sides) > 1:
                self.beside.append(Beside(called, backend.name, rows))
        checks, notes = output_checks(self.source, Contender(name, backend, self.source.model))
        self.checks += checks if first else [replace(check, name=f"{backend.name}.{check.name}") for check in checks]
        self.notes += notes


def opponent(
    source: Artifact, against: Path | None, backend: Backend, scratch: Path
) -> tuple[Contender, dict[str, str]]:
    """The model that the source is held against, and its id; ``backend`` is where it runs.

    Without ``against`` it is the source itself. UsageError where that backend can't run what was given.
    """
    name = source.path.name
    if backend.opens == "module":
        if against is None:
            raise UsageError(f"{backend.name} runs source models", hint="name the source with --against")
        return Contender(_distinct(str(against), name), backend, str(against)), {}
    if against is None:
        return Contender(f"{name} on {backend.name}", backend, source.model), {"against": source.id}
    from modelops.graphs.wrap import open_model

    _refuse_source(against)
    artifact = open_model(against, scratch)
    shown = against.stem if against.suffix == ".onnx" else against.name
    return Contender(_distinct(shown, name), backend, artifact.model), {"against": artifact.id}


def _refuse_source(path: Path) -> None:
    """UsageError where the path names no ONNX model but a source, which only some backends run."""
    from modelops.sources import REGISTRY as SOURCES

    named = ":" in path.name or (path.exists() and path.suffix != ".onnx" and not (path / FILE_NAME).is_file())
    if named and any(SOURCES.load(name).reads(str(path)) for name in SOURCES.names()):
        raise UsageError(
            f"{path} is a source, not an ONNX model", hint="add --against-backend torch-cpu, or convert it"
        )


def _distinct(name: str, taken: str) -> str:
    """The name, told apart from the judged model's where both are called the same."""
    if name != taken:
        return name
    return f"{name} (reference)"
