"""Ranges of activations over a stream of samples; memory does not grow with their number.

The first pass computes the extremes of every tensor inside the graph, so that a run gives back a few numbers. Rules
that clip need a second pass, which fills histograms between those extremes from an even sample of every activation; if
a graph has very many, it runs in bands, each of which gives out only so many bytes at a time.

Values that stand for "never" are no values: a tensor that reaches half the size of the smallest such constant in the
graph (−10000, −3.4e38, −inf: attention masks) is *special*, and the nodes around it stay float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.ahead import ahead
from modelops.core.progress import tracked
from modelops.errors import InputRefused, tool
from modelops.quantizers._histograms import Histogram, Range, Rule, best

if TYPE_CHECKING:
    import onnx

Feeds = Callable[[], Iterator[Mapping[str, Any]]]

MASK_FROM = -1e4
# Nothing that a float32 network computes on purpose is as large as this.
_UNREAL = 1e18
_BAND_BYTES = 256 << 20
# Of a tensor, no more elements than this are counted in one run: they are taken evenly from all of it.
_COUNTED = 1 << 18
# Of every four batches, one is held out to judge by, where rules compete.
_HELD_OUT = 4


@dataclass
class Extent:
    """The least and the greatest value of a tensor, NaN where it held one, and the most elements it had at a time.

    ``lows`` and ``highs`` are the sums of the extremes of all batches.
    """

    low: float = math.inf
    high: float = -math.inf
    elements: int = 0
    runs: int = 0
    lows: float = 0.0
    highs: float = 0.0

    def add(self, low: float, high: float, elements: int) -> None:
        broken = math.isnan(low) or math.isnan(high) or math.isnan(self.low)
        self.low = math.nan if broken else min(self.low, low)
        self.high = math.nan if broken else max(self.high, high)
        self.elements = max(self.elements, elements)
        self.runs += 1
        self.lows += low
        self.highs += high

    def to_list(self) -> list[float]:
        """For the cache; Python's JSON holds NaN and infinity too."""
        return [self.low, self.high, self.elements, self.runs, self.lows, self.highs]

    @classmethod
    def of_list(cls, values: Any) -> Extent:
        """What ``to_list`` wrote; ValueError for anything else."""
        low, high, elements, runs, lows, highs = (float(value) for value in values)
        if not (math.isnan(low) or low <= high) or elements < 0 or runs < 1:
            raise ValueError(f"no extent: {values}")
        return cls(low, high, int(elements), int(runs), lows, highs)

    @property
    def average(self) -> Range:
        """The mean of the batches' least values, and that of their greatest."""
        return (self.lows / self.runs, self.highs / self.runs) if self.runs else (self.low, self.high)

    @property
    def finite(self) -> bool:
        """Whether there were values, and nothing but what a float32 network computes on purpose."""
        return self.runs > 0 and -_UNREAL < self.low <= self.high < _UNREAL


def extents(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds, scratch: Path) -> dict[str, Extent]:
    """The extent of every tensor over all samples.

    InputRefused when the data holds NaN or infinity, or no sample at all.
    """
    import onnx

    from modelops.graphs import runs

    found = {name: Extent() for name in names}
    nodes, outputs = [], []
    for name in names:
        for op, kind in (("ReduceMin", onnx.TensorProto.FLOAT), ("ReduceMax", onnx.TensorProto.FLOAT), ("Size", 7)):
            output = f"{name}/modelops_{op}"
            keep = {} if op == "Size" else {"keepdims": 0}
            nodes.append(onnx.helper.make_node(op, [name], [output], output, **keep))
            outputs.append(onnx.helper.make_tensor_value_info(output, kind, []))
    place = _with_outputs(model, nodes, outputs, scratch / "extents.onnx")
    count = 0
    with runs.session(place, optimization="basic", trusted=True, frugal=True) as session:

        def extremes(feed: Mapping[str, Any]) -> list[Any]:
            _refuse_nonfinite(feed)
            return list(runs.run(session, feed).values())

        for values in ahead(extremes, tracked("calibrating", feeds()), runs.THREADS):
            for number, extent in enumerate(found.values()):
                low, high, size = values[3 * number : 3 * number + 3]
                extent.add(float(low), float(high), int(size))
            count += 1
    place.unlink()
    if count == 0:
        raise InputRefused("the calibration data holds no samples", hint="give at least one sample")
    return found


