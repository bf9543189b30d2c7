"""Quantize: a model with fewer bits that is accurate enough and not slower, or a plain "don't"."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend, require_usable
from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, option
from modelops.core.report import Check, Metric, Report, Verdict
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import GateFailed, Inconclusive, ResourceExhausted, StageFailed, UsageError
from modelops.quantizers import REGISTRY, Quantizer
from modelops.stages import Stage, _limits
from modelops.stages._attempts import MODEL, Attempt, Attempts, moved
from modelops.stages._entrants import runs_onnx

# Methods that keep activations in float make a smaller file; that they may be slower is known, and only reported.
_SIZE_ONLY = frozenset({"float16", "weights"})


class Quantize(Stage):
    """Make a model smaller and faster with fewer bits, and prove what that costs.

    By default several ways are tried, and the fastest that is accurate enough is kept; --method names one.

    Two gates are held before anything is published. Accuracy: with labels, the metric surely drops by at most
    --max-drop; without, outputs and decisions agree with the float model's. Speed: int8 must not be slower than float
    on this machine, unless it is made for another --target; --if-slower says what happens when it is.
    """

    machine_dependent = True
    # Here and not with the method alone, since the stage may choose that.
    tools = ("onnx", "onnx-ir", "onnxruntime", "onnxscript")

    method: Quantizer = choice(REGISTRY, default="auto", help="How to quantize; auto measures what is best.")
    data: Path | None = option(
        default=None, help="Samples to calibrate with; what is left of them judges, without --eval."
    )
    dataset: Dataset | None = choice(DATASETS, default=None, help="How the data is read, when its form does not tell.")
    samples: int = option(default=128, help="Calibration samples to read.", min=1)
    batch: int = option(default=8, help="Samples in one run.", min=1)
    eval: Path | None = option(default=None, help="Held-out samples that judge, best with labels.")
    metric: str | None = option(
        default=None, help="Task metric on labels: top1, f1, mae, r2, spearman (default: top1, or r2 for figures)."
    )
    max_drop: float | None = option(
        default=None, help="How much of the metric may be lost (default: 0.01, a point).", min=0.0, unit="fraction"
    )
    if_slower: Literal["fail", "keep-source", "publish"] = option(
        default="fail",
        help="When int8 is slower here: fail, publish the float model unchanged, or publish int8 all the same.",
    )
    backend: Backend = choice(BACKENDS, default="onnxruntime-cpu", help="Where both models are timed.", fits=runs_onnx)
    speed_budget: float = option(default=20.0, help="Time for the timing.", min=1.0, unit="seconds")
    seed: int = option(default=0, help="Seed of the bootstrap and of the order of timings.", min=0)

    def limits(self, model_bytes: int) -> Limits:
        extra = 60.0 + 1.5 * self.speed_budget + 2.0 * float(getattr(self.method, "budget", 0.0))
        if getattr(self.method, "explain", False) or getattr(self.method, "least_sqnr", 0.0):
            extra += 2.0 * float(getattr(self.method, "search_time", getattr(self.method, "budget", 0.0) / 5))
        if any(path is not None and ".py:" in path.name for path in (self.data, self.eval)):
            return _limits.trusted(extra)
        if self.data is not None or self.eval is not None:
            extra += 600.0
        return _limits.default(model_bytes, extra_seconds=extra)

    def run(self, source: Artifact, draft: Draft) -> Report:
        from modelops.measures.metrics import task_metric
        from modelops.quantizers._scope import refuse_quantized

        if self.metric is not None:
            task_metric(self.metric)
        if self.backend.opens != "onnx":
            raise UsageError(
                f"{self.backend.name} does not run ONNX files", hint="for example --backend onnxruntime-cpu"
            )
        require_usable(self.backend)
        refuse_quantized(source.model)
        with tempfile.TemporaryDirectory(prefix="modelops-quantize-") as folder:
            job = _Job(self, source, draft.file(MODEL), Path(folder))
            job.attempts.refuse_early()
            try:
                job.attempt()
            except GateFailed as error:
                return job.impossible(error)
            job.portable()
            job.race()
            job.explain(draft)
            return job.report()


@dataclass
class _Job:
    """One run of the stage: what was made, what it loses, and how fast it is."""

    stage: Quantize
    source: Artifact
    target: Path
    scratch: Path
    checks: list[Check] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    decision: str = "published"
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.attempts = Attempts(self.stage, self.source, self.scratch)
        self.searched = False

    def attempt(self) -> None:
        """Write the new model and judge it, or search for the best; GateFailed where there is nothing to quantize."""
        from modelops.quantizers.auto import Auto, Candidate

        method = self.stage.method
        if isinstance(method, Auto):
            with self._clocked("search"):
                made = self._found(method)
        else:
            folder = self.scratch / "made"
            folder.mkdir()
            with self._clocked("making"):
                made = self.attempts.made(Candidate(method.name, method), folder / MODEL)
            if not made.impossible:
                with self._clocked("accuracy"):
                    self.attempts.judge(made)
        if made.impossible:
            raise GateFailed(made.impossible, hint=made.hint)
        assert made.place is not None
        moved(made.place, self.target)
        self.method = str(made.method["name"])
        self.checks += made.checks
        self.metrics += made.metrics
        self.notes += made.notes
        self.details |= made.details
        self.details["bytes"] = [self.source.size, made.bytes]

    @contextlib.contextmanager
    def _clocked(self, part: str) -> Iterator[None]:
        """Within, the time that passes counts as that of this part."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started

    def _found(self, auto: Any) -> Attempt:
        """The best that a search found; its table goes into the report."""
        from modelops.stages._search import Search

        self.searched = True
        search = Search(auto, self.attempts, self.feed)
        best = search.run()
        self.notes += search.notes()
        self.details["candidates"] = search.table()
        if best is None and search.broken is not None:
            raise search.broken
        if best is None:
            reasons = "; ".join(f"{one.attempt.name}: {one.attempt.impossible}" for one in search.tried)
            raise GateFailed(f"nothing could be quantized: {reasons}", hint="keep the float model")
        self.details["candidate"] = best.attempt.name
        if auto.explain and not best.attempt.impossible:
            self._measure(auto, best.attempt)
        return best.attempt

    def _measure(self, auto: Any, best: Attempt) -> None:
        """Add to the best what each of its nodes costs: it is made once more, and its nodes are measured."""
        again = auto.explained(best.method)
        if again is None:
            self.notes.append(f"{best.name} has no nodes to measure one by one")
            return
        folder = self.scratch / "explained"
        folder.mkdir()
        try:
            made = self.attempts.made(again, folder / MODEL)
        except (StageFailed, ResourceExhausted) as error:  # what was found stays
            self.notes.append(f"the nodes of {best.name} could not be measured: {error.message}")
            return
        if made.impossible:
            self.notes.append(f"the nodes of {best.name} could not be measured: {made.impossible}")
        best.details |= {key: made.details[key] for key in ("sensitivity",) if key in made.details}

    @functools.cached_property
    def feed(self) -> Mapping[str, Any]:
        """What models are timed on: one sample of the data, of middling size."""
        from modelops.stages._feed import middling, timing_feed

        stage = self.stage
        data = stage.data or stage.eval
        if data is not None:
            feed = middling(self.source, data, stage.dataset)
        else:
            feed, _ = timing_feed(self.source, batch=1, sizes={}, seed=stage.seed)
        self.details["timed_on"] = {name: list(array.shape) for name, array in feed.items()}
        return feed

    @property
    def failed(self) -> bool:
        return any(check.verdict == "fail" for check in self.checks)

    def portable(self) -> None:
        """Say whether the model is right on CPUs without VNNI; it must be where that is its target."""
        from modelops.stages import _portable

        self.details["portable"] = _portable.portability(self.target).to_dict()
        if self.attempts.kernels == "portable" and not self.failed:
            self.checks.append(_portable.check(self.source, self.target, self.attempts.rows))
        elif remark := _portable.told(self.details["portable"]):
            self.notes.append(remark)

    def race(self) -> None:
        """Time both models by turns, unless accuracy has decided already, and do what --if-slower asks."""
        from modelops.stages._reasons import remedies

        if self.failed:
            self.notes.append(remedies(self.method, accurate=False, searched=self.searched))
            self.notes.append("speed was not measured: the model is not accurate enough")
            return
        try:
            with self._clocked("speed"):
                found = timed(self.stage, self.source, self.target, self.feed)
        except Inconclusive as error:
            self.notes.append(f"warning: speed could not be judged: {error.message}")
            return
        self.metrics += found.metrics
        self._decide(found)

    def _decide(self, found: Pace) -> None:
        from modelops.stages._reasons import remedies

        stage, verdict, text = self.stage, found.verdict, found.text
        demand = "not slower than float"
        if self.method in _SIZE_ONLY and not self.searched:
            self.notes.append(f"{text}; --method {self.method} is for size, and speed is only reported")
        elif foreign := self.attempts.foreign:
            self.notes.append(f"{text}; {foreign}: speed is only reported")
        elif verdict == "pass":
            self.checks.append(Check("speed", "pass", text, threshold=demand))
        elif verdict == "inconclusive" and stage.if_slower == "keep-source" and found.looks_slower:
            self._keep_source(f"{text}: not surely slower, but nothing speaks for it")
        elif verdict == "inconclusive":
            self.notes.append(
                f"warning: {text}: {stage.speed_budget:g} s of timing did not settle whether it is slower"
            )
            self.checks.append(Check("speed", "not-evaluated", f"{text}: inconclusive", threshold=demand))
        elif stage.if_slower == "fail":
            self._explain()
            self.notes.append(remedies(self.method, accurate=True, searched=self.searched))
            self.checks.append(Check("speed", "fail", f"{text}: int8 does not pay here", threshold=demand))
        elif stage.if_slower == "publish":
            self.notes.append(f"warning: {text}; published all the same, as --if-slower publish asks")
        else:
            self._keep_source(text)

    def _explain(self) -> None:
        """Say why it is slower, from profiles of both models."""
        from modelops.stages._reasons import reasons

        found = reasons(self.source, self.target, self.stage.backend, self.feed, self.scratch)
        self.notes += found
        self.details["reasons"] = found

    def _keep_source(self, text: str) -> None:
        """Publish the float model: what was measured of the other one stays in the details, and judges nothing."""
        from modelops.graphs import files

        self._explain()
        for place in (self.target, self.target.with_name(f"{MODEL}.data")):
            place.unlink(missing_ok=True)
        files.rewrite(self.source.model, self.target)
        self.decision = "kept-source"
        self.notes.append(f"the float model was kept unchanged: int8 {text}")
        self.details["rejected"] = {
            "bytes": self.details["bytes"][1],
            "checks": [check.to_dict() for check in self.checks],
            "metrics": [metric.to_dict() for metric in self.metrics],
            "portable": self.details.pop("portable"),
        }
        self.details["bytes"] = [self.source.size, files.size_of(self.target)]
        self.metrics = []
        self.checks = [Check("kept-source", "pass", f"int8 {text}; the float model is published as it was")]

    def explain(self, draft: Draft) -> None:
        """What every node costs, where that was asked for: a table in the report, a picture beside the model."""
        from modelops.stages import _explained, _pictures

        lines = self.details.get("sensitivity")
        if not lines or not getattr(self.stage.method, "explain", False):
            return
        self.details["tables"] = [_explained.table(lines)]
        if self.failed or self.decided != "published":
            return
        if not _pictures.can_draw():
            self.notes.append("no picture of error against latency: that needs matplotlib, of the extra plots")
            return
        found = next((metric.value for metric in self.metrics if metric.name == "held_out_sqnr"), None)
        for name in _explained.PICTURES:
            _explained.draw(draft.file(name), lines, float(found) if isinstance(found, (int, float)) else None)

    @property
    def decided(self) -> str:
        """What becomes of the model: without a verdict nothing is published either."""
        return {1: "refused", 3: "undecided"}.get(Report(checks=tuple(self.checks)).exit_code, self.decision)

    def impossible(self, error: GateFailed) -> Report:
        """The report where nothing could be made, with all that was tried."""
        return Report(
            checks=(Check("quantizable", "fail", error.message),),
            notes=tuple(self.notes),
            details={
                "decision": "refused",
                "method": self.stage.method.name,
                "hint": error.hint,
                **self.details,
                "code_executed": self.attempts.code_executed(),
            },
        )

    def report(self) -> Report:
        before, after = self.details.pop("bytes")
        sizes = (
            Metric("model_bytes_before", before, "bytes"),
            Metric("model_bytes", after, "bytes"),
            Metric("size_ratio", before / after, "x"),
        )
        clocked = (Metric(f"{part}_seconds", took, "s") for part, took in self.seconds.items())
        return Report(
            metrics=(*sizes, *self.metrics, *clocked),
            checks=tuple(self.checks),
            notes=tuple(self.notes),
            details={
                "decision": self.decided,
                "method": self.method,
                **self.details,
                "code_executed": self.attempts.code_executed(),
            },
        )


