"""Arithmetic that comes out the same on any number of CPUs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Up to this many rows a triangle is inverted as a whole.
_TRIANGLE = 64


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """numpy's matrix products and solvers on one thread inside the block: sums are then always in the same order.

    It reaches the OpenBLAS that comes with numpy's wheels; another BLAS is left as it is.
    """
    import numpy

    controls = []
    for place in sorted((Path(numpy.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas*.so*")):
        library = ctypes.CDLL(str(place))
        for suffix in ("64_", ""):
            if hasattr(library, f"scipy_openblas_set_num_threads{suffix}"):
                controls.append(
                    (
                        getattr(library, f"scipy_openblas_set_num_threads{suffix}"),
                        getattr(library, f"scipy_openblas_get_num_threads{suffix}")(),
                    )
                )
                break
    for change, _ in controls:
        change(1)
    try:
        yield
    finally:
        for change, before in controls:
            change(before)


def invert_triangle(triangle: NDArray[Any]) -> None:
    """Invert a lower triangle (n × n) in place, by halves: an eighth of the work of a general inverse."""
    import numpy as np

    half = len(triangle) // 2
    if len(triangle) <= _TRIANGLE:
        triangle[:] = np.linalg.inv(triangle)
        return
    invert_triangle(triangle[:half, :half])
    invert_triangle(triangle[half:, half:])
    triangle[half:, :half] = -(triangle[half:, half:] @ triangle[half:, :half] @ triangle[:half, :half])
