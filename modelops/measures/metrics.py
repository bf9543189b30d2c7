"""Task metrics: how well a model's outputs do what the labels ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelops.core.report import Metric
from modelops.errors import UsageError, unknown_name
from modelops.measures.distributions import wilson

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IGNORED_LABEL = -100  # of tokens that have no label, as in PyTorch's cross entropy and Hugging Face's collators


@dataclass(frozen=True)
class TaskMetric:
    """How well outputs do the task that labels ask for.

    ``reduce`` turns raw outputs into what ``score`` compares with labels (class numbers, figures), once; ``score`` is
    called on resampled rows. ``decisions`` says that a row is right or wrong, so that scores are shares.
    """

    name: str
    score: Callable[[NDArray[Any], NDArray[Any]], float]
    higher: bool = True
    decisions: bool = False
    reduce: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]] = lambda outputs, _labels: outputs

    def text(self, value: float) -> str:
        return f"{100 * value:.2f} %" if self.decisions else f"{value:.4g}"

    def text_of_drop(self, value: float) -> str:
        return f"{100 * value:.2f} points" if self.decisions else f"{value:.3g}"


def task_metric(name: str) -> TaskMetric:
    """The built-in metric of that name; UsageError with the nearest one otherwise."""
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]


def evaluate(outputs: NDArray[Any], labels: NDArray[Any], metric: str | TaskMetric) -> Metric:
    """The metric on labelled rows; for single decisions with a Wilson interval."""
    rule = task_metric(metric) if isinstance(metric, str) else metric
    predicted, labels = prepared(rule, outputs, labels)
    if len(labels) == 0:
        return Metric(rule.name, None, n=0)
    value = rule.score(predicted, labels)
    shown = value if math.isfinite(value) else None
    if rule.name == "top1" and labels.ndim == 1:
        counted = int(labelled(labels).sum())
        return Metric(rule.name, shown, "", wilson(round(value * counted), counted), 0.95, counted)
    return Metric(rule.name, shown, n=len(labels))


def prepared(rule: TaskMetric, outputs: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(what the metric scores, labels), both by rows; UsageError when they don't fit."""
    import numpy as np

    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if labels.ndim > 1 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if outputs.ndim == 0 or labels.ndim == 0 or len(outputs) != len(labels):
        raise UsageError(
            f"outputs of shape {outputs.shape} and labels of shape {labels.shape} don't pair up row by row"
        )
    return rule.reduce(outputs, labels), labels


def _classes(outputs: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """Class numbers (or names): as they are, or the first class of scores; a row of NaN is never right."""
    import numpy as np

    if outputs.ndim == labels.ndim + 1 and outputs.shape[-1] == 1 and outputs.dtype.kind not in "fc":
        outputs = outputs[..., 0]
    if outputs.ndim == labels.ndim and outputs.dtype.kind not in "fcV":
        chosen = outputs
    elif outputs.ndim == labels.ndim + 1 and outputs.shape[-1] > 1 and outputs.dtype.kind not in "SUO":
        scores = outputs.astype(np.float64)
        broken = np.isnan(scores).any(axis=-1)
        chosen = np.where(broken, -1, np.where(np.isnan(scores), -np.inf, scores).argmax(axis=-1))
    else:
        raise UsageError(
            f"an output of shape {outputs.shape} holds neither classes nor scores for labels of shape {labels.shape}",
            hint="classes need one score per class on the last axis; for figures use --metric mae, r2 or spearman",
        )
    if (chosen.dtype.kind in "SUO") != (labels.dtype.kind in "SUO"):
        raise UsageError(f"labels are {labels.dtype.name}, the model gives {chosen.dtype.name}")
    if chosen.shape != labels.shape:
        raise UsageError(f"outputs give classes of shape {chosen.shape}, labels have {labels.shape}")
    return chosen


def labelled(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Where labels are not the one that means none."""
    import numpy as np

    if labels.dtype.kind not in "iu":
        return np.ones(labels.shape, dtype=bool)
    result: NDArray[np.bool_] = labels != IGNORED_LABEL
    return result


def _top1(chosen: NDArray[Any], labels: NDArray[Any]) -> float:
    known = labelled(labels)
    return float((chosen == labels)[known].mean()) if known.any() else math.nan


def _f1(chosen: NDArray[Any], labels: NDArray[Any]) -> float:
    """F1 averaged over the classes that occur in labels or choices, each alike (scikit-learn's ``macro``)."""
    import numpy as np

    known = labelled(labels)
    if not known.any():
        return math.nan
    both = np.concatenate([labels[known].reshape(-1), chosen[known].reshape(-1)])
    classes, numbers = np.unique(both, return_inverse=True)
    true, guessed = np.split(numbers.reshape(-1), 2)
    hits = np.bincount(true[true == guessed], minlength=len(classes))
    seen = np.bincount(true, minlength=len(classes)) + np.bincount(guessed, minlength=len(classes))
    return float((2 * hits / seen).mean())


def _figures(outputs: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    if outputs.ndim == labels.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs[..., 0]
    if outputs.shape != labels.shape or outputs.dtype.kind in "SUO" or labels.dtype.kind in "SUO":
        raise UsageError(
            f"outputs {outputs.dtype.name}{list(outputs.shape)} are no figures for labels "
            f"{labels.dtype.name}{list(labels.shape)}",
            hint="for classes use --metric top1 or f1",
        )
    return outputs.astype("float64")


def _mae(figures: NDArray[Any], labels: NDArray[Any]) -> float:
    return float(abs(figures - labels).mean())


def _r2(figures: NDArray[Any], labels: NDArray[Any]) -> float:
    """The share of variance that is explained, averaged over outputs (scikit-learn's ``uniform_average``)."""
    import numpy as np

    flat, wanted = figures.reshape(len(figures), -1), labels.reshape(len(labels), -1).astype(np.float64)
    spread = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=0)
    if not (spread > 0).all():
        return math.nan
    return float((1 - ((flat - wanted) ** 2).sum(axis=0) / spread).mean())


def _spearman(figures: NDArray[Any], labels: NDArray[Any]) -> float:
    """Spearman's rank correlation (1904), ties by their mean rank."""
    import numpy as np

    if not np.isfinite(figures).all():
        return math.nan
    a, b = (_ranks(values.reshape(-1)) for values in (figures, labels))
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length > 0 else math.nan


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    import numpy as np

    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = ((ends - counts + 1 + ends) / 2.0)[numbers.reshape(-1)]
    return ranks


METRICS: dict[str, TaskMetric] = {
    metric.name: metric
    for metric in (
        TaskMetric("top1", _top1, decisions=True, reduce=_classes),
        TaskMetric("f1", _f1, decisions=True, reduce=_classes),
        TaskMetric("mae", _mae, higher=False, reduce=_figures),
        TaskMetric("r2", _r2, reduce=_figures),
        TaskMetric("spearman", _spearman, reduce=_figures),
    )
}
