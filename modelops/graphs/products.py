"""How large the outputs of a node are: rules for the operators that multiply, slide a window, or sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from modelops.graphs.calls import Call, Rule, registrar
from modelops.graphs.values import Dims, Value, blob, broadcast, sized

RULES: Final[dict[str, Rule]] = {}
rule = registrar(RULES)


@rule("MatMul", "MatMulInteger", "FusedMatMul", "QLinearMatMul")
def _matmul(call: Call) -> list[Value]:
    a, b = call.dims(0), call.dims(3 if call.op == "QLinearMatMul" else 1)
    if not a or not b:
        return [blob()]
    if call.read("transA", 0):
        a = (*a[:-2], a[-1], a[-2])
    if call.read("transB", 0):
        b = (*b[:-2], b[-1], b[-2])
    batch = broadcast([a[:-2], b[:-2]])
    return [sized([*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ())])]


@rule("MatMulNBits")
def _matmul_n_bits(call: Call) -> list[Value]:
    a = call.dims(0)
    return [sized([*a[:-1], call.read("N")])] if a else [blob()]


@rule("Gemm")
def _gemm(call: Call) -> list[Value]:
    a, b = call.dims(0), call.dims(1)
    if a is None or b is None:
        return [blob()]
    return [sized([a[1 if call.read("transA", 0) else 0], b[0 if call.read("transB", 0) else 1]])]


@rule("Einsum")
def _einsum(call: Call) -> list[Value]:
    left, arrow, right = call.read("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    sizes: dict[str, int | None] = {}
    for index, term in enumerate(terms):
        dims = call.dims(index)
        if dims is None or "." in term or len(term) != len(dims):
            return [blob()]
        for letter, dim in zip(term, dims, strict=True):
            if sizes.get(letter) in (None, 1):
                sizes[letter] = dim
    if not arrow:
        right = "".join(sorted(letter for letter in sizes if left.count(letter) == 1))
    return [sized(sizes[letter] for letter in right)]


def _spatial(call: Call, kernel: Sequence[int | None], dims: Sequence[int | None]) -> list[int | None]:
    """Output sizes of a sliding window, by the formula of Conv and the pools."""
    rank = len(dims)
    strides = call.read("strides") or [1] * rank
    dilations = call.read("dilations") or [1] * rank
    pads = call.read("pads") or [0] * (2 * rank)
    same = call.read("auto_pad", "NOTSET").startswith("SAME")
    rounding = math.ceil if call.read("ceil_mode", 0) else math.floor
    out: list[int | None] = []
    for axis, dim in enumerate(dims):
        width = kernel[axis]
        if dim is None or width is None:
            out.append(None)
        elif same:
            out.append(-(-dim // strides[axis]))
        else:
            reach = dim + pads[axis] + pads[axis + rank] - ((width - 1) * dilations[axis] + 1)
            size = rounding(reach / strides[axis]) + 1
            if (size - 1) * strides[axis] >= dim + pads[axis]:  # a window must not start in the padding at the end
                size -= 1
            out.append(max(size, 0))
    return out


@rule("Conv", "ConvInteger", "QLinearConv", "DeformConv", "NhwcConv")
def _conv(call: Call) -> list[Value]:
    x, w = call.dims(0), call.dims(3 if call.op == "QLinearConv" else 1)
    if not x or not w or call.op == "NhwcConv":
        return [blob()]
    kernel = call.read("kernel_shape") or w[2:]
    return [sized([x[0], w[0], *_spatial(call, kernel, x[2:])])]


@rule("MaxPool", "AveragePool", "LpPool")
def _pool(call: Call) -> list[Value]:
    x = call.dims(0)
    if not x:
        return [blob(), blob()]
    dims = [*x[:2], *_spatial(call, call.read("kernel_shape"), x[2:])]
    return [sized(dims), sized(dims)]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(call: Call) -> list[Value]:
    x = call.dims(0)
    return [sized([*x[:2], *[1] * (len(x) - 2)])] if x else [blob()]


@rule("ConvTranspose")
def _conv_transpose(call: Call) -> list[Value]:
    x, w = call.dims(0), call.dims(1)
    if not x or not w:
        return [blob()]
    rank = len(x) - 2
    channels = None if w[1] is None else w[1] * call.read("group", 1)
    shape = call.read("output_shape")
    if shape:
        return [sized([x[0], channels, *shape[-rank:]])]
    kernel: list[Any] = list(call.read("kernel_shape") or w[2:])
    strides, dilations = call.read("strides") or [1] * rank, call.read("dilations") or [1] * rank
    pads, extra = call.read("pads") or [0] * (2 * rank), call.read("output_padding") or [0] * rank
    spatial: list[int | None] = []
    for axis, dim in enumerate(x[2:]):
        if dim is None or kernel[axis] is None:
            spatial.append(None)
        elif call.read("auto_pad", "NOTSET").startswith("SAME"):
            spatial.append(dim * strides[axis])
        else:
            window = (kernel[axis] - 1) * dilations[axis] + 1
            spatial.append(strides[axis] * (dim - 1) + extra[axis] + window - pads[axis] - pads[axis + rank])
    return [sized([x[0], channels, *spatial])]


@rule("MaxUnpool")
def _max_unpool(call: Call) -> list[Value]:
    x, shape = call.dims(0), call.numbers(2)
    if shape:
        return [sized(shape)]
    if not x or call.value(2) is not None:
        return [blob()]
    rank = len(x) - 2
    kernel, strides = call.read("kernel_shape"), call.read("strides") or [1] * rank
    pads = call.read("pads") or [0] * (2 * rank)
    spatial: list[int | None] = [
        None if dim is None else (dim - 1) * strides[axis] + kernel[axis] - pads[axis] - pads[axis + rank]
        for axis, dim in enumerate(x[2:])
    ]
    return [sized([*x[:2], *spatial])]


@rule("DepthToSpace", "SpaceToDepth")
def _blocks(call: Call) -> list[Value]:
    x, block = call.dims(0), call.read("blocksize", 1)
    if not x:
        return [blob()]
    depth, area = (x[1], block * block)
    if call.op == "DepthToSpace":
        channels = None if depth is None else depth // area
        return [sized([x[0], channels, *(None if dim is None else dim * block for dim in x[2:])])]
    channels = None if depth is None else depth * area
    return [sized([x[0], channels, *(None if dim is None else dim // block for dim in x[2:])])]


@rule("Col2Im")
def _col2im(call: Call) -> list[Value]:
    x, image, block = call.dims(0), call.numbers(1), call.numbers(2)
    if not x or not image:
        return [blob()]
    area = math.prod(block) if block else None
    channels = None if x[1] is None or not area else x[1] // area
    return [sized([x[0], channels, *image])]


@rule("HannWindow", "HammingWindow", "BlackmanWindow")
def _window(call: Call) -> list[Value]:
    return [sized([call.number(0)])]


@rule("MelWeightMatrix")
def _mel(call: Call) -> list[Value]:
    bins, length = call.number(0), call.number(1)
    return [sized([None if length is None else length // 2 + 1, bins])]


@rule("DFT")
def _dft(call: Call) -> list[Value]:
    x, length = call.dims(0), call.number(1)
    if not x or length is None:
        return [sized([*x[:-1], None])] if x and not call.read("onesided", 0) else [blob()]
    axis = call.read("axis", 1) if "axis" in call.attributes else (call.number(2) if call.value(2) else -2)
    out = [*x[:-1], None]
    out[axis] = None if call.read("onesided", 0) else length
    return [sized(out)]


@rule("AffineGrid")
def _affine_grid(call: Call) -> list[Value]:
    size = call.numbers(1)
    return [sized([size[0], *size[2:], len(size) - 2])] if size else [blob()]


@rule("GridSample", "RoiAlign", "MaxRoiPool")
def _sampled(call: Call) -> list[Value]:
    x, other = call.dims(0), call.dims(1)
    if not x or not other:
        return [blob()]
    if call.op == "GridSample":
        return [sized([*x[:2], *other[1:-1]])]
    if call.op == "RoiAlign":
        return [sized([other[0], x[1], call.read("output_height", 1), call.read("output_width", 1)])]
    return [sized([other[0], x[1], *call.read("pooled_shape", [])])]


@rule("OneHotEncoder")
def _one_hot_encoder(call: Call) -> list[Value]:
    x: Dims | None = call.dims(0)
    categories = len(call.read("cats_int64s") or []) or None
    return [sized([*x, categories])] if x is not None else [blob()]


@rule("Attention", "LinearAttention", "FlexAttention")
def _attention(call: Call) -> list[Value]:
    query = call.dims(0)
    return [sized([*query[:-1], None])] if query else [blob()]


@rule("Multinomial")
def _multinomial(call: Call) -> list[Value]:
    x = call.dims(0)
    return [sized([x[0], call.read("sample_size", 1)])] if x else [blob(call.read("sample_size", 1))]
