"""Measures a model against stored outputs or against another model, on a stream of inputs, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from modelops.core.progress import tracked
from modelops.core.tensors import Signature
from modelops.errors import Inconclusive, InputRefused, StageFailed, UsageError
from modelops.graphs.arrays import digest, numpy_dtype
from modelops.graphs.batches import BatchAxis, row_axes
from modelops.measures.comparison import Comparison
from modelops.measures.differences import Difference
from modelops.measures.drops import CONFIDENCE, drop
from modelops.measures.metrics import IGNORED_LABEL, TaskMetric, evaluate, prepared, task_metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelops.backends import Session
    from modelops.stages._workbench import SampleBench

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """Inputs for one run, of which the first ``rows`` count.

    ``name`` is what a report calls them; ``made_up`` says that even a right model may be unable to run them, and
    ``corner`` that they are then passed over.
    """

    feed: Arrays
    rows: int
    name: str
    labels: tuple[Any, ...] = ()
    made_up: bool = False
    corner: bool = False


class Runner(Protocol):
    """What a comparison needs of a model."""

    @property
    def signature(self) -> Signature: ...

    def run(self, given: Given) -> dict[str, Any]:
        """The outputs for the rows that count."""


class Side:
    """A model that runs: gives its outputs for the rows that count, whatever dtype and batch it wants its inputs in."""

    def __init__(self, session: Session, signature: Signature) -> None:
        self._session = session
        self.signature = signature
        self._axis = BatchAxis.of(signature)

    def run(self, given: Given) -> dict[str, Any]:
        """The outputs for the rows that count; a model with a fixed batch takes them in several runs."""
        import numpy as np

        feed = cast(self.signature, given)
        held, size = self._axis.rows(feed), self._axis.size
        if size is None or held == size:
            return _cut(self._session.run(feed), held, given.rows)
        parts = []
        for start in range(0, given.rows, size):
            part = {name: self._part(name, array, start, size) for name, array in feed.items()}
            parts.append(_cut(self._session.run(part), size, min(size, given.rows - start)))
        return {
            name: np.concatenate([part[name] for part in parts]) if first.ndim else first
            for name, first in parts[0].items()
        }

    def _part(self, name: str, array: Any, start: int, size: int) -> Any:
        """The rows of one run; the last one is repeated where there are too few."""
        import numpy as np

        if name not in self._axis.inputs:
            return array
        rows = array[start : start + size]
        return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)]) if len(rows) < size else rows


def cast(signature: Signature, given: Given) -> dict[str, Any]:
    """The arrays in the dtypes that a model takes; UsageError where there is none for an input."""
    import numpy as np

    feed = {}
    for spec in signature.inputs:
        if spec.name not in given.feed:
            raise UsageError(
                f"there is nothing for the input {spec.name!r} ({given.name} holds {', '.join(given.feed)})",
                hint="compare models that take the same inputs",
            )
        array, wanted = np.asarray(given.feed[spec.name]), numpy_dtype(spec.dtype)
        feed[spec.name] = array.astype(wanted) if array.dtype != wanted and wanted.kind != "O" else array
    return feed


def _cut(outputs: Arrays, held: int, rows: int) -> dict[str, Any]:
    """The outputs without the rows that do not count."""
    return {name: array[:rows] if array.ndim and len(array) == held else array for name, array in outputs.items()}


@dataclass
class Findings:
    """What a comparison found: the differences, what the model could not run, and which inputs it was.

    ``worst`` holds, by output, the inputs that gave its worst element and the row in them; ``first`` the first inputs,
    ``broken`` the first that the model can't run, or gives other shapes for.
    """

    differences: dict[str, Difference] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    rows: int = 0
    digest: str = ""
    worst: dict[str, tuple[Given, int]] = field(default_factory=dict)
    first: Given | None = None
    broken: Given | None = None


def compare_models(before: Runner, after: Runner, stream: Iterable[Given], task: Task | None = None) -> Findings:
    """The differences of two models on the same inputs; ``task`` collects what both make of labelled ones.

    Inconclusive where the reference itself can't run made-up inputs.
    """
    batched = bool(BatchAxis.of(before.signature).inputs)
    comparison = Comparison(batched=batched, axes=row_axes(before.signature))
    findings, total = Findings(), hashlib.sha256()
    seen: dict[str, Any] = {}
    for given in tracked("comparing", stream):
        try:
            wanted = before.run(given)
        except StageFailed as error:
            if given.corner:
                continue
            if given.made_up:
                raise Inconclusive(
                    f"the reference can't run {given.name}: {error.message}", hint="give inputs that fit with --data"
                ) from error
            raise
        total.update(digest(given.feed).encode())
        findings.rows += given.rows
        findings.first = findings.first or given
        try:
            actual = after.run(given)
        except StageFailed as error:
            findings.failures.append({"inputs": given.name, "error": error.message})
            findings.broken = findings.broken or given
            continue
        if any(name in actual and actual[name].shape != array.shape for name, array in wanted.items()):
            findings.broken = findings.broken or given
        comparison.add(wanted, actual, given.name)
        for name, element in comparison.worst().items():
            if element is not None and element is not seen.get(name):
                seen[name], findings.worst[name] = element, (given, element.input_row)
        if task is not None:
            task.add(actual, wanted, given)
    findings.differences, findings.digest = comparison.differences(), total.hexdigest()
    return findings


def from_data(bench: SampleBench) -> Iterator[Given]:
    """The user's samples."""
    assert bench.dataset is not None
    for number, chunk in enumerate(bench.chunks()):
        name = f"batch {number} of the data"
        yield Given(chunk.feed, chunk.rows, name, chunk.labels, made_up=bench.dataset.made_up)


