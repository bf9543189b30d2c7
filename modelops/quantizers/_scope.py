"""Which nodes a method treats, and which models it refuses."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelops.errors import GateFailed, InputRefused, UsageError, nearest

INTEGER_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QGemm",
        "GatherBlockQuantized",
    }
)
# Operators that hold most of a model's weights, and do most of its work: a report tells which of them stay float.
WEIGHTY = frozenset({"Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})


def refuse_quantized(source: Path) -> None:
    """InputRefused when the model holds integer arithmetic already."""
    from modelops.graphs.describe import summary

    operators: Mapping[str, int] = summary(source)["operators"]
    found = [op for op in sorted(operators) if bare(op) in INTEGER_OPS or bare(op).startswith("QLinear")]
    if found:
        listed = ", ".join(f"{operators[op]} {bare(op)}" for op in found[:3])
        raise InputRefused(
            f"the model is quantized already ({listed})", hint="start from the float model it was made from"
        )


def bare(op: str) -> str:
    """The operator without its domain: "com.microsoft::QGemm" is "QGemm"."""
    return op.replace("::", ":").rpartition(":")[2]


def nothing_to_quantize(reason: str) -> GateFailed:
    """The failure of a model in which a method finds no node that it can treat."""
    return GateFailed(f"nothing to quantize: {reason}", hint="keep the float model, or try another --method")


def all_left_out(count: int) -> str:
    """The reason where a method could quantize nodes, and none of them may be."""
    return f"all {count} nodes with weights were to stay in float"


def chosen_ops(asked: Sequence[str], known: Iterable[str], method: str) -> frozenset[str]:
    """The operators to quantize: those that were asked for, or all that the method knows."""
    names = sorted(known)
    for op in asked:
        if op not in names:
            guess = nearest(op, names)
            hint = f"did you mean {guess}?" if guess else f"known: {', '.join(names)}"
            raise UsageError(f"{method} can't quantize {op!r}", hint=hint)
    return frozenset(asked or names)


def excluded_nodes(patterns: Sequence[str], nodes: Mapping[str, Sequence[str]]) -> set[str]:
    """The names of nodes that a pattern matches, by their own name or by that of a tensor they write.

    ``nodes`` maps names to the tensors written. UsageError for a pattern that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {
            name
            for name, outputs in nodes.items()
            if any(fnmatch.fnmatchcase(word, pattern) for word in (name, *outputs))
        }
        if not matched:
            guess = nearest(pattern, nodes)
            hint = f"did you mean {guess!r}?" if guess else "`modelops inspect` lists the nodes"
            raise UsageError(f"--exclude {pattern!r} matches no node", hint=hint)
        found |= matched
    return found


def described_nodes(nodes: Iterable[Any]) -> dict[str, int]:
    """How many nodes there are of each operator, the most frequent first."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def name_nodes(nodes: Iterable[Any]) -> None:
    """Give every node (of onnx or onnx_ir) a name of its own; one that has a name that is not taken keeps it."""
    nodes = list(nodes)
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    for number, node in enumerate(nodes):
        if not node.name or node.name in seen:
            base = node.name or f"{node.op_type}_{number}"
            suffix, name = 1, base
            while name in taken or name in seen:
                suffix += 1
                name = f"{base}_{suffix}"
            node.name = name
        seen.add(node.name)
