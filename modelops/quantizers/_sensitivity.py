"""What quantizing each node alone costs the model's outputs.

Every node that would be quantized gets a twin with quantized inputs, weights and results, in float arithmetic; a switch
among the model's inputs says which twin runs in place of its node. So one session measures all nodes, on samples that
were held out from what is fitted, and an error is what reaches the outputs: isolated at its node, with everything that
is downstream of it::

    y = If(switch == 7) { MatMul(DQ(Q(x)), DQ(int8 W)) } else { MatMul(x, W) }

Errors of different nodes hardly correlate: their powers add up to nearly that of the quantized model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.progress import progress
from modelops.quantizers._calibration import Feeds
from modelops.quantizers._captures import HELD_OUT
from modelops.quantizers._histograms import Range, quantization
from modelops.quantizers._int8 import quantized
from modelops.quantizers._rounding import Scheme

if TYPE_CHECKING:
    import onnx

_SWITCH = "modelops_switch"
_NONE = -1


@dataclass(frozen=True)
class Cost:
    """What a node's quantization costs: power of the error that it makes at the outputs over the power of those.

    Of several outputs, the one where it is worst.
    """

    node: str
    op: str
    error: float

    def to_list(self) -> list[Any]:
        """For the cache; Python's JSON holds infinity too."""
        return [self.node, self.op, self.error]

    @classmethod
    def of_list(cls, values: Any) -> Cost:
        """What ``to_list`` wrote; ValueError for anything else."""
        node, op, error = values
        return cls(str(node), str(op), float(error))

    @property
    def decibels(self) -> float:
        return -10 * math.log10(min(max(self.error, 1e-12), 1e12))


def costs(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    ranges: Mapping[str, Range],
    scheme: Scheme,
    feeds: Feeds,
    scratch: Path,
    seconds: float,
) -> list[Cost]:
    """The cost of every node, the dearest first, on as many held-out batches as the time allows, at least one."""
    from modelops.graphs import runs
    from modelops.quantizers._preparation import save

    place = scratch / "switched.onnx"
    save(switched(model, nodes, ranges, scheme), place)
    errors = [_Errors() for _ in nodes]
    started, done = time.perf_counter(), 0
    with runs.session(place, optimization="basic", trusted=True) as session:
        for feed in held_out(feeds):
            exact = _run(session, feed, _NONE)
            for number, found in enumerate(errors):
                found.add(exact, _run(session, feed, number))
                progress("measuring nodes", number + 1, len(nodes))
            done += 1
            spent = time.perf_counter() - started
            if spent + spent / done > seconds:
                break
    place.unlink()
    found_costs = [Cost(node.name, node.op_type, error.worst) for node, error in zip(nodes, errors, strict=True)]
    return sorted(found_costs, key=lambda cost: -cost.error)


def held_out(feeds: Feeds) -> Iterable[Mapping[str, Any]]:
    """The batches that judge; all of them where there are too few to hold any out."""
    kept = False
    for count, feed in enumerate(feeds()):
        if count % HELD_OUT == HELD_OUT - 1:
            kept = True
            yield feed
    if not kept:
        yield from feeds()


