"""Which values of one graph are which of another: by name, by pairs of Quantize and Dequantize, by shape and content.

What is matched is where a graph can be cut: the nodes between matched values are judged on right inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from modelops.graphs.pieces import Node, Pieces

#: Below this share of nodes with a match by name, contents are compared too.
ENOUGH: Final = 0.5
_LEAST_ELEMENTS: Final = 8  # smaller values are too alike to be told apart by what they hold
_SAME: Final = 1e-3  # noise over signal of values that are taken for the same
#: What onnxruntime's quantizer adds to the names of values.
_DEQUANTIZED: Final = "_DequantizeLinear_Output"
_BEFORE: Final = "_QuantizeLinear_Input"
_FUSED: Final = ("Relu", "Clip")
_ALIKE: Final = 0.15  # … and of two of which one is quantized


def by_name(candidate: Pieces, reference: Pieces) -> dict[str, str]:
    """Candidate's value → reference's value, for inputs, outputs, equal names and quantized forms."""
    known = set(reference.producer) | set(reference.inputs)
    pairs = {name: name for name in (*candidate.inputs, *candidate.producer) if name in known}
    for mine, theirs in ((candidate.inputs, reference.inputs), (candidate.outputs, reference.outputs)):
        if len(mine) == len(theirs):
            for one, other in zip(mine, theirs, strict=True):
                if one not in theirs and other in known:
                    pairs.setdefault(one, other)
    return without_fused(candidate, reference, with_quantized(candidate, pairs))


def without_fused(candidate: Pieces, reference: Pieces, pairs: Mapping[str, str]) -> dict[str, str]:
    """The same where a QuantizeLinear does what an operator of the reference did.

    A Relu, or Clip, may be gone where zero is the smallest value that can be quantized: the name is then that of the
    Relu's output, and what it holds is the output of what stood before the Relu.
    """
    found = dict(pairs)
    for node in candidate.nodes:
        if node.op != "QuantizeLinear" or node.inputs[0] not in found:
            continue
        one, other = _maker(candidate, node.inputs[0]), _maker(reference, found[node.inputs[0]])
        if one is not None and other is not None and other.op in _FUSED and one.op != other.op:
            before = _maker(reference, other.inputs[0])
            del found[node.inputs[0]]
            if before is not None and before.op == one.op:
                found[node.inputs[0]] = other.inputs[0]
    return found


def with_quantized(candidate: Pieces, pairs: Mapping[str, str]) -> dict[str, str]:
    """The same, and across QuantizeLinear → DequantizeLinear, whose two ends stand for one value, and across casts."""
    found = dict(pairs)
    for node in candidate.nodes:
        if node.op == "DequantizeLinear":
            before = _maker(candidate, node.inputs[0])
            if before is None or before.op != "QuantizeLinear":
                continue
            start = before.inputs[0]
        elif node.op == "Cast":
            start = node.inputs[0]
        else:
            continue
        end = node.outputs[0]
        if start in found:
            found.setdefault(end, found[start])
        elif end in found and start in candidate.producer:
            found[start] = found[end]
    return found


def quantized_weights(candidate: Pieces, reference: Pieces, pairs: Mapping[str, str]) -> dict[str, str]:
    """Dequantized weight of the candidate → weight of the reference, where the same operator reads them for one value.

    A Relu or Clip that went into the range of what is quantized may stand in between; an operator into which a
    normalisation was folded reads another weight, and is left out.
    """
    found = {}
    for node in candidate.nodes:
        if node.op != "DequantizeLinear" or any(name not in candidate.weights for name in node.inputs):
            continue
        output = node.outputs[0]
        weight = output.removesuffix(_DEQUANTIZED)
        if weight not in reference.weights or output in pairs:
            continue
        readers = [candidate.nodes[index] for index in candidate.readers[output]]
        if readers and all(_reads_alike(reader, weight, reference) for reader in readers):
            found[output] = weight
    return found


def _reads_alike(reader: Node, weight: str, reference: Pieces) -> bool:
    """Whether the node of the reference that makes the same value reads this weight, with the same operator."""
    other = _maker(reference, reader.outputs[0].removesuffix(_BEFORE))
    if other is not None and other.op != reader.op and other.op in _FUSED:
        other = _maker(reference, other.inputs[0])
    return other is not None and other.op == reader.op and weight in other.inputs


def wrong_half(candidate: Pieces, nodes: list[Node], value: Any, wanted: Any) -> Node | None:
    """Which of a QuantizeLinear and a DequantizeLinear that disagree is wrong; None where nothing tells.

    It is the one whose scale and zero point, if both had them, would bring ``value`` less near to ``wanted``.
    """
    import numpy as np

    parameters = []
    for node in nodes:
        if len(node.inputs) != 3 or any(name not in candidate.weights for name in node.inputs[1:]):
            return None
        parameters.append([candidate.weight(name) for name in node.inputs[1:]])
    (scale, zero), (other_scale, other_zero) = parameters
    if scale.size != 1 or other_scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    if scale == other_scale and zero == other_zero:
        return None
    info = np.iinfo(zero.dtype)
    errors = []
    for s, z in parameters:
        codes = np.clip(np.rint(value.astype(np.float64) / float(s)) + float(z), info.min, info.max)
        errors.append(noise(wanted, (codes - float(z)) * float(s)))
    return nodes[0] if errors[0] > errors[1] else nodes[1]


def share_matched(candidate: Pieces, pairs: Mapping[str, str]) -> float:
    """The share of the candidate's nodes that make a value with a match."""
    counted = [node for node in candidate.nodes if any(name not in candidate.weights for name in node.inputs)]
    matched = sum(any(name in pairs for name in node.outputs) for node in counted)
    return matched / max(1, len(counted))


