"""Seeded inputs like those that the source gave as an example: the same range, another draw."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from modelops.graphs.batches import BatchAxis
from modelops.graphs.seeded import random_feed
from modelops.stages._shapes import Envelope

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feed = dict[str, "NDArray[Any]"]
# Rows that take more than the first together come in feeds of the second.
_ALL_BYTES = 48 << 20
_FEED_BYTES = 24 << 20


def row_sizes(envelope: Envelope, arrays: Iterable[NDArray[Any]], count: int) -> list[dict[str, int]]:
    """The sizes of the feeds that hold ``count`` rows: one, unless the batch is fixed or rows are large.

    ``arrays`` are inputs and outputs at the traced sizes, from which the size of a row is told.
    """
    axis = BatchAxis.of(envelope.signature)
    if axis.symbol is None:
        return [dict(envelope.traced)] * -(-count // (axis.size or 1))
    row = max(1.0, sum(array.nbytes for array in arrays) / envelope.traced[axis.symbol])
    size = count if row * count <= _ALL_BYTES else max(2, int(_FEED_BYTES / row))
    size = max(envelope.low(axis.symbol), min(size, envelope.high(axis.symbol) or size))
    return [{**envelope.traced, axis.symbol: size}] * -(-count // size)


def draw(
    envelope: Envelope,
    sizes: Mapping[str, int],
    examples: Mapping[str, NDArray[Any]],
    ranges: Mapping[str, int],
    seed: int,
    *,
    keep_integers: bool = False,
) -> Feed:
    """One feed with dimensions of these sizes, always the same for the same arguments.

    ``examples`` may be empty. Integers stay within the range of the example, or below what ``ranges`` says of them;
    with ``keep_integers`` they are the example's own, repeated where more are needed.
    """
    batch = envelope.batch
    known = {**_tops(examples), **ranges}
    feed = random_feed(envelope.signature, sizes[batch] if batch else 1, seed, sizes, known)
    for name, example in examples.items():
        if keep_integers and example.dtype.kind in "iub":
            feed[name] = _repeated(example, feed[name].shape)
        elif name not in ranges:
            feed[name] = _like(example, feed[name], (seed, zlib.crc32(name.encode())))
    return feed


def _repeated(example: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    import numpy as np

    for axis, size in enumerate(shape):
        example = np.take(example, np.arange(size) % example.shape[axis], axis)
    return example


def _tops(examples: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """How many values each integer input may take, as far as the example shows."""
    integers = {name: array for name, array in examples.items() if array.dtype.kind in "iu" and array.size}
    return {name: max(2, int(array.max()) + 1) for name, array in integers.items() if int(array.min()) >= 0}


def _like(example: NDArray[Any], drawn: NDArray[Any], seed: tuple[int, int]) -> NDArray[Any]:
    """The draw moved into the example's range."""
    import numpy as np

    if not example.size or example.dtype.kind == "b":
        return drawn
    random = np.random.default_rng(seed)
    low, high = example.min().item(), example.max().item()
    if example.dtype.kind in "iu":
        if low < 0 or (low > 0 and not (example == 1).all()):  # all ones: a mask that masks nothing
            whole: NDArray[Any] = random.integers(low if high > low else min(1, low), high + 1, drawn.shape)
            return whole.astype(example.dtype)
        return drawn
    if low == high:
        # A setting such as a temperature stays near its value; many zeros or ones are a placeholder.
        if example.size <= 4 and low != 0:
            near: NDArray[Any] = low * random.uniform(0.5, 1.5, drawn.shape)
            return near.astype(example.dtype)
        return drawn
    if low >= 0:
        flat: NDArray[Any] = random.uniform(low, high, drawn.shape).astype(example.dtype)
        return flat
    mean, spread = float(example.mean(dtype=np.float64)), float(example.std(dtype=np.float64))
    if abs(mean) < 0.5 and 0.5 < spread < 2:
        return drawn
    bell: NDArray[Any] = (mean + spread * random.standard_normal(drawn.shape)).astype(example.dtype)
    return bell
