"""Quantiles and intervals of the few distributions that verdicts stand on, without scipy.

Sources: the continued fraction of the incomplete beta function is DLMF 8.17.22, evaluated by Lentz's method
(Press et al., *Numerical Recipes*, 3rd ed., §5.2 and §6.4); Student's t through the beta distribution is Abramowitz and
Stegun 26.7.1; the binomial through the beta distribution is DLMF 8.17.5; Wilson (1927) and Clopper and Pearson (1934)
are the two intervals for a proportion.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist


def normal_quantile(probability: float) -> float:
    """The value that a standard normal variable stays below with this probability."""
    return NormalDist().inv_cdf(probability)


def normal_cdf(value: float) -> float:
    """The probability that a standard normal variable stays below this value."""
    return NormalDist().cdf(value)


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """The value that Student's t with ``freedom`` degrees of freedom stays below with this probability."""
    if not 0 < probability < 1 or freedom <= 0:
        raise ValueError(f"need 0 < probability < 1 and freedom > 0, not {probability} and {freedom}")
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    x = beta_quantile(2 * (1 - probability), freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - x) / x)


def binomial_cdf(successes: int, n: int, probability: float) -> float:
    """The probability of at most ``successes`` in ``n`` trials."""
    if successes < 0:
        return 0.0
    if successes >= n:
        return 1.0
    return beta_cdf(1 - probability, n - successes, successes + 1)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), to about 1e-13."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x),
    )
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast; the symmetry covers the other side
        return front * _beta_fraction(x, a, b) / a
    return 1.0 - front * _beta_fraction(1 - x, b, a) / b


@lru_cache(maxsize=4096)
def beta_quantile(probability: float, a: float, b: float) -> float:
    """The x with ``beta_cdf(x, a, b) == probability``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval of Wilson (1927) for a proportion; (0, 1) when there were no trials."""
    if n == 0:
        return 0.0, 1.0
    z = normal_quantile((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion_bounds(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The one-sided lower and upper bounds of Clopper and Pearson (1934), each at this confidence.

    Counts may be fractions, which serves to foretell what a larger sample would give.
    """
    if n <= 0:
        return 0.0, 1.0
    low = 0.0 if successes <= 0 else beta_quantile(1 - confidence, successes, n - successes + 1)
    high = 1.0 if successes >= n else beta_quantile(confidence, successes + 1, n - successes)
    return low, high


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction DLMF 8.17.22, by the modified method of Lentz."""
    tiny = 1e-300
    c = 1.0
    d = 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 100_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            return value
    return value