def by_content(
    candidate: Pieces,
    reference: Pieces,
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    pairs: Mapping[str, str],
    *,
    loose: bool,
) -> dict[str, str]:
    """Further matches between two traces of the same inputs: what holds the same, and, from the outputs upwards and the
    inputs downwards, what is made by the same operator out of matched values.

    ``loose`` allows for the noise of quantized values. Pairs that were matched by name stay, unless what they hold
    differs and another operator makes them.
    """
    found = {c: r for c, r in pairs.items() if _plausible(candidate, reference, mine, theirs, c, r)}
    taken = set(found.values())
    groups: dict[tuple[Any, ...], list[tuple[float, str]]] = defaultdict(list)
    for name, array in theirs.items():
        if name not in taken and _telling(array):
            groups[array.shape].append((_length(array), name))
    allowed = _ALIKE if loose else _SAME
    for name, array in mine.items():
        if name in found or not _telling(array):
            continue
        length = _length(array)
        near = [other for size, other in groups[array.shape] if abs(size - length) <= allowed * size]
        errors = sorted((noise(theirs[other], array), other) for other in near)
        if errors and errors[0][0] <= allowed:
            found[name] = errors[0][1]
    _upwards(candidate, reference, found)
    _downwards(candidate, reference, found)
    return found


def noise(reference: Any, actual: Any) -> float:
    """‖y − x‖ / ‖y‖ over the finite elements; infinite where shapes, or what is not finite, differ."""
    import numpy as np

    if np.shape(reference) != np.shape(actual):
        return float("inf")
    if np.asarray(reference).dtype.kind in "OSU" or np.asarray(actual).dtype.kind in "OSU":
        return 0.0 if np.array_equal(reference, actual) else float("inf")
    y, x = np.asarray(reference).astype(np.float64), np.asarray(actual).astype(np.float64)
    both = np.isfinite(y) & np.isfinite(x)
    if not both.all():
        if not (both | (np.isnan(y) & np.isnan(x)) | (y == x)).all():
            return float("inf")
        y, x = y[both], x[both]
    with np.errstate(over="ignore", invalid="ignore"):
        off, size = float(np.linalg.norm((y - x).reshape(-1))), float(np.linalg.norm(y.reshape(-1)))
    return 0.0 if off == 0 else off / size if size > 0 else float("inf")


def _plausible(
    candidate: Pieces, reference: Pieces, mine: Mapping[str, Any], theirs: Mapping[str, Any], c: str, r: str
) -> bool:
    one, other = _maker(candidate, c), _maker(reference, r)
    if one is None or other is None or c not in mine or r not in theirs:
        return True
    if c in candidate.outputs or one.op == other.op or one.op == "DequantizeLinear":
        return True
    return noise(theirs[r], mine[c]) <= _ALIKE


def _telling(array: Any) -> bool:
    """Whether what an array holds can tell it from others."""
    import numpy as np

    array = np.asarray(array)
    return array.dtype.kind in "fiu" and array.size >= _LEAST_ELEMENTS and bool(array.min() != array.max())


def _length(array: Any) -> float:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm(np.asarray(array).astype(np.float64).reshape(-1)))


def _upwards(candidate: Pieces, reference: Pieces, found: dict[str, str]) -> None:
    """From matched values to those that they are made of, where both are made by the same operator."""
    for node in reversed(candidate.nodes):
        for output in node.outputs:
            other = _maker(reference, found.get(output, ""))
            if other is None or other.op != node.op or len(other.inputs) != len(node.inputs):
                continue
            taken = set(found.values())
            for mine, theirs in zip(node.inputs, other.inputs, strict=True):
                if mine in candidate.producer and theirs in reference.producer and theirs not in taken:
                    found.setdefault(mine, theirs)


def _downwards(candidate: Pieces, reference: Pieces, found: dict[str, str]) -> None:
    """From matched values to what one node alone makes of them on either side with the same operator."""
    taken = set(found.values())
    table: dict[tuple[str, tuple[str, ...]], list[Node]] = defaultdict(list)
    for node in reference.nodes:
        table[node.op, tuple(name for name in node.inputs if name not in reference.weights)].append(node)
    for node in candidate.nodes:
        values = [name for name in node.inputs if name not in candidate.weights]
        if not values or any(name not in found for name in values) or all(name in found for name in node.outputs):
            continue
        others = table.get((node.op, tuple(found[name] for name in values)), [])
        if len(others) != 1 or len(others[0].outputs) != len(node.outputs):
            continue
        for mine, theirs in zip(node.outputs, others[0].outputs, strict=True):
            if theirs not in taken:
                found.setdefault(mine, theirs)
                taken.add(theirs)


def _maker(pieces: Pieces, name: str) -> Node | None:
    index = pieces.producer.get(name)
    return None if index is None else pieces.nodes[index]


def targets(candidate: Pieces, pairs: Iterable[str]) -> list[str]:
    """The matched values that a node makes, in the order of their nodes."""
    return sorted((name for name in pairs if name in candidate.producer), key=lambda name: candidate.producer[name])
