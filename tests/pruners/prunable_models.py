"""Small graphs through which channels travel in every way that pruning follows; all with a dynamic batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Build:
    """Puts a graph together node by node; every method returns the name of what its node writes."""

    def __init__(self, opset: int = 18, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, *shape: int | str, dtype: int = TensorProto.FLOAT, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def const(self, array: Any, name: str = "") -> str:
        self._count += 1
        name = name or f"const{self._count}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape: int) -> str:
        fan = int(np.prod(shape[1:])) or 1
        return self.const((self.random.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        self._count += 1
        names = [f"{op.lower()}{self._count}" + (f"_{k}" if k else "") for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x: str, into: int, out: int, kernel: int = 3, group: int = 1, **attributes: Any) -> str:
        weight = self.normal(out, into // group, kernel, kernel)
        pads = [kernel // 2] * 4
        found: str = self.node("Conv", x, weight, self.normal(out), group=group, pads=pads, **attributes)
        return found

    def norm(self, x: str, channels: int) -> str:
        positive = [np.abs(self.random.normal(size=channels)).astype(np.float32) + 0.5 for _ in range(2)]
        shift = [self.random.normal(size=channels).astype(np.float32) for _ in range(2)]
        values = [self.const(positive[0]), self.const(shift[0]), self.const(shift[1]), self.const(positive[1])]
        found: str = self.node("BatchNormalization", x, *values)
        return found

    def linear(self, x: str, into: int, out: int) -> str:
        found: str = self.node("Add", self.node("MatMul", x, self.normal(into, out)), self.normal(out))
        return found

    def head(self, x: str, channels: int, classes: int = 4) -> str:
        """Average over pixels, then a classifier."""
        flat = self.node("Flatten", self.node("GlobalAveragePool", x))
        found: str = self.node("Gemm", flat, self.normal(classes, channels), self.normal(classes), transB=1)
        return found

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "network", self.inputs, infos, self.weights)
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain for node in self.nodes):
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        model = onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opsets, ir_version=10), data_prop=True
        )
        if len(opsets) == 1:  # the checker knows no other operators
            onnx.checker.check_model(model)
        return model


def chain() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.norm(b.conv(b.input("batch", 3, 8, 8), 3, 16), 16))
    x = b.node("MaxPool", b.node("LeakyRelu", b.conv(x, 16, 24)), kernel_shape=[2, 2], strides=[2, 2])
    return b.model(b.head(x, 24))


def residual() -> onnx.ModelProto:
    b = Build()
    stem = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 16))
    x = b.conv(b.node("Relu", b.conv(stem, 16, 8)), 8, 16)
    x = b.node("Relu", b.node("Add", x, stem))
    y = b.node("Add", b.conv(x, 16, 16, 1), x)
    return b.model(b.head(y, 16))


def depthwise() -> onnx.ModelProto:
    b = Build()
    x = b.node("Clip", b.conv(b.input("batch", 3, 8, 8), 3, 16, 1), b.const(np.float32(0)), b.const(np.float32(6)))
    x = b.node("HardSwish", b.conv(x, 16, 16, group=16))
    x = b.conv(x, 16, 32, group=16)  # two filters to a channel
    return b.model(b.head(b.conv(x, 32, 8, 1), 8))


def grouped() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 32, 1))
    x = b.node("Relu", b.conv(x, 32, 32, group=8))
    return b.model(b.head(x, 32))


def transposed() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 16))
    x = b.node("Relu", b.node("ConvTranspose", x, b.normal(16, 24, 2, 2), b.normal(24), strides=[2, 2]))
    x = b.node("ConvTranspose", x, b.normal(24, 2, 2, 2), group=8, strides=[2, 2])
    return b.model(b.head(x, 16))


def dense_concat() -> onnx.ModelProto:
    b = Build()
    x = b.conv(b.input("batch", 3, 8, 8), 3, 16)
    one = b.node("Concat", x, b.node("Relu", b.conv(x, 16, 8)), axis=1)
    two = b.node("Concat", one, b.node("Relu", b.conv(b.norm(one, 24), 24, 8)), axis=1)
    return b.model(b.head(b.node("Relu", b.norm(two, 32)), 32))


def split_and_slice() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 32))
    left, right = b.node("Split", x, b.const(np.array([8, 24])), outputs=2, axis=1)
    part = b.node("Slice", right, b.const(np.array([8])), b.const(np.array([1 << 40])), b.const(np.array([1])))
    picked = b.node("Gather", x, b.const(np.array([0, 3, -1, 5, 9, 11, 12, 13])), axis=1)
    x = b.node("Concat", b.conv(left, 8, 8), b.conv(part, 16, 8), picked, axis=1)
    return b.model(b.head(x, 24))


def equal_split() -> onnx.ModelProto:
    b = Build()
    x = b.conv(b.input("batch", 3, 8, 8), 3, 32)
    gate, value = b.node("Split", x, outputs=2, axis=1, num_outputs=2)
    return b.model(b.head(b.node("Mul", b.node("Sigmoid", gate), value), 16))


def flattened() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 4, 4), 3, 16))
    x = b.node("Reshape", x, b.const(np.array([0, 16 * 16])))
    x = b.node("Relu", b.linear(x, 256, 32))
    x = b.node("Unsqueeze", b.node("Dropout", x), b.const(np.array([1])))
    return b.model(b.node("Squeeze", b.linear(x, 32, 4), b.const(np.array([1]))))


def computed_flatten() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 4, 4), 3, 16))
    sizes = b.node("Shape", x)
    rows = b.node("Unsqueeze", b.node("Gather", sizes, b.const(np.array(0))), b.const(np.array([0])))
    x = b.node("Reshape", x, b.node("Concat", rows, b.const(np.array([256])), axis=0))
    return b.model(b.linear(x, 256, 4))


def squeeze_and_excite() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 24))
    gate = b.node("Relu", b.conv(b.node("ReduceMean", x, b.const(np.array([2, 3])), keepdims=1), 24, 8, 1))
    gate = b.node("HardSigmoid", b.conv(gate, 8, 24, 1))
    return b.model(b.head(b.node("Mul", x, gate), 24))


def shuffled() -> onnx.ModelProto:
    b = Build()
    x = b.node("Relu", b.conv(b.input("batch", 3, 4, 4), 3, 16))
    x = b.node("Transpose", b.node("Reshape", x, b.const(np.array([0, 2, 8, 4, 4]))), perm=[0, 2, 1, 3, 4])
    x = b.node("Reshape", x, b.const(np.array([-1, 16, 4, 4])))
    return b.model(b.head(b.conv(x, 16, 8), 8))


def grouped_shuffle() -> onnx.ModelProto:
    """Channels of a grouped convolution, shuffled: its groups can go, nothing less."""
    b = Build()
    x = b.node("Relu", b.conv(b.conv(b.input("batch", 3, 4, 4), 3, 16), 16, 16, group=4))
    x = b.node("Transpose", b.node("Reshape", x, b.const(np.array([0, 4, 4, 4, 4]))), perm=[0, 2, 1, 3, 4])
    return b.model(b.head(b.node("Reshape", x, b.const(np.array([0, 16, 4, 4]))), 16))


def u_net() -> onnx.ModelProto:
    b = Build()
    skip = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 16))
    x = b.node("Relu", b.conv(skip, 16, 24, strides=[2, 2]))
    sizes = b.node("Slice", b.node("Shape", x), b.const(np.array([0])), b.const(np.array([2])), b.const(np.array([0])))
    sizes = b.node("Concat", sizes, b.const(np.array([8, 8])), axis=0)
    x = b.node("Resize", x, "", "", sizes, mode="nearest")
    x = b.node("Concat", b.node("Pad", x, b.const(np.array([0, 0, 0, 0, 0, 0, 0, 0]))), skip, axis=1)
    return b.model(b.conv(x, 40, 2))


def group_norm() -> onnx.ModelProto:
    """As torch writes it: an instance normalization over groups."""
    b = Build()
    x = b.conv(b.input("batch", 3, 4, 4), 3, 32)
    y = b.node("Reshape", x, b.const(np.array([0, 8, -1])))
    y = b.node("InstanceNormalization", y, b.const(np.ones(8, np.float32)), b.const(np.zeros(8, np.float32)))
    y = b.node("Reshape", y, b.node("Shape", x))
    y = b.node("Add", b.node("Mul", y, b.normal(32, 1, 1)), b.normal(32, 1, 1))
    return b.model(b.head(b.node("PRelu", y, b.normal(32, 1, 1)), 32))


def shared_filter() -> onnx.ModelProto:
    b = Build()
    filters = b.normal(16, 16, 3, 3)
    x = b.node("Relu", b.conv(b.input("batch", 3, 8, 8), 3, 16))
    for _ in range(2):
        x = b.node("Relu", b.node("Conv", x, filters, pads=[1, 1, 1, 1]))
    return b.model(b.head(x, 16))


def feed_forward() -> onnx.ModelProto:
    """A transformer's, with GELU written out; the width of the whole is normalized, and stays."""
    b = Build()
    x = b.linear(b.input("batch", "sequence", 16), 16, 16)
    y = b.linear(x, 16, 64)
    erf = b.node("Erf", b.node("Div", y, b.const(np.float32(np.sqrt(2)))))
    y = b.node("Mul", b.node("Mul", y, b.node("Add", erf, b.const(np.float32(1)))), b.const(np.float32(0.5)))
    y = b.node("Add", b.linear(y, 64, 16), x)
    y = b.node("LayerNormalization", y, b.const(np.ones(16, np.float32)), b.const(np.zeros(16, np.float32)))
    return b.model(b.node("MatMul", y, b.normal(16, 3)))


