"""Latency tables: how long each product of a network takes on this machine, by how much of it is left.

A convolution or matrix product depends on the channels that it reads and on those that it makes. It is timed by itself,
with the sizes that it has for one sample, at a few sizes of both, and in between its time is interpolated: work and
traffic are linear in either. What is left of the time of the whole network is spread over all other nodes by the size
of what they write.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product as grid_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.core.progress import progress
from modelops.errors import tool
from modelops.pruners._axes import Place
from modelops.pruners._costs import Cost, Removed, Sizes, Term
from modelops.pruners._groups import Anatomy
from modelops.pruners._network import Network

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# What is timed of every product: with nothing removed, and with these shares of its channels.
_SHARES = (0.0, 0.5, 0.875)
_ROUNDS = 7
_ROUND_SECONDS = 4e-3
_TIMED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})

Feed = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Variable:
    """Axes of a node that lose channels together; ``axis`` is one of them."""

    groups: tuple[int, ...]
    axis: int


def tables(anatomy: Anatomy, one: Network, model: Path, feed: Feed) -> Cost:
    """Seconds that one inference takes, by how many channels every group has lost.

    ``one`` is the network of ``anatomy`` with the shapes that it has for ``feed``, which is one sample.
    """
    sizes = Sizes(anatomy)
    whole = timed(model, feed)
    terms: list[Term] = []
    measured, others = 0.0, []
    nodes = one.nodes
    for number, node in enumerate(nodes):
        progress("timing products", number, len(nodes))
        found = _Timer(anatomy, sizes, one, node).term() if node.op_type in _TIMED else None
        if found is None:
            others.append(node)
        else:
            terms.append(found)
            measured += found.value([0] * len(anatomy.groups))
    progress("timing products", len(nodes), len(nodes))
    # Products by themselves may take longer than within the network, where layouts are kept between them.
    scale = min(1.0, whole / measured) if measured else 1.0
    terms = [Term(term.groups, _scaled(term, scale)) for term in terms]
    return Cost([*terms, *_written(anatomy, sizes, one, others, max(0.0, whole - scale * measured))])


def _scaled(term: Term, scale: float) -> Any:
    return lambda removed: scale * term.value(removed)


def _written(anatomy: Anatomy, sizes: Sizes, one: Network, nodes: Sequence[ir.Node], seconds: float) -> list[Term]:
    """The time of nodes that were not timed, spread over them by the elements that they write."""
    rows = []
    for node in nodes:
        for value in node.outputs:
            shape = one.shape(value)
            if shape:
                axes = [anatomy.axes.of(Place(value, k)) for k in range(len(shape))]
                cut = [axis.number for axis in axes if axis is not None and sizes.groups(axis.number)]
                rows.append((math.prod(shape), cut))
    whole = sum(count for count, _ in rows) or 1

    def term(count: int, cut: list[int]) -> Term:
        base = [0] * len(anatomy.groups)

        def value(removed: Removed) -> float:
            share = math.prod(sizes.of(axis, removed) / max(1, sizes.of(axis, base)) for axis in cut)
            return seconds * count / whole * share

        return Term(tuple(sorted({group for axis in cut for group in sizes.groups(axis)})), value)

    return [term(count, cut) for count, cut in rows]


_known: dict[tuple[Any, ...], float] = {}


class _Timer:
    """Times one product at several sizes."""

    def __init__(self, anatomy: Anatomy, sizes: Sizes, one: Network, node: ir.Node) -> None:
        self._anatomy = anatomy
        self._sizes = sizes
        self._one = one
        self._node = node
        self._shapes = [one.shape(value) for value in node.inputs]

    def term(self) -> Term | None:
        """The time of the node as a term of the cost; None where its shapes are not known, or too many things vary."""
        if any(shape is None for value, shape in zip(self._node.inputs, self._shapes, strict=True) if value):
            return None
        variables = self._variables()
        if len(variables) > 2:
            return None
        count = len(self._anatomy.groups)
        points: list[tuple[int, ...]] = []
        jobs: list[tuple[Shape, ...]] = []
        for shares in grid_of(_SHARES, repeat=len(variables)):
            removed = [0] * count
            for share, variable in zip(shares, variables, strict=True):
                for group in variable.groups:
                    removed[group] = int(share * self._anatomy.groups[group].size)
            points.append(tuple(self._sizes.of(variable.axis, removed) for variable in variables))
            jobs.append(self._input_shapes(removed))
        table = falling(dict(zip(points, self._measured(jobs), strict=True)))
        ticks = [sorted({point[k] for point in points}) for k in range(len(variables))]
        axes = [variable.axis for variable in variables]
        groups = tuple(sorted({group for variable in variables for group in variable.groups}))
        sizes = self._sizes
        return Term(
            groups, lambda removed: interpolated(table, ticks, [float(sizes.of(axis, removed)) for axis in axes])
        )

    def _axes(self) -> list[tuple[int, int, int]]:
        """(input, its axis, number of the labelled axis) of everything that may shrink."""
        found = []
        for number, value in enumerate(self._node.inputs):
            shape = self._shapes[number]
            if value is None or shape is None:
                continue
            use = (self._node, number) if self._one.weight(value) else None
            for k in range(len(shape)):
                axis = self._anatomy.axes.of(Place(value, k, use))
                if axis is not None and self._sizes.groups(axis.number):
                    found.append((number, k, axis.number))
        return found

    def _variables(self) -> list[Variable]:
        found: dict[tuple[int, ...], Variable] = {}
        for _, _, axis in self._axes():
            groups = self._sizes.groups(axis)
            found.setdefault(groups, Variable(groups, axis))
        return list(found.values())

    def _input_shapes(self, removed: Removed) -> tuple[Shape, ...]:
        shapes = [list(shape or ()) for shape in self._shapes]
        for number, k, axis in self._axes():
            shapes[number][k] = self._sizes.of(axis, removed)
        return tuple(tuple(shape) for shape in shapes)

    def _measured(self, jobs: Sequence[tuple[Shape, ...]]) -> list[float]:
        """Seconds of the node with inputs of these shapes; the same product is timed once."""
        key = (self._node.op_type, str(sorted((k, str(v.value)) for k, v in self._node.attributes.items())))
        weights = tuple(value is not None and self._one.weight(value) for value in self._node.inputs)
        keys = [(key, weights, job) for job in jobs]
        new = {k: job for k, job in zip(keys, jobs, strict=True) if k not in _known}
        if new:
            spans = timings([_idle(self._one), *(self._model(job) for job in new.values())])
            # What a run costs that computes nothing is not the product's.
            _known.update(zip(new, (max(1e-8, span - spans[0]) for span in spans[1:]), strict=True))
        return [_known[k] for k in keys]

    def _model(self, shapes: tuple[Shape, ...]) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """The node by itself with inputs of these shapes, and a feed for it."""
        import numpy as np
        import onnx
        import onnx_ir as ir

        proto = ir.to_proto(self._node)
        random = np.random.default_rng(0)
        inputs, weights, feed = [], [], {}
        names = [name if name else "" for name in proto.input]
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            value = self._node.inputs[number]
            if value is None or not name:
                continue
            array = random.normal(size=shape).astype(np.float32)
            unique = f"{name}_{number}"
            proto.input[number] = unique
            if self._one.weight(value):
                weights.append(onnx.numpy_helper.from_array(array, unique))
            else:
                inputs.append(onnx.helper.make_tensor_value_info(unique, onnx.TensorProto.FLOAT, list(shape)))
                feed[unique] = array
        for attribute in proto.attribute:
            if attribute.name == "group" and attribute.i > 1 and self._shapes[0]:
                attribute.i = attribute.i * shapes[0][1] // self._shapes[0][1]
        outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in proto.output]
        graph = onnx.helper.make_graph([proto], "one", inputs, outputs, weights)
        opsets = [onnx.helper.make_opsetid("", self._one.opset)]
        ir_version = int(self._one.model.ir_version)
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), feed


def falling(table: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """The table in which nothing takes longer than what is larger in every way: noise only ever adds time."""
    return {
        point: min(span for other, span in table.items() if all(a >= b for a, b in zip(other, point, strict=True)))
        for point in table
    }


def _idle(one: Network) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model that does next to nothing."""
    import numpy as np
    import onnx

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "idle", [x], [y])
    opsets = [onnx.helper.make_opsetid("", one.opset)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=int(one.model.ir_version))
    return model, {"x": np.zeros(1, np.float32)}


