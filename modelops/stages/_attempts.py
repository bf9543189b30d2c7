"""One attempt at quantizing a model: made, judged and timed; and what all attempts of a run share."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modelops.core.artifact import Artifact
from modelops.core.component import described
from modelops.core.report import Check, Metric, Verdict
from modelops.core.workbench import Done
from modelops.errors import GateFailed, UsageError
from modelops.graphs.arrays import digest
from modelops.graphs.files import size_of
from modelops.measures.gates import TransitionName
from modelops.quantizers.auto import Candidate
from modelops.stages._losses import Rows, losses, split
from modelops.stages._measuring import Given, Side
from modelops.stages._transitions import looser
from modelops.stages._workbench import SampleBench

if TYPE_CHECKING:
    from modelops.stages.quantize import Quantize

MODEL = "model.onnx"
# Outputs of the source that are kept, so that it runs once for all candidates.
_REMEMBERED_BYTES = 256 << 20
_TRANSITIONS: dict[str, TransitionName] = {"float16": "float16", "weights": "weights", "float": "structural"}


@dataclass
class Attempt:
    """What came of one candidate. ``impossible`` says why it could not be made; ``place`` is its file, while kept.

    ``ratios`` are the speed-ups over float in the launches of a short look, ``untimed`` says why there was none.
    """

    name: str
    method: Mapping[str, Any]
    impossible: str = ""
    hint: str = ""
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    place: Path | None = None

    @property
    def failed(self) -> bool:
        return bool(self.impossible) or any(check.verdict == "fail" for check in self.checks)

    @property
    def verdict(self) -> Verdict:
        """Whether it is accurate enough: the worst of its checks."""
        found = {check.verdict for check in self.checks}
        return "fail" if self.failed else "inconclusive" if "inconclusive" in found else "pass"

    @property
    def sqnr(self) -> float:
        """Signal to noise of the first output in dB, infinite where nothing changed."""
        found = next((metric.value for metric in self.metrics if metric.name == "sqnr"), None)
        return float(found) if isinstance(found, (int, float)) else float("inf") if found == "identical" else 0.0

    @property
    def remembered(self) -> dict[str, Any]:
        """What a cache keeps; without the file, which can be made again."""
        return {
            **{key: value for key, value in vars(self).items() if key not in ("checks", "metrics", "place", "method")},
            "method": dict(self.method),
            "checks": [check.to_dict() for check in self.checks],
            "metrics": [metric.to_dict() for metric in self.metrics],
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        checks = [Check.parse(item) for item in values["checks"]]
        metrics = [Metric.parse(item) for item in values["metrics"]]
        return cls(**{**values, "checks": checks, "metrics": metrics})


class Attempts:
    """What the attempts of one run share: the source, the samples to calibrate with, and the rows that judge."""

    def __init__(self, stage: Quantize, source: Artifact, scratch: Path) -> None:
        self.stage, self.source, self.scratch = stage, source, scratch
        self.rows = Rows("inputs of the model's own, not real data", False)
        self.more: Rows | None = None
        samples = stage.samples
        if stage.data is not None:
            samples, self.rows = split(self._bench(stage.data, None), stage.samples)
        self._samples = samples
        self.calibration = self._bench(stage.data, samples)
        if stage.eval is not None:
            # Only what calibration has not seen can prove anything.
            self.more = self.rows if self.rows.real and self.rows.skip else None
            bench = self._bench(stage.eval, None)
            made_up = bench.dataset is not None and bench.dataset.made_up
            self.rows = Rows("--eval", not made_up, bench)
        self.memory: Memory | None = None

    def refuse_early(self) -> None:
        """Refuse samples that don't fit the model, or have no labels for --metric, before any work is done."""
        if self.rows.bench is None:
            if self.stage.max_drop is not None:
                raise UsageError("--max-drop needs labelled samples", hint="give them with --eval or --data")
            return
        first = next(iter(self.rows.bench.samples()))
        if self.stage.max_drop is not None and first.label is None:
            raise UsageError(
                f"--max-drop needs labels, and {self.stage.eval or self.stage.data} has none",
                hint="give labelled samples, or leave it out: agreement with the float model judges then",
            )
        if self.stage.metric is not None and first.label is None:
            raise UsageError(
                f"--metric {self.stage.metric} needs labels, and {self.stage.eval or self.stage.data} has none",
                hint="give labelled samples, or leave --metric out: agreement with the float model judges then",
            )

    def _bench(self, data: Path | None, samples: int | None, scratch: Path | None = None) -> SampleBench:
        dataset = self.stage.dataset if data is not None else None
        return SampleBench(self.source, scratch or self.scratch, data, dataset, samples, self.stage.batch)

    def code_executed(self) -> list[dict[str, str]]:
        codes = list(self.calibration.code_executed())
        if self.stage.eval is not None and self.rows.bench is not None:
            codes += [code for code in self.rows.bench.code_executed() if code not in codes]
        return codes

    def made(self, candidate: Candidate, place: Path) -> Attempt:
        """The candidate written to ``place``; ``impossible`` is told where it finds nothing to do."""
        from modelops.quantizers._float import write_fused

        method = described(candidate.method) if candidate.method is not None else {"name": "float"}
        attempt = Attempt(candidate.name, method, place=place)
        started = time.monotonic()
        scratch = self.scratch / "making"
        scratch.mkdir()
        self.calibration = self._bench(self.stage.data, self._samples, scratch)
        try:
            done: Done = (
                candidate.method.quantize(self.source.model, place, self.calibration)
                if candidate.method is not None
                else write_fused(self.source.model, place, scratch)
            )
        except GateFailed as error:
            attempt.impossible, attempt.hint, attempt.place = error.message, error.hint, None
            return attempt
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        attempt.seconds = time.monotonic() - started
        attempt.notes += [*done.notes, *self.calibration.notes]
        attempt.metrics += done.metrics
        attempt.details |= dict(done.details)
        attempt.bytes, attempt.sha256 = size_of(place), _sha256(place)
        return attempt

    def judge(self, attempt: Attempt, candidates: int = 1) -> None:
        """Read the file back, and hold it against the source; adds to the attempt's checks, metrics and notes."""
        from modelops.graphs.describe import signature

        assert attempt.place is not None
        before, after = self.source.signature, signature(attempt.place)
        if [(s.name, s.dtype, len(s.shape)) for s in (*before.inputs, *before.outputs)] != [
            (s.name, s.dtype, len(s.shape)) for s in (*after.inputs, *after.outputs)
        ]:
            text = f"the signature changed from {before.inputs} → {before.outputs} to {after.inputs} → {after.outputs}"
            attempt.checks.append(Check("signature", "fail", text))
            return
        attempt.checks.append(Check("signature", "pass", "names, dtypes and ranks of inputs and outputs are kept"))
        stage = self.stage
        found = losses(
            self.source,
            attempt.place,
            self.rows,
            looser(transition_of(attempt.method["name"]), stage.backend.loses()),
            metric=stage.metric,
            max_drop=stage.max_drop,
            more=self.more,
            seed=stage.seed,
            looks=candidates,
            before=self.memory,
            exact=self.exact and bool(self.foreign),
            backend=stage.backend,
        )
        attempt.checks += found.checks
        attempt.metrics += found.metrics
        attempt.notes += found.notes

    @property
    def kernels(self) -> str:
        """The name of the target that was asked for; "auto" where the method knows none."""
        return str(getattr(self.stage.method, "target", "auto"))

    @property
    def foreign(self) -> str:
        """Why timings here say nothing on the target; empty where they do."""
        from modelops.quantizers._targets import resolve

        runtime = {"openvino": "openvino", "gpu-qdq": "onnxruntime-cuda"}.get(self.kernels)
        if runtime is not None and self.stage.backend.name.startswith(runtime):
            return ""
        if self.kernels == "auto" or resolve(self.kernels).here:
            return ""
        return f"it is made for {self.kernels}, which is not what is timed here"

    @property
    def exact(self) -> bool:
        """Whether the model is for kernels that don't overflow, where this machine's may."""
        from modelops.quantizers._targets import resolve

        return self.kernels != "auto" and resolve(self.kernels).exact

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Within, the source runs once on every batch that judges, however many attempts there are."""
        from modelops.backends import REGISTRY
        from modelops.stages._compare import running

        with running(self.source.model, REGISTRY.load("onnxruntime-cpu").parse({})) as session:
            self.memory = Memory(Side(session, self.source.signature))
            try:
                yield
            finally:
                self.memory = None


class Memory:
    """A model whose outputs are kept by the content of their inputs, as far as they fit."""

    def __init__(self, side: Side) -> None:
        self._side, self.signature = side, side.signature
        self._known: dict[str, dict[str, Any]] = {}
        self._left = _REMEMBERED_BYTES

    def run(self, given: Given) -> dict[str, Any]:
        key = f"{digest(given.feed)} {given.rows}"
        if key in self._known:
            return self._known[key]
        outputs = self._side.run(given)
        size = sum(array.nbytes for array in outputs.values())
        if size <= self._left:
            self._known[key] = outputs
            self._left -= size
        return outputs


def transition_of(method: str) -> TransitionName:
    return _TRANSITIONS.get(method, "int8")


def _sha256(model: Path) -> str:
    total = hashlib.sha256()
    for place in (model, model.with_name(f"{model.name}.data")):
        if place.is_file():
            with open(place, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def moved(model: Path, target: Path) -> None:
    """Put a model's files where they are to be published."""
    for suffix in ("", ".data"):
        place = model.with_name(model.name + suffix)
        target.with_name(target.name + suffix).unlink(missing_ok=True)
        if place.is_file():
            shutil.move(place, target.with_name(target.name + suffix))
