"""Validate: whether a model's outputs are still right, and by how much they moved."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend
from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, described, option
from modelops.core.registry import require
from modelops.core.report import Report
from modelops.core.tensors import Signature
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import EnvironmentMissing, InputRefused, UsageError
from modelops.graphs.batches import BatchAxis
from modelops.graphs.reference import FILE_NAME as REFERENCE
from modelops.graphs.reference import read
from modelops.graphs.wrap import open_model
from modelops.measures.gates import Gate, TransitionName
from modelops.stages import Stage, _limits, _scales
from modelops.stages._blame import REPRO, blame
from modelops.stages._compare import reference_differences, running
from modelops.stages._inputs import corners, fitting, made_up
from modelops.stages._invariance import edges, invariance
from modelops.stages._judgement import CORNER, EDGE, judge_measurements, report_on
from modelops.stages._measuring import Findings, Given, Side, Task, cast, compare_models, from_data
from modelops.stages._portable import remarks
from modelops.stages._transitions import allowed_drop, between
from modelops.stages._user_metric import is_function, metric_code, user_metric
from modelops.stages._workbench import SampleBench

MEASUREMENTS = "measurements.json"
SCHEMA = "modelops.validation/1"
_OUTPUT_BYTES = 256 << 20  # of one run
_LONG = 512  # what a dynamic dimension of an output may come to


class Validate(Stage):
    """Judge whether a model's outputs are right: against its original's, or against another model's."""

    writes = "evidence"
    # 8-bit kernels saturate on some CPUs and not on others.
    machine_dependent = True

    against: Path | None = option(
        default=None, help="Model to compare with, an artifact or .onnx file; by default the outputs of the original."
    )
    data: Path | None = option(default=None, help="Samples to compare on, with labels where there are some.")
    dataset: Dataset | None = choice(DATASETS, default=None, help="Form of the data; told from the path by default.")
    samples: int | None = option(
        default=None, help="Samples to read of the data, or to make up; by default all, or 32.", min=1
    )
    batch: int = option(
        default=32, help="Samples to run at once, at most: fewer where outputs are large, or the batch is fixed.", min=1
    )
    metric: str | None = option(
        default=None,
        help="Task metric on labelled data: top1, f1, mae, r2, spearman, or a function of yours (outputs, labels) as "
        "file.py:function; by default top1 for classes and r2 for figures.",
    )
    max_drop: float | None = option(
        default=None,
        help="Largest drop of the task metric that is allowed (0.01 is a point; mae counts in its own unit); by "
        "default what the step before was allowed, or a point.",
        min=0,
        unit="fraction",
    )
    gate: tuple[str, ...] = option(default=(), help='Gate of your own, such as "top1>=0.98" or "logits.sqnr>=40".')
    transition: Literal["auto", "structural", "export", "float16", "bfloat16", "int8", "weights", "prune"] = option(
        default="auto",
        help="What lies between the two models, which chooses the gates; told from their histories by default.",
    )
    locate: bool = option(
        default=False,
        help="Name the first wrong node also where every gate holds; after a failed gate it is named anyway, with "
        "--against.",
    )
    invariance: bool = option(
        default=True,
        help="Also run the model in other ways (one sample at a time, more threads, no optimisation), and report what "
        "they change.",
    )
    replay: bool = option(
        default=False,
        help="IN is evidence that validate wrote: judge its measurements anew, by other gates where given, and run "
        "nothing.",
    )
    seed: int = option(default=0, help="Seed of made-up inputs and of the bootstrap.", min=0)
    backend: Backend = choice(BACKENDS, default="onnxruntime-cpu", help="Where the models run.")

    def limits(self, model_bytes: int) -> Limits:
        if (self.data is not None and ".py:" in self.data.name) or is_function(self.metric):
            return _limits.trusted()
        data_mib = _size(self.data) / (1 << 20) if self.data is not None else 0.0
        models = model_bytes + (_size(self.against) if self.against is not None else 0)
        return _limits.default(models, extra_seconds=10.0 * data_mib)

    def takes_evidence(self) -> bool:
        return self.replay

    def inputs(self, source: str) -> Mapping[str, Path]:
        found = dict(super().inputs(source))
        if self.metric is not None and is_function(self.metric):
            found["metric"] = Path(self.metric)
        return found

    def run(self, source: Artifact, draft: Draft) -> Report:
        for text in self.gate:
            Gate.parse(text)
        if self.replay:
            return self._replayed(source, draft)
        if self.locate and self.against is None:
            raise UsageError("--locate compares nodes with those of another model", hint="name it with --against REF")
        if self.max_drop is not None and self.data is None:
            raise UsageError("--max-drop needs labelled samples", hint="give them with --data")
        self._check_backend()
        with user_metric(self.metric) as rule, tempfile.TemporaryDirectory(prefix="modelops-") as folder:
            scratch, task = Path(folder), Task(rule)
            if self.against is None:
                with ExitStack() as stack:
                    measurements, bench = self._against_original(source, scratch, task, stack)
                first = next((Given(case.feed, 0, case.name) for case in read(source.file(REFERENCE))), None)
            else:
                reference = open_model(self.against, scratch)
                with ExitStack() as stack:
                    measurements, bench, findings, others = self._against_model(source, reference, scratch, task, stack)
                measurements["located"] = self._located(
                    source, reference, measurements, findings, others, scratch, draft
                )
                first = findings.first
            if self.invariance and first is not None and self.backend.name == "onnxruntime-cpu":
                measurements["invariance"] = invariance(source, cast(source.signature, first))
            measurements["notes"] = [*bench.notes, *remarks(source)]
            return self._report(bench, measurements, draft)

    def _located(
        self,
        source: Artifact,
        reference: Artifact,
        measurements: dict[str, Any],
        findings: Findings,
        others: list[tuple[str, Findings]],
        scratch: Path,
        draft: Draft,
    ) -> dict[str, Any] | None:
        """The nodes to blame, where a gate failed or --locate asks for them."""
        checks = judge_measurements(json.loads(json.dumps(measurements)))
        failed = [check for check in checks if check.verdict == "fail"]
        if not self.locate and not failed:
            return None
        prefixes = tuple(prefix for prefix, _ in others)
        for prefix, one in others if all(check.name.startswith(prefixes) for check in failed) else ():
            mine = [check for check in failed if check.name.startswith(prefix)]
            if mine:  # nothing is wrong on the inputs themselves
                findings, checks = one, [replace(check, name=check.name.removeprefix(prefix)) for check in mine]
                break
        return blame(source, reference, findings, checks, measurements["judged_by"]["transition"], scratch, draft)

    def _replayed(self, source: Artifact, draft: Draft) -> Report:
        """The report that saved measurements give under these gates, or under those that they were judged by."""
        asked = Validate(replay=True, gate=self.gate, transition=self.transition, max_drop=self.max_drop)
        if self != asked:
            raise UsageError(
                "--replay takes everything but --gate, --transition and --max-drop from the evidence",
                hint="leave the other flags out",
            )
        saved = read_measurements(source)
        other: dict[str, Any] = {}
        if self.gate:
            other["gates"] = list(self.gate)
        if self.transition != "auto":
            other |= {"transition": self.transition, "told_by": "--transition"}
        if self.max_drop is not None:
            other |= {"max_drop": self.max_drop, "max_drop_from": "--max-drop"}
        for file in source.manifest.files:
            if file.path.startswith(f"{REPRO}/"):
                draft.copy(source.path / file.path, file.path)
        try:
            return write_and_judge({**saved, "judged_by": {**saved["judged_by"], **other}}, draft)
        # The file may hold anything, and every field of it is used: what is wrong shows where it is used.
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputRefused(
                f"{source.path}: {MEASUREMENTS} is not what validate writes: {error!r:.200}",
                hint="give what validate wrote: modelops validate IN EVIDENCE",
            ) from error

    def _check_backend(self) -> None:
        require(type(self.backend))
        if self.backend.opens != "onnx":
            raise UsageError(
                f"--backend {self.backend.name} does not run ONNX files", hint="for example --backend onnxruntime-cpu"
            )
        if reason := self.backend.missing():
            fact, _, hint = reason.partition("; ")
            raise EnvironmentMissing(f"{self.backend.name} can't be used here: {fact}", hint=hint)

    def _bench(self, source: Artifact, scratch: Path, batch: int) -> SampleBench:
        return SampleBench(source, scratch, self.data, self.dataset, self.samples, batch)

    def _against_original(
        self, source: Artifact, scratch: Path, task: Task, stack: ExitStack
    ) -> tuple[dict[str, Any], SampleBench]:
        """Measurements against the outputs that the source framework gave."""
        if not source.has(REFERENCE):
            raise UsageError(
                f"the model carries no {REFERENCE}, the outputs of its original, to be held against",
                hint="name the model to compare with: --against REF",
            )
        if self.samples is not None and self.data is None:
            raise UsageError("--samples needs --data or --against", hint="the original's inputs are used as they are")
        bench = self._bench(source, scratch, _affordable(source.signature, self.batch))
        session = stack.enter_context(running(source.model, self.backend))
        measured = reference_differences(read(source.file(REFERENCE)), session, source.signature)
        found = self._task_alone(Side(session, source.signature), bench, task)
        measurements = {
            **self._head(source, None),
            "inputs": _inputs("the inputs of the reference", measured.rows, measured.digest, source, source),
            "failures": list(measured.failures),
            "outputs": _plain(measured.differences),
            "float64": None
            if measured.float64 is None
            else {"source": _plain(measured.float64.source), "actual": _plain(measured.float64.actual)},
            "task": found,
        }
        return measurements, bench

    def _task_alone(self, side: Side, bench: SampleBench, task: Task) -> dict[str, Any] | None:
        """The task metric of the model alone, where labelled data was given; UsageError for data without a use."""
        if not bench.has_data:
            return None
        for given in from_data(bench):
            task.add(side.run(given), None, given)
        found = task.results(self.seed)
        if found is None:
            raise UsageError(
                f"{self.data} has no labels, and the original can't be run on it",
                hint="name a model to compare with on this data: --against REF",
            )
        return found

    def _against_model(
        self, source: Artifact, reference: Artifact, scratch: Path, task: Task, stack: ExitStack
    ) -> tuple[dict[str, Any], SampleBench, Findings, list[tuple[str, Findings]]]:
        """Measurements against another model, on data, on the inputs of the reference, or on made-up ones.

        Then what was found on these inputs, and on others, of other scales and shapes, by how their checks are called.
        """
        _refuse_other_inputs(source, reference)
        before = Side(stack.enter_context(running(reference.model, self.backend)), reference.signature)
        after = Side(stack.enter_context(running(source.model, self.backend)), source.signature)
        # Samples are fitted to the model that takes more inputs, and batches to the one whose batch is fixed.
        fitted = source if len(source.signature.inputs) >= len(reference.signature.inputs) else reference
        batch = BatchAxis.of(reference.signature).size or _affordable(reference.signature, self.batch)
        bench = self._bench(fitted, scratch, batch)
        if bench.dataset is not None:
            origin, stream, real = f"--data ({bench.dataset.name})", from_data(bench), not bench.dataset.made_up
        else:
            origin, stream = made_up(source, reference, samples=self.samples, seed=self.seed)
            real = False
        found = compare_models(before, after, stream, task)
        inputs = _inputs(origin, found.rows, found.digest, source, reference)
        head = self._head(source, reference)
        scales: list[dict[str, Any]] = []
        others: list[tuple[str, Findings]] = []
        if found.first is not None and not bench.has_data and head["judged_by"]["transition"] == "structural":
            scales, scaled = _scales.measure(before, after, found.first, reference.signature)
            others += [(_scales.prefix(one["factor"]), f) for one, f in zip(scales, scaled, strict=True)]
        cornered: dict[str, Any] = {}
        if bench.has_data and _same_inputs(source, reference):  # without data they are among the inputs
            corner = compare_models(before, after, fitting(corners(reference, self.seed), source.signature))
            others.append((CORNER, corner))
            cornered = {"rows": corner.rows, "failures": corner.failures, "outputs": _plain(corner.differences)}
        edged, broken = edges(before, after, found.first, source.signature) if found.first is not None else ({}, None)
        others.append((EDGE, Findings(first=broken, broken=broken)))
        measurements = {
            **head,
            "inputs": {**inputs, "real": real, "asked": self.samples if bench.has_data else None},
            "failures": found.failures,
            "outputs": _plain(found.differences),
            "float64": None,
            "task": task.results(self.seed),
            "scales": scales,
            "corners": cornered,
            "edges": edged,
        }
        return measurements, bench, found, others

    def _head(self, source: Artifact, reference: Artifact | None) -> dict[str, Any]:
        histories = (source.manifest.history, reference.manifest.history if reference else ())
        told_by = "the histories" if any(histories) else "no history, so the strictest (choose with --transition)"
        told: TransitionName = between(*histories)
        allowed, step = allowed_drop(*histories)
        return {
            "schema": SCHEMA,
            "model": source.id,
            "reference": reference.id if reference is not None else REFERENCE,
            "backend": described(self.backend),
            "judged_by": {
                "transition": told if self.transition == "auto" else self.transition,
                "told_by": told_by if self.transition == "auto" else "--transition",
                "gates": list(self.gate),
                "metric": self.metric,
                "max_drop": allowed if self.max_drop is None else self.max_drop,
                "max_drop_from": step if self.max_drop is None else "--max-drop",
            },
        }

    def _report(self, bench: SampleBench, measurements: dict[str, Any], draft: Draft) -> Report:
        dataset = described(bench.dataset) if bench.dataset is not None else None
        code = [*bench.code_executed(), *metric_code(self.metric)]
        report = write_and_judge(measurements, draft)
        return replace(report, details={**report.details, "code_executed": code, "dataset": dataset})


