"""Runs engines of the simplify stage in workers of their own, where they may crash, hang or eat memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
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
from modelops.simplifiers import REGISTRY, Simplifier
from modelops.stages import _limits
from modelops.stages._compare import structural_checks
from modelops.stages._workbench import SampleBench

_GIB = 1 << 30
# What the stage itself holds while an engine runs: onnxruntime's library, a parsed graph.
_RESERVED_BYTES = _GIB
# A file may grow by this much without being called larger: inferred shapes that are written down, names.
_SLACK_SHARE, _SLACK_BYTES = 0.01, 1 << 16


def limits_for(model_bytes: int, seconds: float | None, memory: int | None, share: float) -> Limits:
    """What one engine may use: what the user said, else a share of the stage's own limits."""
    whole = _limits.default(model_bytes)
    assert whole.wall_seconds is not None and whole.memory_bytes is not None
    return Limits(
        wall_seconds=seconds if seconds is not None else share * whole.wall_seconds,
        memory_bytes=memory if memory is not None else max(_GIB, whole.memory_bytes - _RESERVED_BYTES),
    )


class EngineBench(SampleBench):
    """The workbench of the simplify stage: it runs engines apart, and judges what they made."""

    def __init__(self, source: Artifact, scratch: Path, limits: Limits, total_seconds: float) -> None:
        super().__init__(source, scratch)
        self._limits = limits
        self._ends = time.monotonic() + total_seconds
        self._count = 0
        self._judged: dict[str, list[Check]] = {}

    def attempt(self, engine: Simplifier, source: Path, target: Path) -> Done:
        """Run an engine in a worker, and write its result anew at ``target``: checked, self-contained."""
        from modelops.graphs import files

        limits = self._left(engine)
        self._count += 1
        place = self.scratch / f"engine-{self._count}" / "model.onnx"
        place.parent.mkdir()
        arguments = {
            "engine": described(engine),
            "source": str(source),
            "target": str(place),
            "artifact": str(self.source.path),
        }
        try:
            outcome = worker.call(
                "modelops.stages._engine:run",
                arguments,
                limits=limits,
                what=f"the engine {engine.name}",
                on_progress=progress,
            )
        except ResourceExhausted as error:
            hint = error.hint.replace("--memory-limit", "--engine-memory").replace("--time-limit", "--engine-time")
            raise ResourceExhausted(error.message, hint=hint) from error
        if place.is_file():
            files.rewrite(place, target)
        return _done(outcome.value)

    def judge(self, candidate: Path) -> list[Check]:
        """The structural gate against the source, and that the file did not grow."""
        # What auto has judged comes back as the stage's result.
        data = candidate.with_name(f"{candidate.name}.data")
        key = cache.sha256_of(candidate) + (cache.sha256_of(data) if data.is_file() else "")
        if key not in self._judged:
            size = size_check(self.source.size, size_of(candidate))
            self._judged[key] = [*structural_checks(self.source, candidate, self), size]
        return self._judged[key]

    def _left(self, engine: Simplifier) -> Limits:
        """The limits of the next engine; ResourceExhausted when it would not fit into them."""
        from modelops.simplifiers.auto import appetite

        left = self._ends - time.monotonic()
        if left < 1.0:
            raise ResourceExhausted(
                f"no time is left for the engine {engine.name}",
                hint="name fewer with --engines, or raise --engine-time",
            )
        need, most = int(appetite(engine) * self.source.size), self._limits.memory_bytes
        if most is not None and need > most:
            raise ResourceExhausted(
                f"the engine {engine.name} would need about {need / _GIB:.1f} GiB, the limit is {most / _GIB:.1f} GiB",
                hint="raise it with --engine-memory, or choose another --engine",
            )
        wall = self._limits.wall_seconds
        return replace(self._limits, wall_seconds=left if wall is None else min(left, wall))


def run(engine: Mapping[str, Any], source: str, target: str, artifact: str) -> dict[str, Any]:
    """The worker's side: build the engine, run it on files, and give back what it did."""
    component = REGISTRY.ready(engine["name"]).parse({k: v for k, v in engine.items() if k != "name"})
    bench = SampleBench(Artifact.open(artifact, verify=False), Path(target).parent)
    done = component.simplify(Path(source), Path(target), bench)  # type: ignore[arg-type]  # plain engines try no others
    return {
        "notes": list(done.notes),
        "metrics": [metric.to_dict() for metric in done.metrics],
        "details": dict(done.details),
    }


def size_check(before: int, after: int) -> Check:
    """That a file did not grow by more than what shapes and names may add."""
    most = int(before * (1 + _SLACK_SHARE)) + _SLACK_BYTES
    text = f"{before:,} → {after:,} bytes"
    if after <= most:
        return Check("size", "pass", text, after, f"<= {most:,} bytes")
    grown = 100 * (after / before - 1)
    text += f": {grown:.0f} % larger, as happens when weights that were shared are written twice"
    return Check("size", "fail", text, after, f"<= {most:,} bytes")


def size_of(model: Path) -> int:
    """Bytes of a graph and its external data."""
    data = model.with_name(f"{model.name}.data")
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _done(values: Mapping[str, Any]) -> Done:
    metrics = tuple(Metric.parse(item) for item in values["metrics"])
    return Done(tuple(values["notes"]), metrics, dict(values["details"]))
