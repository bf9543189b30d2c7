"""What a smaller model loses against its source: task metric where there are labels, agreement where there are none.

Rows that can't be had are not pretended to be there: calibration samples are held apart from those that judge, as far
as there are enough of them, and a report says which rows it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.artifact import Artifact
from modelops.core.report import Check, Metric
from modelops.graphs.batches import BatchAxis
from modelops.measures.differences import Difference
from modelops.measures.distributions import proportion_bounds
from modelops.measures.drops import CONFIDENCE, Drop, judge_drop
from modelops.measures.gates import POINT, TransitionName
from modelops.measures.judging import ROWS_MIN, judge, unjudged, warnings
from modelops.stages._measuring import Findings, Given, Runner, Side, Task, compare_models, from_data
from modelops.stages._workbench import SampleBench

if TYPE_CHECKING:
    from modelops.backends import Backend

HELD_OUT_MOST = 2048
# The kernels of x86 without VNNI add products in 16 bits; this takes slower ones that don't.
_EXACT = {"session.x64quantprecision": "1"}


@dataclass(frozen=True)
class Losses:
    """Checks, figures and remarks on what was lost; ``rows`` judged, from ``origin``."""

    checks: tuple[Check, ...]
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...]
    rows: int
    origin: str
    drop: Drop | None = None
    """What the task metric lost; None without labels."""

    @property
    def failed(self) -> bool:
        return any(check.verdict == "fail" for check in self.checks)


@dataclass(frozen=True)
class Rows:
    """The inputs that judge a model: where they are from, whether they are real data, and how to read them anew."""

    origin: str
    real: bool
    bench: SampleBench | None = None
    skip: int = 0
    most: int | None = None

    def stream(self, source: Artifact) -> Iterator[Given]:
        if self.bench is None:
            yield from made_up(source)
            return
        seen = kept = 0
        for given in from_data(self.bench):
            seen += given.rows
            if seen - given.rows < self.skip:
                continue
            if self.most is not None and kept >= self.most:
                return
            kept += given.rows
            yield given


def split(bench: SampleBench, wanted: int) -> tuple[int, Rows]:
    """(samples to calibrate with, rows to judge by) of data that serves for both.

    What is left after the samples that were asked for judges; with too few, a quarter of all does; and with fewer than
    enough in that quarter, all samples serve twice.
    """
    assert bench.dataset is not None
    count = sum(1 for _ in _counted(bench, wanted + HELD_OUT_MOST))
    real = not bench.dataset.made_up
    if count - wanted >= ROWS_MIN:
        return wanted, Rows("samples of --data held out from calibration", real, bench, wanted, HELD_OUT_MOST)
    kept = min(wanted, count - count // 4)
    if count - kept >= ROWS_MIN:
        return kept, Rows("a quarter of --data, held out from calibration", real, bench, kept)
    few = "the samples of --data, too few to hold any out from calibration"
    return min(wanted, count), Rows(few, real, bench)


def _counted(bench: SampleBench, most: int) -> Iterator[None]:
    for number, _ in enumerate(bench.samples()):
        if number >= most:
            return
        yield None


def made_up(source: Artifact) -> Iterator[Given]:
    from modelops.stages._compare import feeds

    axis = BatchAxis.of(source.signature)
    for number, feed in enumerate(feeds(source)):
        yield Given(feed, axis.rows(feed), f"input {number} of the model's own", made_up=True)


def losses(
    source: Artifact,
    candidate: Path,
    rows: Rows,
    transition: TransitionName,
    *,
    metric: str | None,
    max_drop: float | None = None,
    more: Rows | None = None,
    seed: int = 0,
    looks: int = 1,
    before: Runner | None = None,
    exact: bool = False,
    backend: Backend | None = None,
) -> Losses:
    """What the candidate loses on these rows.

    ``more`` are further rows that may have no labels: where labelled ones are too few to prove a small drop, decisions
    that do not change on any of them can. Where the best of several candidates is chosen by what was found, ``looks``
    is how many there are, and each is held to its share of the error (Bonferroni). ``before`` runs the source, for
    callers that compare with it often. ``exact`` computes the candidate's integers without the overflow of this CPU.
    ``backend`` is where the candidate will run, by default onnxruntime on the CPU, where the source always does.
    """
    task = Task(metric)
    confidence = 1 - (1 - CONFIDENCE) / looks
    found = _compared(source, candidate, rows, task, before, exact, backend)
    allowed = POINT if max_drop is None else max_drop
    result = task.results(seed, confidence)
    checks: list[Check] = [
        Check(f"runs.{failure['inputs']}", "fail", f"the model does not run on {failure['inputs']}: {failure['error']}")
        for failure in found.failures
    ]
    checks += judge(
        found.differences, transition, agreement_evaluated=rows.real, task_metric=bool(result and result["drop"])
    )
    drop: Drop | None = None
    notes = [f"judged on {rows.origin}: {found.rows} rows"]
    metrics = list(figures(found.differences))
    if result and result["drop"]:
        drop = Drop.parse(result["drop"])
        check = judge_drop(drop, allowed)
        if check.verdict == "inconclusive" and more is not None and drop.metric == "top1":
            further = _compared(source, candidate, more, None, before, exact, backend)
            check = _by_agreement(check, further.differences, result["output"], allowed, confidence)
        checks.append(check)
        metrics += [
            replace(Metric.parse(result["reference"]), name=f"{drop.metric}_before"),
            Metric.parse(result["value"]),
            Metric(f"{drop.metric}_drop", drop.drop, "", (drop.lower, drop.bound), 2 * confidence - 1, drop.n),
        ]
    else:
        notes.append("without labels this is agreement with the float model, not accuracy")
        if metric is not None:
            text = f"{metric} needs labels, and these rows have none"
            checks.append(Check(f"{metric}.drop", "inconclusive", text, None, f"<= {allowed:g}", found.rows))
        elif transition != "prune":
            checks += unjudged(checks)
    return Losses(
        tuple(checks),
        tuple(metrics),
        (*notes, *warnings(found.differences, transition)),
        found.rows,
        rows.origin,
        drop,
    )


def _compared(
    source: Artifact,
    candidate: Path,
    rows: Rows,
    task: Task | None,
    before: Runner | None,
    exact: bool,
    backend: Backend | None,
) -> Findings:
    from modelops.backends import REGISTRY
    from modelops.graphs.describe import signature
    from modelops.stages._compare import running

    here = REGISTRY.load("onnxruntime-cpu").parse({})
    with contextlib.ExitStack() as stack:
        if before is None:
            before = Side(stack.enter_context(running(source.model, here)), source.signature)
        opened = exactly(candidate) if exact else running(candidate, backend or here)
        after = Side(stack.enter_context(opened), signature(candidate))
        return compare_models(before, after, rows.stream(source), task)


@contextlib.contextmanager
def exactly(model: Path) -> Iterator[Any]:
    """A session whose integer kernels never overflow, as those of CPUs with VNNI, of ARM and of GPUs don't."""
    from modelops.graphs import runs

    with runs.session(model, threads=0, config=_EXACT) as session:
        yield _Running(session)


