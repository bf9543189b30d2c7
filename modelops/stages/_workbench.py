"""What a stage hands to a method: the user's samples, checked against the model, as feeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact
from modelops.core.registry import require
from modelops.core.tensors import Signature
from modelops.datasets import REGISTRY, Context, Dataset, Sample
from modelops.datasets._fit import Fitting
from modelops.errors import InputRefused, UsageError, from_os_error, missing_path
from modelops.graphs.batches import BatchAxis, collate, together

__all__ = ["Batch", "SampleBench", "collate", "open_dataset"]


@dataclass(frozen=True)
class Batch:
    """A feed with what is known of its samples; a fixed batch may hold more rows than ``rows``, which are repeats."""

    feed: dict[str, Any]
    rows: int
    labels: tuple[Any, ...]
    keys: tuple[str, ...]


class SampleBench:
    """The workbench of the stages: an artifact, a scratch directory and the user's data, if there is any."""

    def __init__(
        self,
        source: Artifact,
        scratch: Path,
        data: Path | None = None,
        dataset: Dataset | None = None,
        samples: int | None = None,
        batch: int = 1,
    ) -> None:
        if data is None and dataset is not None:
            raise UsageError(f"--dataset {dataset.name} needs --data", hint="give the path of the data")
        self._source = source
        self._scratch = scratch
        self._data = data
        self._dataset = open_dataset(data, dataset) if data is not None else None
        self._limit = samples
        self._fitting = Fitting(source.signature)
        self._axis = BatchAxis.of(source.signature)
        self._batch = self._axis.size or batch

    @property
    def source(self) -> Artifact:
        return self._source

    @property
    def signature(self) -> Signature:
        return self._source.signature

    @property
    def scratch(self) -> Path:
        return self._scratch

    @property
    def has_data(self) -> bool:
        return self._dataset is not None

    @property
    def dataset(self) -> Dataset | None:
        """The dataset that reads the user's data."""
        return self._dataset

    @property
    def notes(self) -> tuple[str, ...]:
        """The conversions that were made on the samples read so far."""
        return tuple(f"data converted: {cast}" for cast in self._fitting.casts.values())

    def samples(self) -> Iterator[Sample]:
        """The user's samples, fitted to the model; UsageError when no data was given, InputRefused when it is empty."""
        if self._dataset is None or self._data is None:
            raise UsageError("this needs data", hint="give samples with --data")
        count = 0
        for sample in self._fitted(self._dataset, self._data):
            if self._limit is not None and count >= self._limit:
                return
            count += 1
            yield sample
        if count == 0:
            raise InputRefused(f"{self._data} holds no samples", hint="give at least one sample")

    def _fitted(self, dataset: Dataset, data: Path) -> Iterator[Sample]:
        context = Context(self.signature, self._source.path)
        try:
            for sample in dataset.samples(data, context, self._limit):
                yield from self._fitting.fit(sample)
        except OSError as error:
            raise from_os_error(error, f"reading {data}") from error

    def chunks(self) -> Iterator[Batch]:
        """The samples in batches, with their labels and keys; a batch ends early where samples can't be stacked."""
        waiting: list[Sample] = []
        for sample in self.samples():
            apart = waiting and not together(waiting[0].feed, sample.feed, self.signature)
            if waiting and (apart or len(waiting) == self._batch):
                yield self._chunk(waiting)
                waiting = []
            waiting.append(sample)
        if waiting:
            yield self._chunk(waiting)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The user's samples as feeds with a batch axis; each call starts from the first sample again."""
        for chunk in self.chunks():
            yield chunk.feed

    def labels(self) -> list[Any] | None:
        """The label of every sample, or None when no sample has one; InputRefused when only some have."""
        found = [(sample.label, sample.key) for sample in self.samples()]
        without = [key for label, key in found if label is None]
        if len(without) == len(found):
            return None
        if without:
            raise InputRefused(f"{without[0]} has no label, others have", hint="label every sample, or none")
        return [label for label, _ in found]

    def code_executed(self) -> list[dict[str, str]]:
        """The user's files that ran to give the samples, with their digests."""
        if self._dataset is None or self._data is None:
            return []
        return [
            {"path": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in self._dataset.code(self._data)
        ]

    def _chunk(self, samples: Sequence[Sample]) -> Batch:
        feed = collate([sample.feed for sample in samples], self.signature)
        labels = tuple(sample.label for sample in samples)
        return Batch(feed, len(samples), labels, tuple(sample.key for sample in samples))


def open_dataset(path: Path, dataset: Dataset | None = None) -> Dataset:
    """The dataset that reads this path, with its default options, or the given one.

    UsageError when nothing is there, when nothing reads it, or when two forms of data fit.
    """
    if dataset is not None:
        if not path.exists() and not dataset.reads(path):
            raise missing_path("data", path)
        require(type(dataset))
        return dataset
    fitting = [name for name, cls in REGISTRY.loadable() if cls.reads(path)]
    if len(fitting) == 1:
        return REGISTRY.ready(fitting[0]).parse({})
    if fitting:
        raise UsageError(f"{path} can be read as {' or '.join(fitting)}", hint=f"choose with --dataset {fitting[0]}")
    if not path.exists():
        raise missing_path("data", path)
    raise UsageError(f"no dataset reads {path}", hint=f"name the form with --dataset: {', '.join(REGISTRY.names())}")
