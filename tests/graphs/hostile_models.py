"""Small files that mean harm: each builder writes one below a directory and gives its path.

``BOMBS`` cost memory or time in whatever tool computes them; ``LOCATIONS`` point outside, in each place where a model
can hold a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Builder = Callable[[Path], Path]
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
OPSETS = (helper.make_opsetid("", 21), helper.make_opsetid("own", 1))


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] = (X,),
    outputs: Sequence[onnx.ValueInfoProto] = (Y,),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=weights)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=functions)


def add_to_x(nodes: Sequence[onnx.NodeProto], name: str, *weights: onnx.TensorProto, **more: object) -> onnx.ModelProto:
    """A model that computes ``name`` and adds its sum to the input."""
    summed = helper.make_node("ReduceSum", [name], ["sum"], keepdims=0)
    return model([*nodes, summed, helper.make_node("Add", ["x", "sum"], ["y"])], weights, **more)  # type: ignore[arg-type]


def constant(name: str, values: object, dtype: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=dtype), name)


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("own", name, ["a"], ["b"], list(nodes), list(OPSETS))


def own(name: str, source: str, target: str) -> onnx.NodeProto:
    return helper.make_node(name, [source], [target], domain="own")


def loop(trips: object, step: Sequence[onnx.NodeProto], start: str = "one", condition: str = "") -> onnx.NodeProto:
    """A Loop over one carried value, from ``a`` to ``b``, that never ends by its condition."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["going"]), *step],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, None),
        ],
    )
    return helper.make_node("Loop", ["" if trips is None else "trips", condition, start], ["v"], body=body)


def concat_doubling(times: int, start: str) -> tuple[list[onnx.NodeProto], str]:
    nodes = []
    for index in range(times):
        nodes.append(helper.make_node("Concat", [start, start], [f"c{index}"], axis=0))
        start = f"c{index}"
    return nodes, start


def doubling_functions(times: int) -> onnx.ModelProto:
    functions = [function("f0", helper.make_node("Relu", ["a"], ["b"]))]
    for index in range(1, times + 1):
        functions.append(function(f"f{index}", own(f"f{index - 1}", "a", "t"), own(f"f{index - 1}", "t", "b")))
    return model([own(f"f{times}", "x", "y")], functions=functions)


def deep_subgraphs(depth: int) -> onnx.ModelProto:
    """Subgraphs inside subgraphs by way of functions; a message itself can't be nested more than 33 deep."""
    functions = [function("f0", helper.make_node("Relu", ["a"], ["b"]))]
    for level in range(1, depth + 1):
        out = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
        then = helper.make_graph([own(f"f{level - 1}", "a", "t")], "then", [], [out])
        other = helper.make_graph([helper.make_node("Identity", ["a"], ["t"])], "else", [], [out])
        choice = helper.make_node("If", ["c"], ["b"], then_branch=then, else_branch=other)
        yes = helper.make_node("Constant", [], ["c"], value=constant("", True, np.bool_))
        functions.append(function(f"f{level}", yes, choice))
    return model([own(f"f{depth}", "x", "y")], functions=functions)


def _grow(op: str, *weights: onnx.TensorProto, **attributes: object) -> onnx.ModelProto:
    node = helper.make_node(op, [weight.name for weight in weights], ["v"], **attributes)
    return add_to_x([node], "v", *weights)


def _of_shape(big: list[int]) -> onnx.ModelProto:
    return _grow("ConstantOfShape", constant("s", big))


def _computed_shape() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mul", ["k", "k"], ["m"]),
        helper.make_node("Concat", ["m", "m"], ["s"], axis=0),
        helper.make_node("Where", ["w", "s", "s"], ["t"]),
        helper.make_node("Expand", ["one", "t"], ["v"]),
    ]
    return add_to_x(
        nodes, "v", constant("k", [1000]), constant("w", [True, True], np.bool_), constant("one", 1, np.float32)
    )


def _outer_product() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Reshape", ["x", "column"], ["a"]),
        helper.make_node("Reshape", ["x", "row"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["v"]),
    ]
    wide = helper.make_tensor_value_info("x", TensorProto.FLOAT, [200_000])
    sum_node = helper.make_node("ReduceSum", ["v"], ["y"], keepdims=0)
    return model([*nodes, sum_node], [constant("column", [-1, 1]), constant("row", [1, -1])], inputs=[wide])


def _broadcast() -> onnx.ModelProto:
    column = helper.make_tensor_value_info("x", TensorProto.FLOAT, [100_000, 1])
    row = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 100_000])
    nodes = [helper.make_node("Add", ["x", "z"], ["v"]), helper.make_node("ReduceSum", ["v"], ["y"], keepdims=0)]
    return model(nodes, inputs=[column, row])


def _growing_loop() -> onnx.ModelProto:
    node = loop(40, [helper.make_node("Concat", ["a", "a"], ["b"], axis=0)], start="start")
    return add_to_x([node], "v", constant("trips", 40), constant("start", [1.0], np.float32))


