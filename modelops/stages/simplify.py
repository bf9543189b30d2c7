"""simplify: a graph with fewer nodes that does the same, or the source as it was."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, option
from modelops.core.report import Check, Metric, Report
from modelops.core.worker import Limits
from modelops.simplifiers import REGISTRY, Simplifier
from modelops.stages import Stage

# Shares of the stage's own time: engines may hang, and what they made is still to be judged.
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
    engine_time: float | None = option(
        default=None,
        help="Stop an engine that takes longer (default: a share of the stage's limit).",
        min=0.1,
        unit="seconds",
    )
    engine_memory: int | None = option(
        default=None,
        help="Stop an engine that needs more memory (default: by the model's size).",
        min=1 << 26,
        unit="bytes",
    )

    def limits(self, model_bytes: int) -> Limits:
        limits = super().limits(model_bytes)
        if self.engine_time is not None and limits.wall_seconds is not None:
            limits = replace(limits, wall_seconds=limits.wall_seconds + self.engine_time * self._trials)
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

        target = draft.file(_MODEL)
        arranges = self.engine.arranges
        share = _TRIALS_SHARE if arranges else _ENGINE_SHARE
        one = _engine.limits_for(source.size, self.engine_time, self.engine_memory, share)
        whole = self.limits(source.size).wall_seconds or 0.0
        with tempfile.TemporaryDirectory(prefix="modelops-simplify-") as scratch:
            bench = _engine.EngineBench(source, Path(scratch), one, _ENGINE_SHARE * whole)
            if arranges:
                done = self.engine.simplify(source.model, target, bench)
            else:
                done = bench.attempt(self.engine, source.model, target)
            kept = not target.is_file()
            if kept:
                files.rewrite(source.model, target)
            checks = [_nothing_changed()] if kept else bench.judge(target)
        before, after = summary(source.model), summary(target)
        return Report(
            metrics=(*_metrics(before, after, source.size, _engine.size_of(target)), *done.metrics),
            checks=tuple(checks),
            notes=(*done.notes, *_notes(before, after)),
            details={
                "engine": self.engine.name,
                "kept_source": kept,
                "operators": _operators(before["operators"], after["operators"]),
                **done.details,
                "hint": "try --engine auto, which keeps only what holds",
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


def _operators(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, list[int]]:
    """For every operator whose count changed, what it was and what it is."""
    names = sorted({*before, *after})
    return {op: [before.get(op, 0), after.get(op, 0)] for op in names if before.get(op, 0) != after.get(op, 0)}


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if after["nodes"] > before["nodes"]:
        notes.append(f"the graph has more nodes than before: {before['nodes']} → {after['nodes']}")
    foreign = sorted(set(after["custom_domains"]) - set(before["custom_domains"]))
    if foreign:
        notes.append(f"the graph now needs a runtime that knows the operators of {', '.join(foreign)}")
    return tuple(notes)
