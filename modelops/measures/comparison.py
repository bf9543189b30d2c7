"""Measures how far the outputs of one model lie from those of another, over a stream of batches in bounded memory.

All figures are computed in float64, in pieces of at most a million elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from modelops.measures.differences import Difference, Head, Worst
from modelops.measures.tallies import (
    CHUNK,
    Classes,
    Histogram,
    Neighbours,
    Norm,
    Variation,
    are_probabilities,
    is_float,
    tied_rows,
    ulps,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CLASS_WORDS = ("logit", "score", "prob", "class", "label", "softmax")
_EMBEDDING_WORDS = ("embed", "pool", "feature", "hidden", "sentence", "vector", "repr")
_ULP_FLOOR = 1e-6  # elements below this share of the scale (as known so far) are rounding of zero


def compare(
    pairs: Iterable[tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]],
    *,
    heads: Mapping[str, Head] | None = None,
    batched: bool = True,
) -> dict[str, Difference]:
    """The difference of every output over a stream of (reference outputs, actual outputs); see ``Comparison``."""
    comparison = Comparison(heads=heads, batched=batched)
    for reference, actual in pairs:
        comparison.add(reference, actual)
    return comparison.differences()


class Comparison:
    """Compares two models' outputs, batch by batch.

    ``heads`` says of outputs what they mean where the guess would be wrong. ``batched`` False means that the first axis
    is not the batch: each pair of arrays is then one row. ``axes`` says of outputs on which axis their rows lie where
    that is another one, as it is for the states of an LSTM.
    """

    def __init__(
        self,
        *,
        heads: Mapping[str, Head] | None = None,
        batched: bool = True,
        axes: Mapping[str, int] | None = None,
    ) -> None:
        self._heads = dict(heads or {})
        self._batched = batched
        self._axes = dict(axes or {}) if batched else {}
        self._outputs: dict[str, _Output] = {}

    def add(self, reference: Mapping[str, NDArray[Any]], actual: Mapping[str, NDArray[Any]], origin: str = "") -> None:
        """Count one batch, which ``origin`` names. Outputs that only one side has become problems, not errors."""
        reference, actual = self._rows_first(reference), self._rows_first(actual)
        ties = self._ties(reference) if self._batched else None
        for name in (*reference, *(extra for extra in actual if extra not in reference)):
            output = self._outputs.setdefault(name, _Output(name, self._heads.get(name), self._batched))
            if name not in actual:
                output.problem = output.problem or "missing"
            elif name not in reference:
                output.problem = output.problem or "not in the reference"
            else:
                output.origin = origin
                output.add(reference[name], actual[name], ties)

    def worst(self) -> dict[str, Worst | None]:
        """The worst element of every output so far."""
        return {name: output.worst for name, output in self._outputs.items()}

    def differences(self) -> dict[str, Difference]:
        """The figures so far."""
        return {name: output.difference() for name, output in self._outputs.items()}

    def _rows_first(self, outputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        import numpy as np

        if not self._axes:
            return outputs
        axes = {name: axis for name, axis in self._axes.items() if name in outputs and np.ndim(outputs[name]) > axis}
        return {**outputs, **{name: np.moveaxis(outputs[name], axis, 0) for name, axis in axes.items()}}

    def _ties(self, reference: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_] | None:
        """Rows in which a chosen index may differ rightly, because the two best scores of the reference tie."""
        import numpy as np

        arrays = [np.asarray(value) for value in reference.values()]
        if all(is_float(array.dtype) for array in arrays):
            return None
        scores = [a for a in arrays if is_float(a.dtype) and a.ndim == 2 and a.shape[1] > 1]
        if not scores or len({len(a) for a in scores}) != 1:
            return None
        result: NDArray[np.bool_] = np.any([tied_rows(a) for a in scores], axis=0)
        return result


def guess_head(name: str, array: NDArray[Any]) -> Head:
    """What an output means, by its name, else by its values: rows of length one embed, other matrices are scores."""
    import numpy as np

    lowered = name.lower()
    if array.ndim < 2 or array.shape[-1] < 2 or not is_float(array.dtype):
        return "other"
    if any(word in lowered for word in _CLASS_WORDS) and array.ndim <= 3:
        return "classes"
    if any(word in lowered for word in _EMBEDDING_WORDS):
        return "embedding" if array.ndim == 2 else "other"
    values = array[:64].astype(np.float64)
    if array.ndim == 3:
        return "classes" if are_probabilities(values) else "other"
    if array.ndim == 2:
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(values, axis=1)
        unit = bool(np.abs(lengths - 1).max(initial=0.0) < 1e-2)
        return "embedding" if unit and not are_probabilities(values) else "classes"
    return "other"


def _seen(before: tuple[int | str, ...], shape: tuple[int, ...]) -> tuple[int | str, ...]:
    """The shape of all that came so far, with ``*`` for the rows and where it varied."""
    if len(before) != len(shape):
        return ("*", *shape[1:])
    return tuple(old if old == new else "*" for old, new in zip(before, shape, strict=True))


class _Output:
    """The running tallies of one output."""

    def __init__(self, name: str, head: Head | None, batched: bool) -> None:
        self.name = name
        self.problem = self.origin = ""
        self._head = head
        self._batched = batched
        self._rows = self._elements = self._compared = 0
        self._mismatches = self._new = self._equal = self._unequal = self._ties = 0
        self._dtype = self._actual_dtype = ""
        self._rank, self._exact = 0, False
        self._shape: tuple[int | str, ...] = ()
        self._scale, self._max = 0.0, -1.0
        self._signal, self._noise = Norm(), Norm()
        self._abs, self._ulp = Histogram(), Histogram()
        self._cosine_sum, self._cosine_min, self._cosine_rows = 0.0, 2.0, 0
        self._variation, self._actual_variation = Variation(), Variation()
        self._classes, self._neighbours = Classes(), Neighbours()
        self._worst: Worst | None = None
        self._first_text: NDArray[Any] | None = None

    def add(self, reference: NDArray[Any], actual: NDArray[Any], ties: NDArray[np.bool_] | None) -> None:
        import numpy as np

        y, x = np.asarray(reference), np.asarray(actual)
        self._dtype = self._dtype or y.dtype.name
        if x.dtype != y.dtype or not self._actual_dtype:
            self._actual_dtype = x.dtype.name
        if x.shape != y.shape:
            self.problem = self.problem or f"shape {x.shape}, the reference has {y.shape}"
            return
        if y.ndim == 0 or not self._batched:
            y, x = y[None], x[None]
        self._shape = _seen(self._shape, y.shape)
        self._rank = y.ndim
        if y.dtype.kind == "c" or x.dtype.kind == "c":
            y, x = (np.stack([v.real, v.imag], axis=-1) for v in (y, x))
        self._exact = not (is_float(y.dtype) or is_float(x.dtype))
        if y.size:
            self._head = self._head or guess_head(self.name, y)
            if self._exact:
                self._add_exact(y, x, ties)
            else:
                self._add_floats(y, x)
        self._rows += len(y)
        self._elements += y.size

    def _add_exact(self, y: NDArray[Any], x: NDArray[Any], ties: NDArray[np.bool_] | None) -> None:
        import numpy as np

        rows_y, rows_x = y.reshape(len(y), -1), x.reshape(len(x), -1)
        same = np.zeros(rows_y.shape, dtype=bool)
        same |= np.asarray(rows_y == rows_x, dtype=bool)  # one False for all where text meets numbers
        tied = np.zeros_like(same)
        if ties is not None and len(ties) == len(y):
            tied = ~same & ties[:, None]
        self._ties += int(tied.sum())
        self._equal += int(same.sum())
        wrong = ~same & ~tied
        self._unequal += int(wrong.sum())
        self._compared += y.size
        if self._worst is None and wrong.any():
            self._worst = self._locate(y, x, int(wrong.reshape(-1).argmax()))
        if y.dtype.kind in "biu" and x.dtype.kind in "biu":
            self._variation.add(rows_y)
            self._actual_variation.add(rows_x)
            self._scale = max(self._scale, float(np.abs(rows_y.astype(np.float64)).max()))
        else:  # text varies where it is not that of the first row
            self._first_text = rows_y[0] if self._first_text is None else self._first_text
            for variation, rows in ((self._variation, rows_y), (self._actual_variation, rows_x)):
                variation.add(np.array([[not np.array_equal(row, self._first_text)] for row in rows]))
            self._scale = 1.0

    def _add_floats(self, y: NDArray[Any], x: NDArray[Any]) -> None:
        import numpy as np

        rows_y, rows_x = y.reshape(len(y), -1), x.reshape(len(x), -1)
        width = rows_y.shape[1]
        step, stride = max(1, CHUNK // width), min(width, CHUNK)
        with np.errstate(over="ignore", invalid="ignore"):
            for top in range(0, len(y), step):
                dots = np.zeros((3, len(rows_y[top : top + step])))
                for left in range(0, width, stride):
                    part = (slice(top, top + step), slice(left, left + stride))
                    dots += self._add_part(rows_y[part], rows_x[part], top, left, (y, x))
                if width > 1:
                    self._add_cosines(dots)
            self._variation.add(rows_y)
            self._actual_variation.add(rows_x)
            if self._head == "classes" and y.ndim >= 2 and y.shape[-1] > 1:
                self._classes.add(y, x)
            elif self._head == "embedding" and y.ndim == 2:
                self._neighbours.add(y, x)

    def _add_part(
        self, y: NDArray[Any], x: NDArray[Any], top: int, left: int, whole: tuple[NDArray[Any], NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Count a rectangle of elements; gives each row's products y·x, y·y and x·x."""
        import numpy as np

        y, x = y.astype(np.float64), x.astype(np.float64)
        width = whole[0].reshape(len(whole[0]), -1).shape[1]
        both = np.isfinite(y) & np.isfinite(x)
        if not both.all():
            differ = ~both & ~((np.isnan(y) & np.isnan(x)) | (y == x))
            self._mismatches += int(differ.sum())
            self._new += int((differ & np.isfinite(y)).sum())
            if differ.any() and not math.isinf(self._max):  # outranks every finite error as the worst element
                self._max = math.inf
                row, column = divmod(int(differ.reshape(-1).argmax()), y.shape[1])
                self._worst = self._locate(*whole, (top + row) * width + left + column)
            y, x = np.where(both, y, 0.0), np.where(both, x, 0.0)
        delta = np.minimum(np.abs(x - y), np.finfo(np.float64).max)
        self._compared += int(both.sum())
        self._scale = max(self._scale, float(np.abs(y).max()))
        self._signal.add(y)
        self._noise.add(delta)
        self._abs.add(delta[both])
        counted = both & (np.abs(y) >= _ULP_FLOOR * self._scale) & (y != 0)
        units = ulps(delta[counted], y[counted], self._dtype) if self._dtype == self._actual_dtype else None
        if units is not None:
            self._ulp.add(units)
        largest = int(delta.reshape(-1).argmax())
        if delta.reshape(-1)[largest] > self._max:
            self._max = float(delta.reshape(-1)[largest])
            row, column = divmod(largest, y.shape[1])
            self._worst = self._locate(*whole, (top + row) * width + left + column)
        return np.stack([np.einsum("ij,ij->i", a, b) for a, b in ((y, x), (y, y), (x, x))])

    def _add_cosines(self, dots: NDArray[np.float64]) -> None:
        import numpy as np

        product, yy, xx = dots
        lengths = np.sqrt(yy) * np.sqrt(xx)
        both_zero = (yy == 0) & (xx == 0)
        cosine = np.where(both_zero, 1.0, np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0))
        cosine = np.clip(cosine[np.isfinite(cosine)], -1.0, 1.0)
        if cosine.size:
            self._cosine_sum += float(cosine.sum())
            self._cosine_rows += cosine.size
            self._cosine_min = min(self._cosine_min, float(cosine.min()))

    def _locate(self, y: NDArray[Any], x: NDArray[Any], flat: int) -> Worst:
        import numpy as np

        index = tuple(int(i) for i in np.unravel_index(flat, y.shape))
        values = []
        for array in (y, x):
            value = array[index]
            number = float(value) if array.dtype.kind != "O" and array.dtype.kind not in "SUT" else math.nan
            values.append(number if math.isfinite(number) else str(value))
        return Worst(self._rows + index[0], index[1:], values[0], values[1], self.origin, index[0])

    @property
    def worst(self) -> Worst | None:
        return self._worst

    def difference(self) -> Difference:
        floats = not self._exact and self._compared > 0
        histogram = self._abs
        judged = self._equal + self._unequal
        nearest, nearest_rows = self._neighbours.agreement()
        counted = self._classes.n
        return Difference(
            output=self.name,
            dtype=self._dtype,
            actual_dtype=self._actual_dtype,
            rank=self._rank,
            shape=self._shape,
            head=self._head or "other",
            exact=self._exact,
            problem=self.problem,
            rows=self._rows,
            elements=self._elements,
            compared=self._compared,
            mask_mismatches=self._mismatches,
            new_nonfinite=self._new,
            scale=self._scale,
            signal=self._signal.value,
            noise=self._noise.value,
            max_abs=histogram.largest if floats else None,
            mean_abs=histogram.mean if floats else None,
            p50_abs=histogram.quantile(0.5),
            p99_abs=histogram.quantile(0.99),
            p999_abs=histogram.quantile(0.999),
            cosine_mean=self._cosine_sum / self._cosine_rows if self._cosine_rows else None,
            cosine_min=self._cosine_min if self._cosine_rows else None,
            ulp_p99=self._ulp.quantile(0.99),
            ulp_max=self._ulp.largest if self._ulp.n else None,
            top1=self._classes.top1 / counted if counted else None,
            top5=self._classes.top5 / counted if counted and self._classes.classes > 5 else None,
            decisions=counted,
            kl_mean=self._classes.kl.mean,
            kl_p99=self._classes.kl.quantile(0.99),
            nearest=nearest,
            nearest_rows=nearest_rows,
            equal=self._equal / judged if judged else None,
            ties=self._ties,
            variation=self._variation.relative(self._scale),
            actual_variation=self._actual_variation.relative(self._scale),
            worst=self._worst,
        )