@dataclass(frozen=True)
class Pace:
    """How fast the quantized model is beside the float one, and whether it is surely not slower."""

    verdict: Verdict
    text: str
    metrics: tuple[Metric, ...]

    @property
    def looks_slower(self) -> bool:
        """Whether the estimate alone, sure or not, speaks against the quantized model."""
        return any(metric.name == "speedup" and float(metric.value or 0) < 1 for metric in self.metrics)


def timed(stage: Quantize, source: Artifact, target: Path, feed: Mapping[str, Any]) -> Pace:
    """The two models timed by turns, on this input."""
    from modelops.stages import _speed
    from modelops.stages._race import Contender, race

    quantized, original = (
        Contender(name, stage.backend, model) for name, model in (("quantized", target), ("float", source.model))
    )
    result = race(quantized, original, feed, budget_seconds=stage.speed_budget, seed=stage.seed)
    speedup, interval = _speed.speedup(result.records, "float", "quantized")
    text = f"runs at {speedup:.2f}x the speed of float"
    if interval and interval[1] < 4 * interval[0]:
        text += f" ({interval[0]:.2f}…{interval[1]:.2f})"
    latencies = (
        Metric(f"latency_{one.name}", _speed.block_ms(result.records, one.name), "ms") for one in (quantized, original)
    )
    return Pace(
        result.verdict.verdict,
        text,
        (Metric("speedup", speedup, "x", interval, 0.95 if interval else None), *latencies),
    )
