"""Fits samples to a model: the right names, dtypes and shapes, finite values; says what does not fit, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelops.core.tensors import Signature, TensorSpec
from modelops.datasets import Sample
from modelops.errors import InputRefused, nearest
from modelops.graphs.arrays import numpy_dtype
from modelops.graphs.batches import BatchAxis

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Fitting:
    """Fits the samples of one dataset to one signature; ``casts`` collects the conversions that were made."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.casts: dict[str, str] = {}
        self._axis = BatchAxis.of(signature)

    def fit(self, sample: Sample) -> Iterator[Sample]:
        """The sample with arrays that fit; several where its arrays carry a batch axis of their own.

        InputRefused names the sample, the input and what is wrong. Conversions that lose nothing are made (integers to
        wider ones, or to narrower ones that hold the values), and float to float; others are refused, and so are NaN
        and infinity.
        """
        import numpy as np

        known = {spec.name: spec for spec in self.signature.inputs}
        for name in sample.feed:
            if name not in known:
                guess = nearest(str(name), known)
                hint = f"did you mean {guess!r}?" if guess else f"the model's inputs: {', '.join(known) or '(none)'}"
                raise InputRefused(f"{sample.key}: {name!r} is not an input of the model", hint=hint)
        feed: dict[str, NDArray[Any]] = {}
        for name, spec in known.items():
            if name not in sample.feed:
                raise InputRefused(
                    f"{sample.key}: the input {name!r} is missing (found: {', '.join(sample.feed) or 'none'})",
                    hint=f"give an array for each of {', '.join(known)}",
                )
            try:
                array = np.asarray(sample.feed[name])
            except (ValueError, TypeError, RuntimeError) as error:
                raise InputRefused(f"{sample.key}: {name!r} is no array: {error}", hint="give a numpy array") from error
            feed[name] = self._typed(array, spec, sample.key)
        yield from self._shaped(feed, sample)

    def _typed(self, array: NDArray[Any], spec: TensorSpec, key: str) -> NDArray[Any]:
        """The array in the dtype of the input."""
        import numpy as np

        target = numpy_dtype(spec.dtype)
        if array.dtype != target:
            where = f"{key}: {spec.name!r} is {array.dtype}, the model takes {spec.dtype}"
            array = _cast(array, target, where)
            self.casts[spec.name] = where.partition(": ")[2]
        if array.dtype.kind in "fc" or array.dtype.kind == "V":
            bad = ~np.isfinite(array)
            if bad.any():
                at = [int(i) for i in np.argwhere(bad)[0]]
                raise InputRefused(
                    f"{key}: {spec.name!r} holds {array[tuple(at)]} at {at}", hint="remove or repair the sample"
                )
        return array

    def _shaped(self, feed: Mapping[str, NDArray[Any]], sample: Sample) -> Iterator[Sample]:
        batched = [name for name in feed if name in self._axis.inputs]
        ranks = {name: len(self.signature.input(name).shape) for name in batched}
        if batched and all(feed[name].ndim == ranks[name] for name in batched):
            yield from self._rows(feed, batched, sample)
        else:
            self._check(feed, sample.key)
            yield Sample(feed, sample.label, sample.key)

    def _rows(self, feed: Mapping[str, NDArray[Any]], batched: list[str], sample: Sample) -> Iterator[Sample]:
        """The samples of a feed that carries its own batch axis."""
        sizes = {name: len(feed[name]) for name in batched}
        count = sizes[batched[0]]
        if len(set(sizes.values())) > 1 or count == 0:
            raise InputRefused(f"{sample.key}: the first axes differ or are empty: {sizes}", hint="give equal lengths")
        labels: Any = [sample.label]
        if count > 1:
            labels = [None] * count if sample.label is None else sample.label
            if not hasattr(labels, "__len__") or isinstance(labels, str) or len(labels) != count:
                raise InputRefused(f"{sample.key}: {count} samples, but the label is {labels!r}", hint="one label each")
        elif getattr(sample.label, "shape", None) == (1,):
            labels = sample.label
        for row in range(count):
            one = {name: array[row] if name in self._axis.inputs else array for name, array in feed.items()}
            key = f"{sample.key}[{row}]" if count > 1 else sample.key
            self._check(one, key)
            yield Sample(one, labels[row], key)

    def _check(self, feed: Mapping[str, NDArray[Any]], key: str) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.signature.inputs:
            wanted, found = self._axis.sample_shape(spec), feed[spec.name].shape
            fits = len(wanted) == len(found) and all(
                isinstance(dim, str) or dim == size for dim, size in zip(wanted, found, strict=True)
            )
            if not fits:
                batch = ", without the batch axis" if spec.name in self._axis.inputs else ""
                raise InputRefused(
                    f"{key}: {spec.name!r} has the shape {_text(found)}, the model takes {_text(wanted)}{batch}",
                    hint=f"the model's input is {spec}",
                )
            for dim, size in zip(wanted, found, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, (size, spec.name))[0] != size:
                    other = sizes[dim]
                    raise InputRefused(
                        f"{key}: {dim!r} is {size} in {spec.name!r} and {other[0]} in {other[1]!r}",
                        hint="inputs that share a dimension need the same length",
                    )


def _cast(array: NDArray[Any], target: np.dtype[Any], where: str) -> NDArray[Any]:
    import numpy as np

    source = array.dtype
    if target.kind == "O":
        if source.kind in "US" or (source.kind == "O" and all(isinstance(item, str) for item in array.flat)):
            return array.astype(str).astype(object)
        raise InputRefused(where, hint="give texts")
    if source.kind == "V" and not source.fields and source.itemsize == target.itemsize and target.kind in "Vf":
        return array.view(target)  # numpy stores bfloat16 and its like as plain bytes
    floats = source.kind == "f" or (source.kind == "V" and source.isbuiltin == 2)
    if floats and (target.kind == "f" or (target.kind == "V" and target.isbuiltin == 2)):
        with np.errstate(over="ignore"):
            result: NDArray[Any] = array.astype(target)
        if np.isfinite(array).all() and not np.isfinite(result).all():
            raise InputRefused(f"{where}, which can't hold {array.flat[np.abs(array).argmax()]}", hint="scale the data")
        return result
    if (source.kind in "iub" and target.kind in "iuf") or np.can_cast(source, target, "safe"):
        result = array.astype(target)
        if (result.astype(source) == array).all() and (source.kind == "b" or ((result < 0) == (array < 0)).all()):
            return result
        raise InputRefused(f"{where}, which can't hold all its values", hint=f"give {target} values")
    raise InputRefused(f"{where}: the conversion would lose something", hint=f"save the array as {target}")


def _text(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(str(dim) for dim in shape)}]"
