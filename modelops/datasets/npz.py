"""One .npz file: an array per input of the model, its first axis counting samples; ``labels`` holds the labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modelops.datasets import Context, Dataset, Sample
from modelops.datasets._rows import rows
from modelops.graphs.arrays import read_npz


class Npz(Dataset):
    """A .npz file with one array per input; the first axis counts samples, "labels" holds labels."""

    names_inputs = True

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.suffix == ".npz" and path.is_file()

    def samples(self, path: Path, context: Context, limit: int | None = None) -> Iterator[Sample]:
        yield from rows(read_npz(path, by_rows=True), context, str(path), limit)
