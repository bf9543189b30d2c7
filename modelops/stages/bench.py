"""Bench: how fast a model runs, and whether it is surely slower or faster than another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend, require_usable
from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, described, option
from modelops.core.manifest import FILE_NAME
from modelops.core.registry import require
from modelops.core.report import Check, Report
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import EnvironmentMissing, InputRefused, UsageError
from modelops.measures.verdicts import Rules
from modelops.stages import Stage, _limits
from modelops.stages._baseline import fingerprint, fixed_figures
from modelops.stages._correctness import first_run, output_checks
from modelops.stages._evidence import Evidence
from modelops.stages._peak import remembered
from modelops.stages._profile import profiled
from modelops.stages._race import Contender, Plan, measure, race


class Bench(Stage):
    """Measure how fast a model runs; with --against, judge it by another.

    Alone, a model gets figures: latency with percentiles and intervals, throughput, load time, memory. Against another
    it gets a verdict: FAIL when it is surely slower by more than --ignore, PASS when it is surely not slower by
    --detect, INCONCLUSIVE (exit 3) when the machine was too noisy to tell within --budget. Both run in fresh processes
    by turns, in random order; outputs are checked before, while and after they are timed.
    """

    writes = "evidence"
    machine_dependent = True

    against: Path | None = option(
        default=None,
        help="Judge IN by this: an artifact, an .onnx file, or a source to run with --against-backend torch-cpu.",
    )
    backend: Backend = choice(BACKENDS, default="onnxruntime-cpu", help="Where the model runs.")
    against_backend: Backend | None = choice(
        BACKENDS,
        default=None,
        help="Where the other model runs; without --against, IN itself is judged by IN on this backend.",
    )
    all_backends: bool = option(default=False, help="Time IN on every backend that is here, side by side.")
    batch: int = option(default=1, help="Samples in one inference.", min=1)
    dim: tuple[str, ...] = option(default=(), help="Size of a dynamic dimension, such as sequence=128. Repeatable.")
    data: Path | None = option(
        default=None, help="Samples to time on; by default those of the reference, or random ones."
    )
    dataset: Dataset | None = choice(DATASETS, default=None, help="How the data is read, when its form does not tell.")
    baseline: Path | None = option(
        default=None, help="Evidence of an earlier bench: size, nodes, parameters and memory must not grow."
    )
    budget: float = option(default=60.0, help="Time for the timing.", min=1.0, unit="seconds")
    launches: int = option(default=5, help="Fresh processes to time a model in that is not compared.", min=1, max=100)
    ignore: float = option(default=0.02, help="A slow-down that nobody minds.", min=0.0, max=10.0, unit="fraction")
    detect: float = option(default=0.05, help="A slow-down that must be found.", min=0.0, max=10.0, unit="fraction")
    at_least: float | None = option(
        default=None, help="Demand that IN is so many times as fast, such as 1.5x.", unit="ratio"
    )
    concurrency: tuple[int, ...] = option(
        default=(), help="Measure throughput with so many inferences at once too, such as 1,2,4.", min=1, max=256
    )
    profile: bool = option(default=False, help="Show which operators take the time, by the runtime's own profiler.")
    replay: bool = option(
        default=False, help="IN is evidence that bench wrote: derive its verdict again, and measure nothing."
    )
    seed: int = option(default=0, help="Seed of the order of blocks and of random inputs.", min=0)

    def run(self, source: Artifact, draft: Draft) -> Report:
        if self.replay:
            return self._replayed(source, draft)
        rules = Rules(ignore=self.ignore, detect=self.detect, at_least=self.at_least)
        self._refuse_contradictions()
        baseline = self._baseline()
        with tempfile.TemporaryDirectory(prefix="modelops-bench-") as folder:
            job = self._job(source, Path(folder))
            judged = replace(job.judged, expected=first_run(job.judged, job.feed, Path(folder)))
            checks, notes = output_checks(source, judged)
            plan = replace(Plan(), concurrency=self.concurrency)
            profile = profiled(judged, job.feed, Path(folder)) if self.profile else None
            others = self._others(source, judged, job.feed, Path(folder), checks, notes) if self.all_backends else {}
            if job.against is None:
                contenders = [judged, *others.values()]
                records = measure(
                    contenders, job.feed, budget_seconds=self.budget, launches=self.launches, seed=self.seed, plan=plan
                )
            else:
                contenders = [judged, job.against]
                result = race(
                    judged, job.against, job.feed, budget_seconds=self.budget, rules=rules, seed=self.seed, plan=plan
                )
                records = list(result.records)
        evidence = Evidence(
            judged=judged.name,
            against=job.against.name if job.against else None,
            rules=rules,
            rows=job.rows,
            records=records,
            budget_seconds=self.budget,
            setup=job.setup(contenders, self.seed),
            profile=profile,
            baseline=baseline,
            others={backend: contender.name for backend, contender in others.items()},
            checks=tuple(checks),
            notes=(f"timed on {job.origin}: {job.shapes()}", *notes),
        )
        evidence.write(draft.path)
        report = Evidence.read(draft.path).report()
        code = [*_code(records), *self._data_code(source)]
        details = {**report.details, "measured": dict(job.ids), "code_executed": code}
        if _code(records):
            details["unseen_readers"] = ["the processes that were timed"]
        return replace(report, details=details)

    def takes_evidence(self) -> bool:
        return self.replay

    def _replayed(self, source: Artifact, draft: Draft) -> Report:
        """The report that the evidence's records and rules give; no other option has a say."""
        if self != type(self).parse({"replay": True}):
            raise UsageError("--replay takes everything from the evidence", hint="leave the other flags out")
        evidence = Evidence.read(source.path)
        try:
            report = evidence.report()
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputRefused(f"{source.path} holds records that bench did not write: {error!r}") from error
        evidence.write(draft.path)
        return replace(report, details={**report.details, "measured": dict(source.manifest.measured)})

    def limits(self, model_bytes: int) -> Limits:
        extra = 60.0 + 1.5 * self.budget
        runs_code = self.against_backend is not None and self.against_backend.opens == "module"
        if runs_code or (self.data is not None and ".py:" in self.data.name):
            return _limits.trusted(extra)
        return _limits.default(2 * model_bytes, extra_seconds=extra)

    def _refuse_contradictions(self) -> None:
        compared = self.against is not None or self.against_backend is not None
        if self.at_least is not None and not compared:
            raise UsageError("--at-least compares, and there is nothing to compare with", hint="add --against REF")
        if self.all_backends and compared:
            raise UsageError("--all-backends times IN alone", hint="leave --against and --against-backend out")
        if self.backend.opens == "module":
            raise UsageError(
                f"{self.backend.name} runs source models, and IN is an ONNX model",
                hint=f"judge IN by its source: --against SOURCE --against-backend {self.backend.name}",
            )
        for backend in (self.backend, self.against_backend):
            if backend is not None:
                require_usable(backend)

    def _data_code(self, source: Artifact) -> list[dict[str, str]]:
        """The user's files that ran to give the samples."""
        from modelops.stages._workbench import SampleBench

        return SampleBench(source, source.path, self.data, self.dataset).code_executed() if self.data else []

    def _baseline(self) -> dict[str, Any] | None:
        """The summary of the earlier measurement; InputRefused when that is no evidence of bench."""
        if self.baseline is None:
            return None
        try:
            return Evidence.read(Artifact.open(self.baseline).path).summary()
        except (KeyError, StopIteration, TypeError, ValueError) as error:
            raise InputRefused(f"{self.baseline} holds records that bench did not write: {error!r}") from error

    def _others(
        self,
        source: Artifact,
        judged: Contender,
        feed: Mapping[str, Any],
        scratch: Path,
        checks: list[Check],
        notes: list[str],
    ) -> dict[str, Contender]:
        """IN on every other backend that can run it here, by the backend's name; says why on those that can't.

        Their outputs are checked too: a backend that is fast and wrong fails.
        """
        found = {}
        for name, cls in BACKENDS.loadable():
            if name == self.backend.name or cls.opens != "onnx" or not cls.computes:
                continue
            try:
                require(cls)
                backend = _as_many_threads(cls.parse({}), self.backend)
                require_usable(backend)
            except EnvironmentMissing as error:
                notes.append(f"not timed: {error.message}")
                continue
            contender = Contender(f"{judged.name} on {name}", backend, source.model)
            contender = replace(contender, expected=first_run(contender, feed, scratch))
            own, remarks = output_checks(source, contender)
            checks += [replace(check, name=f"{name}.{check.name}") for check in own]
            notes += remarks
            found[name] = contender
        return found

    def _job(self, source: Artifact, scratch: Path) -> _Job:
        from modelops.graphs.batches import BatchAxis
        from modelops.stages._feed import sizes_of, timing_feed

        sizes = sizes_of(self.dim, source.signature)
        feed, origin = timing_feed(
            source, batch=self.batch, sizes=sizes, data=self.data, dataset=self.dataset, seed=self.seed
        )
        name = source.path.name
        judged = Contender(name, self.backend, source.model)
        against, ids = None, {"model": source.id}
        other = _as_many_threads(self.against_backend or self.backend, self.backend)
        if self.against is not None and other.opens == "module":
            against = Contender(_distinct(str(self.against), name), other, str(self.against))
        elif self.against is not None:
            from modelops.graphs.wrap import open_model

            _refuse_source(self.against)
            artifact = open_model(self.against, scratch)
            ids["against"] = artifact.id
            shown = self.against.stem if self.against.suffix == ".onnx" else self.against.name
            against = Contender(_distinct(shown, name), other, artifact.model)
        elif self.against_backend is not None:
            if other.opens == "module":
                raise UsageError(f"{other.name} runs source models", hint="name the source with --against")
            ids["against"] = source.id
            against = Contender(f"{name} on {other.name}", other, source.model)
        return _Job(
            judged, against, feed, origin, BatchAxis.of(source.signature).rows(feed), ids, fixed_figures(source)
        )