class _Running:
    """A session of onnxruntime as a comparison wants it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        from modelops.graphs import runs

        return runs.run(self._session, feed)


def _by_agreement(check: Check, found: dict[str, Difference], output: str, max_drop: float, confidence: float) -> Check:
    """A pass where further rows prove that decisions seldom change: accuracy can drop by no more than that."""
    difference = found.get(output)
    if difference is None or difference.top1 is None or not difference.decisions:
        return check
    changed = round((1 - difference.top1) * difference.decisions)
    bound = proportion_bounds(changed, difference.decisions, confidence)[1]
    if bound > max_drop:
        return check
    text = (
        f"{check.message}; settled without labels: {changed} of {difference.decisions} decisions on --data changed, "
        f"surely at most {100 * bound:.2f} %, and accuracy can't drop by more"
    )
    return replace(check, verdict="pass", message=text)


def figures(differences: dict[str, Difference]) -> Iterator[Metric]:
    """The figures of the first output that people ask for, without its name; the checks hold the rest."""
    from modelops.measures.distributions import wilson

    first = next(iter(differences.values()), None)
    if first is None:
        return
    sqnr = first.sqnr
    if sqnr is not None:
        finite = sqnr != float("inf")
        yield Metric("sqnr", sqnr if finite else "identical", "dB" if finite else "", n=first.rows)
    for name, value in (("cosine_mean", first.cosine_mean), ("cosine_min", first.cosine_min)):
        if value is not None:
            yield Metric(name, value, n=first.rows)
    for name, value, n in (("agreement", first.top1, first.decisions), ("nearest", first.nearest, first.nearest_rows)):
        if value is not None and n:
            yield Metric(name, value, "", wilson(round(value * n), n), 0.95, n)