def histograms(
    model: onnx.ModelProto, extents: Mapping[str, Extent], feeds: Feeds, scratch: Path
) -> dict[str, tuple[Histogram, Histogram]]:
    """How often values fell where, of every tensor: on the batches that fit, and on one in four that is held out."""
    found: dict[str, tuple[Histogram, Histogram]] = {}
    steps = {name: step_of(extent.elements) for name, extent in extents.items()}
    parts = list(bands({name: 4 * extent.elements // steps[name] for name, extent in extents.items()}))
    for number, band in enumerate(parts, 1):
        for name in band:
            low, high = extents[name].low, extents[name].high
            found[name] = Histogram(low, high), Histogram(low, high)
        what = "counting activations" + (f", part {number} of {len(parts)}" if len(parts) > 1 else "")
        for index, values in enumerate(streamed(model, band, feeds, scratch, what, steps)):
            held_out = index % _HELD_OUT == _HELD_OUT - 1
            while values:  # freed one by one, before the next batch runs
                name, array = values.popitem()
                found[name][held_out].add(array)
            del array
    return found


def chosen(rule: Rule, percentile: float, extent: Extent, counted: tuple[Histogram, Histogram] | None) -> Range:
    """The range of a tensor by the rule; only auto needs samples of its own to judge by."""
    if rule == "minmax":
        return extent.low, extent.high
    if rule == "average":
        return extent.average
    assert counted is not None
    fitted, held_out = counted
    if rule == "auto":
        return best(fitted, rule, percentile, held_out, extent.average)
    return best(fitted + held_out, rule, percentile)


def step_of(elements: int) -> int:
    """Every how many elements one is counted, of so many; no dimension of the tensor is a multiple of it.

    So the sample runs evenly through all channels, rows and columns.
    """
    step = -(-elements // _COUNTED)
    while math.gcd(step, elements) > 1:
        step += 1
    return max(step, 1)


def bands(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The tensors, of these sizes in bytes, in groups that together are small enough to be held."""
    band: list[str] = []
    held = 0
    for name, size in sizes.items():
        if band and held + size > _BAND_BYTES:
            yield band
            band, held = [], 0
        band.append(name)
        held += size
    if band:
        yield band


def streamed(
    model: onnx.ModelProto,
    names: Sequence[str],
    feeds: Feeds,
    scratch: Path,
    what: str,
    steps: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """These tensors of one batch after another; who takes them out of the mapping frees them before the next.

    Of a tensor with a step above 1, every so many-th element alone, in a row.
    """
    import onnx

    from modelops.graphs import runs

    aliases = {name: f"{name}/modelops_value" for name in names}
    nodes = [node for name, alias in aliases.items() for node in _given_out(name, alias, (steps or {}).get(name, 1))]
    outputs = [onnx.helper.make_tensor_value_info(alias, onnx.TensorProto.FLOAT, None) for alias in aliases.values()]
    place = _with_outputs(model, nodes, outputs, scratch / "values.onnx")
    with runs.session(place, optimization="basic", trusted=True, frugal=True, threads=runs.THREADS) as session:
        for feed in tracked(what, feeds()):
            values = runs.run(session, feed)
            yield {name: values.pop(alias) for name, alias in aliases.items()}
    place.unlink()


def _given_out(name: str, alias: str, step: int) -> list[Any]:
    """The nodes that give out a tensor under another name, or every so many-th element of it."""
    import onnx
    from onnx import helper

    if step == 1:
        # A graph's own inputs can't be its outputs everywhere: they pass through an Identity.
        return [helper.make_node("Identity", [name], [alias], alias)]
    numbers = {"row": [-1], "start": [0], "end": [2**62], "axis": [0], "step": [step]}
    constants = [
        helper.make_node(
            "Constant", [], [f"{alias}_{word}"], f"{alias}_{word}",
            value=helper.make_tensor("", onnx.TensorProto.INT64, [1], number),
        )
        for word, number in numbers.items()
    ]  # fmt: skip
    flat = helper.make_node("Reshape", [name, f"{alias}_row"], [f"{alias}_flat"], f"{alias}_flat")
    places = [f"{alias}_flat", *(f"{alias}_{word}" for word in ("start", "end", "axis", "step"))]
    return [*constants, flat, helper.make_node("Slice", places, [alias], alias)]


def special_tensors(model: onnx.ModelProto, extents: Mapping[str, Extent]) -> set[str]:
    """The tensors that carry mask values, NaN or infinity."""
    limit = mask_limit(model)
    return {name for name, extent in extents.items() if not (-limit < extent.low <= extent.high < limit)}


def mask_limit(model: onnx.ModelProto) -> float:
    """Half the size of the smallest constant in the graph that can only be a mask; large where there is none."""
    import numpy as np
    import onnx

    weights = weights_of(model)
    sizes = [2 * _UNREAL]
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in weights and 0 not in tensor.dims:
            values = onnx.numpy_helper.to_array(tensor)
            masks = values[values <= MASK_FROM]
            if masks.size:
                sizes.append(float(np.abs(masks).min()))
    return min(sizes) / 2


def weights_of(model: onnx.ModelProto) -> set[str]:
    """The tensors that weighted nodes multiply or add: large values in them are no masks."""
    weighted = (node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv"))
    return {name for node in weighted for name in node.input[1:]}


def _refuse_nonfinite(feed: Mapping[str, Any]) -> None:
    import numpy as np

    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputRefused(
                f"the calibration data holds NaN or infinity in input {name!r}", hint="remove those samples"
            )


def _with_outputs(model: onnx.ModelProto, nodes: Sequence[Any], outputs: Sequence[Any], place: Path) -> Path:
    """The model written to ``place`` with these nodes more, and these outputs in place of its own."""
    import onnx

    from modelops.quantizers._preparation import save

    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    del grown.graph.output[:]
    in_order(grown, nodes)
    grown.graph.output.extend(outputs)
    _without_idle(grown.graph)
    with tool("writing the calibration graph"):
        save(grown, place)
    return place


def _without_idle(graph: onnx.GraphProto) -> None:
    """Remove the nodes that no output depends on: onnxruntime would run them all the same."""
    needed, kept = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(type(node).FromString(node.SerializeToString()))
            needed.update(_read_by(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, inside its branches and loops too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            yield from (value.name for value in inner.output)
            for one in inner.node:
                yield from _read_by(one)


def in_order(model: onnx.ModelProto, nodes: Sequence[Any]) -> None:
    """Add nodes to a graph, each right behind the last that it reads from: so nothing is kept longer than it must."""
    places = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    behind: dict[int, list[Any]] = {}
    for node in nodes:
        place = max((places.get(name, -1) for name in node.input), default=-1)
        behind.setdefault(place, []).append(node)
        places.update(dict.fromkeys(node.output, place))
    old = list(model.graph.node)
    merged = [*behind.get(-1, []), *(item for place, node in enumerate(old) for item in (node, *behind.get(place, [])))]
    copies = [type(node).FromString(node.SerializeToString()) for node in merged]
    del model.graph.node[:]
    model.graph.node.extend(copies)
