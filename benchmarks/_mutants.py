"""Mistakes that a converter might make, one at a time, in one node of an ONNX model: what a validator has to notice.

``mutants(model, random)`` gives at most one mutant of every kind, at a node drawn at random among those that it fits.
"""

from __future__ import annotations

import random as randoms
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

Change = Callable[[onnx.ModelProto, int], bool]


@dataclass(frozen=True)
class Mutant:
    """A changed copy. ``node`` and ``op`` name the changed node, ``output`` its first output."""

    kind: str
    node: str
    op: str
    output: str
    model: onnx.ModelProto


def mutants(
    model: onnx.ModelProto, random: randoms.Random, kinds: dict[str, Change] | None = None, tries: int = 30
) -> Iterator[Mutant]:
    """One mutant of every kind that fits somewhere, the kinds and the nodes in an order drawn at random."""
    names = list(KINDS if kinds is None else kinds)
    random.shuffle(names)
    for kind in names:
        change = (kinds or KINDS)[kind]
        places = list(range(len(model.graph.node)))
        random.shuffle(places)
        left = tries
        for place in places:
            if left == 0:
                break
            if not _may(kind, model.graph.node[place]):
                continue
            left -= 1
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            node = copy.graph.node[place]
            name, op, output = node.name or node.output[0], node.op_type, node.output[0]
            if change(copy, place):
                yield Mutant(kind, name, op, output, copy)
                break


def _may(kind: str, node: onnx.NodeProto) -> bool:
    ops = _ONLY.get(kind)
    return bool(node.output) and (ops is None or node.op_type in ops)


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _set(node: onnx.NodeProto, name: str, value: object) -> None:
    found = _attribute(node, name)
    if found is not None:
        node.attribute.remove(found)
    node.attribute.append(helper.make_attribute(name, value))


def _weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto | None:
    found = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if found is not None:
        return found
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            value = _attribute(node, "value")
            return value.t if value is not None else None
    return None


def _own(model: onnx.ModelProto, place: int, index: int) -> tuple[onnx.TensorProto, np.ndarray] | None:
    """A weight that the node reads, as a copy of its own: other readers keep theirs."""
    node = model.graph.node[place]
    if index >= len(node.input):
        return None
    tensor = _weight(model, node.input[index])
    if tensor is None:
        return None
    array = numpy_helper.to_array(tensor).copy()
    name = f"{node.input[index]}__mutated"
    node.input[index] = name
    fresh = model.graph.initializer.add()
    fresh.CopyFrom(numpy_helper.from_array(array, name))
    return fresh, array


def _replace(fresh: onnx.TensorProto, array: np.ndarray) -> bool:
    fresh.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), fresh.name))
    return True


def _float_weight(model: onnx.ModelProto, place: int) -> tuple[onnx.TensorProto, np.ndarray] | None:
    for index, name in enumerate(model.graph.node[place].input):
        tensor = _weight(model, name)
        if tensor is not None and tensor.data_type == 1 and np.prod(tensor.dims) >= 4:
            return _own(model, place, index)
    return None


def swap_inputs(model: onnx.ModelProto, place: int) -> bool:
    node = model.graph.node[place]
    if len(node.input) < 2:
        return False
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return node.input[0] != node.input[1]


def axis(step: int) -> Change:
    def change(model: onnx.ModelProto, place: int) -> bool:
        found = _attribute(model.graph.node[place], "axis")
        if found is None:
            return False
        found.i += step
        return True

    return change


def drop_bias(model: onnx.ModelProto, place: int) -> bool:
    node = model.graph.node[place]
    index = 1 if node.op_type == "Add" else 2
    found = _own(model, place, index) or (_own(model, place, 0) if node.op_type == "Add" else None)
    if found is None or found[1].dtype.kind != "f" or not found[1].any():
        return False
    return _replace(found[0], np.zeros_like(found[1]))


def epsilon(model: onnx.ModelProto, place: int) -> bool:
    node = model.graph.node[place]
    if node.op_type == "Add":  # of a normalisation written out
        for index in (1, 0):
            tensor = _weight(model, node.input[index])
            if tensor is not None and np.prod(tensor.dims) == 1 and tensor.data_type == 1:
                value = float(numpy_helper.to_array(tensor).reshape(-1)[0])
                if 0 < value < 1e-2:
                    own = _own(model, place, index)
                    return own is not None and _replace(own[0], own[1] * np.float32(10))
        return False
    found = _attribute(node, "epsilon")
    _set(node, "epsilon", 10 * (found.f if found is not None else 1e-5))
    return True


def permutation(model: onnx.ModelProto, place: int) -> bool:
    found = _attribute(model.graph.node[place], "perm")
    if found is None or len(found.ints) < 2:
        return False
    found.ints[-1], found.ints[-2] = found.ints[-2], found.ints[-1]
    return True


