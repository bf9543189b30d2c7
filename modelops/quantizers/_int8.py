"""Weights as 8-bit integers: symmetric, one scale per output channel.

``scale = max|w| / levels`` and ``q = round(w / scale)``, where ``levels`` is 127, or 64 with a reduced range: the AVX2
and AVX512 kernels without VNNI add pairs of products in 16 bits, and 2 · 255 · 64 still fits there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelops.quantizers._targets import Target

FULL_LEVELS = 127
REDUCED_LEVELS = 64

ReducedRange = Literal["auto", "yes", "no"]


def reduces(asked: ReducedRange, target: Target) -> bool:
    """Whether weights keep to 7 bits: as asked, or where the target's kernels could saturate."""
    return target.reduced if asked == "auto" else asked == "yes"


def quantized(
    weights: NDArray[Any], *, axis: int | None, reduced: bool
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(integers, scales) of float weights; one scale per index of ``axis``, or one for all when it is None.

    A channel of zeros gets the scale 1.
    """
    import numpy as np

    levels = REDUCED_LEVELS if reduced else FULL_LEVELS
    values = np.asarray(weights, dtype=np.float32)
    if axis is None:
        largest = np.abs(values).max(initial=0.0).reshape(())
        spread = largest
    else:
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        largest = np.abs(values).max(axis=others, initial=0.0)
        spread = np.expand_dims(largest, others)
    tiny = np.finfo(np.float32).tiny
    scales = np.where(largest / levels > tiny, largest / levels, 1.0).astype(np.float32)
    spread = np.where(spread / levels > tiny, spread / levels, 1.0).astype(np.float32)
    integers = np.clip(np.rint(values / spread), -levels, levels).astype(np.int8)
    return integers, scales
