"""Seeded inputs by signature and by what names mean: token ids in range, masks of several lengths, floats near zero."""

from __future__ import annotations

import ast
import math
import operator
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelops.core.tensors import Signature, TensorSpec
from modelops.errors import ResourceExhausted
from modelops.graphs.arrays import numpy_dtype
from modelops.graphs.batches import BatchAxis

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

#: Sizes of dynamic dimensions, by a part of their name; 8 where nothing is known.
_SIZES: Final = {"past": 4, "seq": 16, "len": 16, "tok": 16, "time": 16, "height": 32, "width": 32}
#: Dynamic dimensions, of which each is tried at its smallest alone; with more of them, all together.
_MOST_ALONE: Final = 3
#: Elements of one made-up array; more is a mistake, or malice.
_LARGEST: Final = 1 << 28
_OPERATORS: Final = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def random_feed(
    signature: Signature,
    rows: int,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    bounds: Mapping[str, int] | None = None,
) -> dict[str, NDArray[Any]]:
    """A feed of that many samples, always the same for the same arguments.

    ``sizes`` gives dynamic dimensions a size; ``bounds`` says of integer inputs how many values they may take (see
    ``index_bounds``). A model with a fixed batch gets that many rows instead.
    """
    import numpy as np

    axis = BatchAxis.of(signature)
    known = {**_named(signature), **(sizes or {}), **({axis.symbol: rows} if axis.symbol else {})}
    feed = {}
    for spec in signature.inputs:
        shape = tuple(dim if isinstance(dim, int) else _evaluated(dim, known) for dim in spec.shape)
        if spec.name in axis.inputs and axis.symbol:
            shape = (rows, *shape[1:])
        if math.prod(shape) > _LARGEST:
            raise ResourceExhausted(
                f"the input {spec.name!r} would take {math.prod(shape)} elements, shape {list(shape)}",
                hint="give inputs with --data",
            )
        random = np.random.default_rng((seed, zlib.crc32(spec.name.encode())))
        feed[spec.name] = _values(spec, shape, random, (bounds or {}).get(spec.name))
    return feed