def _counting_loop(trips: int | None, start: str = "one") -> onnx.ModelProto:
    node = loop(trips, [helper.make_node("Add", ["a", "one"], ["b"])], start=start)
    weights = [constant("one", 1.0, np.float32), *([] if trips is None else [constant("trips", trips)])]
    return add_to_x([node], "v", *weights)


def _nested_loops() -> onnx.ModelProto:
    inner = loop(30_000, [helper.make_node("Add", ["a", "one"], ["b"])], start="o")
    outer_body = helper.make_graph(
        [helper.make_node("Identity", ["og"], ["ogo"]), inner],
        "outer",
        [
            helper.make_tensor_value_info("oi", TensorProto.INT64, []),
            helper.make_tensor_value_info("og", TensorProto.BOOL, []),
            helper.make_tensor_value_info("o", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("ogo", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
    )
    node = helper.make_node("Loop", ["trips", "", "x"], ["w"], body=outer_body)
    return add_to_x([node], "w", constant("one", 1.0, np.float32), constant("trips", 30_000))


def _function_hides_growth() -> onnx.ModelProto:
    nodes, last = concat_doubling(4, "a")
    nodes[-1].output[0] = "b"
    chain = [own("grow", "start" if index == 0 else f"g{index - 1}", f"g{index}") for index in range(8)]
    assert last == "c3"
    return add_to_x(chain, "g7", constant("start", [1.0], np.float32), functions=[function("grow", *nodes)])


def _sparse() -> onnx.ModelProto:
    made = add_to_x([], "big")
    values = constant("big", [1.0], np.float32)
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, constant("i", [0]), [1_000_000_000]))
    return made


BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "constant of 10 GB": lambda: _of_shape([2_500_000_000]),
    "constant of 1 GB": lambda: _of_shape([250_000_000]),
    "expand to 10 GB": lambda: _grow("Expand", constant("one", 1, np.float32), constant("s", [50_000, 50_000])),
    "expand to a computed shape": _computed_shape,
    "tile": lambda: _grow("Tile", constant("one", [1], np.float32), constant("s", [10_000_000_000])),
    "range": lambda: _grow("Range", constant("a", 0), constant("b", 10**12), constant("c", 1)),
    "pad": lambda: _grow("Pad", constant("one", [1], np.float32), constant("p", [0, 10**11])),
    "resize": lambda: _grow(
        "Resize",
        constant("one", [[[[1]]]], np.float32),
        constant("roi", [], np.float32),
        constant("scale", [1, 1, 1e5, 1e5], np.float32),
    ),
    "one hot": lambda: _grow(
        "OneHot", constant("one", [1] * 100), constant("depth", 10**9), constant("v", [0, 1], np.float32)
    ),
    "transposed convolution": lambda: _grow(
        "ConvTranspose", constant("one", [[[[1]]]], np.float32), constant("w", [[[[1]]]], np.float32),
        output_shape=[100_000, 100_000],
    ),
    "padded pool": lambda: _grow(
        "AveragePool", constant("one", [[[[1]]]], np.float32), kernel_shape=[1, 1], pads=[50_000] * 4
    ),
    "window": lambda: _grow("HannWindow", constant("size", 10**11)),
    "constant concat doubling": lambda: add_to_x(*concat_doubling(34, "c"), constant("c", [1, 2, 3])),
    "concat doubling of an input": lambda: add_to_x(*concat_doubling(34, "x")),
    "outer product": _outer_product,
    "broadcast": _broadcast,
    "sparse weight of 4 GB": _sparse,
    "doubling functions": lambda: doubling_functions(25),
    "growth inside functions": _function_hides_growth,
    "recursive functions": lambda: model(
        [own("f", "x", "y")], functions=[function("f", own("g", "a", "b")), function("g", own("f", "a", "b"))]
    ),
    "loop of 2^62 turns": lambda: _counting_loop(2**62),
    "loop of 2^62 turns over an input": lambda: _counting_loop(2**62, start="x"),
    "loop without an end": lambda: _counting_loop(None, start="x"),
    "nested loops": _nested_loops,
    "doubling loop": _growing_loop,
    "deep subgraphs": lambda: deep_subgraphs(33),
}  # fmt: skip


def deep_message(depth: int = 3000) -> bytes:
    """A model of If inside If, as no library would write it."""
    graph = b""
    for _ in range(depth):
        attribute = b"\x0a\x01b" + _field(6, graph) + b"\xa0\x01\x05"
        graph = _field(1, b"\x22\x02If" + _field(5, attribute))
    return b"\x08\x0a" + _field(7, graph) + _field(8, b"\x10\x12")


def _field(number: int, body: bytes) -> bytes:
    size, out = len(body), bytearray([number << 3 | 2])
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(out) + bytes([size]) + body


def external(name: str, location: str, shape: Sequence[int] = (4,), **keys: object) -> onnx.TensorProto:
    """A float tensor whose elements are said to lie elsewhere."""
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def in_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return add_to_x([], tensor.name, tensor)