@dataclass(frozen=True)
class _Job:
    """What is to be timed, and on what."""

    judged: Contender
    against: Contender | None
    feed: dict[str, Any]
    origin: str
    rows: int
    ids: Mapping[str, str]
    figures: Mapping[str, int]

    def shapes(self) -> str:
        """The feed's shapes for a person to read."""
        return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self.feed.items())

    def setup(self, contenders: list[Contender], seed: int) -> dict[str, Any]:
        """The measurement's circumstances as JSON types."""
        feed = {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in self.feed.items()}
        return {
            "models": {one.name: {"backend": described(one.backend), "model": str(one.model)} for one in contenders},
            "ids": dict(self.ids),
            "feed": feed,
            "feed_from": self.origin,
            "seed": seed,
            "peak": remembered(),
            "machine": fingerprint(),
            "figures": dict(self.figures),
        }


def _code(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The user's files that ran in the launches, each once."""
    found = {}
    for record in records:
        for side in record.get("sides", {}).values():
            found.update({entry["path"]: entry for entry in side["code_executed"]})
    return list(found.values())


def _refuse_source(path: Path) -> None:
    """UsageError where the path names no ONNX model but a source, which only some backends run."""
    from modelops.sources import REGISTRY as SOURCES

    named = ":" in path.name or (path.exists() and path.suffix != ".onnx" and not (path / FILE_NAME).is_file())
    if named and any(cls.reads(str(path)) for _, cls in SOURCES.loadable()):
        raise UsageError(
            f"{path} is a source, not an ONNX model", hint="add --against-backend torch-cpu, or convert it"
        )


def _as_many_threads(backend: Backend, like: Backend) -> Backend:
    """The backend with the other's number of threads, unless it was given one of its own."""
    wanted = getattr(like, "threads", 0)
    if wanted and getattr(backend, "threads", None) == 0:
        return replace(backend, threads=wanted)  # type: ignore[call-arg]
    return backend


def _distinct(name: str, taken: str) -> str:
    """The name, told apart from the judged model's where both are called the same."""
    if name != taken:
        return name
    return f"{name} (reference)"
