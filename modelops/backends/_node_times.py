"""What onnxruntime's profiler says of every node: its time, its work, and what it moves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from modelops.backends import NodeTime
from modelops.backends._sessions import onnxruntime_session
from modelops.errors import tool

_SUFFIX = "_kernel_time"
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "QGemm", "QLinearMatMul", "MatMulNBits"})
_INTEGER_PRODUCTS = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv"})


def node_times(
    model: Path, feed: Mapping[str, Any], scratch: Path, runs: int, options: Any, providers: list[Any]
) -> list[NodeTime]:
    """Every node with its median time over these runs, the slowest first, with the shapes that it saw."""
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    session = onnxruntime_session(model, options, providers)
    with tool("onnxruntime"):
        for _ in range(runs):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    spans: dict[tuple[str, str], list[float]] = {}
    facts: dict[tuple[str, str], Mapping[str, Any]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            key = (name.removesuffix(_SUFFIX), str(event["args"].get("node_index", "")))
            spans.setdefault(key, []).append(float(event["dur"]))
            facts[key] = event["args"]
    found = [_node(name, median(spans[name, index]), facts[name, index]) for name, index in spans]
    return sorted(found, key=lambda node: -node.microseconds)


def _node(name: str, microseconds: float, facts: Mapping[str, Any]) -> NodeTime:
    op = str(facts["op_name"])
    inputs, outputs = _tensors(facts.get("input_type_shape")), _tensors(facts.get("output_type_shape"))
    moved = sum(int(facts.get(key, 0)) for key in ("activation_size", "parameter_size", "output_size"))
    small = any(dtype in ("int8", "uint8") for dtype, _ in inputs[:2])
    return NodeTime(name, op, str(facts["provider"]), microseconds, macs(op, inputs, outputs), moved, small)


def macs(op: str, inputs: Sequence[tuple[str, list[int]]], outputs: Sequence[tuple[str, list[int]]]) -> int | None:
    """How many products a node adds up: output elements times the length of each sum; 0 for what multiplies little.

    None where shapes don't tell: a weight that onnxruntime packed anew is not among the inputs.
    """
    if op in _PRODUCTS or op in _INTEGER_PRODUCTS:
        if not inputs or not outputs or not inputs[0][1]:
            return None
        rows = outputs[0][1][0] if "Gemm" in op else math.prod(inputs[0][1][:-1])  # Gemm may take its input transposed
        return math.prod(outputs[0][1]) * (math.prod(inputs[0][1]) // rows if rows else 0)
    if op in _CONVOLUTIONS:
        weight = next((shape for _, shape in inputs[1:] if len(shape) > 2), None)
        return None if weight is None or not outputs else math.prod(outputs[0][1]) * math.prod(weight[1:])
    if op in ("ConvTranspose", "LSTM", "GRU", "RNN"):
        shapes = [shape for _, shape in inputs[:3]]
        if len(shapes) < 2 or not all(shapes[: 2 if op == "ConvTranspose" else 3]):
            return None
        if op == "ConvTranspose":
            return math.prod(shapes[0]) * math.prod(shapes[1][1:])
        return math.prod(shapes[0][:2]) * (math.prod(shapes[1]) + math.prod(shapes[2]))  # every step, both directions
    if "Attention" in op or op == "Einsum":
        return None
    return 0


def _tensors(listed: Any) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of every tensor in a list such as [{"float": [2, 8]}]."""
    return [(dtype, list(shape)) for entry in listed or () for dtype, shape in entry.items()]
