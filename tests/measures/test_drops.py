"""A bound on a drop holds as often as it says, and a gate passes only when the bound is within it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from modelops.measures.drops import Drop, drop, judge_drop, paired_bounds, rows_needed
from modelops.measures.metrics import TaskMetric


def decisions(n: int, lost: int, gained: int, wrong: int = 0) -> tuple[Any, Any, Any]:
    """(reference, outputs, labels) of classes with so many rows lost, gained, and wrong in both."""
    labels = np.arange(n) % 10
    before, after = labels.copy(), labels.copy()
    after[:lost] += 1
    before[lost : lost + gained] += 1
    both = slice(lost + gained, lost + gained + wrong)
    before[both] += 1
    after[both] += 2
    return before, after, labels


def test_no_changed_decision_in_540_rows_bounds_the_drop_at_055_points() -> None:
    found = drop(*decisions(540, 0, 0, wrong=20), "top1")
    assert (found.drop, found.lost, found.gained, found.n) == (0.0, 0, 0, 540)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 540))
    assert 100 * found.bound == pytest.approx(0.553, abs=0.001)
    assert judge_drop(found, 0.01).verdict == "pass"


@pytest.mark.parametrize(
    ("lost", "gained", "verdict"),
    [(1, 0, "pass"), (0, 9, "pass"), (2, 2, "pass"), (4, 0, "inconclusive"), (6, 0, "fail"), (60, 0, "fail")],
)
def test_the_gate_of_one_point_on_540_rows(lost: int, gained: int, verdict: str) -> None:
    assert judge_drop(drop(*decisions(540, lost, gained), "top1"), 0.01).verdict == verdict


def test_few_rows_never_prove_a_small_drop_and_the_message_says_how_many_would() -> None:
    check = judge_drop(drop(*decisions(64, 0, 0), "top1"), 0.01)
    assert check.verdict == "inconclusive"
    assert "about 299 rows like these would settle it" in check.message
    assert judge_drop(drop(*decisions(299, 0, 0), "top1"), 0.01).verdict == "pass"
    assert judge_drop(drop(*decisions(20, 0, 9), "top1"), 0.5).verdict == "inconclusive"


def test_the_number_of_rows_asked_for_is_the_smallest_that_settles() -> None:
    found = drop(*decisions(540, 4, 0), "top1")
    needed = rows_needed(found, 0.01)
    assert needed is not None
    share = 4 / 540
    assert paired_bounds(share * needed, 0, needed)[1] <= 0.01 < paired_bounds(share * (needed - 1), 0, needed - 1)[1]
    assert rows_needed(found, share) is None  # no number of rows proves what is just at the edge


def test_the_message_holds_both_values_the_bound_and_the_rows() -> None:
    check = judge_drop(drop(*decisions(540, 1, 0, wrong=10), "top1"), 0.01)
    assert check.message == (
        "top1: 97.96 % against 98.15 %, loses 0.19 points, surely at most 0.88 points (95 %, 540 rows), "
        "needs <= 1.00 points"
    )
    assert (check.name, check.threshold, check.n) == ("top1.drop", "<= 1.00 points", 540)
    assert "gains 1.67 points" in judge_drop(drop(*decisions(540, 0, 9), "top1"), 0.01).message


@pytest.mark.parametrize("n", [100, 540, 2000])
@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.0), (0.01, 0.005), (0.03, 0.03), (0.1, 0.02), (0.002, 0.002)])
def test_the_paired_bound_covers_as_often_as_it_says(n: int, lost: float, gained: float) -> None:
    counts = np.random.default_rng(5).multinomial(n, [lost, gained, 1 - lost - gained], 20_000)
    seen, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    above = below = 0
    for (b, c), count in zip(seen.tolist(), times.tolist(), strict=True):
        low, high = paired_bounds(b, c, n)
        above += count * (high >= lost - gained)
        below += count * (low <= lost - gained)
    assert above / 20_000 >= 0.945  # 95 % less three standard errors
    assert below / 20_000 >= 0.945


def test_bounds_turn_around_when_the_models_do() -> None:
    low, high = paired_bounds(7, 3, 200)
    assert paired_bounds(3, 7, 200) == pytest.approx((-high, -low))
    assert paired_bounds(0, 0, 0) == (-1.0, 1.0)


def regression(n: int, noise: float) -> tuple[Any, Any, Any]:
    r = np.random.default_rng(2)
    labels = r.normal(size=n)
    before = labels + 0.3 * r.normal(size=n)
    return before, before + noise * r.normal(size=n), labels


@pytest.mark.parametrize("metric", ["mae", "r2", "spearman"])
def test_worse_figures_are_a_positive_drop(metric: str) -> None:
    found = drop(*regression(400, 0.3), metric)
    assert 0 < found.lower < found.drop < found.bound
    better = regression(400, 0.3)
    assert drop(better[1], better[0], better[2], metric).drop == pytest.approx(-found.drop)
    assert judge_drop(found, 1.1 * found.bound).verdict == "pass"
    assert judge_drop(found, (found.drop + found.bound) / 2).verdict == "inconclusive"
    assert judge_drop(found, 0.9 * found.drop).verdict == "fail"


def test_the_bootstrap_bound_covers_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(60):
        r = np.random.default_rng(seed)
        labels = r.normal(size=120)
        before, after = labels + r.normal(size=120), labels + 1.2 * r.normal(size=120)
        truth = 0.2 * math.sqrt(2 / math.pi)  # E|N(0, s)| = s·sqrt(2/π)
        covered += drop(before, after, labels, "mae", seed=seed).bound >= truth
    assert covered >= 52  # 57 expected; below 52 has a chance of 1 %


def test_the_bootstrap_is_seeded() -> None:
    assert drop(*regression(100, 0.1), "spearman") == drop(*regression(100, 0.1), "spearman")


def test_a_bootstrap_without_a_changed_decision_is_not_certain() -> None:
    found = drop(*decisions(100, 0, 0, wrong=5), "f1")
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 100))
    assert judge_drop(found, 0.01).verdict == "inconclusive"


def test_tokens_are_resampled_by_rows_not_by_token() -> None:
    r = np.random.default_rng(0)
    labels = r.integers(0, 4, size=(60, 30))
    after = labels.copy()
    after[:6] = (after[:6] + 1) % 4  # six rows are lost whole: their tokens are no independent evidence
    found = drop(labels, after, labels, "top1")
    assert found.method == "paired bootstrap"
    assert found.n == 60
    assert found.drop == pytest.approx(0.1)
    assert found.bound > 0.15


def test_outputs_that_are_not_finite_fail() -> None:
    before, after, labels = regression(50, 0.1)
    after[3] = np.nan
    check = judge_drop(drop(before, after, labels, "mae"), 10.0)
    assert check.verdict == "fail"
    assert judge_drop(drop(after, before, labels, "mae"), 10.0).verdict == "inconclusive"


def test_nothing_labelled_is_inconclusive() -> None:
    none = np.zeros(0, int)
    assert judge_drop(drop(none, none, none, "top1"), 0.01).verdict == "inconclusive"


def test_users_metrics_are_resampled_too() -> None:
    worst = TaskMetric("worst", lambda a, b: float(abs(a - b).max()), higher=False)
    found = drop(*regression(80, 0.5), worst)
    assert found.metric == "worst"
    assert judge_drop(found, 10.0).verdict == "pass"


def test_drops_survive_json() -> None:
    for found in (drop(*decisions(64, 1, 2), "top1"), drop(*regression(64, 0.1), "r2")):
        assert Drop.parse(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    none = np.zeros(0, int)
    again = Drop.parse(json.loads(json.dumps(drop(none, none, none, "top1").to_dict(), allow_nan=False)))
    assert judge_drop(again, 0.5).verdict == "inconclusive"
