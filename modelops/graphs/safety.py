"""Models from strangers: what a file may not ask of us is refused before any other tool sees it.

A file is read as a message only; nothing in it is computed, inlined, inferred or followed outside its directory::

    file          regular, not empty, a whole protobuf message, a known version
    tensors       exactly as many bytes as their shape needs; external data in plain files below the model's directory
    functions     no recursion, and no more than so many nodes once inlined
    nodes         names defined before they are read; no nodes that hold compiled code
    sizes         no value, constant or loop out of all proportion (modelops.graphs.sizes)
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modelops.graphs import lean as lean_files
from modelops.graphs import tensors
from modelops.graphs.lean import Lean, Refusal
from modelops.graphs.limits import GraphLimits
from modelops.graphs.sizes import FunctionKey, Walk, function_key, function_key_of, plain_domain
from modelops.graphs.values import Value

if TYPE_CHECKING:
    import onnx

__all__ = ["GraphLimits", "check", "check_parsed"]

_STANDARD: Final = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_LARGEST_TENSOR: Final = 1 << 62
_RECURSION: Final = "functions can't be recursive: repair the model"


def check(path: Path, *, limits: GraphLimits = GraphLimits()) -> None:  # noqa: B008  (frozen)
    """Refuse a hostile, broken or oversized .onnx file; weights are not read.

    Raises InputRefused, which names the file and the part of it. A file that passes may still be wrong in ways that
    only a runtime finds (types that don't match, operators that nobody knows).
    """
    with lean_files.opened(path) as lean:
        check_parsed(lean, limits=limits)


def check_parsed(lean: Lean, *, limits: GraphLimits = GraphLimits()) -> list[Value]:  # noqa: B008
    """The same for a model that is open already, so that what was checked is what is used; raises Refusal.

    Gives what the walk over the graph found out about the outputs.
    """
    try:
        _versions(lean.proto)
        _nodes(lean.proto, limits)
        weights = _Tensors(lean).check()
        _expansion(lean.proto, limits)
        return Walk(lean, limits, weights).run()
    except RecursionError:
        raise Refusal("its bodies are nested too deeply", "flatten its functions and subgraphs") from None


def _versions(model: onnx.ModelProto) -> None:
    import onnx

    newest_ir, newest = max(onnx.Version.values()), onnx.defs.onnx_opset_version()
    upgrade = "export it for an older version, or install a newer onnx"
    if not model.HasField("graph"):
        raise Refusal("it holds no graph", "check that it is an .onnx file, and export or download it again")
    if not 1 <= model.ir_version <= newest_ir:
        raise Refusal(f"IR version {model.ir_version} is not one of 1 to {newest_ir}", upgrade)
    if not model.opset_import:
        raise Refusal("it imports no operator set", "the file was cut short, or is too old: export the model again")
    for where, imports in [("the model", model.opset_import)] + [
        (f"function {function.name!r}", function.opset_import) for function in model.functions
    ]:
        versions: dict[str, int] = {}
        for entry in imports:
            domain = plain_domain(entry.domain)
            if versions.setdefault(domain, entry.version) != entry.version:
                raise Refusal(f"{where} imports operator set {domain or 'ai.onnx'!r} in two versions")
        if not 1 <= versions.get("", 1) <= newest:
            raise Refusal(f"{where} needs operator set {versions['']}; known are 1 to {newest}", upgrade)


def _nodes(model: onnx.ModelProto, limits: GraphLimits) -> None:
    total = 0
    for scope in tensors.scopes(model):
        total += len(scope.body.node)
        if total > limits.nodes:
            raise Refusal(f"it has more than {limits.nodes:,} nodes", "split the model")
        if scope.depth > limits.subgraph_depth:
            raise Refusal(f"{scope.where} is nested more than {limits.subgraph_depth} deep", "flatten its subgraphs")
        for node in scope.body.node:
            if node.op_type == "EPContext":
                raise Refusal(
                    f"{tensors.node_label(node)} holds a compiled model, which may run any code",
                    "give the model from which it was compiled",
                )


class _Tensors:
    """The check of every tensor: as many bytes as its shape needs, from places where it may take them."""

    def __init__(self, lean: Lean) -> None:
        self.lean = lean
        self.sizes: dict[str, int] = {}
        self.ranges: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def check(self) -> int:
        """The bytes of all weights."""
        total = 0
        for place in tensors.tensors(self.lean.proto):
            try:
                total += self.one(place)
            except Refusal as refusal:
                raise Refusal(f"{place}: {refusal.reason}", refusal.hint) from None
        for location, ranges in self.ranges.items():
            self.overlaps(location, ranges)
        return total

    def one(self, place: tensors.Place) -> int:
        tensor = place.tensor
        if place.role == "initializer" and not tensor.name:
            raise Refusal("it has no name", "repair the model")
        if tensor.data_type not in tensors.TYPES:
            raise Refusal(f"its element type {tensor.data_type} is unknown")
        elements = 1
        for dim in tensor.dims:
            elements *= max(dim, 1)
            if dim < 0 or elements > _LARGEST_TENSOR:
                raise Refusal(f"its shape {list(tensor.dims)[:8]} is impossible")
        if tensor.HasField("segment"):
            raise Refusal("it is split into segments, which no tool reads")
        for entry in tensor.external_data:
            if lean_files.MEMORY_MARKER in entry.value:
                raise Refusal("its external data is an address in memory")
        if tensor.data_location == tensors.EXTERNAL:
            self.external(tensor)
        elif problem := tensors.missing_elements(tensor, self.lean.raw_length(tensor)):
            raise Refusal(problem)
        return tensors.tensor_bytes(tensor)

    def external(self, tensor: onnx.TensorProto) -> None:
        span = lean_files.external_span(self.lean.path.parent, tensor)
        location = span.file.location  # type: ignore[attr-defined]
        if location not in self.sizes:
            descriptor = span.file.descriptor()
            self.sizes[location] = os.fstat(descriptor).st_size
            os.close(descriptor)
        end = span.offset + span.length
        if end > self.sizes[location]:
            raise Refusal(
                f"external data ends at byte {end:,} of {location!r}, which has {self.sizes[location]:,}",
                "the data file was cut short or replaced: export or download both files again",
            )
        if span.length:
            self.ranges[location].add((span.offset, end))

    @staticmethod
    def overlaps(location: str, ranges: set[tuple[int, int]]) -> None:
        reached = 0
        for start, end in sorted(ranges):
            if start < reached:
                raise Refusal(f"external data in {location!r} overlaps at byte {start:,}")
            reached = end


@dataclass
class _Function:
    """What a function costs: its own nodes, and how often and how deep inside it calls which others."""

    nodes: int = 0
    depth: int = 0
    calls: list[tuple[FunctionKey, int]] = field(default_factory=list)


def _expansion(model: onnx.ModelProto, limits: GraphLimits) -> None:
    """Count nodes as if every function were inlined, each function once; linear in the size of the file."""
    functions: dict[FunctionKey, _Function] = {}
    for function in model.functions:
        key = function_key_of(function)
        if key[0] in _STANDARD:
            what = f"function {function.name!r} stands in for a standard operator"
            raise Refusal(what, "give it a domain of its own")
        if key in functions:
            raise Refusal(f"function {function.name!r} of domain {function.domain!r} is defined twice")
        functions[key] = _measured(function)
    done: dict[FunctionKey, tuple[int, int, int]] = {}
    whole = _measured(model.graph)
    written = whole.nodes + sum(cost.nodes for cost in functions.values())
    most = max(written, min(max(limits.expansion * written, limits.freely_expanded), limits.expanded_nodes))
    stack: list[tuple[FunctionKey, bool]] = [(key, False) for key in functions]
    open_keys: set[FunctionKey] = set()
    while stack:
        key, finished = stack.pop()
        if finished:
            open_keys.discard(key)
            done[key] = _total(functions[key], done, functions, key[1], most, limits)
        elif key not in done:
            if key in open_keys:
                raise Refusal(f"function {key[1]!r} calls itself", _RECURSION)
            open_keys.add(key)
            stack.append((key, True))
            for callee in dict.fromkeys(callee for callee, _ in functions[key].calls if callee in functions):
                if callee in open_keys:
                    raise Refusal(f"function {callee[1]!r} calls itself", _RECURSION)
                stack.append((callee, False))
    _total(whole, done, functions, "the graph", most, limits)


def _measured(body: onnx.GraphProto | onnx.FunctionProto) -> _Function:
    cost = _Function()
    stack = [(body, 0)]
    while stack:
        part, depth = stack.pop()
        cost.depth = max(cost.depth, depth)
        cost.nodes += len(part.node)
        for node in part.node:
            cost.calls.append((function_key(node), depth))
            for attribute in node.attribute:
                stack.extend((graph, depth + 1) for graph in tensors.graphs_of(attribute))
    return cost


def _total(
    cost: _Function,
    done: dict[FunctionKey, tuple[int, int, int]],
    functions: dict[FunctionKey, _Function],
    name: str,
    most: int,
    limits: GraphLimits,
) -> tuple[int, int, int]:
    """Nodes, subgraph depth and call depth after inlining."""
    nodes, depth, calls = cost.nodes, cost.depth, 0
    for callee, at in cost.calls:
        if callee in functions:
            inside, deeper, further = done[callee]
            nodes, depth, calls = nodes + inside, max(depth, at + deeper), max(calls, further + 1)
    where = f"function {name!r}" if name != "the graph" else name
    if nodes > most:
        raise Refusal(f"{where} has more than {most:,} nodes once inlined", "inline the functions, or split the model")
    if depth > limits.subgraph_depth or calls > limits.call_depth:
        raise Refusal(f"{where} nests {depth} subgraphs and {calls} calls", "flatten its functions and subgraphs")
    return nodes, depth, calls
