"""Bias correction: the mean error that quantization makes in every output channel, taken off the bias.

Every node runs beside its quantized twin in one graph, on the same float inputs; the means of the difference and of its
square come out by channel. A correction that is fitted on some batches stays only where it lowers the squared error on
those that were held out (Nagel et al. 2019, *Data-free quantization*, here with the error as measured).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelops.core.ahead import ahead
from modelops.core.progress import tracked
from modelops.quantizers._calibration import Feeds, in_order
from modelops.quantizers._captures import HELD_OUT
from modelops.quantizers._histograms import Range
from modelops.quantizers._memory import Memory
from modelops.quantizers._rounding import Scheme, decibels
from modelops.quantizers._sensitivity import twin

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

# ReduceMean takes its axes as an input since this opset.
_AXES_AS_INPUT = 18
# Each row of an image has many pixels to take the mean of; of large ones (of so many numbers) fewer rows are enough.
_ROWS, _ROWS_IF_LARGE, _LARGE = 64, 16, 1 << 15
# A correction has to save this share of a node's error.
_WORTH = 0.01


@dataclass
class _Means:
    """Sums over batches of the mean error of every channel, of that of its square, and of the power of all channels."""

    errors: Any = 0.0
    squares: Any = 0.0
    power: float = 0.0
    count: int = 0

    def add(self, errors: NDArray[Any], squares: NDArray[Any], power: NDArray[Any]) -> None:
        self.errors = self.errors + errors.astype("float64")
        self.squares = self.squares + squares.astype("float64")
        self.power += float(power) * len(errors)
        self.count += 1


@dataclass
class _Seen:
    fitting: _Means = field(default_factory=_Means)
    held_out: _Means = field(default_factory=_Means)

    def correction(self) -> tuple[NDArray[Any] | None, float, float]:
        """(what to add to the bias, or None; the held-out error over the signal before, and with it)."""
        import numpy as np

        judge = self.held_out if self.held_out.count else self.fitting
        before = float(np.sum(judge.squares) / judge.count)
        shift = -self.fitting.errors / self.fitting.count
        after = before + float(np.sum(2 * shift * judge.errors / judge.count + shift**2))
        power = judge.power / judge.count or 1.0
        worth = after < (1 - _WORTH) * before
        found = np.asarray(shift, dtype=np.float32) if worth else None
        return found, before / power, (after if worth else before) / power


def correct(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    ranges: Mapping[str, Range],
    scheme: Scheme,
    memory: Memory,
) -> list[dict[str, Any]]:
    """Change the biases of these Conv and Gemm nodes of the model, where that helps; a line of a table for each."""
    from modelops.graphs import runs
    from modelops.quantizers._preparation import save

    nodes = [node for node in nodes if _correctable(node, model.graph)]
    if not nodes:
        return []
    place = memory.scratch / "twins.onnx"
    save(_beside(model, nodes, ranges, scheme), place)
    seen = [_Seen() for _ in nodes]
    with runs.session(place, optimization="basic", trusted=True, frugal=True) as session:

        def means(feed: Mapping[str, Any]) -> list[Any]:
            return list(runs.run(session, feed).values())

        some = tracked("measuring biases", _some(model, memory.feeds))
        for count, values in enumerate(ahead(means, some, runs.THREADS)):
            for number, one in enumerate(seen):
                part = one.held_out if count % HELD_OUT == HELD_OUT - 1 else one.fitting
                part.add(*values[3 * number : 3 * number + 3])
    place.unlink()
    table = []
    for node, one in zip(nodes, seen, strict=True):
        shift, before, after = one.correction()
        if shift is not None:
            _add(model.graph, node, shift)
        line = {"nodes": [node.name], "bias_corrected": shift is not None}
        table.append({**line, "before_db": decibels(before), "after_db": decibels(after)})
    return table


def _some(model: onnx.ModelProto, feeds: Feeds) -> Iterator[Mapping[str, Any]]:
    """As many batches as a mean over channels needs; of large samples, a few of each."""
    rows = 0
    for count, feed in enumerate(feeds()):
        size = len(next((array for array in feed.values() if array.ndim), [None]))
        large = max((array.size for array in feed.values()), default=0) >= size * _LARGE
        if rows >= (_ROWS_IF_LARGE if large else _ROWS) and count >= HELD_OUT:
            return
        few = _ROWS_IF_LARGE // HELD_OUT
        if large and size > few and _stacks(model, feed, size):
            feed, size = {name: array[:few] for name, array in feed.items()}, few
        rows += size
        yield feed


def _stacks(model: onnx.ModelProto, feed: Mapping[str, Any], size: int) -> bool:
    """Whether the first axis of all inputs counts samples, and may be of any size."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return all(
        array.ndim and len(array) == size and shapes[name] and not shapes[name][0].HasField("dim_value")
        for name, array in feed.items()
    )