def interpolated(table: Mapping[tuple[int, ...], float], ticks: Sequence[Sequence[int]], at: Sequence[float]) -> float:
    """The value of a table between its points, linear along each of its axes; beyond them, as at the last point."""
    corners: list[list[tuple[int, float]]] = []
    for row, place in zip(ticks, at, strict=True):
        above = next((k for k, tick in enumerate(row) if tick >= place), len(row) - 1)
        below = max(0, above - 1)
        low, high = row[below], row[above]
        share = 0.0 if low == high else min(1.0, max(0.0, (place - low) / (high - low)))
        corners.append([(low, 1 - share), (high, share)])
    return sum(
        table[tuple(tick for tick, _ in corner)] * math.prod(weight for _, weight in corner)
        for corner in grid_of(*corners)
        if all(weight > 0 for _, weight in corner)
    )


def timings(models: Sequence[tuple[onnx.ModelProto, dict[str, Any]]]) -> list[float]:
    """Seconds of one run of each, the least of several rounds in which all take their turn."""
    sessions = [(session(model.SerializeToString()), feed) for model, feed in models]
    runs = []
    for one, feed in sessions:
        one.run(None, feed)
        started = time.perf_counter()
        one.run(None, feed)
        runs.append(max(1, min(200, int(_ROUND_SECONDS / max(1e-7, time.perf_counter() - started)))))
    best = [math.inf] * len(sessions)
    for _ in range(_ROUNDS):
        for k, (one, feed) in enumerate(sessions):
            started = time.perf_counter()
            for _ in range(runs[k]):
                one.run(None, feed)
            best[k] = min(best[k], (time.perf_counter() - started) / runs[k])
    return best


