"""How products with integers differ from those with floats, in numbers that a numpy simulation gives.

Weights are rounded in float: a matrix whose every column reaches the last level of its grid is rounded by any later
quantizer to the same integers, so that what is decided here holds for every method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelops.core.blas import invert_triangle
from modelops.quantizers._captures import Batch, Capture
from modelops.quantizers._histograms import LEVELS, Histogram, Range, Rule, best, quantization
from modelops.quantizers._int8 import FULL_LEVELS, REDUCED_LEVELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rounding = Literal["nearest", "compensated"]
# Share of the mean of the diagonal that is added to it, so that directions that no sample showed are not trusted.
_DAMPING = 0.01
# Rows between two times that all later rows follow at once; few, since numpy is slow within.
_BLOCK = 32


@dataclass(frozen=True)
class Scheme:
    """How a method turns weights and activations to integers; ``rule`` is None where ranges are found at run time."""

    per_channel: bool
    reduced: bool
    rule: Rule | None = None
    percentile: float = 99.99

    @property
    def levels(self) -> int:
        return REDUCED_LEVELS if self.reduced else FULL_LEVELS


def decibels(error: float) -> float:
    """Power of an error over that of the signal, as signal over noise."""
    return round(-10 * math.log10(min(max(error, 1e-12), 1e12)), 2)


def scales(weights: NDArray[Any], scheme: Scheme) -> NDArray[Any]:
    """The step of every column of a K×N matrix, as a row."""
    import numpy as np

    largest = np.abs(weights).max(axis=0 if scheme.per_channel else None, keepdims=True)
    steps = np.asarray(largest.reshape(1, -1) / np.float32(scheme.levels))
    return np.where(steps > np.finfo(np.float32).tiny, steps, np.float32(1.0))


def nearest(weights: NDArray[Any], scheme: Scheme) -> NDArray[Any]:
    """The matrix, every weight at the nearest level."""
    import numpy as np

    steps = scales(weights, scheme)
    return np.asarray(np.rint(weights / steps) * steps)


def compensated(weights: NDArray[Any], moments: NDArray[Any], scheme: Scheme) -> NDArray[Any]:
    """The matrix at its levels, where later rows make up for what rounding earlier ones changed in the product.

    ``moments`` is XᵀX of the rows X that are multiplied with it (Frantar et al. 2022, *GPTQ*, with the order of the
    rows as it is). The largest weight of a column stays at the last level, which keeps the grid what it was. Moments
    that overflowed tell nothing: every weight is rounded to the nearest level then.
    """
    import numpy as np

    if not np.isfinite(moments).all():
        return nearest(weights, scheme)
    steps = scales(weights, scheme)
    size = len(weights)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(size)] += max(_DAMPING * float(np.trace(damped)) / size, 1e-12)
    # The upper Cholesky factor of the inverse tells how the rows that are left have to move. It is the inverse of the
    # upper factor of the moments themselves, which their Cholesky factor in the opposite order of the rows is.
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    lower = np.ascontiguousarray(upper.T)
    invert_triangle(lower)
    factor = lower.T.astype(np.float32)
    left, result = weights.astype(np.float32), np.empty_like(weights, dtype=np.float32)
    pinned = np.abs(weights).argmax(axis=0)
    columns = np.arange(weights.shape[1])
    sign = np.sign(weights[pinned, columns])
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        block, errors = left[start:stop].copy(), np.empty((stop - start, weights.shape[1]), dtype=np.float32)
        for row in range(stop - start):
            at = start + row
            q = np.clip(np.rint(block[row] / steps[0]), -scheme.levels, scheme.levels)
            if scheme.per_channel:
                q = np.where(pinned == at, sign * scheme.levels, q)
            result[at] = q * steps[0]
            errors[row] = (block[row] - result[at]) / factor[at, at]
            block[row + 1 :] -= np.outer(factor[at, at + 1 : stop], errors[row])
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return result


def activations(batch: Batch, factors: NDArray[Any], found: Range | None) -> NDArray[Any]:
    """The rows of a batch times ``factors``, at the levels of this range, or of the batch's own."""
    import numpy as np

    rows = batch.rows * factors
    if found is None:
        found = (min(0.0, float((batch.low * factors).min())), max(0.0, float((batch.high * factors).max())))
    step, zero = quantization(found)
    levels = np.clip(np.rint(rows / np.float32(step)) + zero, 0, LEVELS - 1)
    return np.asarray((levels - zero) * np.float32(step), dtype=np.float32)


def static_range(capture: Capture, factors: NDArray[Any], scheme: Scheme) -> Range | None:
    """The range that the scheme would find for these rows times ``factors``; None where it is found at run time."""
    import numpy as np

    if scheme.rule is None:
        return None
    low, high = float((capture.low() * factors).min()), float((capture.high() * factors).max())
    if scheme.rule == "minmax":
        return min(low, 0.0), max(high, 0.0)
    if scheme.rule == "average":
        ends = [((b.low * factors).min(), (b.high * factors).max()) for b in capture.fitting]
        low, high = (float(end) for end in np.mean(ends, axis=0))
        return min(low, 0.0), max(high, 0.0)
    fitted, held_out = Histogram(low, high), Histogram(low, high)
    for batch in capture.fitting:
        fitted.add(batch.rows * factors)
    for batch in capture.held_out:
        held_out.add(batch.rows * factors)
    return best(fitted, scheme.rule, scheme.percentile, held_out)
