"""How much work one row of a model is: it decides on how many rows, and threads, a conversion is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelops.stages._eager import Eager

ROWS = 32
LEAST_ROWS = 16
"""Rows that a model is checked on at least, those of the corners included, however large it is."""
_AFFORDABLE = 140e9  # operations: some seconds on a core, less than exporting such a model takes
_WORTH_THREADS = 50e9
# However many CPUs there are: sums come out in another order on another number of threads, at some shapes and dtypes.
_THREADS = 2


@dataclass(frozen=True)
class Effort:
    """The multiplications and additions in matrix products and convolutions for one row; 0 where it is not known.

    ``convolutions`` is the share of the latter.
    """

    operations: float = 0.0
    convolutions: float = 0.0

    def rows(self, wanted: int | None) -> int:
        """How many rows to check: as many as were asked for, else 32, or of an expensive model fewer with corners."""
        if wanted is not None or self.operations * ROWS <= _AFFORDABLE:
            return wanted or ROWS
        return max(LEAST_ROWS, int(_AFFORDABLE / self.operations))

    def threads(self, rows: int) -> int:
        """How many threads to run that many rows on: the same on every machine, as the last bits depend on it.

        Convolutions stay on one.
        """
        if self.operations * rows <= _WORTH_THREADS or self.convolutions > 0.5:
            return 1
        return _THREADS


class Counter:
    """Counts operations while the block lasts."""

    def __init__(self) -> None:
        self.total = self.convolutions = 0.0

    def effort(self, rows: int) -> Effort:
        return Effort(self.total / max(1, rows), self.convolutions / self.total if self.total else 0.0)

    @contextmanager
    def counting(self) -> Iterator[None]:
        from torch.utils._python_dispatch import TorchDispatchMode

        counter = self

        class Mode(TorchDispatchMode):  # type: ignore[misc]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                name = func._schema.name.removeprefix("aten::")
                found = operations(name, args, out)
                counter.total += found
                counter.convolutions += found if "convolution" in name else 0.0
                return out

        with Mode():
            yield


def operations(name: str, args: Sequence[Any], out: Any) -> float:
    """The multiplications and additions of one call: of products, convolutions and attention; 0 for all else."""
    if name in ("mm", "bmm"):
        return 2.0 * _size(args[0].shape) * int(args[1].shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2.0 * _size(args[1].shape) * int(args[2].shape[-1])
    if name in ("convolution", "mkldnn_convolution", "_convolution"):
        x, weight = args[0], args[1]
        transposed = len(args) > 6 and args[6] is True
        if transposed:
            return 2.0 * _size(x.shape) * _size(weight.shape[1:])
        return 2.0 * _size(out.shape) * _size(weight.shape[1:])
    if name.startswith("_scaled_dot_product"):
        query, key = args[0], args[1]
        return 4.0 * _size(query.shape) * int(key.shape[-2])
    return 0.0


def _size(shape: Sequence[int]) -> int:
    return math.prod(int(dim) for dim in shape)


def settle_threads(eager: Eager, first: Mapping[str, NDArray[Any]], many: int) -> str | None:
    """Choose how many threads the module runs on, by running it again on its example inputs.

    ``first`` is what one thread gave. Several are used only where they give the same, bit for bit; what they give at
    other sizes may differ from what one thread gives, and is repeatable since their number is fixed. Gives the name of
    an output that differs between two runs on one thread, if there is one.
    """
    known, differing = [first], None
    for threads in (many, 1, 1) if many > 1 else (1, 1):
        eager.threads = threads
        found = eager.run(eager.feed())
        apart = [_differing(other, found) for other in known]
        if None in apart:
            return None
        known, differing = ([first, found] if threads == 1 else [first]), apart[0]
    return differing


def _differing(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> str | None:
    import numpy as np

    pairs = ((name, value, other[name]) for name, value in one.items())
    return next(
        (name for name, a, b in pairs if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f")),
        None,
    )
