"""Task metrics agree with scikit-learn and scipy, and refuse outputs that can't be scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelops.errors import UsageError
from modelops.measures.metrics import METRICS, evaluate, task_metric

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def value(outputs: Any, labels: Any, metric: str) -> float:
    found = evaluate(np.asarray(outputs), np.asarray(labels), metric).value
    assert isinstance(found, float)
    return found


def test_decisions_agree_with_scikit_learn() -> None:
    scores, labels = rng().normal(size=(200, 5)), rng().integers(0, 7, 200)  # two classes are never chosen
    chosen = scores.argmax(1)
    assert value(scores, labels, "top1") == sklearn_metrics.accuracy_score(labels, chosen)
    assert value(scores, labels, "f1") == pytest.approx(sklearn_metrics.f1_score(labels, chosen, average="macro"))
    assert value(chosen, labels, "f1") == value(scores, labels, "f1")


def test_figures_agree_with_scikit_learn_and_scipy() -> None:
    labels = rng().normal(size=(150, 3))
    figures = labels + np.random.default_rng(1).normal(size=labels.shape)
    assert value(figures, labels, "mae") == pytest.approx(sklearn_metrics.mean_absolute_error(labels, figures))
    assert value(figures, labels, "r2") == pytest.approx(sklearn_metrics.r2_score(labels, figures))
    tied = np.round(labels[:, 0])
    assert value(figures[:, :1], tied, "spearman") == pytest.approx(stats.spearmanr(figures[:, 0], tied).statistic)


def test_top1_comes_with_its_wilson_interval() -> None:
    labels = np.zeros(64, int)
    chosen = labels.copy()
    chosen[:2] = 1
    found = evaluate(chosen, labels, "top1")
    assert found.value == 62 / 64
    assert found.interval == pytest.approx((0.893, 0.991), abs=0.001)
    assert found.n == 64


def test_names_are_classes_too() -> None:
    assert value(np.array(["cat", "dog"]), np.array(["cat", "cow"]), "top1") == 0.5


def test_a_row_of_nan_is_never_right() -> None:
    scores = np.array([[np.nan, 0.0], [1.0, 0.0]])
    assert value(scores, np.array([0, 0]), "top1") == 0.5
    assert value(scores, np.array([1, 0]), "top1") == 0.5


def test_tokens_without_a_label_are_left_out() -> None:
    labels = np.array([[1, 2, -100], [0, -100, -100]])
    scores = np.eye(4)[[[1, 0, 3], [0, 3, 3]]]
    assert value(scores, labels, "top1") == pytest.approx(2 / 3)
    assert value(scores, labels, "f1") == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_trailing_axis_of_one_is_no_matter() -> None:
    labels = np.array([[1], [2]])
    assert value(np.array([[1], [0]]), labels, "top1") == 0.5
    assert value(np.array([[1.5], [2.5]]), labels, "mae") == 0.5


@pytest.mark.parametrize(
    ("outputs", "labels", "metric"),
    [
        (np.zeros((4, 1)), np.zeros(4, int), "top1"),
        (np.zeros((4, 3)), np.zeros(5, int), "top1"),
        (np.zeros((4, 2, 3)), np.zeros(4, int), "top1"),
        (np.zeros((4, 3)), np.array(["a"] * 4), "top1"),
        (np.zeros((4, 3)), np.zeros(4), "mae"),
        (np.float32(1), np.float32(1), "mae"),
    ],
)
def test_outputs_that_cannot_be_scored_are_usage_errors(outputs: Any, labels: Any, metric: str) -> None:
    with pytest.raises(UsageError):
        evaluate(outputs, labels, metric)


def test_unknown_metrics_name_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        task_metric("top-1")
    assert caught.value.hint == "did you mean 'top1'?"


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_have_no_value(metric: str) -> None:
    assert evaluate(np.zeros((0, 3)), np.zeros(0 if metric in ("top1", "f1") else (0, 3), int), metric).value is None


def test_undefined_values_are_none() -> None:
    constant = np.ones(10)
    assert evaluate(constant, constant, "r2").value is None
    assert evaluate(constant, np.arange(10.0), "spearman").value is None