def pads(model: onnx.ModelProto, place: int) -> bool:
    found = _attribute(model.graph.node[place], "pads")
    if found is None or len(found.ints) % 2:
        return False
    half = len(found.ints) // 2
    found.ints[0] += 1
    if found.ints[half] > 0:
        found.ints[half] -= 1
        return True
    found.ints[0] -= 1
    return False


def zero_point(step: int) -> Change:
    def change(model: onnx.ModelProto, place: int) -> bool:
        found = _own(model, place, 2)
        if found is None or found[1].dtype.kind not in "iu":
            return False
        info = np.iinfo(found[1].dtype)
        moved = np.clip(found[1].astype(np.int64) + step, info.min, info.max)
        return bool((moved != found[1]).any()) and _replace(found[0], moved.astype(found[1].dtype))

    return change


def scale(factor: float) -> Change:
    def change(model: onnx.ModelProto, place: int) -> bool:
        node = model.graph.node[place]
        found = _own(model, place, 1) if node.op_type in _QUANTIZED else _float_weight(model, place)
        if found is None or found[1].dtype != np.float32 or not found[1].any():
            return False
        return _replace(found[0], found[1] * np.float32(factor))

    return change


def quantized_axis(model: onnx.ModelProto, place: int) -> bool:
    """The scales of channels go to other ones."""
    found = _own(model, place, 1)
    if found is None or found[1].size < 2:
        return False
    rolled = np.roll(found[1], 1)
    return bool((rolled != found[1]).any()) and _replace(found[0], rolled)


def clip(model: onnx.ModelProto, place: int) -> bool:
    found = _own(model, place, 2)
    if found is None or found[1].dtype.kind != "f" or not found[1].any() or not np.isfinite(found[1]).all():
        return False
    return _replace(found[0], (found[1] * 0.9).astype(found[1].dtype))


def outputs(model: onnx.ModelProto, place: int) -> bool:
    node = model.graph.node[place]
    if len([name for name in node.output if name]) < 2:
        return False
    node.output[0], node.output[1] = node.output[1], node.output[0]
    return True


def default(model: onnx.ModelProto, place: int) -> bool:
    """What an operator does when an attribute is lost on the way to another operator set."""
    node = model.graph.node[place]
    other = {
        "Softmax": ("axis", 1), "LogSoftmax": ("axis", 1), "Resize": ("coordinate_transformation_mode", "asymmetric"),
        "AveragePool": ("count_include_pad", 1), "LeakyRelu": ("alpha", 0.01), "Elu": ("alpha", 1.0),
        "HardSigmoid": ("alpha", 0.2), "Flatten": ("axis", 1), "ArgMax": ("axis", 0), "Gemm": ("alpha", 0.99),
        "ReduceMean": ("keepdims", 1), "InstanceNormalization": ("epsilon", 1e-3), "LRN": ("size", 3),
    }[node.op_type]  # fmt: skip
    found = _attribute(node, other[0])
    if found is not None and helper.get_attribute_value(found) == (
        other[1].encode() if isinstance(other[1], str) else other[1]
    ):
        if node.op_type == "Resize":
            _set(node, other[0], "align_corners")
            return True
        return False
    _set(node, other[0], other[1])
    return True


def gelu(model: onnx.ModelProto, place: int) -> bool:
    """The approximation of GELU by tanh, be it one operator or written out with Erf."""
    node = model.graph.node[place]
    if node.op_type == "Gelu":
        found = _attribute(node, "approximate")
        exact = found is None or found.s == b"none"
        _set(node, "approximate", "tanh" if exact else "none")
        return True
    x, y, name = node.input[0], node.output[0], f"mutated{place}"
    for label, value in (("a", 1.1283791), ("b", 0.10091), ("c", 3.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), f"{name}{label}"))
    make = helper.make_node
    nodes = [
        make("Pow", [x, f"{name}c"], [f"{name}p"]), make("Mul", [f"{name}p", f"{name}b"], [f"{name}q"]),
        make("Mul", [x, f"{name}a"], [f"{name}r"]), make("Add", [f"{name}q", f"{name}r"], [f"{name}s"]),
        make("Tanh", [f"{name}s"], [y]),
    ]  # fmt: skip
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*rest[:place], *nodes, *rest[place + 1 :]])
    return True


def float16(model: onnx.ModelProto, place: int) -> bool:
    """Weights that went through float16."""
    found = _float_weight(model, place)
    if found is None:
        return False
    with np.errstate(over="ignore"):
        halved = found[1].astype(np.float16).astype(np.float32)
    return bool((halved != found[1]).any()) and _replace(found[0], halved)


