"""Quantize: a model with fewer bits that is accurate enough and not slower, or a plain "don't"."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend, require_usable
from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, option
from modelops.core.report import Check, Metric, Report, Verdict
from modelops.core.workbench import Done
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import GateFailed, Inconclusive, UsageError
from modelops.measures.gates import TransitionName
from modelops.quantizers import REGISTRY, Quantizer
from modelops.stages import Stage, _limits

_MODEL = "model.onnx"
# Methods that keep activations in float make a smaller file; that they may be slower is known, and only reported.
_SIZE_ONLY = frozenset({"float16", "weights"})
_TRANSITIONS: dict[str, TransitionName] = {"float16": "float16", "weights": "weights"}


class Quantize(Stage):
    """Make a model smaller and faster with fewer bits, and prove what that costs.

    Two gates are held before anything is published. Accuracy: with labels, the metric surely drops by at most
    --max-drop; without, outputs and decisions agree with the float model's. Speed: int8 must not be slower than float
    on this machine, where static and dynamic are concerned; --if-slower says what happens when it is.
    """

    machine_dependent = True
    # Here and not with the method alone, since the stage may choose that.
    tools = ("onnx", "onnx-ir", "onnxruntime", "onnxscript")

    method: Quantizer | None = choice(
        REGISTRY, default=None, help="How to quantize; by default static for convolutions with --data, else dynamic."
    )
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
    max_drop: float = option(default=0.01, help="How much of the metric may be lost.", min=0.0, unit="fraction")
    if_slower: Literal["fail", "keep-source", "publish"] = option(
        default="fail",
        help="When int8 is slower here: fail, publish the float model unchanged, or publish int8 all the same.",
    )
    backend: Backend = choice(BACKENDS, default="onnxruntime-cpu", help="Where both models are timed.")
    speed_budget: float = option(default=20.0, help="Time for the timing.", min=1.0, unit="seconds")
    seed: int = option(default=0, help="Seed of the bootstrap and of the order of timings.", min=0)

    def limits(self, model_bytes: int) -> Limits:
        extra = 60.0 + 1.5 * self.speed_budget
        if any(path is not None and ".py:" in path.name for path in (self.data, self.eval)):
            return _limits.trusted(extra)
        if self.data is not None or self.eval is not None:
            extra += 600.0
        return _limits.default(model_bytes, extra_seconds=extra)

    def run(self, source: Artifact, draft: Draft) -> Report:
        from modelops.measures.metrics import task_metric

        if self.metric is not None:
            task_metric(self.metric)
        if self.backend.opens != "onnx":
            raise UsageError(
                f"{self.backend.name} does not run ONNX files", hint="for example --backend onnxruntime-cpu"
            )
        require_usable(self.backend)
        target = draft.file(_MODEL)
        with tempfile.TemporaryDirectory(prefix="modelops-quantize-") as folder:
            job = _Job(self, source, target, Path(folder))
            try:
                job.quantize()
            except GateFailed as error:
                return _impossible(job.method, error)
            job.judge()
            job.race()
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

    def __post_init__(self) -> None:
        from modelops.stages._losses import Rows, split

        stage = self.stage
        self.method = stage.method or self._chosen()
        self.rows = Rows("inputs of the model's own, not real data", False)
        self.more: Rows | None = None
        calibration = stage.samples
        if stage.data is not None:
            whole = self._bench(stage.data, None)
            calibration, self.rows = split(whole, stage.samples)
        self.calibration = self._bench(stage.data, calibration)
        if stage.eval is not None:
            # Only what calibration has not seen can prove anything.
            self.more = self.rows if self.rows.real and self.rows.skip else None
            bench = self._bench(stage.eval, None)
            made_up = bench.dataset is not None and bench.dataset.made_up
            self.rows = Rows("--eval", not made_up, bench)

    def _bench(self, data: Path | None, samples: int | None) -> Any:
        from modelops.stages._workbench import SampleBench

        dataset = self.stage.dataset if data is not None else None
        return SampleBench(self.source, self.scratch, data, dataset, samples, self.stage.batch)

    def _chosen(self) -> Quantizer:
        """The method that fits the graph: static for convolutions where there is data, else dynamic."""
        from modelops.graphs.describe import summary

        convolutions = int(summary(self.source.model)["operators"].get("Conv", 0))
        if convolutions and self.stage.data is None:
            raise UsageError(
                "this model has convolutions, which only --method static makes faster, and that needs --data",
                hint="give samples with --data, or choose --method dynamic or weights",
            )
        name = "static" if convolutions else "dynamic"
        self.notes.append(f"--method {name} was chosen to fit the graph")
        return REGISTRY.ready(name).parse({})

    def quantize(self) -> None:
        """Write the new model; GateFailed when the method finds nothing to do."""
        done: Done = self.method.quantize(self.source.model, self.target, self.calibration)
        self.notes += [*done.notes, *self.calibration.notes]
        self.metrics += done.metrics
        self.details |= dict(done.details)
        self.details["bytes"] = [self.source.size, _size_of(self.target)]

    @property
    def transition(self) -> TransitionName:
        return _TRANSITIONS.get(self.method.name, "int8")

    def judge(self) -> None:
        """Read the file back, and hold it against the source."""
        from modelops.graphs.describe import signature
        from modelops.stages._losses import losses

        before, after = self.source.signature, signature(self.target)
        if [(s.name, s.dtype, len(s.shape)) for s in (*before.inputs, *before.outputs)] != [
            (s.name, s.dtype, len(s.shape)) for s in (*after.inputs, *after.outputs)
        ]:
            text = f"the signature changed from {before.inputs} → {before.outputs} to {after.inputs} → {after.outputs}"
            self.checks.append(Check("signature", "fail", text))
            return
        self.checks.append(Check("signature", "pass", "names, dtypes and ranks of inputs and outputs are kept"))
        stage = self.stage
        found = losses(
            self.source,
            self.target,
            self.rows,
            self.transition,
            metric=stage.metric,
            max_drop=stage.max_drop,
            more=self.more,
            seed=stage.seed,
        )
        self.checks += found.checks
        self.metrics += found.metrics
        self.notes += found.notes

    @property
    def failed(self) -> bool:
        return any(check.verdict == "fail" for check in self.checks)

    def race(self) -> None:
        """Time both models by turns, unless accuracy has decided already, and do what --if-slower asks."""
        if self.failed:
            self.notes.append("speed was not measured: the model is not accurate enough")
            return
        try:
            found = timed(self.stage, self.source, self.target)
        except Inconclusive as error:
            self.notes.append(f"warning: speed could not be judged: {error.message}")
            return
        self.metrics += found.metrics
        self._decide(found)

    def _decide(self, found: Pace) -> None:
        stage, name, verdict, text = self.stage, self.method.name, found.verdict, found.text
        demand = "not slower than float"
        if name in _SIZE_ONLY:
            self.notes.append(f"{text}; --method {name} is for size, and speed is only reported")
        elif verdict == "pass":
            self.checks.append(Check("speed", "pass", text, threshold=demand))
        elif verdict == "inconclusive" and stage.if_slower == "keep-source" and found.looks_slower:
            self._keep_source(f"{text}: not surely slower, but nothing speaks for it")
        elif verdict == "inconclusive":
            self.notes.append(
                f"warning: {text}, which is too close or too noisy to tell within {stage.speed_budget:g} s"
            )
            self.checks.append(Check("speed", "not-evaluated", f"{text}: inconclusive", threshold=demand))
        elif stage.if_slower == "fail":
            self.checks.append(Check("speed", "fail", f"{text}: int8 does not pay here", threshold=demand))
        elif stage.if_slower == "publish":
            self.notes.append(f"warning: {text}; published all the same, as --if-slower publish asks")
        else:
            self._keep_source(text)

    def _keep_source(self, text: str) -> None:
        """Publish the float model: what was measured of the other one stays in the report, but does not judge it."""
        from modelops.graphs import files

        for place in (self.target, self.target.with_name(f"{_MODEL}.data")):
            place.unlink(missing_ok=True)
        files.rewrite(self.source.model, self.target)
        self.decision = "kept-source"
        self.notes.append(f"the float model was kept unchanged: int8 {text}")
        self.details["candidate_checks"] = [check.to_dict() for check in self.checks]
        self.checks = [Check("kept-source", "pass", f"int8 {text}; the float model is published as it was")]

    def report(self) -> Report:
        before, after = self.details.pop("bytes")
        sizes = (
            Metric("model_bytes_before", before, "bytes"),
            Metric("model_bytes", _size_of(self.target), "bytes"),
            Metric("quantized_bytes", after, "bytes"),
            Metric("size_ratio", before / after, "x"),
        )
        codes = self.calibration.code_executed()
        if self.stage.eval is not None and self.rows.bench is not None:
            codes += [code for code in self.rows.bench.code_executed() if code not in codes]
        return Report(
            metrics=(*sizes, *self.metrics),
            checks=tuple(self.checks),
            notes=tuple(self.notes),
            details={
                "decision": "refused" if self.failed else self.decision,
                "method": self.method.name,
                **self.details,
                "code_executed": codes,
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


def timed(stage: Quantize, source: Artifact, target: Path) -> Pace:
    """The two models timed by turns, on one sample of the data."""
    from modelops.stages import _speed
    from modelops.stages._feed import timing_feed
    from modelops.stages._race import Contender, race

    data = stage.data or stage.eval
    feed, _ = timing_feed(source, batch=1, sizes={}, data=data, dataset=stage.dataset, seed=stage.seed)
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


def _impossible(method: Quantizer, error: GateFailed) -> Report:
    return Report(
        checks=(Check("quantizable", "fail", error.message),),
        details={"decision": "refused", "method": method.name, "hint": error.hint},
    )


def _size_of(model: Path) -> int:
    data = model.with_name(f"{model.name}.data")
    return model.stat().st_size + (data.stat().st_size if data.is_file() else 0)
