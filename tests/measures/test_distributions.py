"""The quantiles agree with scipy, which is there for tests only."""

from __future__ import annotations

import pytest

from modelops.measures.distributions import (
    beta_cdf,
    beta_quantile,
    binomial_cdf,
    normal_quantile,
    proportion_bounds,
    t_quantile,
    wilson,
)

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 4, 7, 11, 19, 100, 5000, 2.5])
@pytest.mark.parametrize("probability", [1e-6, 0.0025, 0.05, 0.3, 0.5, 0.9, 0.95, 0.9975, 1 - 1e-6])
def test_t_quantiles_agree_with_scipy(probability: float, freedom: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1, 540), (6, 535), (2, 3), (400, 20), (1e5, 2e5), (0.5, 1e4)])
def test_beta_agrees_with_scipy(a: float, b: float) -> None:
    for probability in (0.0025, 0.05, 0.5, 0.95):
        x = stats.beta.ppf(probability, a, b)
        assert beta_cdf(x, a, b) == pytest.approx(probability, rel=1e-7)
        assert beta_quantile(probability, a, b) == pytest.approx(x, rel=1e-7)


@pytest.mark.parametrize(("count", "n", "probability"), [(0, 5, 0.1), (1, 64, 0.1), (1, 662, 0.01), (300, 540, 0.5)])
def test_binomial_agrees_with_scipy(count: int, n: int, probability: float) -> None:
    assert binomial_cdf(count, n, probability) == pytest.approx(stats.binom.cdf(count, n, probability), rel=1e-9)


def test_binomial_ends_are_certain() -> None:
    assert binomial_cdf(-1, 5, 0.5) == 0
    assert binomial_cdf(5, 5, 0.5) == 1


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (62, 64), (540, 540), (7, 13)])
def test_intervals_agree_with_scipy(successes: int, n: int) -> None:
    result = stats.binomtest(successes, n)
    interval = result.proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((interval.low, interval.high), abs=1e-9)
    low, high = proportion_bounds(successes, n, 0.975)  # two one-sided bounds make the two-sided exact interval
    exact = result.proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_no_trials_say_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert proportion_bounds(0, 0) == (0.0, 1.0)


def test_normal_quantile_agrees_with_scipy() -> None:
    assert normal_quantile(0.975) == pytest.approx(stats.norm.ppf(0.975), abs=1e-12)


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 3.0), (1.0, 3.0), (0.5, 0.0)])
def test_impossible_quantiles_are_refused(probability: float, freedom: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        t_quantile(probability, freedom)