def timed(model: Path, feed: Feed) -> float:
    """Seconds that one inference of a model takes."""
    one = session(model)
    names = {item.name for item in one.get_inputs()}
    feed = {name: array for name, array in feed.items() if name in names}
    spans: list[float] = []
    end = time.perf_counter() + 1.0
    while len(spans) < 5 or (time.perf_counter() < end and len(spans) < 500):
        started = time.perf_counter()
        one.run(None, feed)
        spans.append(time.perf_counter() - started)
    return min(spans[1:])


def ratio(model: Path, other: Path, feed: Feed, seconds: float = 2.0) -> float:
    """The time of ``model`` as a share of that of ``other``, run by turns; the median over the turns."""
    import numpy as np

    sessions = [session(place) for place in (model, other)]
    feeds = [{name: feed[name] for name in (item.name for item in one.get_inputs())} for one in sessions]
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 7 or (time.perf_counter() < end and len(found) < 2000):
        spans = []
        for one, mine in zip(sessions, feeds, strict=True):
            started = time.perf_counter()
            one.run(None, mine)
            spans.append(time.perf_counter() - started)
        found.append(spans[0] / spans[1])
    return float(np.median(found[1:]))


def session(model: Path | bytes) -> Any:
    """A session as models are deployed: all optimisations, and all CPUs that this process may use."""
    with tool("onnxruntime"):
        import onnxruntime as ort

        from modelops.core import machine

        options = ort.SessionOptions()
        options.intra_op_num_threads = machine.usable_cpus()
        # Threads that wait for work in one session would take time from the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        where = model if isinstance(model, bytes) else str(model)
        return ort.InferenceSession(where, options, providers=["CPUExecutionProvider"])
