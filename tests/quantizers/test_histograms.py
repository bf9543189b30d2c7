from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from modelops.quantizers._histograms import Histogram, best, quantization

RNG = np.random.default_rng(21)
DISTRIBUTIONS = {
    "normal": RNG.normal(size=6000),
    "after a Relu": np.maximum(RNG.normal(size=6000), 0),
    "with outliers": np.concatenate([RNG.normal(size=5990), [30.0, -25.0, 28, 27, 26, 25, -20, -22, 29, 24]]),
    "lopsided": RNG.gamma(1.0, 2.0, size=6000) - 0.3,
    "negative": -RNG.gamma(2.0, 1.0, size=6000),
}


def counted(values: Any, batches: int = 1) -> Histogram:
    histogram = Histogram(float(values.min()), float(values.max()))
    for part in np.array_split(values.astype(np.float32), batches):
        histogram.add(part)
    return histogram


def squared_error(values: Any, low: float, high: float) -> float:
    """What quantizing these very values with this range costs."""
    step, zero = quantization((low, high))
    levels = np.clip(np.rint(values / step) + zero, 0, 255)
    return float(((values - (levels - zero) * step) ** 2).mean())


def pairs(values: Any, count: int) -> Any:
    parts = [(index + 1) / count for index in range(count)]
    lows = [min(float(values.min()), 0.0) * part for part in parts] if values.min() < 0 else [0.0]
    highs = [max(float(values.max()), 0.0) * part for part in parts] if values.max() > 0 else [0.0]
    return itertools.product(lows, highs)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_finds_what_trying_every_range_finds(name: str) -> None:
    values = DISTRIBUTIONS[name]
    found = squared_error(values, *best(counted(values), "mse", 99.99))
    assert found <= 1.02 * min(squared_error(values, low, high) for low, high in pairs(values, 40))


def divergence(histogram: Histogram, low: float, high: float) -> float:
    """KL(real ‖ quantized), bin by bin as the definition reads."""
    step, zero = quantization((low, high))
    bins = [(c, int(n)) for c, n in zip(histogram.centres, histogram.counts, strict=True)]
    kept = [(c, n) for c, n in bins if low <= c <= high]
    if not any(n for _, n in kept):
        return math.inf
    real = [float(n) for _, n in kept]
    real[0] += sum(n for c, n in bins if c < low)
    real[-1] += sum(n for c, n in bins if c > high)
    groups: dict[int, list[int]] = {}
    for index, (centre, count) in enumerate(kept):
        if count:
            groups.setdefault(min(255, max(0, round(centre / step) + zero)), []).append(index)
    quantized = [0.0] * len(kept)
    for members in groups.values():
        for index in members:
            quantized[index] = sum(kept[i][1] for i in members) / len(members)
    p, q = (np.array(side) / sum(side) for side in (real, quantized))
    return float(sum(a * math.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("name", ["after a Relu", "with outliers", "lopsided"])
def test_entropy_searches_and_finds_what_trying_every_range_finds(name: str) -> None:
    values = DISTRIBUTIONS[name]
    histogram = counted(values)
    found = best(histogram, "entropy", 99.99)
    brute = min(divergence(histogram, low, high) for low, high in pairs(values, 12))
    assert divergence(histogram, *found) <= brute + 1e-6
    if name == "with outliers":
        assert divergence(histogram, *found) < 0.5 * divergence(histogram, histogram.low, histogram.high)


def test_percentile_is_that_of_the_values() -> None:
    values = DISTRIBUTIONS["lopsided"]
    histogram = counted(values)
    low, high = best(histogram, "percentile", 99.0)
    assert abs((values > high).mean() - 0.01) < 0.001
    assert low == min(values.min(), 0) or abs((values < low).mean() - 0.01) < 0.001


def test_percentile_counts_the_zeros_of_a_relu() -> None:
    values = np.concatenate([np.zeros(9990), np.full(10, 7.0)])
    assert best(counted(values), "percentile", 99.0) == (0.0, pytest.approx(0.0, abs=7 / 2048))


def test_minmax_clips_nothing_and_every_range_holds_zero() -> None:
    values = DISTRIBUTIONS["normal"] + 50
    for rule in ("minmax", "percentile", "mse", "entropy", "auto"):
        low, high = best(counted(values), rule, 99.99)  # type: ignore[arg-type]
        assert low == 0 < high
    assert best(counted(values), "minmax", 99.99)[1] == values.max()


def test_auto_takes_the_least_error_on_values_that_it_was_not_found_on() -> None:
    values = DISTRIBUTIONS["with outliers"]
    fitted, held_out = counted(values), Histogram(values.min(), values.max())
    held_out.add(np.concatenate([np.full(3000, 30.0), np.full(3000, -25.0)]))
    assert best(fitted, "auto", 99.0, held_out) == best(fitted, "minmax", 99.0)
    held_out.counts[:] = 0
    held_out.add(RNG.normal(size=6000))
    assert best(fitted, "auto", 99.0, held_out, (0.25, 0.5)) == best(fitted, "auto", 99.0, held_out)
    narrow = best(held_out, "mse", 99.0)
    assert best(fitted, "auto", 99.0, held_out, narrow) == narrow
    chosen = held_out.error(best(fitted, "auto", 99.0, held_out))
    assert chosen == min(
        held_out.error(best(fitted, rule, 99.0)) for rule in ("minmax", "percentile", "mse", "entropy")
    )


def test_batches_of_any_size_count_the_same() -> None:
    values = DISTRIBUTIONS["normal"]
    assert (counted(values, 1).counts == counted(values, 17).counts).all()


def test_the_error_of_a_histogram_is_that_of_its_values() -> None:
    values = DISTRIBUTIONS["after a Relu"]
    histogram = counted(values)
    for found in ((histogram.low, histogram.high), (0.0, 1.5)):
        assert histogram.error(found) == pytest.approx(squared_error(values, *found), rel=0.02)


def test_a_constant_and_nothing_have_a_range() -> None:
    for values in (np.zeros(5), np.full(5, 3.0)):
        for rule in ("minmax", "percentile", "mse", "entropy", "auto"):
            low, high = best(counted(values), rule, 99.99)  # type: ignore[arg-type]
            assert low <= values[0] * 0.99 <= high or values[0] == 0


def test_average_is_the_mean_of_the_extremes_of_batches() -> None:
    from modelops.quantizers._calibration import Extent

    values = np.random.default_rng(2).standard_t(3, size=(20, 500))
    extent = Extent()
    for batch in values:
        extent.add(float(batch.min()), float(batch.max()), batch.size)
    assert np.allclose(extent.average, (values.min(axis=1).mean(), values.max(axis=1).mean()))
    assert (extent.low, extent.high, extent.elements, extent.runs) == (values.min(), values.max(), 500, 20)
