"""Samples from arrays whose first axis counts samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modelops.datasets import Context, Sample
from modelops.errors import InputRefused, nearest
from modelops.graphs.batches import BatchAxis

LABELS = "labels"


def rows(arrays: Mapping[str, Any], context: Context, where: str, limit: int | None) -> Iterator[Sample]:
    """The samples of one array per input; the array ``labels`` holds their labels, unless an input has that name.

    InputRefused when a name is missing or unknown, when lengths differ, or when there are no samples.
    """
    import numpy as np

    signature = context.signature
    names = [spec.name for spec in signature.inputs] if context.known else [name for name in arrays if name != LABELS]
    labels = None if LABELS in names else arrays.get(LABELS)
    for name in arrays:
        if name not in names and name != LABELS:
            guess = nearest(name, names)
            hint = f"did you mean {guess!r}?" if guess else f"the model's inputs: {', '.join(names) or '(none)'}"
            raise InputRefused(f"{where}: {name!r} is not an input of the model", hint=hint)
    for name in names:
        if name not in arrays:
            found = ", ".join(other for other in arrays if other != LABELS) or "nothing"
            raise InputRefused(f"{where} holds no array {name!r} (found: {found})", hint="give one array per input")
    axis = BatchAxis.of(signature)
    shared = {
        name
        for name in names
        if context.known and name not in axis.inputs and arrays[name].ndim == len(signature.input(name).shape)
    }
    arrays = {**arrays, **{name: np.asarray(arrays[name]) for name in shared}}
    count = _count({name: arrays[name] for name in names if name not in shared}, labels, where)
    for number in range(count if limit is None else min(count, limit)):
        feed = {name: arrays[name] if name in shared else arrays[name][number] for name in names}
        yield Sample(feed, None if labels is None else _plain(labels[number]), f"{where}, sample {number}")


def _count(arrays: Mapping[str, Any], labels: Any, where: str) -> int:
    sized = dict(arrays) if labels is None else {**arrays, LABELS: labels}
    for name, array in sized.items():
        if array.ndim == 0:
            raise InputRefused(f"{where}: {name!r} is a single number", hint="the first axis counts samples")
    lengths = {name: len(array) for name, array in sized.items()}
    if len(set(lengths.values())) > 1:
        raise InputRefused(
            f"{where}: the numbers of samples differ: {', '.join(f'{name} {n}' for name, n in lengths.items())}",
            hint="the first axis of every array counts samples",
        )
    count = next(iter(lengths.values()), 0)
    if count == 0:
        raise InputRefused(f"{where} holds no samples", hint="give at least one")
    return count


def _plain(label: Any) -> Any:
    """A label as a Python value where it is a single one."""
    return label.item() if getattr(label, "ndim", None) == 0 else label
