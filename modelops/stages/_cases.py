"""The cases that a conversion is held against: sample rows and shape corners, as the source itself answers them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from modelops.core.progress import progress
from modelops.core.report import Check
from modelops.graphs import reference
from modelops.graphs.reference import ROWS, Case
from modelops.sources._user_code import summary, told
from modelops.stages._draw import Feed, draw, row_sizes
from modelops.stages._effort import ROWS as ROWS_WANTED
from modelops.stages._prepare import Prepared, refuse_fixed, refuse_random
from modelops.stages._shapes import Envelope
from modelops.stages._trial import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Dims = Sequence[int | str | None]


@dataclass(frozen=True)
class Cases:
    """The cases; what is known of the outputs' dimensions; and the corners that the source itself refused.

    ``few`` says that there are fewer than 32 sample rows, so that the corners count as rows as well.
    ``envelope`` has the least sizes that the source accepts, ``stored`` the names of the cases that reference.npz can
    hold. ``problem`` is a check that failed already, because of
    which nothing can be compared.
    """

    cases: list[Case]
    envelope: Envelope
    layout: Layout = field(default_factory=lambda: Layout(None, {}))
    stored: frozenset[str] = frozenset()
    refused: list[tuple[str, dict[str, int], str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: Check | None = None
    few: bool = False


def observe(prepared: Prepared, *, rows: int | None, seed: int) -> Cases:
    """Run the source on seeded rows and at the corners of the envelope; without ``rows``, on as many as it affords."""
    refuse_random(prepared, prepared.effort.rows(rows))
    watcher = _Watcher(prepared, seed)
    count, batch = prepared.effort.rows(rows), prepared.envelope.batch
    few = rows is None and count < ROWS_WANTED
    if few and batch is not None:
        taken = sum(sizes[batch] for sizes in prepared.envelope.corners().values())
        count = max(count // 2, count - taken)
    cases = watcher.sample(count)
    problem = _undefined(prepared, cases)
    if problem is not None:
        return Cases(cases, prepared.envelope, problem=problem)
    corners = watcher.corners()
    layout = Layout(watcher.envelope.batch, _output_dims(watcher.envelope, watcher.seen))
    if layout.unbatched:
        cases = watcher.sample(count, whole=True)
    kept, stored, notes = trimmed([*cases, *corners])
    if prepared.samples is not None:
        notes.append(f"the first {len(prepared.samples.first(count))} samples of --data are in reference.npz")
    if few:
        notes.append(f"an expensive model: it was checked on {count} rows beside the corners, not on {ROWS_WANTED}")
    return Cases(kept, watcher.envelope, layout, stored, watcher.refused, watcher.notes + notes, few=few)


class _Watcher:
    """Runs the source, and notes the shapes that come out."""

    def __init__(self, prepared: Prepared, seed: int) -> None:
        self.prepared, self.seed = prepared, seed
        self.eager, self.envelope = prepared.eager, prepared.envelope
        self.keep_integers = False
        self.refused: list[tuple[str, dict[str, int], str]] = []
        self.notes: list[str] = []
        self.seen: list[tuple[Mapping[str, int], Mapping[str, tuple[int, ...]]]] = []

    def sample(self, count: int, *, whole: bool = False) -> list[Case]:
        """The case ``rows``, or ``rows-00`` and so on where one feed can't hold them.

        With ``whole`` every row is a feed of its own: for outputs that give one value for a whole batch.
        """
        arrays = [*self.eager.feed().values(), *self.prepared.outputs.values()]
        sizes = [dict(self.envelope.traced)] * count if whole else row_sizes(self.envelope, arrays, count)
        samples, batch = self.prepared.samples, self.envelope.batch
        if samples is not None:
            samples = samples.first(count)
            given = self._given(list(samples.feeds(1 if whole or batch is None else sizes[0][batch])))
            left = count - len(samples)
            rest = [] if left <= 0 else sizes[:left] if whole else row_sizes(self.envelope, arrays, left)
            return _numbered([*given, *self._drawn(rest)])
        return _numbered(self._drawn(sizes))

    def _drawn(self, sizes: Sequence[Mapping[str, int]]) -> list[Case]:
        """The cases of made-up feeds of these sizes."""
        work = [(ROWS, each, self.seed + number) for number, each in enumerate(sizes)]
        try:
            return [self._case(*item) for item in work]
        except Exception as error:
            # Is it a size, or a value, that the module refuses?
            refuse_fixed(self.eager, self.envelope)
            log.debug("the module refuses other integers than its example's", exc_info=error)
            self.keep_integers = bool(self.prepared.examples)
        with told(None, "running the module on inputs like its example inputs"):
            return [self._case(*item) for item in work]

    def corners(self) -> list[Case]:
        """One case for every corner that the source accepts; where it refuses the least sizes, the least it accepts."""
        found = self._corner("minimum")
        if self.refused:
            self.refused.clear()
            for dim in self.envelope.dims:
                self._raise_low(dim)
            found = self._corner("minimum")
        for name in self.envelope.corners():
            found += self._corner(name) if name != "minimum" else []
        return found

    def _corner(self, name: str) -> list[Case]:
        """The case of one corner; none where there is no such corner, or the source refuses it."""
        sizes = self.envelope.corners().get(name)
        if sizes is None:
            return []
        progress(f"running the source, {name}")
        try:
            return [self._case(name, sizes, self.seed + 1000 + len(self.seen))]
        except Exception as error:
            self.refused.append((name, sizes, summary(error)))
            return []

    def _case(self, name: str, sizes: Mapping[str, int], seed: int) -> Case:
        return self._run(name, self._draw(sizes, seed), sizes)

    def _run(self, name: str, feed: Feed, sizes: Mapping[str, int]) -> Case:
        outputs = self.eager.run(feed)
        self.seen.append((dict(sizes), {name: value.shape for name, value in outputs.items()}))
        return Case(name, feed, outputs)

    def _given(self, feeds: Sequence[Feed]) -> list[Case]:
        """The cases of the user's own samples."""
        with told(None, "running the module on the samples of --data"):
            return [self._run(ROWS, feed, self.envelope.sizes(feed)) for feed in feeds]

    def _draw(self, sizes: Mapping[str, int], seed: int) -> Feed:
        known = self.prepared.examples, self.prepared.ranges
        return draw(self.envelope, sizes, *known, seed, keep_integers=self.keep_integers)

    def _refusal(self, sizes: Mapping[str, int]) -> str:
        """Why the source does not run at these sizes; empty when it does."""
        try:
            self.eager.run(self._draw({**self.envelope.traced, **sizes}, self.seed))
        except Exception as error:
            return summary(error)
        return ""

    def _raise_low(self, dim: str) -> None:
        """Find the least size that the source accepts there, between the bound and the traced size."""
        low, high = self.envelope.low(dim), self.envelope.traced[dim]
        reason = self._refusal({dim: low})
        if not reason:
            return
        while high - low > 1:
            middle = (low + high) // 2
            why = self._refusal({dim: middle})
            low, high = (middle, high) if why else (low, middle)
        self.notes.append(f"the source itself takes no {dim} below {high}: {reason}")
        bounds = {**self.envelope.bounds, dim: (high, self.envelope.high(dim))}
        self.envelope = replace(self.envelope, bounds=bounds)