def write_and_judge(measurements: Mapping[str, Any], draft: Draft) -> Report:
    """Save measurements, and judge them as they will be read."""
    text = json.dumps(measurements, indent=1, sort_keys=True, allow_nan=False) + "\n"
    draft.file(MEASUREMENTS).write_text(text, encoding="utf-8")
    return report_on(json.loads(text))


def read_measurements(evidence: Artifact) -> dict[str, Any]:
    """What ``validate`` saved there; InputRefused where it is something else."""
    hint = "give what validate wrote: modelops validate IN EVIDENCE"
    if evidence.manifest.kind != "evidence" or not evidence.has(MEASUREMENTS):
        raise InputRefused(f"{evidence.path} holds no measurements of validate", hint=hint)
    try:
        found: dict[str, Any] = json.loads(evidence.file(MEASUREMENTS).read_bytes())
        if found["schema"] != SCHEMA:
            raise InputRefused(f"{evidence.path} holds measurements of the schema {found['schema']!r}", hint=hint)
    except (ValueError, KeyError, TypeError) as error:
        raise InputRefused(f"{evidence.path}: {MEASUREMENTS} can't be read: {error}", hint=hint) from error
    return found


def _refuse_other_inputs(source: Artifact, reference: Artifact) -> None:
    """UsageError unless one model takes what the other takes: nothing could be compared otherwise."""
    mine, theirs = ([spec.name for spec in model.signature.inputs] for model in (source, reference))
    if not (set(mine) <= set(theirs) or set(theirs) <= set(mine)):
        raise UsageError(
            f"the models take other inputs: {', '.join(map(repr, mine))} here, {', '.join(map(repr, theirs))} in the "
            "reference",
            hint="name the inputs alike, or compare with the model that this one was made of",
        )


def _same_inputs(source: Artifact, reference: Artifact) -> bool:
    names = [{spec.name for spec in model.signature.inputs} for model in (source, reference)]
    return names[0] == names[1]


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    with suppress(OSError):
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0


def _affordable(signature: Signature, batch: int) -> int:
    """That batch, or less where the outputs of one sample are so large that fewer of them fill the memory set aside."""
    sample = sum(
        4 * math.prod(dim if isinstance(dim, int) else _LONG for dim in spec.shape[1:]) for spec in signature.outputs
    )
    return max(1, min(batch, _OUTPUT_BYTES // max(1, sample)))


def _inputs(origin: str, rows: int, digest: str, source: Artifact, reference: Artifact) -> dict[str, Any]:
    return {
        "origin": origin,
        "rows": rows,
        "digest": digest,
        "real": False,
        "asked": None,
        "names": [spec.name for spec in source.signature.inputs],
        "reference_names": [spec.name for spec in reference.signature.inputs],
    }


def _plain(differences: Mapping[str, Any]) -> dict[str, Any]:
    return {name: difference.to_dict() for name, difference in differences.items()}
