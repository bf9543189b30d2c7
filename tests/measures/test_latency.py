"""Percentiles appear only where samples hold them, and their intervals hold the truth as often as they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelops.errors import InputRefused
from modelops.measures.latency import order_interval, percentile, samples_needed, summarize


def test_percentiles_need_as_many_samples_as_in_loadgen() -> None:
    assert [samples_needed(share) for share in (0.5, 0.9, 0.95, 0.99)] == [11, 64, 130, 662]


@pytest.mark.parametrize(
    ("n", "names"),
    [
        (1, {"mean", "p50"}),
        (63, {"mean", "p50"}),
        (64, {"mean", "p50", "p90"}),
        (130, {"mean", "p50", "p90", "p95"}),
        (662, {"mean", "p50", "p90", "p95", "p99"}),
    ],
)
def test_only_percentiles_with_enough_samples_appear(n: int, names: set[str]) -> None:
    found = summarize([np.random.default_rng(0).lognormal(size=n).tolist()])
    assert set(found.values) == names
    assert set(found.needs) == {"mean", "p50", "p90", "p95", "p99"} - names
    assert found.n == n


def test_figures_are_the_plain_ones() -> None:
    samples = np.random.default_rng(1).lognormal(size=1000)
    found = summarize([samples.tolist()])
    assert found.values["mean"] == pytest.approx(samples.mean())
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found.values[name] == np.quantile(samples, share, method="inverted_cdf")
    assert found.per_second == pytest.approx(1000 / samples.mean())


@pytest.mark.parametrize(("share", "n"), [(0.5, 30), (0.9, 200), (0.99, 1500)])
def test_order_intervals_cover_as_often_as_they_say(share: float, n: int) -> None:
    samples = np.sort(np.random.default_rng(2).random((1500, n)), axis=1)  # the percentile of U(0, 1) is the share
    intervals = [order_interval(row, share, 0.95) for row in samples.tolist()]
    covered = sum(low <= share <= high for low, high in intervals)  # type: ignore[misc]
    assert 0.94 <= covered / 1500 <= 0.995


def test_no_interval_where_the_samples_do_not_reach() -> None:
    assert order_interval(list(range(40)), 0.9, 0.99) is None
    assert order_interval(list(range(64)), 0.9, 0.99) == (50, 63)
    assert "p50" not in summarize([[1.0, 2.0, 3.0, 4.0, 5.0]]).intervals


def test_every_interval_holds_its_figure() -> None:
    r = np.random.default_rng(3)
    for launches in ([r.lognormal(size=700)], [r.lognormal(size=20)], list(r.lognormal(size=(5, 140)))):
        found = summarize([launch.tolist() for launch in launches])
        assert {"mean", "p50"} <= set(found.intervals) or len(launches[0]) == 20
        for name, (low, high) in found.intervals.items():
            assert low <= found.values[name] <= high
    uneven = summarize([[1.0] * 500, [5.0] * 3, [5.1] * 3, [5.05] * 3])
    assert uneven.intervals["mean"][0] <= uneven.values["mean"] <= uneven.intervals["mean"][1]


def test_launches_that_differ_widen_the_interval() -> None:
    r = np.random.default_rng(4)
    noise = 0.01 * r.standard_normal((5, 200))
    alike, apart = 10 + noise, 10 + noise + np.array([[-1.0], [0.5], [0.0], [1.0], [-0.5]])
    narrow, wide = (summarize(x.tolist()).intervals["mean"] for x in (alike, apart))
    assert wide[1] - wide[0] > 50 * (narrow[1] - narrow[0])


def test_slow_waves_within_a_launch_widen_the_interval_of_its_mean() -> None:
    r = np.random.default_rng(5)
    walk = np.cumsum(r.standard_normal(2000)) * 0.05
    dependent = 50 + walk
    shuffled = r.permutation(dependent)
    wide, narrow = (summarize([x.tolist()]).intervals["mean"] for x in (dependent, shuffled))
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_metrics_hold_unit_interval_and_count() -> None:
    metric = next(m for m in summarize([[1.0, 2.0, 3.0] * 10]).metrics("latency") if m.name == "latency_p50")
    assert (metric.value, metric.unit, metric.n, metric.confidence) == (2.0, "ms", 30, 0.99)
    assert metric.interval is not None
    json.dumps(metric.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "samples", [[], [[]], [[0.0, 1.0]], [[1.0, -1.0]], [[1.0, float("nan"), 2.0]], [[float("inf")]]]
)
def test_what_is_no_time_is_refused(samples: list[list[float]]) -> None:
    with pytest.raises(InputRefused):
        summarize(samples)


def test_the_percentile_is_one_of_the_samples() -> None:
    assert [percentile([1, 2, 3, 4], share) for share in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