def _numbered(cases: Sequence[Case]) -> list[Case]:
    """Cases of sample rows by their names: ``rows`` where there is one, else ``rows-00`` and so on."""
    if len(cases) == 1:
        return list(cases)
    return [replace(case, name=f"{ROWS}-{number:02}") for number, case in enumerate(cases)]


def _undefined(prepared: Prepared, cases: Sequence[Case]) -> Check | None:
    """A check that failed where the source itself gives NaN."""
    import numpy as np

    def share(arrays: Sequence[NDArray[Any]]) -> float:
        return float(np.mean([np.isnan(array).mean() if array.size else 0.0 for array in arrays]))

    for name, value in prepared.outputs.items():
        if value.dtype.kind != "f":
            continue
        if prepared.examples and np.isnan(value).any():
            text = f"{name}: the source gives NaN for its own example inputs, in {share([value]):.0%} of the elements"
            return Check(f"{name}.source", "fail", text)
        found = share([case.outputs[name] for case in cases])
        if found > 0:
            text = (
                f"{name}: the source gives NaN for {found:.0%} of the elements on made-up inputs: "
                "give example inputs in the range that it is made for"
            )
            return Check(f"{name}.source", "inconclusive", text)
    return None


def _output_dims(
    envelope: Envelope, seen: Sequence[tuple[Mapping[str, int], Mapping[str, tuple[int, ...]]]]
) -> dict[str, Dims]:
    """For every output: what each dimension is, by how it moved with the sizes of the inputs."""
    found: dict[str, Dims] = {}
    for name, first in seen[0][1].items():
        if any(len(shapes[name]) != len(first) for _, shapes in seen):
            found[name] = (None,) * len(first)
            continue
        columns = [tuple(shapes[name][axis] for _, shapes in seen) for axis in range(len(first))]
        moves = {dim: tuple(sizes[dim] for sizes, _ in seen) for dim in envelope.dims}
        found[name] = [
            next((dim for dim, sizes in moves.items() if sizes == column), None) if len(set(column)) > 1 else column[0]
            for column in columns
        ]
    return found


def trimmed(cases: Sequence[Case]) -> tuple[list[Case], frozenset[str], list[str]]:
    """The cases with wide outputs cut to some columns; the names of those that reference.npz can hold; and remarks."""
    stored, notes = _storable(cases)
    inputs = sum(_input_bytes(case) for case in cases if case.name in stored)
    shapes = [
        {n: (v.shape, v.itemsize + (8 if v.dtype.kind == "f" else 0)) for n, v in case.outputs.items()}
        for case in cases
    ]
    columns = reference.affordable(shapes, available=reference.LIMIT_BYTES - inputs - (1 << 20))
    kept = []
    for case, cut in zip(cases, columns, strict=True):
        case = replace(case, columns=cut)
        kept.append(replace(case, outputs=case.take(case.outputs)))
    names = sorted({name for cut in columns for name in cut})
    if names:
        notes.append(f"reference.npz keeps a part of the columns of {', '.join(names)}")
    return kept, stored, notes


def _storable(cases: Sequence[Case]) -> tuple[frozenset[str], list[str]]:
    """The names of the leading cases whose inputs take three quarters of what reference.npz may hold."""
    stored: set[str] = set()
    left = 0.75 * reference.LIMIT_BYTES
    for case in cases:
        if not stored or _input_bytes(case) <= left:
            stored.add(case.name)
            left -= _input_bytes(case)
    notes = [f"reference.npz holds {len(stored)} of the {len(cases)} cases"] if len(stored) < len(cases) else []
    return frozenset(stored), notes


def _input_bytes(case: Case) -> int:
    return sum(array.nbytes for array in case.feed.values())
