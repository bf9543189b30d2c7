"""A network that is run stretch by stretch on many samples, whose values in flight are kept on disk meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modelops.core.ahead import ahead
from modelops.graphs.batches import BatchAxis
from modelops.pruners._segments import Parts, Segment

Feed = dict[str, Any]
Digest = Callable[[int, Feed], Any]
# Samples that run at a time: few, so that the values of wide layers fit into memory; more of those that are short, as
# sentences are.
_ROWS, _SHORT_ROWS = 4, 16
_SHORT = 256


class Flight:
    """The values that a network has at one place, batch by batch.

    ``samples`` counts them; ``firsts`` holds for every batch the number of its first sample, and ``masks`` what the
    model's mask hides (samples × positions).
    """

    def __init__(self, parts: Parts, scratch: Path) -> None:
        self._parts = parts
        self._scratch = scratch
        self._folder = scratch / "0"
        self._names: list[str] = []
        self._moves = 0
        self.samples = 0
        self.firsts: list[int] = []
        self.masks: list[Any] = []

    @property
    def masked(self) -> bool:
        return any(mask is not None for mask in self.masks)

    def start(self, feeds: Iterable[Feed]) -> None:
        """Begin with these inputs of the model."""
        for number, feed in enumerate(feeds):
            self._names = self._names or list(feed)
            _store(self._folder / f"{number:06}", [feed[name] for name in self._names])
            self.firsts.append(self.samples)
            self.samples += len(next(iter(feed.values())))
            self.masks.append(_mask(feed))

    def __iter__(self) -> Iterator[Feed]:
        """What is there, batch after batch."""
        return map(self._load, self._batches())

    def look(self, wanted: Sequence[str], digest: Digest | None = None) -> Iterator[Any]:
        """The values of these names, or what ``digest`` makes of a batch's number and them, batch after batch.

        Digests are made side by side, like the values. The place stays where it is.
        """
        batches = self._batches()
        segment = Segment(self._parts, self._load(batches[0]), wanted)

        def found(number: int) -> Any:
            values = segment.run(self._load(batches[number]))
            return values if digest is None else digest(number, values)

        return ahead(found, range(len(batches)))

    def advance(self, done: Iterable[str], wanted: Sequence[str] = (), digest: Digest | None = None) -> Iterator[Any]:
        """What ``look`` gives, on the way to the place behind the nodes that are done."""
        import numpy as np

        live = self._parts.live(done)
        new, moves = self._scratch / str(self._moves + 1), True

        def found(number: int, values: Feed) -> tuple[bool, Any]:
            arrays = [values[name] for name in live]
            storable = all(isinstance(array, np.ndarray) for array in arrays)
            if storable:
                _store(new / f"{number:06}", arrays)
            some = {name: values[name] for name in wanted}
            return storable, some if digest is None else digest(number, some)

        for storable, item in self.look([*live, *(name for name in wanted if name not in live)], found):
            moves = moves and storable  # sequences can't be put on disk: the place stays where it was
            yield item
        if moves:
            self.close()
            self._folder, self._names, self._moves = new, live, self._moves + 1

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def _batches(self) -> list[Path]:
        return sorted(self._folder.iterdir())

    def _load(self, folder: Path) -> Feed:
        return dict(zip(self._names, _load(folder, len(self._names)), strict=True))


def small(batches: Iterable[Feed], axis: BatchAxis) -> Iterator[Feed]:
    """The same samples in batches of few, where the model takes any number."""
    for feed in batches:
        if axis.symbol is None:
            yield feed
            continue
        longest = max(array[:1].size for name, array in feed.items() if name in axis.inputs)
        rows = _SHORT_ROWS if longest <= _SHORT else _ROWS
        for first in range(0, axis.rows(feed), rows):
            part = slice(first, first + rows)
            yield {name: array[part] if name in axis.inputs else array for name, array in feed.items()}


def _mask(feed: Feed) -> Any:
    """What an input that is named a mask says of samples × positions; None where there is none."""
    return next((array for name, array in feed.items() if "mask" in name.lower() and array.ndim == 2), None)


def _store(folder: Path, arrays: Sequence[Any]) -> None:
    import numpy as np

    folder.mkdir(parents=True)
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array, allow_pickle=False)


def _load(folder: Path, count: int) -> list[Any]:
    import numpy as np

    return [np.load(folder / f"{number}.npy", allow_pickle=False) for number in range(count)]
