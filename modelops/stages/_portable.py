"""Whether an int8 model gives the same answers on CPUs without VNNI: proven from its weights, and tried out.

The kernels of AVX2 and of AVX512 without VNNI add pairs of products of uint8 and int8 in 16 bits: 2 · 255 · 64 fits,
and 2 · 255 · 127 does not. A model whose integer weights stay within ±64 can't overflow, whatever it is fed.

``session.x64quantprecision`` switches onnxruntime from that kernel to one that never overflows: on a CPU without VNNI
the two must agree, on one with VNNI it runs the kernel of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelops.core.artifact import Artifact
from modelops.core.report import Check
from modelops.graphs.describe import signature
from modelops.measures.differences import Difference
from modelops.quantizers._int8 import REDUCED_LEVELS
from modelops.quantizers._scope import INTEGER_OPS, bare
from modelops.stages._compare import running
from modelops.stages._losses import Rows, exactly
from modelops.stages._measuring import Given, Side, compare_models

_ROWS = 1024
# Where outputs are no decisions, both ways of computing must agree as well as two ways of adding floats.
_LEAST_SQNR = 80.0


@dataclass(frozen=True)
class Portability:
    """Whether a model is right on every CPU, and why (not)."""

    portable: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {"portable": self.portable, "why": self.why}


def portability(model: Path) -> Portability:
    """What the weights of a file say."""
    wide = 0
    count = 0
    for largest in _largest_weights(model):
        count += 1
        wide += largest > REDUCED_LEVELS
    if not count:
        return Portability(True, "no integer kernel of uint8 and int8 runs in it")
    if wide:
        return Portability(
            False,
            f"{wide} of {count} integer weights use all 8 bits, and overflow in the kernels of CPUs without VNNI",
        )
    return Portability(True, f"all {count} integer weights keep to 7 bits, which no kernel overflows with")


def _largest_weights(model: Path) -> Iterator[int]:
    """The largest absolute value of every int8 weight that is multiplied with uint8 activations."""
    import numpy as np

    from modelops.graphs import files

    loaded = files.load(model)
    seen = set()
    for node in (node for graph in (loaded.graph, *loaded.functions.values()) for node in graph.all_nodes()):
        for position in _WEIGHTS.get(node.op_type, ()):
            value = node.inputs[position] if position < len(node.inputs) else None
            while value is not None and (producer := value.producer()) is not None:
                value = producer.inputs[0] if producer.op_type in _ON_THE_WAY else None
            tensor = value.const_value if value is not None else None
            if value is None or tensor is None or tensor.dtype.name != "INT8" or id(value) in seen:
                continue
            seen.add(id(value))
            yield int(np.abs(tensor.numpy().astype(np.int16)).max(initial=0))


# What may stand between a weight and the operator that multiplies it.
_ON_THE_WAY = frozenset({"DequantizeLinear", "Identity", "Reshape", "Transpose"})
# Where operators read weights that an integer kernel multiplies.
_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvInteger": (1,),
    "ConvTranspose": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "DynamicQuantizeMatMul": (1,),
    "Gemm": (1,),
    "MatMul": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "QAttention": (1,),
    "QGemm": (3,),
    "QLinearConv": (3,),
    "QLinearMatMul": (3,),
}


def check(source: Artifact, model: Path, rows: Rows) -> Check:
    """Whether a model that is meant to be portable is: by its weights, and by its decisions computed both ways."""
    found = portability(model)
    if not found.portable:
        return Check("portable", "fail", found.why)
    with running(model) as plain, exactly(model) as exact:
        sides = [Side(session, signature(model)) for session in (plain, exact)]
        compared = compare_models(sides[0], sides[1], _most(rows.stream(source)))
    for failure in compared.failures:
        text = f"it does not run as on CPUs without VNNI on {failure['inputs']}: {failure['error']}"
        return Check("portable", "fail", text)
    differences = compared.differences
    if not differences:
        return Check("portable", "inconclusive", f"{found.why}; there were no inputs to try it on")
    for difference in differences.values():
        if problem := _apart(difference):
            return Check("portable", "fail", f"{difference.output}: {problem} on CPUs without VNNI", n=difference.rows)
    counted = max((difference.rows for difference in differences.values()), default=0)
    return Check("portable", "pass", f"{found.why}; {counted} rows decide alike with and without VNNI", n=counted)


def _most(stream: Iterator[Given]) -> Iterator[Given]:
    rows = 0
    for given in stream:
        if rows >= _ROWS:
            return
        rows += given.rows
        yield given


def _apart(difference: Difference) -> str:
    """How outputs that were computed in the two ways differ; empty where they do not."""
    if difference.problem:
        return difference.problem
    if difference.mask_mismatches:
        return f"{difference.mask_mismatches} elements are NaN or infinite on one side alone"
    if difference.exact:
        return "" if difference.identical else "integers or texts change"
    if difference.top1 is not None and difference.decisions:
        changed = round((1 - difference.top1) * difference.decisions)
        return f"{changed} of {difference.decisions} decisions change" if changed else ""
    sqnr = difference.sqnr
    return f"outputs differ ({sqnr:.0f} dB)" if sqnr is not None and sqnr < _LEAST_SQNR else ""


def remarks(model: Artifact) -> list[str]:
    """What a reader of a model should know: that its integers are not portable, by its history or by its weights."""
    steps = [step for step in model.manifest.history if step.stage == "quantize"]
    if steps:
        text = told(steps[-1].report.details.get("portable"))
    elif any(bare(op) in INTEGER_OPS or bare(op).startswith("QLinear") for op in _operators(model)):
        text = told(portability(model.model).to_dict())
    else:
        text = ""
    return [text] if text else []


def _operators(model: Artifact) -> Mapping[str, int]:
    found: Mapping[str, int] = model.manifest.model.get("operators", {})
    return found


def told(found: Any) -> str:
    """The sentence for what a report of quantize holds; empty for a portable model."""
    if isinstance(found, Mapping) and found.get("portable") is False:
        return f"warning: not portable: {found.get('why')}"
    return ""
