"""The inputs that validate makes up where there are none, or beside the user's: seeded rows, and corners of shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from modelops.core.artifact import Artifact
from modelops.core.tensors import Signature
from modelops.graphs.batches import BatchAxis
from modelops.graphs.reference import FILE_NAME, read
from modelops.graphs.seeded import corner_feeds, index_bounds, random_feeds
from modelops.measures.judging import ROWS_MIN
from modelops.stages._measuring import Given

_TINY = 16 << 10  # bytes of a model


def made_up(source: Artifact, reference: Artifact, *, samples: int | None, seed: int) -> tuple[str, Iterator[Given]]:
    """(what they are, inputs): those of a reference.npz, else seeded ones by what names mean."""
    for artifact in (reference, source):
        if artifact.has(FILE_NAME) and samples is None:
            cases = read(artifact.file(FILE_NAME))
            axis = BatchAxis.of(artifact.signature)
            return "the inputs of the reference", (
                Given(case.feed, axis.rows(case.feed), f"case {case.name!r}") for case in cases
            )
    return f"seeded inputs (seed {seed})", _seeded(reference, samples, seed)


def _seeded(reference: Artifact, samples: int | None, seed: int) -> Iterator[Given]:
    signature, bounds = reference.signature, index_bounds(reference.model)
    axis = BatchAxis.of(signature)
    rows = samples or _rows_enough(reference)
    for number, feed in enumerate(random_feeds(signature, rows, seed, bounds)):
        yield Given(feed, axis.rows(feed), f"seeded inputs {number}", made_up=True)
    yield from corners(reference, seed)


def corners(reference: Artifact, seed: int) -> Iterator[Given]:
    """Small inputs at the corners of the dynamic dimensions; a reference may be unable to run them."""
    signature, bounds = reference.signature, index_bounds(reference.model)
    axis = BatchAxis.of(signature)
    for number, feed in enumerate(corner_feeds(signature, seed, bounds)):
        yield Given(feed, axis.rows(feed), f"shape corner {number}", made_up=True, corner=True)


def fitting(stream: Iterator[Given], signature: Signature) -> Iterator[Given]:
    """Those that a model takes by its own word, but for the number of samples."""
    axis = BatchAxis.of(signature)
    for given in stream:
        shapes = {spec.name: spec.shape for spec in signature.inputs}
        if all(
            dim == size or not isinstance(dim, int) or (place == 0 and name in axis.inputs)
            for name, array in given.feed.items()
            for place, (dim, size) in enumerate(zip(shapes[name], array.shape, strict=False))
        ):
            yield given


def _rows_enough(model: Artifact) -> int:
    """How many samples to make up: 32, and more for a tiny model, few of whose values would meet a threshold."""
    elements = sum(math.prod(dim if isinstance(dim, int) else 8 for dim in s.shape[1:]) for s in model.signature.inputs)
    return max(ROWS_MIN, min(256, 4096 // max(1, elements))) if model.size < _TINY else ROWS_MIN
