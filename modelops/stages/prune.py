"""prune: a model with fewer weights, and the truth about what that cost and what it gained."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, option
from modelops.core.report import Check, Metric, Report
from modelops.core.workbench import Done
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import Inconclusive, StageFailed, UsageError
from modelops.pruners import CUT, REGISTRY, ZEROED, Pruner
from modelops.stages import Stage, _limits

_MODEL = "model.onnx"
# Cutting and zeroing the same channels may differ by rounding alone.
_SURGERY_MOST = 1e-5
# Rounding to multiples may leave a little less removed than asked.
_MISSED_MOST = 0.02
_BATCH = 16


class Prune(Stage):
    """Remove weights, and tell what it cost.

    --method channels removes whole channels: the model gets smaller and faster. --method magnitude sets single weights
    to zero, from which dense runtimes gain nothing. What could not be treated is listed with its reason.
    """

    method: Pruner = choice(REGISTRY, default="channels", help="How weights are removed.")
    data: Path | None = option(default=None, help="Samples to look at, and to compare on; without labels is enough.")
    dataset: Dataset | None = choice(DATASETS, default=None, help="Form of the data; told from the path by default.")
    samples: int = option(default=128, help="Samples that the method itself looks at.", min=1)
    eval: Path | None = option(default=None, help="Labelled samples, kept apart, to measure the task metric on.")
    metric: Literal["top1", "f1", "mae", "r2", "spearman"] | None = option(
        default=None, help="Task metric on labelled samples; by default top1 for classes and r2 for figures."
    )
    max_drop: float = option(
        default=0.01, help="Largest drop of the task metric that is allowed (0.01 is a point).", min=0, unit="fraction"
    )
    best_effort: bool = option(default=False, help="Accept less removal than asked for, where parts can't be cut.")
    speed_budget: float = option(
        default=20.0, help="Time for measuring the gain in speed; 0 leaves it out.", min=0, unit="seconds"
    )

    def limits(self, model_bytes: int) -> Limits:
        if any(path is not None and ".py:" in path.name for path in (self.data, self.eval)):
            return _limits.trusted(self.speed_budget)
        extra = 600.0 if self.data is not None or self.eval is not None else 0.0
        return _limits.default(2 * model_bytes, extra_seconds=extra + 3 * self.speed_budget)

    def run(self, source: Artifact, draft: Draft) -> Report:
        from modelops.graphs.describe import summary

        if self.metric is not None and self.eval is None and self.data is None:
            raise UsageError("--metric needs labelled samples", hint="give them with --eval")
        target = draft.file(_MODEL)
        with tempfile.TemporaryDirectory(prefix="modelops-prune-") as folder:
            given = _Given.of(self, source, Path(folder))
            done = self.method.prune(source.model, target, given.bench)
            checks = [_surgery(source, given.bench, target), _reached(done, best_effort=self.best_effort)]
            losses = self._losses(source, target, given)
            speed, notes = self._speed(source, target, given) if self.speed_budget else ((), ())
        before, after = summary(source.model), summary(target)
        return Report(
            metrics=(*_sizes(source, target, before, after), *done.metrics, *speed, *losses.metrics),
            checks=tuple(check for check in (*checks, *losses.checks) if check is not None),
            notes=(*done.notes, *notes, *losses.notes, *given.notes),
            details={**done.details, "code_executed": given.code_executed(), "hint": _HINT},
        )

    def _losses(self, source: Artifact, target: Path, given: _Given) -> Any:
        """What the outputs lost: the task metric where there are labels, else figures that nothing is gated by."""
        from modelops.stages._losses import losses

        found = losses(source, target, given.rows, "prune", metric=self.metric, max_drop=self.max_drop)
        gated = self.eval is not None or self.metric is not None
        return replace(found, checks=tuple(_advisory(check, gated=gated) for check in found.checks))

    def _speed(self, source: Artifact, target: Path, given: _Given) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
        """How many times as fast the new model is, one sample at a time; and what to make of it."""
        from modelops.backends import REGISTRY as BACKENDS
        from modelops.stages._race import Contender, standings

        backend = BACKENDS.load("onnxruntime-cpu").parse({})
        sides = [Contender("source", backend, source.model), Contender("pruned", backend, target)]
        try:
            found = standings(sides, given.one(), budget_seconds=self.speed_budget, most_launches=5).of("pruned")
        except (StageFailed, Inconclusive) as error:
            return (), (f"the gain in speed could not be measured: {error.message}",)
        metric = Metric("speedup", found.speedup, "x", found.interval, 0.95 if found.interval else None)
        if found.interval is None:
            return (metric,), ("the gain in speed was measured once; --speed-budget gives it an interval",)
        if found.interval[0] <= 1.0:
            return (metric,), ("this model is not surely faster than its source on this machine",)
        return (metric,), ()


_HINT = "prune less, give data for --eval, or accept what is left with --best-effort"


@dataclass(frozen=True)
class _Given:
    """The samples of a run: those that the method looks at, and the rows that judge its result."""

    bench: Any
    rows: Any
    benches: tuple[Any, ...]

    @classmethod
    def of(cls, stage: Prune, source: Artifact, scratch: Path) -> _Given:
        from modelops.stages._losses import Rows, split
        from modelops.stages._workbench import SampleBench

        benches = []
        bench = SampleBench(source, scratch, stage.data, stage.dataset, None, _BATCH)
        rows = Rows("the model's own inputs", False)
        if bench.has_data:
            count, rows = split(bench, stage.samples) if stage.eval is None else (stage.samples, rows)
            benches.append(bench)
            bench = SampleBench(source, scratch, stage.data, stage.dataset, count, _BATCH)
        if stage.eval is not None:
            held = SampleBench(source, scratch, stage.eval, None, None, _BATCH)
            benches.append(held)
            rows = Rows("--eval", not held.dataset.made_up if held.dataset else False, held)
        return cls(bench, rows, tuple(benches))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for bench in self.benches for note in bench.notes))

    def code_executed(self) -> list[dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for bench in self.benches:
            found.update({item["path"]: item for item in bench.code_executed()})
        return list(found.values())

    def one(self) -> dict[str, Any]:
        """One sample, or as few as the model takes."""
        from modelops.graphs.batches import BatchAxis
        from modelops.stages._compare import feeds

        axis = BatchAxis.of(self.bench.signature)
        feed = next(self.bench.batches()) if self.bench.has_data else feeds(self.bench.source)[0]
        rows = axis.size or 1
        return {name: array[:rows] if name in axis.inputs else array for name, array in feed.items()}


def _surgery(source: Artifact, bench: Any, target: Path) -> Check | None:
    """The proof of a cut: the cut graph does what the source does when nothing reads the same channels."""
    from modelops.stages._compare import compare, feeds

    zeroed, cut = bench.scratch / ZEROED, bench.scratch / CUT
    if not zeroed.is_file():
        return None
    found = compare(zeroed, cut if cut.is_file() else target, feeds(source, bench))
    worst = 0.0
    for name, difference in found.items():
        error = 0.0 if difference.identical else difference.max_scaled
        if difference.problem or difference.mask_mismatches or error is None:
            text = difference.problem or "other elements are NaN or infinite"
            return Check("surgery", "fail", f"{name}: {text}, against the source with the same channels zeroed")
        worst = max(worst, error if not difference.exact else 1.0 - (difference.equal or 0.0))
    rows = max((difference.rows for difference in found.values()), default=0)
    text = f"differs by {worst:.1e} of scale from the source with the same channels zeroed"
    verdict: Literal["pass", "fail"] = "pass" if worst <= _SURGERY_MOST else "fail"
    return Check("surgery", verdict, text, worst, f"<= {_SURGERY_MOST:g}", rows)


def _reached(done: Done, *, best_effort: bool) -> Check:
    """Whether as much was removed as was asked for."""
    asked = done.details["asked"]
    wanted, reached = float(asked["removed"]), float(asked["reached"])
    text = f"asked to remove {wanted:.1%} of the {asked['what']}, removed {reached:.1%}"
    threshold = f">= {wanted - _MISSED_MOST:.1%}"
    if reached >= wanted - _MISSED_MOST:
        return Check("removed", "pass", text, reached, threshold)
    skipped = [item for item in done.details.get("skipped", ()) if not item["interface"]]
    if skipped:
        text += f"; {len(skipped)} nodes were left alone, such as {skipped[0]['node']}: {skipped[0]['reason']}"
    return Check("removed", "pass" if best_effort else "fail", text, reached, threshold)


def _advisory(check: Check, *, gated: bool) -> Check:
    """Agreement with the model before is told, not judged: pruning is meant to change what a model does.

    So is the task metric, where labels came with --data and nobody asked for it.
    """
    figures = (".top1", ".kl_mean", ".nearest", ".equal", *(() if gated else (".drop",)))
    if check.name.endswith(figures) and check.verdict != "not-evaluated":
        asked = "" if gated or not check.name.endswith(".drop") else "; --eval or --metric makes it a gate"
        return replace(check, verdict="not-evaluated", message=f"{check.message}; told, not judged{asked}")
    return check


def _sizes(source: Artifact, target: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Metric, ...]:
    data = target.with_name(f"{target.name}.data")
    size = target.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    return (
        Metric("parameters_before", int(before["parameters"])),
        Metric("parameters", int(after["parameters"])),
        Metric("model_bytes_before", source.size, "bytes"),
        Metric("model_bytes", size, "bytes"),
    )