def _beside(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], ranges: Mapping[str, Range], scheme: Scheme
) -> onnx.ModelProto:
    """The model with a twin beside every node; its outputs are the three means of each."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    shape, axes = "modelops_channels", "modelops_axes"
    grown.graph.initializer.append(numpy_helper.from_array(np.array([0, 2]), axes))
    grown.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1]), shape))
    del grown.graph.output[:]
    more: list[onnx.NodeProto] = []
    for node in nodes:
        base = f"{node.name}/modelops_twin"
        made = twin(node, {name: ranges[name] for name in node.input if name in ranges}, scheme, weights, grown.graph)
        made[-1].output[0] = f"{base}_out"
        difference, flat = f"{base}_difference", f"{base}_flat"
        more.extend([*made, helper.make_node("Sub", [f"{base}_out", node.output[0]], [difference])])
        if node.op_type == "Gemm":
            more.append(helper.make_node("Unsqueeze", [difference, f"{shape}_last"], [flat]))
        else:
            more.append(helper.make_node("Reshape", [difference, shape], [flat]))
        more.append(helper.make_node("Mul", [flat, flat], [f"{flat}_squared"]))
        for value in (flat, f"{flat}_squared"):
            if opset >= _AXES_AS_INPUT:
                mean = helper.make_node("ReduceMean", [value, axes], [f"{value}_mean"], keepdims=0)
            else:
                mean = helper.make_node("ReduceMean", [value], [f"{value}_mean"], axes=[0, 2], keepdims=0)
            more.append(mean)
            grown.graph.output.append(helper.make_tensor_value_info(f"{value}_mean", onnx.TensorProto.FLOAT, None))
        signal = [f"{base}_signal", f"{base}_power"]
        more.append(helper.make_node("Mul", [node.output[0]] * 2, signal[:1]))
        more.append(helper.make_node("ReduceMean", signal[:1], signal[1:], keepdims=0))
        grown.graph.output.append(helper.make_tensor_value_info(signal[1], onnx.TensorProto.FLOAT, None))
    grown.graph.initializer.append(numpy_helper.from_array(np.array([2]), f"{shape}_last"))
    in_order(grown, more)
    return grown


def _correctable(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether a node adds a bias that is in the file, or none so far."""
    if node.op_type not in ("Conv", "Gemm") or any(item.name == "beta" and item.f != 1 for item in node.attribute):
        return False
    bias = node.input[2] if len(node.input) > 2 else ""
    return not bias or any(tensor.name == bias and len(tensor.dims) == 1 for tensor in graph.initializer)


def _add(graph: onnx.GraphProto, node: onnx.NodeProto, shift: NDArray[Any]) -> None:
    """Add to the bias of a node; one that has none gets it."""
    from onnx import numpy_helper

    bias = node.input[2] if len(node.input) > 2 else ""
    old = next((numpy_helper.to_array(tensor) for tensor in graph.initializer if bias and tensor.name == bias), 0.0)
    name = f"{node.name}_corrected_bias"
    graph.initializer.append(numpy_helper.from_array((old + shift).astype("float32"), name))
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)