class Task:
    """Collects what models make of labelled samples, and says how well they do the task."""

    def __init__(self, metric: str | TaskMetric | None) -> None:
        self._asked = metric
        self._rule: TaskMetric | None = None
        self.output = ""
        self._labels: list[NDArray[Any]] = []
        self._after: list[NDArray[Any]] = []
        self._before: list[NDArray[Any]] = []
        self._unlabelled = ""

    def add(self, after: Arrays, before: Arrays | None, given: Given) -> None:
        """Count one batch, reduced to what the metric needs; InputRefused where only some samples have labels."""
        labels = [label for label in given.labels if label is not None]
        if len(labels) != len(given.labels) or not labels:
            self._unlabelled = self._unlabelled or given.name
        if labels and self._unlabelled:
            raise InputRefused(f"some samples have no label ({self._unlabelled})", hint="label every sample, or none")
        if not labels:
            return
        wanted = _label_array(labels, given.name)
        if self._rule is None:
            self._rule, self.output = self._choose(after, wanted)
        chosen, wanted = prepared(self._rule, after[self.output], wanted)
        self._labels.append(wanted)
        self._after.append(chosen)
        if before is not None:
            self._before.append(prepared(self._rule, before[self.output], wanted)[0])

    def _choose(self, outputs: Arrays, labels: NDArray[Any]) -> tuple[TaskMetric, str]:
        """The metric that fits the labels, and the first output that it can be counted on."""
        asked = self._asked or ("r2" if labels.dtype.kind == "f" else "top1")
        rule = task_metric(asked) if isinstance(asked, str) else asked
        problem: UsageError | None = None
        for name, array in outputs.items():
            try:
                prepared(rule, array, labels)
            except UsageError as error:
                problem = problem or error
            else:
                return rule, name
        raise problem or UsageError("the model has no outputs")

    def results(self, seed: int, confidence: float = CONFIDENCE) -> dict[str, Any] | None:
        """The metric's value, that of the reference and the drop, as JSON values; None without labels."""
        if self._rule is None:
            return None
        labels, after = _joined(self._labels, IGNORED_LABEL), _joined(self._after, -1)
        found: dict[str, Any] = {
            "metric": self._rule.name,
            "output": self.output,
            "value": evaluate(after, labels, self._rule).to_dict(),
            "reference": None,
            "drop": None,
        }
        if self._before:
            before = _joined(self._before, -1)
            found["reference"] = evaluate(before, labels, self._rule).to_dict()
            found["drop"] = drop(before, after, labels, self._rule, confidence=confidence, seed=seed).to_dict()
        return found


def _label_array(labels: Sequence[Any], where: str) -> NDArray[Any]:
    """One array of labels; lists of different lengths (one label per token) are filled with the label for none."""
    import numpy as np

    rows = [np.asarray(label) for label in labels]
    if len({row.ndim for row in rows}) != 1 or any(row.dtype.kind not in "biufUS" for row in rows):
        raise InputRefused(f"the labels of {where} are not numbers, texts or equal arrays", hint="repair the labels")
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else _joined([row[None] for row in rows], -100)


def _joined(parts: Sequence[NDArray[Any]], fill: int) -> NDArray[Any]:
    """The parts one below another; where their rows differ in length, they are filled up."""
    import numpy as np

    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    if len({part.ndim for part in parts}) != 1:
        raise InputRefused("labels of some samples are lists, of others not", hint="give all in one form")
    largest = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
    filled = []
    for part in parts:
        whole = np.full((len(part), *largest), fill, dtype=part.dtype)
        whole[tuple(slice(size) for size in part.shape)] = part
        filled.append(whole)
    return np.concatenate(filled)
