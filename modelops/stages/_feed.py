"""The one input that a model is timed on: the user's samples, the rows of its reference, or seeded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact
from modelops.core.tensors import Signature
from modelops.datasets import Dataset
from modelops.errors import InputRefused, UsageError, unknown_name
from modelops.graphs.batches import BatchAxis, collate, split, together
from modelops.graphs.reference import FILE_NAME, read
from modelops.graphs.seeded import index_bounds, random_feed
from modelops.stages._workbench import SampleBench

Feed = dict[str, Any]
# Samples that are looked at for one of middling size.
_AMONG, _HELD_BYTES = 64, 256 << 20


def timing_feed(
    source: Artifact,
    *,
    batch: int,
    sizes: Mapping[str, int],
    data: Path | None = None,
    dataset: Dataset | None = None,
    seed: int = 0,
) -> tuple[Feed, str]:
    """A feed of ``batch`` samples, and in words where they came from.

    Samples are repeated where there are fewer. With ``sizes`` of dynamic dimensions, or without data and reference, the
    feed is seeded random. UsageError for a batch or a size that the model does not take.
    """
    axis = BatchAxis.of(source.signature)
    if axis.symbol is None:
        fixed = axis.size or 1
        if batch not in (1, fixed):
            raise UsageError(f"the model's batch is fixed at {fixed}", hint=f"leave --batch out, or give {fixed}")
        batch = fixed
    if data is not None:
        if sizes:
            raise UsageError("--dim and --data both say how large inputs are", hint="leave one of them out")
        samples = _user_samples(source, data, dataset, batch)
        return collate(_repeated(samples, batch), source.signature), f"{min(len(samples), batch)} samples of {data}"
    rows = [] if sizes else _reference_rows(source, batch)
    if rows:
        return collate(_repeated(rows, batch), source.signature), "rows of the model's reference"
    feed = random_feed(source.signature, batch, seed, sizes, index_bounds(source.model))
    return feed, f"seeded random values, seed {seed}"


def middling(source: Artifact, data: Path, dataset: Dataset | None) -> Feed:
    """One of the first samples of the user's data, of middling size; repeated where the model's batch is fixed.

    So a short first sentence does not stand for all of them.
    """
    import numpy as np

    bench = SampleBench(source, source.path, data, dataset, samples=_AMONG)
    seen: list[Feed] = []
    held = 0
    for sample in bench.samples():
        seen.append(dict(sample.feed))
        held += sum(int(np.asarray(array).nbytes) for array in sample.feed.values())
        if held > _HELD_BYTES:
            break
    sizes = [sum(int(np.size(array)) for array in feed.values()) for feed in seen]
    chosen = seen[sizes.index(sorted(sizes)[len(sizes) // 2])]
    axis = BatchAxis.of(source.signature)
    return collate([chosen] * (axis.size or 1), source.signature)


def sizes_of(texts: Sequence[str], signature: Signature) -> dict[str, int]:
    """The sizes that texts such as ``sequence=128`` give to dynamic dimensions; UsageError for an unknown one."""
    axis = BatchAxis.of(signature)
    found = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--dim can't be {text!r}", hint="write name=size, such as --dim sequence=128")
        if name == axis.symbol:
            raise UsageError(f"{name!r} counts the samples", hint=f"write --batch {size}")
        if name not in signature.dynamic:
            raise unknown_name("dynamic dimension", name, (dim for dim in signature.dynamic if dim != axis.symbol))
        found[name] = int(size)
    return found


def _user_samples(source: Artifact, data: Path, dataset: Dataset | None, batch: int) -> list[Feed]:
    bench = SampleBench(source, source.path, data, dataset, samples=batch)
    samples = [dict(sample.feed) for sample in bench.samples()]
    for sample in samples[1:]:
        if not together(samples[0], sample, source.signature):
            raise InputRefused(
                f"the first {batch} samples of {data} can't share a batch: they differ in size",
                hint="give samples of one size, or --batch 1",
            )
    return samples


def _reference_rows(source: Artifact, batch: int) -> list[Feed]:
    """Rows of the first case of the reference, as single samples; none where there is no reference."""
    if not source.has(FILE_NAME):
        return []
    rows: list[Feed] = []
    for case in read(source.file(FILE_NAME)):
        if case.is_rows:
            rows += split(case.feed, source.signature)
        if len(rows) >= batch:
            break
    return rows[:batch]


def _repeated(samples: Sequence[Feed], count: int) -> list[Feed]:
    return [samples[number % len(samples)] for number in range(count)]