class _Errors:
    """Power of signal and noise by output, over batches; infinite noise where NaN or infinity came in.

    Where nothing but integers or texts comes out, the share of those that changed.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, exact: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        import numpy as np

        floats = any(wanted.dtype.kind == "f" for wanted in exact.values())
        for name, wanted in exact.items():
            if made[name].shape != wanted.shape:  # its size depends on values that changed
                if not floats or wanted.dtype.kind == "f":
                    self._sums.setdefault(name, [1.0, 0.0])[1] = math.inf
                continue
            if wanted.dtype.kind != "f":
                if not floats:  # decisions alone come out: their number, and how many changed
                    sums = self._sums.setdefault(name, [0.0, 0.0])
                    sums[0] += float(wanted.size)
                    sums[1] += float((made[name] != wanted).sum())
                continue
            signal, difference = wanted.astype(np.float64), made[name] - wanted
            known = np.isfinite(signal) & np.isfinite(difference)
            sums = self._sums.setdefault(name, [0.0, 0.0])
            if not np.isfinite(made[name][np.isfinite(signal)]).all():
                sums[1] = math.inf
            sums[0] += float((signal[np.isfinite(signal)] ** 2).sum())
            sums[1] += float((difference[known].astype(np.float64) ** 2).sum())

    @property
    def worst(self) -> float:
        """The greatest ratio of noise to signal of any output."""
        return max((noise / signal for signal, noise in self._sums.values() if signal > 0), default=0.0)


def noise(source: Path, candidate: Path, feeds: Feeds, *, exact: bool = False) -> float:
    """Power of the difference between two models over that of the first's outputs, on the batches that judge.

    ``exact`` computes the second one's integers as kernels do that don't overflow, where this machine's may.
    """
    from modelops.graphs import runs

    found = _Errors()
    config = {"session.x64quantprecision": "1"} if exact else {}
    with runs.session(source, trusted=True) as before, runs.session(candidate, config=config) as after:
        for feed in held_out(feeds):
            found.add(runs.run(before, feed), runs.run(after, feed))
    return found.worst


def _run(session: Any, feed: Mapping[str, Any], switch: int) -> dict[str, Any]:
    import numpy as np

    from modelops.graphs import runs

    return runs.run(session, {**feed, _SWITCH: np.array(switch, dtype=np.int64)})


def switched(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], ranges: Mapping[str, Range], scheme: Scheme
) -> onnx.ModelProto:
    """The model with one input more, the number of the node that is quantized."""
    import onnx
    from onnx import helper

    grown = onnx.ModelProto()
    grown.CopyFrom(model)
    numbers = {node.name: number for number, node in enumerate(nodes)}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    weights |= _turned(model, weights)
    body: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name not in numbers:
            body.append(node)
            continue
        number, chosen = numbers[node.name], f"{node.name}/modelops_chosen"
        constant = helper.make_tensor("", onnx.TensorProto.INT64, [], [number])
        body.append(helper.make_node("Constant", [], [f"{chosen}_number"], f"{chosen}_constant", value=constant))
        body.append(helper.make_node("Equal", [_SWITCH, f"{chosen}_number"], [chosen], f"{chosen}_test"))
        made = twin(node, ranges, scheme, weights, grown.graph)
        branches = {"then_branch": _branch(made, node, "quantized"), "else_branch": _branch([node], node, "float")}
        body.append(helper.make_node("If", [chosen], list(node.output), f"{node.name}/modelops_if", **branches))
    del grown.graph.node[:]
    grown.graph.node.extend(body)
    grown.graph.input.append(helper.make_tensor_value_info(_SWITCH, onnx.TensorProto.INT64, []))
    return grown


def _turned(model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> dict[str, onnx.TensorProto]:
    """The matrices that a Transpose makes of weights, by the name of what it gives."""
    from onnx import numpy_helper

    found = {}
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights and len(weights[node.input[0]].dims) == 2:
            order = next((list(item.ints) for item in node.attribute if item.name == "perm"), [1, 0])
            array = numpy_helper.to_array(weights[node.input[0]]).transpose(order)
            found[node.output[0]] = numpy_helper.from_array(array, node.output[0])
    return found


def _branch(nodes: Sequence[onnx.NodeProto], node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    """A body of an If: these nodes, and what ``node`` writes under names of its own."""
    import onnx
    from onnx import helper

    renamed = {output: f"{output}/modelops_{name}" for output in node.output if output}
    body = []
    for item in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(item)
        copy.name = f"{item.name}/modelops_{name}"
        for place, output in enumerate(copy.output):
            copy.output[place] = renamed.get(output, output)
        body.append(copy)
    outputs = [
        helper.make_tensor_value_info(renamed[output], onnx.TensorProto.FLOAT, None) for output in node.output if output
    ]
    return helper.make_graph(body, f"{node.name}/modelops_{name}", [], outputs)


def twin(
    node: onnx.NodeProto,
    ranges: Mapping[str, Range],
    scheme: Scheme,
    weights: Mapping[str, onnx.TensorProto],
    graph: onnx.GraphProto,
) -> list[onnx.NodeProto]:
    """The node with quantized inputs and results; its integer weights join the graph."""
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{node.name}/modelops_twin"
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    for place, name in enumerate(node.input):
        base = f"{node.name}/modelops_in{place}"
        if place == 1 and name in weights:
            before.append(_weight(node, weights[name], base, scheme, graph))
        elif place == 0 and scheme.rule is None:
            before += _found_at_run_time(name, base)
        elif name in ranges:
            before += _pair(name, base, ranges[name], graph)
        else:
            continue
        copy.input[place] = f"{base}_float"
    for place, name in enumerate(node.output):
        if name in ranges and scheme.rule is not None:
            base = f"{node.name}/modelops_out{place}"
            copy.output[place] = f"{base}_raw"
            pair = _pair(f"{base}_raw", base, ranges[name], graph)
            pair[-1].output[0] = name
            after += pair
    return [*before, copy, *after]


def _pair(name: str, base: str, found: Range, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    import numpy as np
    from onnx import helper, numpy_helper

    step, zero = quantization((min(found[0], 0.0), max(found[1], 0.0)))
    constants = [f"{base}_step", f"{base}_zero"]
    for place, value in zip(constants, (np.float32(step), np.uint8(zero)), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), place))
    return [
        helper.make_node("QuantizeLinear", [name, *constants], [f"{base}_levels"], f"{base}_quantize"),
        helper.make_node("DequantizeLinear", [f"{base}_levels", *constants], [f"{base}_float"], f"{base}_dequantize"),
    ]


def _found_at_run_time(name: str, base: str) -> list[onnx.NodeProto]:
    from onnx import helper

    found = [f"{base}_levels", f"{base}_step", f"{base}_zero"]
    return [
        helper.make_node("DynamicQuantizeLinear", [name], found, f"{base}_quantize"),
        helper.make_node("DequantizeLinear", found, [f"{base}_float"], f"{base}_dequantize"),
    ]


def _weight(
    node: onnx.NodeProto, weight: onnx.TensorProto, base: str, scheme: Scheme, graph: onnx.GraphProto
) -> onnx.NodeProto:
    """The weight as integers that join the graph, and the node that makes them floats again."""
    from onnx import helper, numpy_helper

    axis = out_axis(node)
    integers, scales = quantized(
        numpy_helper.to_array(weight), axis=axis if scheme.per_channel else None, reduced=scheme.reduced
    )
    names = [f"{base}_int8", f"{base}_scales"]
    for name, array in zip(names, (integers, scales), strict=True):
        graph.initializer.append(numpy_helper.from_array(array, name))
    return helper.make_node("DequantizeLinear", names, [f"{base}_float"], f"{base}_dequantize", axis=axis)


def out_axis(node: onnx.NodeProto) -> int:
    """Which axis of a weight goes over output channels."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1
