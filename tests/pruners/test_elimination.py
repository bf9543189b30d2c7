"""What is lost when channels go, step by step, is what least squares anew would lose."""

from __future__ import annotations

import numpy as np

from modelops.pruners._activations import Moments
from modelops.pruners._elimination import State, _inverse
from modelops.pruners._equations import Sums


def test_costs_are_those_of_refitting_anew() -> None:
    random = np.random.default_rng(0)
    inputs = random.permutation(300).reshape(75, 4)
    x, weight = random.normal(size=(900, 300)) @ random.normal(size=(300, 300)), random.normal(size=(300, 7))
    moment = x.T @ x / len(x)

    def lost(gone: list[int]) -> float:
        kept = np.setdiff1d(np.arange(300), inputs[gone].reshape(-1))
        best = np.linalg.solve(moment[np.ix_(kept, kept)], moment[kept] @ weight)
        return float(np.sum(weight * (moment @ weight)) - np.sum((moment[kept] @ weight) * best))

    inverse = _inverse(moment)  # which damps the moments in place
    state, left, gone = State(inverse, weight, inputs, 1.0), np.arange(75), list[int]()
    for _ in range(3):
        costs = state.costs(left)
        assert np.allclose(costs[:5], [lost([*gone, int(k)]) - lost(gone) for k in left[:5]], rtol=1e-6)
        first = np.argsort(costs)[:8]
        state.remove(left[first])
        gone, left = [*gone, *left[first].tolist()], np.delete(left, first)


def test_moments_that_rounding_spoilt_have_an_inverse() -> None:
    spoilt = np.array([[1.0, 1.02, 0.0], [1.02, 1.0, 0.0], [0.0, 0.0, -1e-9]])
    assert np.linalg.eigvalsh(_inverse(spoilt)).min() > 0


def test_sums_of_rows_that_come_bit_by_bit_are_those_of_all() -> None:
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(2500, size)).astype(np.float32) for size in (20, 3))
    sums = Sums(20, 3)
    for first in range(0, 2500, 90):
        sums.add(x[first : first + 90], y[first : first + 90])
    sums.join()
    assert sums.rows == 2500
    assert np.allclose(sums.xx, x.T.astype(float) @ x, atol=1e-2)
    assert np.allclose(sums.xy, x.T.astype(float) @ y, atol=1e-2)


def test_a_batch_of_nothing_but_padding_adds_nothing() -> None:
    seen = Moments.of(np.arange(12, dtype=np.float32).reshape(4, 3), 1)
    seen.add(Moments.of(np.zeros((0, 3), np.float32), 1))
    assert np.allclose(seen.variance(), [11.25] * 3)
