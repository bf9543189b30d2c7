"""prune: a model with fewer weights, and the truth about what that cost and what it gained."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, option
from modelops.core.report import Check, Metric, Report
from modelops.core.workbench import Done
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import Inconclusive, StageFailed, UsageError
from modelops.measures.gates import POINT
from modelops.pruners import CUT, REGISTRY, ZEROED, Pruner
from modelops.stages import Stage, _limits

if TYPE_CHECKING:
    from modelops.stages._gain import Timing
    from modelops.stages._losses import Losses
    from modelops.stages._measuring import Runner

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

    machine_dependent = True
    method: Pruner = choice(REGISTRY, default="channels", help="How weights are removed.")
    data: Path | None = option(default=None, help="Samples to look at, and to compare on; without labels is enough.")
    dataset: Dataset | None = choice(DATASETS, default=None, help="Form of the data; told from the path by default.")
    samples: int = option(default=128, help="Samples that the method itself looks at.", min=1)
    eval: Path | None = option(default=None, help="Labelled samples, kept apart, to measure the task metric on.")
    metric: Literal["top1", "f1", "mae", "r2", "spearman"] | None = option(
        default=None, help="Task metric on labelled samples; by default top1 for classes and r2 for figures."
    )
    max_drop: float | None = option(
        default=None,
        help="Largest drop of the task metric that is allowed (default 1%, which is a point). Given without a target, "
        "it is the target: as much is removed as it allows.",
        min=0,
        unit="fraction",
    )
    best_effort: bool = option(default=False, help="Accept less removal than asked for, where parts can't be cut.")
    curve: str | None = option(
        default=None, help="Also draw accuracy against latency over a range of cuts, such as 0.1..0.7."
    )
    curve_to: Path | None = option(
        default=None, help="Folder that keeps the curve whatever the verdict; it goes with the model by default."
    )
    speed_budget: float = option(
        default=20.0, help="Time for measuring the gain in speed; 0 leaves it out.", min=0, unit="seconds"
    )

    def limits(self, model_bytes: int) -> Limits:
        if any(path is not None and ".py:" in path.name for path in (self.data, self.eval)):
            return _limits.trusted(self.speed_budget)
        extra = 600.0 if self.data is not None or self.eval is not None else 0.0
        # A search or a curve prunes several times; a target in time prunes for trials too.
        rounds = 1 + (6 if self.max_drop is not None else 0) + (7 if self.curve is not None else 0)
        found = _limits.default(2 * model_bytes, extra_seconds=extra + 60.0)
        return replace(found, wall_seconds=rounds * (found.wall_seconds or 0.0) + 4 * self.speed_budget)

    def run(self, source: Artifact, draft: Draft) -> Report:
        from modelops.graphs.describe import summary

        if self.metric is not None and self.eval is None and self.data is None:
            raise UsageError("--metric needs labelled samples", hint="give them with --eval")
        if getattr(self.method, "latency", None) is not None and not self.speed_budget:
            raise UsageError(
                "--latency is judged by timing, which --speed-budget 0 leaves out", hint="give it some seconds"
            )
        cuts = self._curve_shares()
        target = draft.file(_MODEL)
        with tempfile.TemporaryDirectory(prefix="modelops-prune-") as folder:
            job = _Job(self, source, target, _Given.of(self, source, Path(folder)))
            made = job.prune()
            if made:
                job.judge()
                if self.speed_budget:
                    job.time()
            if cuts:
                try:
                    job.draw(cuts, draft)
                except (StageFailed, Inconclusive) as error:  # what was judged of the model before stays said
                    job.checks.append(Check("curve", "inconclusive", f"no curve was drawn: {error.message}"))
        return job.report(summary(source.model), summary(target)) if made else job.report({}, {})

    def inputs(self, source: str) -> Mapping[str, Path]:
        return {name: path for name, path in super().inputs(source).items() if name != "curve_to"}

    def outputs(self) -> tuple[Path, ...]:
        from modelops.stages import _curve

        names = (_curve.DATA, *_curve.PICTURES)
        return () if self.curve_to is None else tuple(self.curve_to / name for name in names)

    def _curve_shares(self) -> list[float]:
        from modelops.stages import _curve

        if self.curve is None:
            if self.curve_to is not None:
                raise UsageError("--curve-to is where a curve goes", hint="say which with --curve, such as 0.1..0.7")
            return []
        _curve.require_plots()
        if not self.speed_budget:
            raise UsageError("--curve shows latency, which --speed-budget 0 leaves out", hint="give it some seconds")
        return _curve.shares(self.curve)

    @property
    def allowed(self) -> float:
        """The largest drop of the task metric that passes."""
        return POINT if self.max_drop is None else self.max_drop


@dataclass
class _Job:
    """One run of the stage: what was made, what it loses, and how fast it is."""

    stage: Prune
    source: Artifact
    target: Path
    given: _Given
    checks: list[Check] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    looks: int = 1

    def prune(self) -> bool:
        """Write the new model, at the share that was asked for or that the allowed drop leaves room for."""
        from modelops.stages import _deepest

        stage, method, bench = self.stage, self.stage.method, self.given.bench
        found: _deepest.Search | None = None
        if stage.max_drop is not None and not method.targeted:
            self.looks = _deepest.LOOKS
            folder = self.given.bench.scratch / "cuts"
            found = _deepest.search(method, self.source, bench, self._losses, stage.max_drop, folder)
            self.details["search"] = found.trials
            if found.share is None:
                self.checks.append(found.check(None, stage.max_drop))
                return False
            method = method.aimed(found.share)
        done = method.prune(self.source.model, self.target, bench)
        self.checks += [check for check in (_surgery(self.source, bench, self.target),) if check is not None]
        if found is not None:
            self.checks.append(found.check(done, stage.allowed))
        else:
            asked = (done.details["asked"], *done.details.get("also_asked", ()))
            self.checks += [_reached(each, done, best_effort=stage.best_effort) for each in asked]
        self.notes += done.notes
        self.metrics += done.metrics
        self.details |= dict(done.details)
        return True

    def _losses(self, candidate: Path, before: Runner | None = None) -> Losses:
        from modelops.stages._losses import losses

        return losses(
            self.source,
            candidate,
            self.given.rows,
            "prune",
            metric=self.stage.metric,
            max_drop=self.stage.max_drop,
            looks=self.looks,
            before=before,
        )

    def judge(self) -> None:
        """What the outputs lost, and what they would have lost had nothing been refitted."""
        from modelops.backends import REGISTRY as BACKENDS
        from modelops.stages._attempts import Memory
        from modelops.stages._compare import running
        from modelops.stages._measuring import Side

        cut = self.given.bench.scratch / CUT
        with running(self.source.model, BACKENDS.load("onnxruntime-cpu").parse({})) as session:
            before = Memory(Side(session, self.source.signature))
            found = self._losses(self.target, before)
            unrefitted = self._losses(cut, before).metrics if cut.is_file() else ()
        if self.stage.max_drop is not None and found.drop is None:
            raise UsageError("--max-drop needs samples with labels", hint="give labelled ones with --eval")
        gated = any(given is not None for given in (self.stage.eval, self.stage.metric, self.stage.max_drop))
        self.checks += [_advisory(check, gated=gated) for check in found.checks]
        self.metrics += found.metrics
        self.notes += found.notes
        self.metrics += _unrefitted(unrefitted)

    def time(self) -> None:
        """How many times as fast the new model is, one sample at a time; and what to make of it."""
        from modelops.stages import _gain
        from modelops.stages._profile import RUNS

        asked = self.details.get("asked", {})
        found = self._timing({"pruned": self.target})
        if asked.get("timed"):
            self.checks = [each for each in self.checks if each.name != "removed"]
            self.checks.append(
                _gain.not_timed(float(asked["removed"]), best_effort=self.stage.best_effort)
                if found is None
                else found.removed("pruned", float(asked["removed"]), best_effort=self.stage.best_effort)
            )
        if found is None:
            return
        self.metrics.append(found.metric("pruned"))
        self.notes += found.remarks("pruned")
        groups = self.details.get("groups", ())
        if groups and 2 * RUNS * found.of("source").latency_ms < 1000 * self.stage.speed_budget:
            models = (self.source.model, self.target)
            try:
                _gain.by_group(groups, models, self.given.one(), self.given.bench.scratch)
            except (StageFailed, Inconclusive) as error:
                self.notes.append(f"the time of single nodes could not be measured: {error.message}")

    def _timing(self, models: Mapping[str, Path]) -> Timing | None:
        """All models beside the source; None, and a note, where they can't be timed."""
        from modelops.stages import _gain

        try:
            return _gain.timing(self.source.model, models, self.given.one(), self.stage.speed_budget)
        except (StageFailed, Inconclusive) as error:
            self.notes.append(f"the gain in speed could not be measured: {error.message}")
            return None

    def draw(self, cuts: list[float], draft: Draft) -> None:
        """Prune at every cut, and write what came out as data and as a picture."""
        from modelops.stages import _curve

        folder = self.given.bench.scratch / "curve"
        points = _curve.cut(self.stage.method, cuts, self.source, self.given.bench, self._losses, folder)
        found = self._timing({point["name"]: folder / point["name"] / _MODEL for point in points})
        if found is None:
            raise Inconclusive("the curve's cuts could not be timed", hint="give it more time with --speed-budget")
        quality = _curve.finished(points, found)
        apart = self.stage.curve_to
        if apart is not None:
            apart.mkdir(parents=True, exist_ok=True)
        _curve.write(draft.file if apart is None else apart.joinpath, quality, points)
        self.details["curve"] = points
        unsure = next((point["name"] for point in points if point["interval"] is None), None)
        self.notes += [f"{_curve.DATA}: {remark}" for remark in (found.remarks(unsure) if unsure else ())]
        best = f"{quality.name} {points[0]['quality']:.4g} to {points[-1]['quality']:.4g}"
        where = f" in {apart}" if apart is not None else ""
        self.notes.append(
            f"{_curve.DATA}, {' and '.join(_curve.PICTURES)}{where} show {best} over cuts of {cuts[0]:.0%} to "
            f"{cuts[-1]:.0%}"
        )
        if apart is None and Report(checks=tuple(self.checks)).exit_code:
            self.notes.append("they go with the model, which was not written; --curve-to FOLDER keeps them")

    def report(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> Report:
        from modelops.stages._lists import tables

        sizes = _sizes(self.source, self.target, before, after) if after else ()
        return Report(
            metrics=(*sizes, *self.metrics),
            checks=tuple(self.checks),
            notes=(*self.notes, *self.given.notes),
            details={
                **self.details,
                "tables": tables(self.details),
                "code_executed": self.given.code_executed(),
                "hint": _HINT,
            },
        )


_HINT = "prune less, give more data to refit to, or allow more: --max-drop for accuracy, --best-effort for less removal"


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
    from modelops.stages._compare import all_cpus, compare, feeds

    zeroed, cut = bench.scratch / ZEROED, bench.scratch / CUT
    if not zeroed.is_file():
        return None
    found = compare(zeroed, cut if cut.is_file() else target, feeds(source, bench), all_cpus())
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


def _reached(asked: Mapping[str, Any], done: Done, *, best_effort: bool) -> Check:
    """Whether as much was removed as was asked for."""
    wanted, reached = float(asked["removed"]), float(asked["reached"])
    name = "removed" if asked is done.details["asked"] else f"removed.{asked['what'].replace(' ', '-')}"
    text = f"asked to remove {wanted:.1%} of the {asked['what']}, removed {reached:.1%}"
    threshold = f">= {wanted - _MISSED_MOST:.1%}"
    if reached >= wanted - _MISSED_MOST:
        return Check(name, "pass", text, reached, threshold)
    skipped = [item for item in done.details.get("skipped", ()) if not item["interface"]]
    if skipped:
        text += f"; {len(skipped)} nodes were left alone, such as {skipped[0]['node']}: {skipped[0]['reason']}"
    return Check(name, "pass" if best_effort else "fail", text, reached, threshold)


def _unrefitted(metrics: tuple[Metric, ...]) -> list[Metric]:
    """The figures of the cut before anything was refitted, under names that say so."""
    return [replace(metric, name=f"{metric.name}_unrefitted") for metric in metrics if "_before" not in metric.name]


def _advisory(check: Check, *, gated: bool) -> Check:
    """Agreement with the model before is told, not judged: pruning is meant to change what a model does.

    The task metric is a gate. On labels that came with --data it can only fail: what was refitted to these very samples
    looks better on them than it is.
    """
    figures = (".top1", ".kl_mean", ".nearest", ".equal")
    weak = not gated and check.name.endswith(".drop") and check.verdict != "fail"
    if (weak or check.name.endswith(figures)) and check.verdict != "not-evaluated":
        asked = "; --eval, --metric or --max-drop makes it a gate" if weak else ""
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
