"""Bench: how fast a model runs, and whether it is surely slower or faster than another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelops.backends import REGISTRY as BACKENDS
from modelops.backends import Backend, require_usable
from modelops.backends._counting import counted_macs
from modelops.core.artifact import Artifact, Draft
from modelops.core.component import choice, described, option
from modelops.core.report import Report
from modelops.core.worker import Limits
from modelops.datasets import REGISTRY as DATASETS
from modelops.datasets import Dataset
from modelops.errors import InputRefused, UsageError
from modelops.measures.verdicts import Rules
from modelops.stages import Stage, _limits
from modelops.stages._baseline import fingerprint, fixed_figures, load, save
from modelops.stages._entrants import AllBackends, Entrants, as_many_threads, opponent, runs_onnx
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
    backend: Backend = choice(
        BACKENDS,
        default="onnxruntime-cpu",
        also=(AllBackends,),
        fits=runs_onnx,
        help="Where the model runs; all is every one that is here, side by side.",
    )
    against_backend: Backend | None = choice(
        BACKENDS,
        default=None,
        help="Where the other model runs; without --against, IN itself is judged by IN on this backend.",
    )
    batch: tuple[int, ...] = option(
        default=(1,),
        help="Samples in one inference; several, such as 1,8,32, are measured side by side.",
        min=1,
        max=1 << 20,
    )
    dim: tuple[str, ...] = option(default=(), help="Size of a dynamic dimension, such as sequence=128. Repeatable.")
    data: Path | None = option(
        default=None, help="Samples to time on; by default those of the reference, or random ones."
    )
    dataset: Dataset | None = choice(DATASETS, default=None, help="How the data is read, when its form does not tell.")
    baseline: Path | None = option(
        default=None,
        help="A file of --save-baseline, or evidence: size, nodes, parameters, MACs and memory must not grow.",
    )
    save_baseline: Path | None = option(
        default=None, help="Write these figures to a file for --baseline, unless a check fails."
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
    profile: bool = option(
        default=False,
        help="Show which operators take the time, by the runtime's own profiler, and how far they are from the "
        "machine's peak where doctor --peak has measured it.",
    )
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
            evidence = self._measured(source, rules, baseline, Path(folder))
        evidence.write(draft.path)
        report = Evidence.read(draft.path).report()
        code = [*_code(evidence.records), *self._data_code(source)]
        details = {**report.details, "measured": dict(evidence.setup["ids"]), "code_executed": code}
        if _code(evidence.records):
            details["unseen_readers"] = ["the processes that were timed"]
        return replace(report, details=details, notes=(*report.notes, *self._saved(evidence, report)))

    def _measured(self, source: Artifact, rules: Rules, baseline: Mapping[str, Any] | None, scratch: Path) -> Evidence:
        """Check and time everything that was asked for."""
        feeds, origin = self._feeds(source)
        rows, feed = feeds[0]
        first = self.backend.first() if isinstance(self.backend, AllBackends) else self.backend
        entrants = Entrants.of(source, first, feeds, scratch)
        if isinstance(self.backend, AllBackends):
            entrants.add_other_backends()
        judged, sides, ids = entrants.judged, entrants.sides, {"model": source.id}
        profile = self._profiled(judged, feed, scratch)
        counts = not self._compares() or self.baseline is not None or self.save_baseline is not None
        macs = counted_macs(source.model, feed, scratch) if counts and judged.backend.computes else None
        plan = replace(Plan(), concurrency=self.concurrency)
        against = None
        if self._compares():
            other = as_many_threads(self.against_backend or first, first)
            against, its_id = opponent(source, self.against, other, scratch)
            ids |= its_id
            sides = [judged, against]
            records: Sequence[Any] = race(
                judged, against, feed, budget_seconds=self.budget, rules=rules, seed=self.seed, plan=plan
            ).records
        else:
            records = measure(
                sides, feed, budget_seconds=self.budget, launches=self.launches, seed=self.seed, plan=plan
            )
        figures = fixed_figures(source) | ({"macs": macs} if macs is not None else {})
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feed.items())
        return Evidence(
            judged=judged.name,
            against=against.name if against else None,
            rules=rules,
            rows=rows,
            records=records,
            budget_seconds=self.budget,
            setup=_setup(sides, feed, origin, ids, figures, self.seed),
            profile=profile,
            baseline=baseline,
            beside=tuple(entrants.beside),
            checks=tuple(entrants.checks),
            notes=(f"timed on {origin}: {shapes}", *entrants.notes),
        )

    def _feeds(self, source: Artifact) -> tuple[list[tuple[int, Mapping[str, Any]]], str]:
        """For every batch how many samples it has, and its arrays; and where they came from."""
        from modelops.graphs.batches import BatchAxis
        from modelops.stages._feed import sizes_of, timing_feed

        sizes, axis = sizes_of(self.dim, source.signature), BatchAxis.of(source.signature)
        found: dict[int, Mapping[str, Any]] = {}
        origin = ""
        for batch in self.batch:
            feed, origin = timing_feed(
                source, batch=batch, sizes=sizes, data=self.data, dataset=self.dataset, seed=self.seed
            )
            found.setdefault(axis.rows(feed), feed)
        return list(found.items()), origin

    def _profiled(self, judged: Contender, feed: Mapping[str, Any], scratch: Path) -> list[dict[str, Any]] | None:
        """The time of every node: where it was asked for, and where it can be held against the machine's peak."""
        if not self.profile and (self._compares() or remembered() is None or not judged.backend.profiles):
            return None
        return profiled(judged, feed, scratch)

    def _compares(self) -> bool:
        return self.against is not None or self.against_backend is not None

    def inputs(self, source: str) -> Mapping[str, Path]:
        return {name: path for name, path in super().inputs(source).items() if name != "save_baseline"}

    def outputs(self) -> tuple[Path, ...]:
        return () if self.save_baseline is None else (self.save_baseline,)

    def takes_evidence(self) -> bool:
        return self.replay

    def _replayed(self, source: Artifact, draft: Draft) -> Report:
        """The report that the evidence's records and rules give; no other option has a say."""
        if self != type(self).parse({"replay": True}):
            raise UsageError("--replay takes everything from the evidence", hint="leave the other flags out")
        evidence = Evidence.read(source.path)
        try:
            report = evidence.report()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputRefused(f"{source.path} holds records that bench did not write: {error!r}") from error
        evidence.write(draft.path)
        return replace(report, details={**report.details, "measured": dict(source.manifest.measured)})

    def limits(self, model_bytes: int) -> Limits:
        sides = len(self.batch) * (3 if isinstance(self.backend, AllBackends) else 1)
        extra = 60.0 + 1.5 * self.budget + 20.0 * (sides - 1)
        runs_code = self.against_backend is not None and self.against_backend.opens == "module"
        if runs_code or (self.data is not None and ".py:" in self.data.name):
            return _limits.trusted(extra)
        return _limits.default(2 * model_bytes, extra_seconds=extra)

    def _refuse_contradictions(self) -> None:
        compared = self._compares()
        several = isinstance(self.backend, AllBackends) or len(set(self.batch)) > 1
        if self.at_least is not None and not compared:
            raise UsageError("--at-least compares, and there is nothing to compare with", hint="add --against REF")
        if several and compared:
            raise UsageError(
                "a verdict is given on one backend and one batch",
                hint="leave --against and --against-backend out, or name one backend and one batch",
            )
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

    def _baseline(self) -> Mapping[str, Any] | None:
        """The summary of the earlier measurement; InputRefused when that is neither a baseline nor evidence."""
        if self.baseline is None:
            return None
        if not self.baseline.is_dir():
            return load(self.baseline)
        try:
            return Evidence.read(Artifact.open(self.baseline).path).summary()
        except (LookupError, StopIteration, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputRefused(f"{self.baseline} holds records that bench did not write: {error!r}") from error

    def _saved(self, evidence: Evidence, report: Report) -> list[str]:
        """Write the file of --save-baseline where nothing failed; says what was done."""
        if self.save_baseline is None:
            return []
        if report.exit_code:
            return [f"{self.save_baseline} was not written, since a check did not pass"]
        save(self.save_baseline, evidence.summary())
        return [f"wrote {self.save_baseline} for --baseline"]


def _setup(
    sides: Sequence[Contender],
    feed: Mapping[str, Any],
    origin: str,
    ids: Mapping[str, str],
    figures: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """The measurement's circumstances as JSON types."""
    return {
        "models": {side.name: {"backend": described(side.backend), "model": str(side.model)} for side in sides},
        "ids": dict(ids),
        "feed": {name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in feed.items()},
        "feed_from": origin,
        "seed": seed,
        "peak": remembered(),
        "machine": fingerprint(),
        "figures": dict(figures),
    }


def _code(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The user's files that ran in the launches, each once."""
    found = {}
    for record in records:
        for side in record.get("sides", {}).values():
            found.update({entry["path"]: entry for entry in side["code_executed"]})
    return list(found.values())
