"""Compares two models, or a model and stored outputs, on the same inputs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.artifact import Artifact
from modelops.core.progress import tracked
from modelops.core.report import Check
from modelops.core.tensors import Signature
from modelops.errors import Inconclusive, StageFailed
from modelops.graphs.arrays import digest
from modelops.graphs.batches import BatchAxis, row_axes
from modelops.graphs.reference import FILE_NAME, Case, read
from modelops.graphs.seeded import corner_feeds, index_bounds, masked_feeds, random_feed, random_feeds
from modelops.measures.comparison import Comparison
from modelops.measures.differences import Difference
from modelops.measures.judging import Float64Errors, judge
from modelops.stages import _scales
from modelops.stages._transitions import between

if TYPE_CHECKING:
    from modelops.backends import Backend, Session
    from modelops.stages._workbench import SampleBench

log = logging.getLogger(__name__)

__all__ = ["compare", "feeds", "random_feed", "reference_differences", "structural_checks"]

# Rows at other scales, fewer of a model with more weights than this, where a row takes seconds.
_LARGE, _FEW_SCALED, _SCALED = 128 << 20, 2, 8

Feed = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Inputs, and what the source gives for them; what they were multiplied by is judged by itself."""

    feed: Feed
    wanted: Feed
    factor: float = 1.0


Pairs = list[Pair]


def feeds(source: Artifact, workbench: SampleBench | None = None, rows: int = 32) -> list[Feed]:
    """Inputs for a model: those of its reference.npz, else the user's data, else seeded ones by what names mean."""
    if source.has(FILE_NAME):
        return [dict(case.feed) for case in read(source.file(FILE_NAME))]
    if workbench is not None and workbench.has_data:
        return list(_first(workbench.batches(), source.signature, rows))
    return random_feeds(source.signature, rows, bounds=index_bounds(source.model))


def compare(
    reference: Path, candidate: Path, feeds: Iterable[Mapping[str, Any]], backend: Backend | None = None
) -> dict[str, Difference]:
    """The difference of every output of two ONNX files on these feeds; see ``running`` for the backend."""
    with running(reference, backend) as before, running(candidate, backend) as after:
        comparison = Comparison(batched=has_batch(before.signature), axes=row_axes(before.signature))
        for feed in tracked("comparing", feeds):
            comparison.add(before.run(feed), after.run(feed))
    return comparison.differences()


@contextmanager
def running(model: Path, backend: Backend | None = None) -> Iterator[Session]:
    """A session on the model; without a backend, onnxruntime on one CPU thread, whose results never vary."""
    from modelops.backends import REGISTRY

    backend = backend or REGISTRY.load("onnxruntime-cpu").parse({"threads": 1})
    with backend.open(model) as session:
        yield session


@dataclass(frozen=True)
class Measured:
    """What a model's outputs on the cases of a reference.npz differ by.

    ``float64`` holds, where the reference has float64 outputs, both sides' differences from them; ``failures`` the
    cases that the model could not run; ``digest`` is over all inputs.
    """

    differences: dict[str, Difference]
    float64: Float64Errors | None
    failures: tuple[dict[str, str], ...]
    rows: int
    digest: str


def reference_differences(cases: Sequence[Case], session: Session | _Played, signature: Signature) -> Measured:
    """The differences of a model's outputs from those that a reference.npz holds, over all its cases."""
    axis, total = BatchAxis.of(signature), hashlib.sha256()
    axes = row_axes(signature)
    comparison, source, own = (Comparison(batched=bool(axis.inputs), axes=axes) for _ in range(3))
    failures, rows, exact = [], 0, False
    for case in tracked("comparing with the reference", cases, len(cases)):
        total.update(digest(case.feed).encode())
        rows += axis.rows(case.feed)
        try:
            actual = case.take(session.run(case.feed))
        except StageFailed as error:
            failures.append({"inputs": f"case {case.name!r}", "error": error.message})
            continue
        comparison.add(case.outputs, actual, f"case {case.name!r}")
        if case.outputs64:
            exact = True
            names = [name for name in case.outputs64 if name in actual]
            source.add(case.outputs64, {name: _float64(case.outputs[name]) for name in case.outputs64})
            own.add({name: case.outputs64[name] for name in names}, {name: _float64(actual[name]) for name in names})
    float64 = Float64Errors(source.differences(), own.differences()) if exact else None
    return Measured(comparison.differences(), float64, tuple(failures), rows, total.hexdigest())


def has_batch(signature: Signature) -> bool:
    """Whether the first axis of arrays counts rows."""
    return bool(BatchAxis.of(signature).inputs)


