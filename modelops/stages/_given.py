"""The user's samples as inputs of a conversion: what they say of the inputs, and the feeds that they make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.tensors import Signature, TensorSpec
from modelops.datasets import Context, Dataset, Sample
from modelops.datasets._fit import Fitting
from modelops.errors import InputRefused, UsageError, from_os_error
from modelops.graphs.batches import BatchAxis, collate, together
from modelops.stages._workbench import open_dataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feed = dict[str, "NDArray[Any]"]
_BATCH = "batch"
_SAY = 'say what the model takes: --input "x:float32[batch,3,224,224]"'


@dataclass(frozen=True)
class Given:
    """The first samples of ``--data``, as many as there are rows to check.

    ``directory`` is where a tokenizer may lie.
    """

    data: Path
    dataset: Dataset
    count: int
    directory: Path | None = None

    @classmethod
    def of(cls, data: Path | None, dataset: Dataset | None, count: int, directory: Path | None = None) -> Given | None:
        """The samples that the options name; None without any."""
        if data is None:
            if dataset is not None:
                raise UsageError(f"--dataset {dataset.name} needs --data", hint="give the path of the data")
            return None
        return cls(data, open_dataset(data, dataset), count, directory)

    def specs(self, *, double: bool, static: bool) -> tuple[TensorSpec, ...]:
        """What the samples themselves say of the inputs: names, dtypes, and a batch.

        Where samples differ in size, that dimension is dynamic as well. Without ``double`` float64 becomes float32,
        since numpy's numbers are float64 unless somebody says otherwise.
        """
        if not self.dataset.names_inputs:
            raise UsageError(f"{self.data} ({self.dataset.name}) does not tell what the model takes", hint=_SAY)
        feeds = [dict(sample.feed) for sample in self._read(Context(Signature((), ()), self.directory, known=False))]
        return described(feeds, str(self.data), double=double, static=static)

    def samples(self, signature: Signature) -> Samples:
        """The samples, fitted to the inputs; InputRefused names what does not fit."""
        fitting = Fitting(signature)
        found: list[Feed] = []
        for sample in self._read(Context(signature, self.directory)):
            found += [dict(one.feed) for one in fitting.fit(sample)]
        notes = tuple(f"data converted: {cast}" for cast in fitting.casts.values())
        return Samples(tuple(found[: self.count]), signature, notes)

    def code_executed(self) -> tuple[dict[str, str], ...]:
        """The user's files that ran to give the samples, with their digests."""
        return tuple(
            {"path": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in self.dataset.code(self.data)
        )

    def _read(self, context: Context) -> list[Sample]:
        try:
            found = list(islice(self.dataset.samples(self.data, context, self.count), self.count))
        except OSError as error:
            raise from_os_error(error, f"reading {self.data}") from error
        if not found:
            raise InputRefused(f"{self.data} holds no samples", hint="give at least one sample")
        return found


@dataclass(frozen=True)
class Samples:
    """Single samples that fit the inputs of a model."""

    found: tuple[Feed, ...]
    signature: Signature
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.found)

    def first(self, count: int) -> Samples:
        """The first so many of them."""
        return replace(self, found=self.found[:count])

    def feeds(self, most: int) -> Iterator[Feed]:
        """Feeds of ``most`` samples or fewer: only such as can share a batch."""
        most = BatchAxis.of(self.signature).size or most
        waiting: list[Feed] = []
        for sample in self.found:
            if waiting and (len(waiting) == most or not together(waiting[0], sample, self.signature)):
                yield collate(waiting, self.signature)
                waiting = []
            waiting.append(sample)
        if waiting:
            yield collate(waiting, self.signature)


def described(feeds: Sequence[Mapping[str, Any]], where: str, *, double: bool, static: bool) -> tuple[TensorSpec, ...]:
    """The inputs that samples without a batch axis are made for."""
    import numpy as np

    first = {name: np.asarray(value) for name, value in feeds[0].items()}
    for number, feed in enumerate(feeds):
        if set(feed) != set(first) or any(np.ndim(feed[name]) != array.ndim for name, array in first.items()):
            raise InputRefused(f"{where}: sample {number} has other inputs than the first one", hint=_SAY)
    columns = {
        (name, axis): tuple(np.shape(feed[name])[axis] for feed in feeds)
        for name, array in first.items()
        for axis in range(array.ndim)
    }
    named: dict[tuple[int, ...], str] = {}
    for (name, axis), sizes in columns.items():
        if len(set(sizes)) > 1 and not static:  # what varies alike is one dimension
            named.setdefault(sizes, f"{name}_dim{axis + 1}")
    specs = []
    for name, array in first.items():
        dtype = "float32" if array.dtype == np.float64 and not double else array.dtype.name
        shape = (named.get(columns[name, axis], size) for axis, size in enumerate(array.shape))
        specs.append(TensorSpec(name, dtype, (1 if static else _BATCH, *shape)))
    return tuple(specs)