def bit(model: onnx.ModelProto, place: int) -> bool:
    """The second highest bit of the mantissa of the largest element of a weight."""
    found = _float_weight(model, place)
    if found is None or not found[1].any():
        return False
    flat = found[1].reshape(-1).copy()
    flat.view(np.uint32)[int(np.abs(flat).argmax())] ^= 1 << 21
    return _replace(found[0], flat.reshape(found[1].shape))


def transposed(model: onnx.ModelProto, place: int) -> bool:
    found = _float_weight(model, place)
    if found is None or found[1].ndim < 2 or found[1].shape[-1] != found[1].shape[-2] or found[1].shape[-1] < 2:
        return False
    return _replace(found[0], np.swapaxes(found[1], -1, -2).copy())


def operator(model: onnx.ModelProto, place: int) -> bool:
    node = model.graph.node[place]
    other = _OTHERS[node.op_type]
    node.op_type = other
    del node.attribute[:]
    return True


def rounding(model: onnx.ModelProto, place: int) -> bool:
    node = model.graph.node[place]
    if node.op_type == "Round":
        node.op_type = "Floor"
        return True
    if node.op_type == "Resize":
        found = _attribute(node, "nearest_mode")
        _set(node, "nearest_mode", "ceil" if found is None or found.s != b"ceil" else "floor")
        mode = _attribute(node, "mode")
        return mode is None or mode.s == b"nearest"
    _set(node, "ceil_mode", 1 - (found.i if (found := _attribute(node, "ceil_mode")) else 0))
    return True


def attribute(model: onnx.ModelProto, place: int) -> bool:
    """A number that an operator is told, a little off."""
    for name in ("alpha", "beta", "gamma", "lambd", "bias"):
        found = _attribute(model.graph.node[place], name)
        if found is not None and found.type == onnx.AttributeProto.FLOAT and found.f:
            found.f *= 1.02
            return True
    return False


_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_OTHERS = {
    "Relu": "Abs", "Tanh": "Sigmoid", "Sigmoid": "Tanh", "Add": "Sub", "Mul": "Add", "Div": "Mul", "Sqrt": "Exp",
    "ReduceMean": "ReduceMax", "Floor": "Ceil", "Less": "LessOrEqual", "Greater": "GreaterOrEqual", "Min": "Max",
    "Max": "Min", "Sin": "Cos", "Cos": "Sin", "Exp": "Abs", "GlobalAveragePool": "GlobalMaxPool", "Erf": "Tanh",
    "HardSwish": "Relu", "And": "Or", "Or": "And",
}  # fmt: skip
_ONLY: dict[str, frozenset[str]] = {
    "swapped inputs": frozenset({"Sub", "Div", "Pow", "Less", "Greater", "MatMul", "Concat"}),
    "dropped bias": frozenset({"Add", "Conv", "Gemm", "LayerNormalization", "BatchNormalization", "ConvTranspose"}),
    "epsilon x10": frozenset(
        {"Add", "LayerNormalization", "BatchNormalization", "InstanceNormalization", "RMSNormalization",
         "GroupNormalization"}
    ),
    "zero point + 1": _QUANTIZED, "zero point - 1": _QUANTIZED, "scales of other channels": _QUANTIZED,
    "quantized scale x1.02": _QUANTIZED,
    "clip bounds": frozenset({"Clip"}),
    "default of another operator set": frozenset(
        {"Softmax", "LogSoftmax", "Resize", "AveragePool", "LeakyRelu", "Elu", "HardSigmoid", "ArgMax",
         "Gemm", "ReduceMean", "InstanceNormalization", "LRN", "Flatten"}
    ),
    "tanh for erf": frozenset({"Gelu", "Erf"}),
    "other operator": frozenset(_OTHERS),
    "rounding mode": frozenset({"Round", "Resize", "MaxPool", "AveragePool"}),
}  # fmt: skip
KINDS: dict[str, Change] = {
    "swapped inputs": swap_inputs, "axis + 1": axis(1), "axis - 1": axis(-1), "dropped bias": drop_bias,
    "epsilon x10": epsilon, "wrong permutation": permutation, "shifted pads": pads, "zero point + 1": zero_point(1),
    "zero point - 1": zero_point(-1), "weight x1.02": scale(1.02), "quantized scale x1.02": scale(1.02),
    "scales of other channels": quantized_axis, "clip bounds": clip, "swapped outputs": outputs,
    "default of another operator set": default, "tanh for erf": gelu, "weights through float16": float16,
    "one flipped bit": bit, "transposed weight": transposed, "other operator": operator, "rounding mode": rounding,
    "attribute x1.02": attribute,
}  # fmt: skip
