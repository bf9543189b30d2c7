"""Least squares from sums that do not grow with the samples: second moments, and the normal equations of a refit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelops.core.ahead import ahead

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Rows that are multiplied at a time, in float32; the sums are in float64.
_ROWS = 1024
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_USUAL_PENALTY = 1e-1
# Outputs that choose among penalties, at most.
_JUDGES = 128
_ALL = slice(None)
# Solutions at a time: each holds a copy of the equations.
_AT_ONCE = 2


class Sums:
    """xᵀx of rows that come bit by bit, and xᵀy where there is a y."""

    def __init__(self, unknowns: int, outputs: int = 0) -> None:
        import numpy as np

        self.xx = np.zeros((unknowns, unknowns))
        self.xy = np.zeros((unknowns, outputs))
        self._waiting: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self.rows = 0

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """More rows."""
        self._waiting.append((x, y))
        self.rows += len(x)
        if sum(len(part) for part, _ in self._waiting) >= _ROWS:
            self.join()

    def join(self) -> None:
        """Bring ``xx`` and ``xy`` up to the last row."""
        import numpy as np

        if self._waiting:
            x, y = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            self.xx += x.T @ x
            self.xy += x.T @ y


class Equations:
    """Normal equations of missing ≈ x · change + shift, held apart for samples that fit and samples that check."""

    def __init__(self, unknowns: int, outputs: int) -> None:
        self._unknowns = unknowns
        self._halves = [Sums(unknowns + 1, outputs) for _ in range(2)]
        self._yy = [0.0, 0.0]
        self._scale = 0.0

    def add(self, x: NDArray[Any], missing: NDArray[Any], samples: NDArray[np.int64]) -> None:
        """Rows of one batch; ``samples`` says for each which sample it is from. Every fourth sample checks."""
        import numpy as np

        ones = np.ones((len(x), 1), x.dtype)
        wide = np.concatenate([x, ones], axis=1) if self._unknowns else ones
        checks = samples % 4 == 1
        for half, mine in enumerate((~checks, checks)):
            lacking = missing[mine]
            self._halves[half].add(wide[mine], lacking)
            self._yy[half] += float(np.square(lacking, dtype=np.float64).sum())
        self._scale += float(np.square(x, dtype=np.float64).sum())

    @property
    def untouched(self) -> bool:
        """Whether nothing is missing beyond rounding."""
        return sum(self._yy) <= 1e-10 * self._scale

    def solve(self, *, with_bias: bool) -> NDArray[np.float64]:
        """(change below, shift in the last row): fitted on all, with the penalty that serves the samples that check."""
        for half in self._halves:
            half.join()
        penalty = _USUAL_PENALTY
        if all(half.rows for half in self._halves) and self._unknowns:
            few = slice(None, None, -(-self._halves[0].xy.shape[1] // _JUDGES))
            fits = ahead(lambda each: self._told(self._fit((0,), each, with_bias, few), 1, few), _PENALTIES, _AT_ONCE)
            penalty = max(zip(fits, _PENALTIES, strict=True), key=lambda fit: fit[0])[1]
        return self._fit((0, 1), penalty, with_bias)

    def errors(self, solution: NDArray[np.float64]) -> tuple[float, float]:
        """The mean square of what is missing in a row, before and after."""
        before, rows = sum(self._yy), sum(half.rows for half in self._halves)
        after = before - self._told(solution, 0) - self._told(solution, 1)
        return before / rows, max(0.0, after) / rows

    def _fit(
        self, halves: tuple[int, ...], penalty: float, with_bias: bool, outputs: slice = _ALL
    ) -> NDArray[np.float64]:
        """Least squares with a penalty on change, so that what the data does not tell stays as it was."""
        import numpy as np

        xx = np.sum([self._halves[half].xx for half in halves], axis=0)
        xy = np.sum([self._halves[half].xy[:, outputs] for half in halves], axis=0)
        if not with_bias:
            xx[-1, :-1] = xx[:-1, -1] = 0.0
            xy[-1] = 0.0
        inner = np.arange(self._unknowns)
        if self._unknowns:
            xx[inner, inner] += penalty * float(xx[inner, inner].mean()) + 1e-12
        solution: NDArray[Any] = np.linalg.solve(xx, xy)
        return solution

    def _told(self, solution: NDArray[np.float64], half: int, outputs: slice = _ALL) -> float:
        """By how much ‖missing‖² falls with a solution, on one part of the samples."""
        import numpy as np

        sums = self._halves[half]
        return float(2 * np.sum(solution * sums.xy[:, outputs]) - np.sum(solution * (sums.xx @ solution)))