def random_feeds(
    signature: Signature, rows: int, seed: int = 0, bounds: Mapping[str, int] | None = None
) -> list[dict[str, NDArray[Any]]]:
    """As many feeds as a model with a fixed batch needs for that many rows; one otherwise."""
    axis = BatchAxis.of(signature)
    if axis.symbol is not None:
        return [random_feed(signature, rows, seed, bounds=bounds)]
    count = -(-rows // (axis.size or 1))
    return [random_feed(signature, axis.size or 1, seed + number, bounds=bounds) for number in range(count)]


def corner_feeds(
    signature: Signature, seed: int = 0, bounds: Mapping[str, int] | None = None
) -> list[dict[str, NDArray[Any]]]:
    """Small feeds at the corners of the dynamic dimensions: one sample; every other dimension 1, and odd.

    Where one input alone has two or three other dimensions (height and width), each of them is 1 alone too.
    """
    axis = BatchAxis.of(signature)
    others = [dim for dim in signature.dynamic if dim != axis.symbol and not _is_expression(dim)]
    feeds = [random_feed(signature, 1, seed + 101, bounds=bounds)] if axis.symbol else []
    corners = [dict.fromkeys(others, size) for size in (1, 7)] if others else []
    holders = [spec for spec in signature.inputs if set(others) & set(spec.shape)]
    if 1 < len(others) <= _MOST_ALONE and len(holders) == 1:
        corners += [{**dict.fromkeys(others, 7), name: 1} for name in others]
    feeds += [random_feed(signature, 2, seed + 102 + number, sizes, bounds) for number, sizes in enumerate(corners)]
    return feeds


def masked_feeds(
    signature: Signature, seed: int = 0, bounds: Mapping[str, int] | None = None
) -> list[dict[str, NDArray[Any]]]:
    """A feed whose rows are masked in every way: wholly, right, left, with holes, all but one, not at all.

    Empty for a model that takes no mask of two dimensions, or whose batch is fixed below six.
    """
    masks = [spec for spec in signature.inputs if "mask" in spec.name.lower() and len(spec.shape) == 2]
    feed = random_feed(signature, 6, seed + 105, bounds=bounds) if masks else {}
    if not masks or any(len(feed[spec.name]) < 6 for spec in masks):
        return []
    for spec in masks:
        mask = feed[spec.name]
        half = mask.shape[1] // 2
        mask[:6] = 1
        mask[0], mask[1, half:], mask[2, :half], mask[3, ::2], mask[4, 1:] = 0, 0, 0, 0, 0
    return [feed]


def index_bounds(model: Path) -> dict[str, int]:
    """For every input that looks something up in a weight (Gather): how many entries there are to choose from."""
    from modelops.graphs.lean import opened

    with opened(model) as lean:
        graph = lean.proto.graph
        dims: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        origin = {value.name: value.name for value in graph.input if value.name not in dims}
        found: dict[str, int] = {}
        for node in graph.node:
            _follow(node, origin, dims)
            for indices, entries in _lookups(node, dims):
                name = origin.get(indices)
                if name is not None:
                    found[name] = min(entries, found.get(name, entries))
        return found


_SAME = frozenset(
    {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Slice", "Clip"}
)
_SAME_WEIGHT = frozenset({"Cast", "Identity", "DequantizeLinear"})


def _follow(node: onnx.NodeProto, origin: dict[str, str], dims: dict[str, tuple[int, ...]]) -> None:
    """Note which values are an input, or a weight, in another form."""
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.name == "value":
                dims[node.output[0]] = tuple(attribute.t.dims)
    if not node.input or not node.output:
        return
    if node.op_type in _SAME and node.input[0] in origin:
        origin[node.output[0]] = origin[node.input[0]]
    if node.op_type in _SAME_WEIGHT and node.input[0] in dims:
        dims[node.output[0]] = dims[node.input[0]]


def _lookups(node: onnx.NodeProto, dims: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """(name of the indices, number of entries) for every table that a node looks something up in."""
    if node.op_type in ("Gather", "GatherBlockQuantized"):
        at = next((a.i for a in node.attribute if a.name in ("axis", "gather_axis")), 0)
        pairs = [(node.input[1], node.input[0], at)]
    elif node.op_type == "EmbedLayerNormalization":
        pairs = [(node.input[0], node.input[2], 0)]
        if len(node.input) > 4 and node.input[1] and node.input[4]:
            pairs.append((node.input[1], node.input[4], 0))
    else:
        return []
    return [(indices, dims[table][at]) for indices, table, at in pairs if table in dims and -1 <= at < len(dims[table])]


def _named(signature: Signature) -> dict[str, int]:
    """A size for every dynamic dimension: by its name, else by what its input looks like."""
    found: dict[str, int] = {}
    for spec in signature.inputs:
        for place, dim in enumerate(spec.shape):
            if isinstance(dim, str) and not _is_expression(dim):
                image = len(spec.shape) == 4 and place >= 2 and spec.dtype.startswith(("float", "uint8"))
                found.setdefault(dim, _by_name(dim, 32 if image else 8))
    return found


def _by_name(dim: str, otherwise: int) -> int:
    return next((size for part, size in _SIZES.items() if part in dim.lower()), otherwise)


def _evaluated(text: str, known: Mapping[str, int]) -> int:
    """The size of a dimension: known by its name, or computed, as "past + sequence" is."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return int(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return known.get(node.id, _by_name(node.id, 8))
        raise ValueError

    if text in known:
        return known[text]
    if not _is_expression(text):
        return _by_name(text, 8)
    try:
        return max(0, value(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return _by_name(text, 8)


def _values(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator, bound: int | None) -> NDArray[Any]:
    import numpy as np

    dtype, name = numpy_dtype(spec.dtype), spec.name.lower()
    if dtype.kind == "O":
        return np.array([f"word{n}" for n in random.integers(0, 100, np.prod(shape, dtype=int))], object).reshape(shape)
    if "mask" in name and len(shape) == 2:
        return _mask(shape, random).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    if dtype.kind in "iu":
        return _integers(name, shape, random, dtype, bound)
    values = random.standard_normal(shape)
    if shape:
        values[3::4] = random.random(values[3::4].shape)  # every fourth row from 0 to 1, as images are
    return values.astype(dtype)


def _mask(shape: tuple[int, ...], random: np.random.Generator) -> NDArray[Any]:
    """Rows of ones of several lengths: full, random, half, and every eighth a single one."""
    import numpy as np

    rows, length = shape
    lengths = np.full(rows, length)
    lengths[1::4] = random.integers(1, length + 1, len(lengths[1::4])) if length else 0
    lengths[2::4] = (length + 1) // 2
    lengths[7::8] = min(1, length)
    result: NDArray[Any] = np.arange(length)[None, :] < lengths[:, None]
    return result


def _integers(
    name: str, shape: tuple[int, ...], random: np.random.Generator, dtype: np.dtype[Any], bound: int | None
) -> NDArray[Any]:
    import numpy as np

    if "position" in name and shape:
        positions = np.broadcast_to(np.arange(shape[-1]), shape) % max(1, bound or shape[-1])
        return positions.astype(dtype)
    if dtype.itemsize == 1 and bound is None:
        info = np.iinfo(dtype)
        return random.integers(info.min, info.max + 1, shape).astype(dtype)
    # Without a table to look at, 0 and 1 are in range for nearly everything that integers are used for.
    top = min(max(1, bound or 2), int(np.iinfo(dtype).max))
    values = random.integers(0, top, shape)
    if shape and top > 100:  # every other row prefers small ids, as frequent words have
        values[1::2] = np.minimum(top ** random.random(values[1::2].shape), top - 1).astype(np.int64)
    if "bbox" in name and shape[-1:] == (4,):  # left and top lie before right and bottom
        values.sort(axis=-1)
    return values.astype(dtype)


def _is_expression(dim: str) -> bool:
    return len(dim) <= 200 and any(sign in dim for sign in "+-*/")
