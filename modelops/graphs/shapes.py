"""How large the outputs of a node are, told from its inputs: rules for the operators that move and repeat elements.

An operator without a rule is taken to make one element or more. Sizes are lower bounds: unknown dimensions count as 1.
Formulas are those of the ONNX operator reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from modelops.graphs.calls import Call, Rule, registrar
from modelops.graphs.values import FLOAT, INT64, Value, blob, broadcast, known, row, sized, together

RULES: Final[dict[str, Rule]] = {}
rule = registrar(RULES)


def _words(text: str) -> list[str]:
    return text.split()


_SAME_AS_FIRST: Final = _words(
    "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Bernoulli BitCast BitwiseNot Cast CastLike Ceil Celu Clip"
    " Cos Cosh CumProd CumSum DequantizeLinear Dropout DynamicQuantizeLinear Elu Erf Exp EyeLike Floor Gelu"
    " GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN"
    " LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MeanVarianceNormalization Mish Neg Not Optional"
    " OptionalGetElement QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike Reciprocal Relu"
    " ReverseSequence RotaryEmbedding Round Scatter ScatterElements ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax"
    " Softplus Softsign Sqrt Swish Tan Tanh TensorScatter ThresholdedRelu Trilu QuickGelu FastGelu BiasGelu"
)
_BROADCASTING: Final = _words(
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min"
    " Mod Mul Or PRelu Pow Sub Sum Where Xor StringConcat"
)


@rule(*_SAME_AS_FIRST)
def _same(call: Call) -> list[Value]:
    first = call.inputs[0] if call.inputs else None
    if first is None:
        return []
    return [Value(first.dims, first.elements, item=first.item)]


@rule(*_BROADCASTING)
def _broadcasting(call: Call) -> list[Value]:
    return [together([value for value in call.inputs if value is not None])]


@rule("Shape")
def _shape(call: Call) -> list[Value]:
    dims = call.dims(0)
    return [] if dims is None else [row(dims[call.read("start", 0) : call.read("end", None)])]


@rule("Size")
def _size(call: Call) -> list[Value]:
    import numpy as np

    dims = call.dims(0)
    return [known(np.array(None if dims is None else _product(dims), dtype=object), INT64)]


@rule("Constant")
def _constant(call: Call) -> list[Value]:
    if "value_ints" in call.attributes:
        return [_numbers(call.read("value_ints"), INT64)]
    if "value_floats" in call.attributes:
        return [_numbers(call.read("value_floats"), FLOAT)]
    for name, dtype in (("value_int", INT64), ("value_float", FLOAT)):
        if name in call.attributes:
            value = _numbers([call.read(name)], dtype)
            value.few = value.few.reshape(())
            value.dims = ()
            return [value]
    return []  # tensors and strings are the reader's


def _numbers(numbers: list[Any], dtype: int) -> Value:
    return row(numbers, dtype) if len(numbers) <= 64 else sized([len(numbers)], dtype)


@rule("ConstantOfShape")
def _constant_of_shape(call: Call) -> list[Value]:
    dims = call.numbers(0, "shape")
    return [] if dims is None else [sized(dims)]


@rule("RandomNormal", "RandomUniform")
def _random(call: Call) -> list[Value]:
    return [sized(call.read("shape", []))]


@rule("Expand")
def _expand(call: Call) -> list[Value]:
    dims, target = call.dims(0), call.numbers(1)
    if target is None or dims is None:
        return [_at_least(call)]
    return [sized(broadcast([dims, tuple(target)]))]


@rule("Tile")
def _tile(call: Call) -> list[Value]:
    dims, repeats = call.dims(0), call.numbers(1)
    if repeats is None or dims is None:
        return [_at_least(call)]
    if len(repeats) == 1 and len(dims) > 1 and call.value(2) is not None:  # operator set 1: (tiles, axis)
        return [_at_least(call)]
    return [sized(_times(dim, factor) for dim, factor in zip(dims, repeats, strict=True))]


def _times(a: int | None, b: Any) -> int | None:
    return None if a is None or b is None else math.floor(a * b)


def _plus(*numbers: Any) -> Any:
    return None if None in numbers else sum(numbers)


def _at_least(call: Call) -> Value:
    first = call.inputs[0] if call.inputs else None
    return blob(first.elements if first else 1)


@rule("Range")
def _range(call: Call) -> list[Value]:
    numbers = [call.number(index) for index in range(3)]
    if None in numbers:
        return [sized([None])]
    start, limit, step = numbers
    return [sized([max(math.ceil((limit - start) / step), 0)])]


@rule("Reshape")
def _reshape(call: Call) -> list[Value]:
    source, target = call.inputs[0], call.numbers(1, "shape")
    if source is None or target is None:
        return [_at_least(call)]
    keep_zero = call.read("allowzero", 0)
    dims: list[int | None] = []
    for axis, dim in enumerate(target):
        kept = dim == 0 and not keep_zero
        inherited = source.dims[axis] if kept and source.dims and axis < len(source.dims) else None
        dims.append(inherited if kept else dim)
    if -1 in dims and source.dims is not None and None not in source.dims:
        rest = math.prod(dim for dim in dims if dim not in (-1, None))
        dims[dims.index(-1)] = source.elements // rest if rest and None not in dims else None
    value = sized(dims)
    if source.dims is not None and None not in source.dims:
        value.elements = source.elements
    return [value]


@rule("Flatten")
def _flatten(call: Call) -> list[Value]:
    dims, axis = call.dims(0), call.read("axis", 1)
    if dims is None:
        return [_at_least(call)]
    return [sized([_product(dims[:axis]), _product(dims[axis:])])]


def _product(dims: Sequence[int | None]) -> int | None:
    numbers = [dim for dim in dims if dim is not None]
    return math.prod(numbers) if len(numbers) == len(dims) else None


@rule("Squeeze")
def _squeeze(call: Call) -> list[Value]:
    dims, axes = call.dims(0), call.numbers(1, "axes")
    if dims is None or (axes is None and (None in dims or call.value(1) is not None)):
        return [_at_least(call)]
    gone = {axis % len(dims) for axis in axes} if axes else {axis for axis, dim in enumerate(dims) if dim == 1}
    return [sized(dim for axis, dim in enumerate(dims) if axis not in gone)]


@rule("Unsqueeze")
def _unsqueeze(call: Call) -> list[Value]:
    dims, axes = call.dims(0), call.numbers(1, "axes")
    if dims is None or axes is None:
        return [_at_least(call)]
    rank = len(dims) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(dims)
    return [sized(1 if axis in new else next(rest) for axis in range(rank))]


@rule("Transpose")
def _transpose(call: Call) -> list[Value]:
    dims = call.dims(0)
    if dims is None:
        return [_at_least(call)]
    return [sized(dims[axis] for axis in call.read("perm") or reversed(range(len(dims))))]


@rule("Concat")
def _concat(call: Call) -> list[Value]:
    values = [value for value in call.inputs if value is not None]
    shapes = [value.dims for value in values if value.dims is not None]
    axis = call.read("axis", 1)
    if not shapes or len(shapes) < len(values) or axis >= len(shapes[0]):
        return [blob(sum(value.elements for value in values))]
    axis %= len(shapes[0])
    dims = list(broadcast(shapes))
    dims[axis] = _plus(*(shape[axis] for shape in shapes))
    value = sized(dims)
    value.elements = max(value.elements, sum(value.elements for value in values))
    return [value]


@rule("Gather", "Embedding")
def _gather(call: Call) -> list[Value]:
    dims, indices, axis = call.dims(0), call.dims(1), call.read("axis", 0)
    if dims is None or indices is None:
        return []
    axis %= len(dims)
    return [sized([*dims[:axis], *indices, *dims[axis + 1 :]])]


@rule("GatherElements")
def _gather_elements(call: Call) -> list[Value]:
    indices = call.value(1)
    return [Value(indices.dims, indices.elements)] if indices else []


@rule("GatherND")
def _gather_nd(call: Call) -> list[Value]:
    dims, indices, batch = call.dims(0), call.dims(1), call.read("batch_dims", 0)
    if dims is None or not indices or indices[-1] is None:
        return []
    return [sized([*indices[:-1], *dims[batch + indices[-1] :]])]


@rule("Slice")
def _slice(call: Call) -> list[Value]:
    dims = call.dims(0)
    if dims is None:
        return []
    starts, ends = call.numbers(1, "starts"), call.numbers(2, "ends")
    axes, steps = call.numbers(3, "axes"), call.numbers(4)
    if starts is None or ends is None or (axes is None and call.value(3)) or (steps is None and call.value(4)):
        return [sized([None] * len(dims))]
    out = list(dims)
    for index, axis in enumerate(axes or range(len(starts))):
        dim, step = dims[axis], (steps[index] if steps else 1)
        bounds = (dim, starts[index], ends[index], step)
        out[axis] = None if None in bounds else len(range(*slice(*_clipped(*bounds)).indices(dim)))
    return [sized(out)]


def _clipped(dim: int, start: int, end: int, step: int) -> tuple[int, int | None, int]:
    return start, (None if step < 0 and end < -dim else end), step


@rule("Split", "SplitToSequence")
def _split(call: Call) -> list[Value]:
    dims, axis = call.dims(0), call.read("axis", 0)
    if call.op == "SplitToSequence" or dims is None:
        return [_at_least(call)]
    sizes = call.numbers(1, "split")
    if sizes is None and dims[axis] is not None and call.value(1) is None:
        part = -(-dims[axis] // max(call.outputs, 1))
        sizes = [min(part, dims[axis] - part * index) for index in range(call.outputs)]
    parts = sizes or [None] * call.outputs
    axis %= len(dims)
    return [sized([*dims[:axis], part, *dims[axis + 1 :]]) for part in parts]


@rule("Pad", "CenterCropPad")
def _pad(call: Call) -> list[Value]:
    dims, pads = call.dims(0), call.numbers(1, "pads" if "pads" in call.attributes else "paddings")
    axes = call.numbers(3) if call.op == "Pad" else call.read("axes")
    if dims is None or pads is None or (axes is None and call.value(3) is not None):
        return [blob()]
    axes = list(range(len(dims))) if axes is None else axes
    out = list(dims)
    for index, axis in enumerate(axes):
        if call.op == "Pad":
            out[axis] = _plus(dims[axis], pads[index], pads[index + len(axes)])
        else:
            out[axis] = pads[index]
    return [sized(out)]


@rule("Resize", "Upsample")
def _resize(call: Call) -> list[Value]:
    dims = call.dims(0)
    if dims is None:
        return [blob()]
    place = 1 if call.op == "Upsample" or len(call.inputs) == 2 else 2
    scales, sizes = call.numbers(place, "scales"), call.numbers(3)
    axes = call.read("axes") or list(range(len(dims)))
    out: list[int | None] = list(dims)
    for index, axis in enumerate(axes):
        if sizes:
            out[axis] = sizes[index]
        else:
            out[axis] = _times(dims[axis], scales[index]) if scales else None
    return [sized(out)]


@rule("OneHot")
def _one_hot(call: Call) -> list[Value]:
    dims, depth = call.dims(0), call.number(1)
    if dims is None:
        return [blob(depth or 1)]
    axis = call.read("axis", -1) % (len(dims) + 1)
    return [sized([*dims[:axis], depth, *dims[axis:]])]


@rule("TopK")
def _top_k(call: Call) -> list[Value]:
    dims, axis = call.dims(0), call.read("axis", -1)
    if dims is None:
        return []
    out = list(dims)
    out[axis] = call.number(1, "k")
    return [sized(out), sized(out)]


@rule(*(f"Reduce{how}" for how in _words("L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare")), "ArgMax", "ArgMin")
def _reduce(call: Call) -> list[Value]:
    dims = call.dims(0)
    if dims is None:
        return []
    if call.op.startswith("Arg"):
        axes: list[Any] | None = [call.read("axis", 0)]
    else:
        axes = call.numbers(1, "axes")
        if axes is None and call.value(1) is not None:
            return []
    if not axes:
        axes = [] if call.read("noop_with_empty_axes", 0) else list(range(len(dims)))
    gone = {axis % len(dims) for axis in axes} if dims else set()
    if call.read("keepdims", 1):
        return [sized(1 if axis in gone else dim for axis, dim in enumerate(dims))]
    return [sized(dim for axis, dim in enumerate(dims) if axis not in gone)]


@rule("NonZero")
def _non_zero(call: Call) -> list[Value]:
    dims = call.dims(0)
    return [] if dims is None else [sized([len(dims), None])]


@rule("SequenceConstruct", "SequenceInsert", "SequenceAt", "ConcatFromSequence", "SequenceErase", "SequenceEmpty")
def _sequence(call: Call) -> list[Value]:
    values = [value for value in call.inputs if value is not None]
    if call.op == "SequenceEmpty":
        return [Value(None, 0)]
    if call.op == "SequenceAt":
        item = values[0].item
        return [Value(item.dims, item.elements, item.dtype)] if item else []
    if call.op in ("ConcatFromSequence", "SequenceErase"):
        return [Value(None, values[0].elements if call.op == "ConcatFromSequence" else 1, item=values[0].item)]
    items = values if call.op == "SequenceConstruct" else values[:2]
    parts = [value.item or value for value in items] if call.op == "SequenceInsert" else items
    smallest = min((part for part in parts if part.elements), key=lambda part: part.elements, default=None)
    return [Value(None, sum(value.elements for value in items), item=smallest)]
