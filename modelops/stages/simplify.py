"""simplify: a graph with fewer nodes that does the same, or the source as it was."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelops.core import worker
from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, option
from modelops.core.report import Check, Metric, Report
from modelops.core.worker import Limits
from modelops.simplifiers import REGISTRY, Simplifier
from modelops.simplifiers._changes import changes
from modelops.stages import Stage

# Each engine's share of the stage's own time: several may run one after the other, and what they made is to be judged.
_ENGINE_SHARE, _TRIALS_SHARE = 0.7, 0.35
_MODEL = "model.onnx"


class Simplify(Stage):
    """Make the graph simpler, and prove that it still does the same.

    The result is held against the source at several shapes. With --engine auto, several engines run, each in a process
    of its own; the simplest valid result is kept, or the source when none is better.
    """

    engine: Simplifier = choice(
        REGISTRY, default="auto", help="The engine to use; auto tries several and keeps the best."
    )
    expect: tuple[str, ...] = option(
        default=(), help='Fail unless the result has these operators, such as "Attention>=6" or "IsNaN==0".'
    )
    opset: int | None = option(default=None, help="Bring the model to this version of ONNX's operators first.", min=1)
    engine_time: float | None = option(
        default=None,
        help="Stop an engine that takes more CPU time (default: a share of --time-limit).",
        min=0.1,
        unit="seconds",
    )
    engine_memory: int | None = option(
        default=None,
        help="Stop an engine that needs more memory (default: what --memory-limit leaves).",
        min=1 << 26,
        unit="bytes",
    )

    @property
    def machine_dependent(self) -> bool:  # type: ignore[override]  # what is timed depends on the machine
        return getattr(self.engine, "fuse", "none") != "none"

    def limits(self, model_bytes: int) -> Limits:
        limits = super().limits(model_bytes)
        extra = (self.engine_time or 0.0) * self._trials
        if self.machine_dependent:
            extra += 40.0 + 3.0 * float(getattr(self.engine, "speed_budget", 0.0)) + 4.0 * model_bytes / 2**20
        if limits.wall_seconds is not None:
            limits = replace(limits, wall_seconds=limits.wall_seconds + extra)
        if self.engine_memory is not None and limits.memory_bytes is not None:
            limits = replace(limits, memory_bytes=max(limits.memory_bytes, self.engine_memory + (1 << 30)))
        return limits

    @property
    def _trials(self) -> int:
        """How many engines may run one after the other."""
        return len(getattr(self.engine, "engines", ())) or 1

    def run(self, source: Artifact, draft: Draft) -> Report:
        from modelops.graphs import files
        from modelops.graphs.describe import summary
        from modelops.stages import _engine
        from modelops.stages._demands import Demand

        demands = [Demand.parse(text) for text in self.expect]
        target = draft.file(_MODEL)
        share = _TRIALS_SHARE if self.engine.arranges else _ENGINE_SHARE
        limits = worker.granted() or self.limits(source.size)
        allowance = _engine.Allowance.of(limits, self.engine_time, self.engine_memory, share)
        with tempfile.TemporaryDirectory(prefix="modelops-simplify-") as scratch:
            bench = _engine.EngineBench(source, Path(scratch), allowance)
            start, notes = source.model, []
            if self.opset is not None:
                start = bench.scratch / "upgraded" / _MODEL
                notes += bench.upgrade(source.model, start, self.opset)
            if self.engine.arranges:
                done = self.engine.simplify(start, target, bench)
            else:
                done = bench.attempt(self.engine, start, target)
            kept = not target.is_file()
            if kept:
                files.rewrite(start, target)
            checks = [_nothing_changed()] if kept and start == source.model else bench.judge(target)
        before, after = summary(source.model), summary(target)
        checks += [demand.check(after["operators"]) for demand in demands]
        return Report(
            metrics=(*_metrics(before, after, source.size, files.size_of(target)), *done.metrics),
            checks=tuple(checks),
            notes=(*notes, *done.notes, *_notes(before, after), *_unused(target)),
            details={
                "engine": self.engine.name,
                "kept_source": kept,
                "operators": changes(before["operators"], after["operators"]),
                **done.details,
                **({} if self.engine.arranges else {"hint": "try --engine auto, which keeps only what holds"}),
            },
        )


def _nothing_changed() -> Check:
    return Check("unchanged", "pass", "the graph is the source's own")


def _metrics(
    before: Mapping[str, Any], after: Mapping[str, Any], bytes_before: int, bytes_after: int
) -> tuple[Metric, ...]:
    return (
        Metric("nodes_before", int(before["nodes"])),
        Metric("nodes", int(after["nodes"])),
        Metric("model_bytes_before", bytes_before, "bytes"),
        Metric("model_bytes", bytes_after, "bytes"),
    )


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if after["nodes"] > before["nodes"]:
        notes.append(f"the graph has more nodes than before: {before['nodes']} → {after['nodes']}")
    foreign = sorted(set(after["custom_domains"]) - set(before["custom_domains"]))
    if foreign:
        runtime = "onnxruntime" if foreign == ["com.microsoft"] else "a runtime that knows them"
        notes.append(f"the graph now needs {runtime}: it uses the operators of {', '.join(foreign)}")
    return tuple(notes)


def _unused(model: Path) -> tuple[str, ...]:
    """A remark on inputs that nothing reads; they stay, since callers give them."""
    from modelops.graphs.lean import opened
    from modelops.graphs.tensors import scopes

    with opened(model) as lean:
        graph = lean.proto.graph
        read = {name for scope in scopes(lean.proto) for node in scope.body.node for name in node.input}
        read |= {value.name for value in graph.output} | {tensor.name for tensor in graph.initializer}
        unused = [value.name for value in graph.input if value.name not in read]
    return (f"nothing reads the input {', '.join(unused)}",) if unused else ()