def in_sparse_values(tensor: onnx.TensorProto) -> onnx.ModelProto:
    made = add_to_x([], tensor.name)
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, constant("i", [0, 1, 2, 3]), [8]))
    return made


def in_sparse_indices(tensor: onnx.TensorProto) -> onnx.ModelProto:
    made = add_to_x([], "s")
    made.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=constant("s", [1, 2, 3, 4], np.float32), indices=tensor, dims=[8])
    )
    return made


def in_constant(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return add_to_x([helper.make_node("Constant", [], ["k"], value=tensor)], "k")


def in_list(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Anything", ["x"], ["k"], domain="own")
    node.attribute.append(onnx.AttributeProto(name="many", type=onnx.AttributeProto.TENSORS, tensors=[tensor]))
    return add_to_x([node], "k")


def in_sparse_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    sparse = helper.make_sparse_tensor(tensor, constant("i", [0, 1, 2, 3]), [8])
    return add_to_x([helper.make_node("Constant", [], ["k"], sparse_value=sparse)], "k")


def in_subgraph(tensor: onnx.TensorProto) -> onnx.ModelProto:
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Identity", [tensor.name], ["o"])], "b", [], [out], [tensor])
    node = helper.make_node("If", ["c"], ["k"], then_branch=branch, else_branch=branch)
    return add_to_x([node], "k", constant("c", True, np.bool_))


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    inside = function(
        "f", helper.make_node("Constant", [], ["k"], value=tensor), helper.make_node("Add", ["a", "k"], ["b"])
    )
    return model([own("f", "x", "y")], functions=[inside])


def in_function_default(tensor: onnx.TensorProto) -> onnx.ModelProto:
    made = model([own("f", "x", "y")], functions=[function("f", helper.make_node("Relu", ["a"], ["b"]))])
    made.functions[0].attribute_proto.append(helper.make_attribute("t", tensor))
    return made


def in_training(tensor: onnx.TensorProto) -> onnx.ModelProto:
    made = add_to_x([helper.make_node("Relu", ["x"], ["k"])], "k")
    made.training_info.add().algorithm.initializer.append(tensor)
    return made


def in_mislabelled_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    made = in_constant(tensor)
    made.graph.node[0].attribute.append(onnx.AttributeProto(name="value_int", type=onnx.AttributeProto.INT, i=1))
    made.graph.node[0].attribute[0].type = onnx.AttributeProto.INT
    return made


PLACES: dict[str, Callable[[onnx.TensorProto], onnx.ModelProto]] = {
    name.removeprefix("in_"): value for name, value in list(globals().items()) if name.startswith("in_")
}


def link(path: Path, target: Path) -> str:
    path.symlink_to(target)
    return path.name


def hard_link(path: Path, target: Path) -> str:
    os.link(target, path)
    return path.name


def locations(folder: Path) -> dict[str, dict[str, object]]:
    """What a hostile tensor of 16 bytes may say of its data, by the name of the trick; makes the files it needs."""
    inside, outside = folder / "model", folder / "secret"
    inside.mkdir()
    outside.mkdir()
    secret = outside / "key"
    secret.write_bytes(b"s" * 64)
    (inside / "plain").write_bytes(bytes(range(64)))
    (inside / "sub").mkdir()
    (inside / "linked").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    named = {
        "absolute": str(secret),
        "absolute, other system": "\\\\host\\share\\key",
        "drive": "C:\\key",
        "drive without backslash": "C:key",
        "parent": "../secret/key",
        "parent inside": "sub/../../secret/key",
        "parent that stays": "sub/../plain",
        "backslash": "sub\\..\\..\\secret\\key",
        "device": "/dev/zero",
        "NUL": "plain\0.safe",
        "empty": "",
        "dot": ".",
        "directory": "sub",
        "missing": "nothing",
        "missing directory": "no/plain",
        "symbolic link outside": link(inside / "out", secret),
        "symbolic link inside": link(inside / "in", inside / "plain"),
        "linked directory": "linked/key",
        "hard link": hard_link(inside / "hard", secret),
        "named pipe": "pipe",
        "memory": "*/_ORT_MEM_ADDR_/*",
    }
    cases: dict[str, dict[str, object]] = {name: {"location": location} for name, location in named.items()}
    plain = {"location": "plain"}
    return cases | {
        "negative offset": {**plain, "offset": -1},
        "offset beyond the file": {**plain, "offset": 64},
        "huge offset": {**plain, "offset": 2**64},
        "offset that is no number": {**plain, "offset": "0x10"},
        "fractional offset": {**plain, "offset": "1.0"},
        "length too short": {**plain, "length": 4},
        "length too long": {**plain, "length": 64},
        "negative length": {**plain, "length": -1},
        "range beyond the file": {**plain, "offset": 56, "length": 16},
        "unknown key": {**plain, "__class__": "os"},
    }
