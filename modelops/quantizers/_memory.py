"""What calibration found, remembered by content: the graph, the samples as they are fed, and the tools' versions.

Facts are kept by tensor, so that leaving out a node, or another choice of nodes or of rules, never calibrates again.
What can't be read, or is not what was written, counts as not remembered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import modelops
from modelops.core import cache, machine
from modelops.core.progress import progress
from modelops.errors import InputRefused
from modelops.quantizers._calibration import Extent, Feeds, chosen, extents, histograms
from modelops.quantizers._histograms import Histogram, Range, Rule

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

T = TypeVar("T")
_KIND = "ranges"


class Memory:
    """The calibration of one graph on one stream of samples."""

    def __init__(self, model: onnx.ModelProto, feeds: Feeds, scratch: Path) -> None:
        """InputRefused when there are no samples, or when they hold NaN or infinity."""
        self.model, self.feeds, self.scratch = model, feeds, scratch
        version = machine.installed("onnxruntime")
        tools = f"onnxruntime {version} modelops {modelops.__version__}"
        self._key = f"{graph_digest(model)} {samples_digest(feeds)} {tools}"

    def extents(self, names: Iterable[str]) -> dict[str, Extent]:
        """The extent of every tensor."""

        def found(missing: list[str]) -> dict[str, Extent]:
            return extents(self.model, missing, self.feeds, self.scratch)

        return self.recalled("extents", names, found, Extent.to_list, Extent.of_list)

    def ranges(self, seen: Mapping[str, Extent], rule: Rule, percentile: float) -> dict[str, Range]:
        """The range of every tensor by the rule; those that clip look at one and the same count of values."""
        counted: dict[str, tuple[Histogram, Histogram]] = {}
        if rule not in ("minmax", "average"):

            def found(missing: list[str]) -> dict[str, tuple[Histogram, Histogram]]:
                return histograms(self.model, {name: seen[name] for name in missing}, self.feeds, self.scratch)

            counted = self.recalled("histograms", seen, found, _written, _read)
        return {name: chosen(rule, percentile, extent, counted.get(name)) for name, extent in seen.items()}

    def recalled(
        self,
        what: str,
        names: Iterable[str],
        find: Callable[[list[str]], Mapping[str, T]],
        write: Callable[[T], Any],
        read: Callable[[Any], T],
    ) -> dict[str, T]:
        """A fact for every name, found now where it is not remembered; ``read`` raises for what is no such fact."""
        key = f"{what} {self._key}"
        kept = cache.get(_KIND, key)
        known: dict[str, T] = {}
        for name, value in kept.items() if isinstance(kept, dict) else ():
            try:
                known[name] = read(value)
            except (TypeError, ValueError, KeyError):
                continue
        names = list(names)
        if missing := [name for name in names if name not in known]:
            known |= find(missing)
            cache.put(_KIND, key, {name: write(value) for name, value in known.items()})
        return {name: known[name] for name in names}


def _written(pair: tuple[Histogram, Histogram]) -> list[Any]:
    return [one.to_list() for one in pair]


def _read(value: Any) -> tuple[Histogram, Histogram]:
    fitted, held_out = (Histogram.of_list(one) for one in value)
    return fitted, held_out


def graph_digest(model: onnx.ModelProto) -> str:
    """The SHA-256 of a graph and its weights; of graphs of any size."""
    digest, graph = hashlib.sha256(), model.graph
    for part in (*model.opset_import, *model.functions, *graph.input, *graph.node, *graph.output):
        digest.update(part.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}\0{tensor.data_type}\0{list(tensor.dims)}\0".encode())
        digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def samples_digest(feeds: Feeds) -> str:
    """The SHA-256 of all samples as they are fed, batch by batch.

    InputRefused when there is none, or when one holds NaN or infinity.
    """
    import numpy as np

    digest, count = hashlib.sha256(), 0
    for feed in feeds():
        for name in sorted(feed):
            array = np.ascontiguousarray(feed[name])
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputRefused(
                    f"the calibration data holds NaN or infinity in input {name!r}", hint="remove those samples"
                )
            digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            if array.dtype.hasobject:
                digest.update(repr(array.tolist()).encode())
            else:
                digest.update(array.view(np.uint8).reshape(-1).data if array.ndim else array.tobytes())
        count += 1
        progress("reading samples", count, None)
    if count == 0:
        raise InputRefused("the calibration data holds no samples", hint="give at least one sample")
    return digest.hexdigest()
