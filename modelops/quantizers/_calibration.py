"""Ranges of activations over a stream of samples; memory does not grow with their number.

The extremes of every tensor are computed inside the graph, so that a run gives back two numbers per tensor. Values that
stand for "never" are no values: a tensor that reaches half the size of the smallest such constant in the graph
(−10000, −3.4e38, −inf: attention masks) is *special*, and the nodes around it stay float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.progress import tracked
from modelops.errors import InputRefused, tool

if TYPE_CHECKING:
    import onnx

Feeds = Callable[[], Iterator[Mapping[str, Any]]]
Range = tuple[float, float]

_MASK_FROM = -1e4
# Nothing that a float32 network computes on purpose is as large as this.
_UNREAL = 1e18


def extremes(model: onnx.ModelProto, names: Sequence[str], feeds: Feeds, scratch: Path) -> dict[str, Range]:
    """The least and the greatest value of every tensor over all samples; NaN where a tensor held one.

    InputRefused when the data holds NaN or infinity, or no sample at all.
    """
    from modelops.graphs import runs
    from modelops.quantizers._preparation import save

    outputs = {name: (f"{name}/modelops_min", f"{name}/modelops_max") for name in names}
    place = scratch / "extremes.onnx"
    with tool("writing the calibration graph"):
        save(_with_extremes(model, outputs), place)
    wanted = [one for pair in outputs.values() for one in pair]
    low, high = dict.fromkeys(names, math.inf), dict.fromkeys(names, -math.inf)
    count = 0
    with runs.session(place, optimization="basic", trusted=True) as session:
        for feed in tracked("calibrating", feeds()):
            _refuse_nonfinite(feed)
            count += 1
            values = runs.run(session, feed, wanted)
            for name, (least, greatest) in outputs.items():
                low[name] = _least(low[name], float(values[least]))
                high[name] = -_least(-high[name], -float(values[greatest]))
    if count == 0:
        raise InputRefused("the calibration data holds no samples", hint="give at least one sample")
    return {name: (low[name], high[name]) for name in names}


def special_tensors(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> set[str]:
    """The tensors that carry mask values, NaN or infinity, by their ranges."""
    limit = mask_limit(model)
    return {name for name, (low, high) in ranges.items() if not (-limit < low <= high < limit)}


def mask_limit(model: onnx.ModelProto) -> float:
    """Half the size of the smallest constant in the graph that can only be a mask; large where there is none."""
    import numpy as np
    import onnx

    weights = {
        name for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv") for name in node.input[1:]
    }
    sizes = [_UNREAL]
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in weights and 0 not in tensor.dims:
            values = onnx.numpy_helper.to_array(tensor)
            masks = values[values <= _MASK_FROM]
            if masks.size:
                sizes.append(float(np.abs(masks).min()))
    return min(sizes) / 2


def _least(a: float, b: float) -> float:
    """The smaller of two numbers; NaN when one of them is."""
    return math.nan if math.isnan(a) or math.isnan(b) else min(a, b)


def _refuse_nonfinite(feed: Mapping[str, Any]) -> None:
    import numpy as np

    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputRefused(
                f"the calibration data holds NaN or infinity in input {name!r}", hint="remove those samples"
            )


def _with_extremes(model: onnx.ModelProto, outputs: Mapping[str, tuple[str, str]]) -> onnx.ModelProto:
    """A copy that gives nothing but the extremes of these tensors."""
    import onnx

    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    del grown.graph.output[:]
    for name, pair in outputs.items():
        for op, output in zip(("ReduceMin", "ReduceMax"), pair, strict=True):
            grown.graph.node.append(onnx.helper.make_node(op, [name], [output], output, keepdims=0))
            grown.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
    return grown


def tensors_of(nodes: Iterable[Any], facts: Any) -> list[str]:
    """The float tensors that these nodes read and write, once each."""
    return list(dict.fromkeys(name for node in nodes for name in (*facts.activations(node), *facts.results(node))))