def structural_checks(
    source: Artifact,
    candidate: Path,
    workbench: SampleBench | None = None,
    outputs: Callable[[], Pairs] | None = None,
) -> list[Check]:
    """Whether a rewritten graph does what its source does: signature, outputs at several shapes, and the original.

    The outputs of the source model are the reference on its own inputs (see ``feeds``) and on shape corners that the
    source itself can run. Where the source carries a reference.npz, the candidate must also agree with the original
    as well as the source's history allows. ``outputs`` gives what ``source_outputs`` gave before.
    """
    from modelops.graphs.describe import signature

    form = signature(candidate)
    checks = [_same_signature(source.signature, form)]
    if not checks[0]:
        return checks
    # The first inputs are those of the cases, where the source has a reference: what comes out is compared with both.
    cases = read(source.file(FILE_NAME)) if source.has(FILE_NAME) else []
    pairs = outputs() if outputs is not None else source_outputs(source, workbench)
    kept, misdeclared = [], ""
    try:
        with running(candidate, all_cpus()) as after:
            comparisons: dict[float, Comparison] = {}
            for number, pair in enumerate(pairs):
                found = after.run(pair.feed)
                if pair.factor not in comparisons:
                    batched = has_batch(source.signature)
                    comparisons[pair.factor] = Comparison(batched=batched, axes=row_axes(source.signature))
                comparisons[pair.factor].add(pair.wanted, found)
                misdeclared = misdeclared or _misdeclared(source.signature, form, found)
                kept += [found] if number < len(cases) else []
    except StageFailed as error:
        return [*checks, Check("runs", "fail", f"the new graph does not run: {error.message}")]
    if misdeclared:
        return [Check("signature", "fail", misdeclared)]
    checks += judge(comparisons.pop(1.0, Comparison()).differences(), "structural", agreement_evaluated=False)
    for factor, comparison in comparisons.items():
        judged = judge(comparison.differences(), "structural", agreement_evaluated=False, rows_min=1)
        checks += [_scales.failed(factor, check) for check in judged if check.verdict == "fail"]
    if cases:
        checks += _original_checks(source, cases, _Played(kept))
    return checks


def all_cpus() -> Backend:
    """onnxruntime on every CPU: what another order of sums changes stays far below the gates."""
    from modelops.backends import REGISTRY

    return REGISTRY.load("onnxruntime-cpu").parse({"spinning": False})


class _Played:
    """Gives the outputs of a session that ran before, in their order."""

    def __init__(self, outputs: Sequence[dict[str, Any]]) -> None:
        self._outputs = iter(outputs)

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        return next(self._outputs)


def source_outputs(source: Artifact, workbench: SampleBench | None = None) -> Pairs:
    """(inputs, outputs of the source) for the source's feeds, and for the shape corners that it can run."""
    pairs = []
    with running(source.model, all_cpus()) as session:
        for feed in feeds(source, workbench):
            try:
                pairs.append(Pair(feed, session.run(feed)))
            except StageFailed as error:
                raise Inconclusive(
                    f"nothing can be proven, since the source can't run the inputs that were made up: {error.message}",
                    hint="bring inputs that fit along: modelops convert MODEL.onnx OUT --data SAMPLES",
                ) from error
        bounds = index_bounds(source.model)
        for feed in (*corner_feeds(source.signature, bounds=bounds), *masked_feeds(source.signature, bounds=bounds)):
            try:
                wanted = session.run(feed)
            except StageFailed as error:
                log.debug("the source can't run a shape corner, or masked rows: %s", error)
                continue
            pairs.append(Pair(feed, wanted))
        rows = _FEW_SCALED if source.size > _LARGE else _SCALED
        for factor, feed in _scales.scaled_feeds(pairs[0].feed, source.signature, rows) if pairs else ():
            try:
                pairs.append(Pair(feed, session.run(feed), factor))
            except StageFailed as error:
                log.debug("the source can't run inputs times %g: %s", factor, error)
    return pairs


def _original_checks(source: Artifact, cases: Sequence[Case], played: _Played) -> list[Check]:
    measured = reference_differences(cases, played, source.signature)
    checks = [Check("runs", "fail", f"does not run on {item['inputs']}: {item['error']}") for item in measured.failures]
    transition = between(source.manifest.history, ())
    if transition not in ("structural", "export"):
        # Made-up inputs say little on what was calibrated on others: only that nothing changed is judged there.
        return checks
    checks += judge(measured.differences, transition, agreement_evaluated=False, float64=measured.float64)
    return [
        Check(f"original.{c.name}", c.verdict, f"against the original: {c.message}", c.value, c.threshold, c.n)
        for c in checks
        if c.verdict != "not-evaluated"
    ]


def _same_signature(source: Signature, target: Signature) -> Check:
    problems = []
    for side, old, new in (("inputs", source.inputs, target.inputs), ("outputs", source.outputs, target.outputs)):
        if [(spec.name, spec.dtype) for spec in old] != [(spec.name, spec.dtype) for spec in new]:
            problems.append(f"{side} were {', '.join(map(str, old))}, now {', '.join(map(str, new))}")
            continue
        for before, after in zip(old, new, strict=True):
            ranks = len(before.shape) == len(after.shape)
            if side == "inputs" and (
                not ranks or any(isinstance(a, int) and a != b for a, b in zip(after.shape, before.shape, strict=True))
            ):
                problems.append(f"{before} became {after}")
    if problems:
        return Check("signature", "fail", "; ".join(problems))
    return Check("signature", "pass", "names, dtypes and dynamic dimensions are kept")


def _misdeclared(source: Signature, target: Signature, outputs: Mapping[str, Any]) -> str:
    """How an output that is declared with a fixed size comes out in another one, where the source does not say so."""
    for old, new in zip(source.outputs, target.outputs, strict=True):
        shape = getattr(outputs[new.name], "shape", ())
        if not len(shape) == len(new.shape) == len(old.shape):
            continue
        sizes = zip(old.shape, new.shape, shape, strict=True)
        if any(isinstance(dim, int) and before != dim != size for before, dim, size in sizes):
            return f"the output {old} became {new}, and comes out as {list(shape)}"
    return ""


def _first(batches: Iterable[Feed], signature: Signature, rows: int) -> Iterator[Feed]:
    axis, seen = BatchAxis.of(signature), 0
    for feed in batches:
        yield feed
        seen += axis.rows(feed)
        if seen >= rows:
            return


def _float64(array: Any) -> Any:
    return array.astype("float64") if array.dtype.kind not in "OSU" else array