def gated_feed_forward() -> onnx.ModelProto:
    b = Build()
    x = b.input("batch", "sequence", 16)
    gate = b.node("MatMul", x, b.normal(16, 48))
    gate = b.node("Mul", gate, b.node("Sigmoid", gate))
    y = b.node("Mul", gate, b.node("MatMul", x, b.normal(16, 48)))
    return b.model(b.node("Add", x, b.node("MatMul", y, b.normal(48, 16))))


def attention(fused: bool = False) -> onnx.ModelProto:
    """Four heads of eight; queries, keys and values from one product, or from three."""
    b = Build()
    return b.model(attend(b, b.input("batch", "sequence", 16), 16, 4, 8, fused))


def attend(b: Build, x: str, width: int, count: int, size: int, fused: bool = False) -> str:
    """Attention of so many heads of that size, on a value (batch, sequence, width), added to it."""
    inner = count * size
    lead = b.node("Slice", b.node("Shape", x), b.const(np.array([0])), b.const(np.array([2])), b.const(np.array([0])))
    heads = b.node("Concat", lead, b.const(np.array([count, size])), axis=0)
    q, k, v = (b.node("Reshape", part, heads) for part in projections(b, x, width, inner, fused))
    q, v = (b.node("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    scores = b.node("MatMul", q, b.node("Transpose", k, perm=[0, 2, 3, 1]))
    weights = b.node("Softmax", b.node("Mul", scores, b.const(np.float32(0.35))), axis=-1)
    y = b.node("Transpose", b.node("MatMul", weights, v), perm=[0, 2, 1, 3])
    y = b.node("Reshape", y, b.node("Concat", lead, b.const(np.array([inner])), axis=0))
    found: str = b.node("Add", x, b.linear(y, inner, width))
    return found


def projections(b: Build, x: str, width: int, inner: int, fused: bool) -> list[str]:
    """Queries, keys and values: parts of one product, or three."""
    if fused:
        found: list[str] = b.node("Split", b.linear(x, width, 3 * inner), outputs=3, axis=-1, num_outputs=3)
        return found
    return [b.linear(x, width, inner) for _ in range(3)]


def attention_operator(shared: int = 1) -> onnx.ModelProto:
    """ONNX's own operator on packed heads, with keys and values that ``shared`` query heads have in common."""
    b = Build(opset=23)
    x = b.input("batch", "sequence", 16)
    return b.model(attend_by_operator(b, x, 16, 4, 8, shared))


def attend_by_operator(b: Build, x: str, width: int, count: int, size: int, shared: int = 1) -> str:
    few = count // shared
    q, k, v = (b.linear(x, width, heads * size) for heads in (count, few, few))
    y = b.node("Attention", q, k, v, q_num_heads=count, kv_num_heads=few)
    found: str = b.node("Add", x, b.linear(y, count * size, width))
    return found


def attention_of_onnxruntime() -> onnx.ModelProto:
    """The operator that onnxruntime's optimizer writes, with biases of its own, and one for every head and position."""
    b = Build()
    x = b.input("batch", 6, 16)
    q, k, v = (b.node("MatMul", x, b.normal(16, 32)) for _ in range(3))
    y = b.node(
        "MultiHeadAttention", q, k, v, b.normal(96), "", b.normal(1, 4, 6, 6), num_heads=4, domain="com.microsoft"
    )
    return b.model(b.node("Add", x, b.linear(y, 32, 16)))


FOLLOWED: dict[str, Callable[[], onnx.ModelProto]] = {
    build.__name__: build
    for build in (
        chain,
        residual,
        depthwise,
        grouped,
        transposed,
        dense_concat,
        split_and_slice,
        equal_split,
        flattened,
        computed_flatten,
        squeeze_and_excite,
        shuffled,
        grouped_shuffle,
        u_net,
        group_norm,
        shared_filter,
        feed_forward,
        gated_feed_forward,
        attention,
        attention_operator,
        attention_of_onnxruntime,
    )
} | {
    "fused_attention": lambda: attention(fused=True),
    "attention_of_shared_keys": lambda: attention_operator(shared=2),
}


class Bench:
    """What a pruner needs of a stage; ``data`` are feeds with a batch axis."""

    def __init__(self, source: Path, scratch: Path, data: Sequence[dict[str, Any]] = ()) -> None:
        from modelops.graphs.describe import signature

        scratch.mkdir()
        self.signature = signature(source)
        self.scratch = scratch
        self.has_data = bool(data)
        self._data = data

    def batches(self) -> Iterator[dict[str, Any]]:
        return iter(self._data)


def outputs(model: Path, feed: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    found: list[Any] = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]).run(None, feed)
    return found


def feed_for(model: Path, rows: int = 5, seed: int = 7) -> dict[str, Any]:
    from modelops.graphs.describe import signature
    from modelops.graphs.seeded import random_feed

    return random_feed(signature(model), rows, seed, {"sequence": 11})
