"""Values that stand for "never", clipped to what can matter downstream, where float outputs prove that nothing does.

A tensor that reaches −10000, −3.4e38 or −inf at places that are masked further on leaves no levels to all others. In
the float graph it is clipped to the range of its ordinary values, or to a little more, as a Softmax needs it: when all
outputs on all samples stay the same, that range is enough, and so it is for the integers::

    Where(keep, x, −1e9) → MatMul → Where(keep, ·, 0)       ordinary values alone: what is masked does not come through
    Where(keep, x, −1e9) → Softmax                          a margin below them, from where exp gives nothing

The graph that is written has no such node: quantizing clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelops.quantizers._calibration import Extent, in_order, mask_limit, special_tensors
from modelops.quantizers._memory import Memory

if TYPE_CHECKING:
    import onnx

# How far beyond the ordinary values a clipped one may have to lie: exp(−20) of the largest is nothing in float32.
_MARGINS = (0.0, 20.0)
# Tensors that are tried at most: every one costs some passes over the data.
_MOST = 8
# Power of what may change over that of the outputs: 120 dB, what another order of sums changes.
_NOTHING = 1e-12


def clipped(memory: Memory, names: Sequence[str]) -> tuple[Memory, set[str]]:
    """(the calibration of the graph with sentinels clipped where that is proven right, tensors that it clips).

    ``names`` are the tensors that need ranges. The same calibration comes back where nothing can be clipped.
    """
    found: set[str] = set()
    tried: set[str] = set()
    limit = mask_limit(memory.model)
    edges = {value.name for value in (*memory.model.graph.input, *memory.model.graph.output)}
    current = memory
    while len(tried) < _MOST:
        seen = current.extents(names)
        special = special_tensors(memory.model, seen) - edges - tried
        special = {name for name in special if seen[name].low == seen[name].low}  # NaN can't be clipped
        name = next((item for node in current.model.graph.node for item in node.output if item in special), None)
        if name is None:
            break
        tried.add(name)
        for low, high in _bounds(current, name, seen[name], limit):
            fresh = _with_clip(current.model, name, low, high)
            if _same(memory, fresh):
                current = Memory(fresh, memory.feeds, memory.scratch)
                found.add(name)
                break
    return current, found


def touched(plain: Memory, current: Memory, names: Sequence[str]) -> set[str]:
    """The tensors that hold other values where sentinels are clipped."""
    if plain is current:
        return set()
    before, after = plain.extents(names), current.extents(names)
    return {name for name in names if before[name].to_list() != after[name].to_list()}


def _bounds(memory: Memory, name: str, seen: Extent, limit: float) -> list[tuple[float, float]]:
    """Ranges to try, the tightest first."""

    def find(missing: list[str]) -> dict[str, tuple[float, float]]:
        return {item: _ordinary(memory, item, limit) for item in missing}

    low, high = memory.recalled(f"ordinary {limit!r}", [name], find, list, lambda pair: (pair[0], pair[1]))[name]
    return [
        (low - margin if seen.low <= -limit else low, high + margin if seen.high >= limit else high)
        for margin in _MARGINS
    ]


def _ordinary(memory: Memory, name: str, limit: float) -> tuple[float, float]:
    """The least and the greatest of the values that are no sentinels, zero among them."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    from modelops.graphs import runs
    from modelops.quantizers._preparation import save

    grown = onnx.ModelProto()
    grown.CopyFrom(memory.model)
    base = f"{name}/modelops_ordinary"
    for word, value in (("limit", limit), ("zero", 0.0)):
        grown.graph.initializer.append(numpy_helper.from_array(np.float32(value), f"{base}_{word}"))
    nodes = [
        helper.make_node("Abs", [name], [f"{base}_size"]),
        helper.make_node("Less", [f"{base}_size", f"{base}_limit"], [f"{base}_is"]),
        helper.make_node("Where", [f"{base}_is", name, f"{base}_zero"], [base]),
        helper.make_node("ReduceMin", [base], [f"{base}_low"], keepdims=0),
        helper.make_node("ReduceMax", [base], [f"{base}_high"], keepdims=0),
    ]
    del grown.graph.output[:]
    for word in ("low", "high"):
        grown.graph.output.append(helper.make_tensor_value_info(f"{base}_{word}", onnx.TensorProto.FLOAT, []))
    in_order(grown, nodes)
    place = memory.scratch / "ordinary.onnx"
    save(grown, place)
    low = high = 0.0
    with runs.session(place, optimization="basic", trusted=True, frugal=True, threads=runs.THREADS) as session:
        for feed in memory.feeds():
            values = [float(value) for value in runs.run(session, feed).values()]
            low, high = min(low, values[0]), max(high, values[1])
    place.unlink()
    return low, high


def _with_clip(model: onnx.ModelProto, name: str, low: float, high: float) -> onnx.ModelProto:
    """The graph in which this tensor is clipped for all that read it, under the name that it had."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    raw = f"{name}/modelops_raw"
    for node in grown.graph.node:
        for place, output in enumerate(node.output):
            if output == name:
                node.output[place] = raw
    bounds = [f"{name}/modelops_low", f"{name}/modelops_high"]
    for bound, value in zip(bounds, (low, high), strict=True):
        grown.graph.initializer.append(numpy_helper.from_array(np.float32(value), bound))
    in_order(grown, [helper.make_node("Clip", [raw, *bounds], [name], f"{name}/modelops_clip")])
    return grown


def _same(memory: Memory, fresh: onnx.ModelProto) -> bool:
    """Whether another graph gives the same outputs on all samples."""
    import numpy as np

    from modelops.graphs import runs
    from modelops.quantizers._preparation import save

    plain, other = memory.scratch / "plain.onnx", memory.scratch / "clipped.onnx"
    save(memory.model, plain)
    save(fresh, other)
    try:
        with (
            runs.session(plain, trusted=True, threads=runs.THREADS) as before,
            runs.session(other, trusted=True, threads=runs.THREADS) as after,
        ):
            for feed in memory.feeds():
                wanted, found = runs.run(before, feed), runs.run(after, feed)
                for name, array in wanted.items():
                    if array.dtype.kind != "f":
                        same = np.array_equal(array, found[name])
                    elif same := np.array_equal(np.isfinite(array), np.isfinite(found[name])):
                        kept = np.isfinite(array)
                        signal, made = array[kept].astype(np.float64), found[name][kept].astype(np.float64)
                        same = bool(((made - signal) ** 2).sum() <= _NOTHING * (signal**2).sum())
                    if not same:
                        return False
    finally:
        for place in (plain, other):
            place.unlink(missing_ok=True)
    return True
