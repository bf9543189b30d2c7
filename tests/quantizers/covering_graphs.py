"""Tiny graphs of every kind that quantizers meet, at opsets 13 to 23, with data; and cases that cover all pairs.

Nodes are written as exporters write them at that opset: layer normalization is one node from opset 17 on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from quantizer_models import weights

OPSETS = (13, 15, 17, 18, 21, 23)
ALL_OPSETS = tuple(range(13, 24))
RULES = ("minmax", "average", "percentile", "entropy", "mse", "auto")
SCHEMES = (*(f"static {rule}" for rule in RULES), "dynamic", "weights", "float16")
SAMPLES = 12

Built = tuple[Path, dict[str, Any]]


class Graph:
    """A graph as it grows: every call adds a node, and gives the name of what it writes."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"t{len(self.nodes)}_{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, f"{op}_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, *shape: int, scale: float = 0.2) -> str:
        return self.constant(weights(*shape, seed=len(self.constants), scale=scale))

    def mean(self, value: str, axes: list[int]) -> str:
        if self.opset >= 18:
            return str(self("ReduceMean", value, self.constant(np.array(axes)), keepdims=1))
        return str(self("ReduceMean", value, axes=axes, keepdims=1))

    def normalized(self, value: str, size: int) -> str:
        scale, shift = self.weight(size, scale=1.0), self.weight(size)
        if self.opset >= 17:
            return str(self("LayerNormalization", value, scale, shift, axis=-1))
        centred = self("Sub", value, self.mean(value, [-1]))
        spread = self(
            "Sqrt", self("Add", self.mean(self("Mul", centred, centred), [-1]), self.constant(np.float32(1e-5)))
        )
        return str(self("Add", self("Mul", self("Div", centred, spread), scale), shift))

    def save(self, path: Path, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, str], data: Any) -> Built:
        """Write the graph; ``outputs`` maps the names of outputs to what they are."""
        for name, value in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name], f"give_{name}"))
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)
        return path, data


def _rows(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(SAMPLES, *shape)).astype(np.float32)


def cnn(opset: int, path: Path) -> Built:
    g = Graph(opset)
    pads = {"pads": [1, 1, 1, 1]}
    first = g("Relu", g("Conv", "image", g.weight(8, 3, 3, 3), g.weight(8), **pads))
    depthwise = g("Relu", g("Conv", first, g.weight(8, 1, 3, 3), g.weight(8), group=8, **pads))
    both = g("Add", g("Conv", depthwise, g.weight(8, 8, 1, 1), g.weight(8)), first)
    pooled = g("Flatten", g("GlobalAveragePool", g("MaxPool", both, kernel_shape=[2, 2], strides=[2, 2])))
    logits = g("Gemm", pooled, g.weight(5, 8), g.weight(5), transB=1)
    return g.save(path, {"image": (1, ["n", 3, 8, 8])}, {"logits": logits}, {"image": _rows(3, 8, 8)})


def _encoder(g: Graph, x: str, mask: str, *, guarded: bool) -> str:
    """A layer of 2 heads of 8; ``guarded`` as the newer exporter writes it, with NaN taken out after the Softmax."""
    heads, flat = g.constant(np.array([0, 0, 2, 8])), g.constant(np.array([0, 0, 16]))
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        product = g("Add", g("MatMul", x, g.weight(16, 16)), g.weight(16))
        parts.append(g("Transpose", g("Reshape", product, heads), perm=perm))
    query, key, value = parts
    scores = g("Add", g("MatMul", g("Mul", query, g.constant(np.float32(8**-0.5))), key), mask)
    share = g("Softmax", scores, axis=-1)
    if guarded:
        share = g("Where", g("IsNaN", share), g.constant(np.float32(0)), share)
    mixed = g("Reshape", g("Transpose", g("MatMul", share, value), perm=[0, 2, 1, 3]), flat)
    attended = g.normalized(g("Add", g("Add", g("MatMul", mixed, g.weight(16, 16)), g.weight(16)), x), 16)
    inner = g("Add", g("MatMul", attended, g.weight(16, 32)), g.weight(32))
    half, one, root = (g.constant(np.float32(number)) for number in (0.5, 1.0, 2**0.5))
    gelu = g("Mul", g("Mul", inner, g("Add", g("Erf", g("Div", inner, root)), one)), half)
    return g.normalized(g("Add", g("Add", g("MatMul", gelu, g.weight(32, 16)), g.weight(16)), attended), 16)


def _transformer(opset: int, path: Path, *, guarded: bool) -> Built:
    g = Graph(opset)
    x = g("Gather", g.constant(weights(600, 16, seed=99, scale=1.0), "table"), "ids")
    wide = g("Unsqueeze", "keep", g.constant(np.array([1, 2])))
    mask = g("Where", wide, g.constant(np.float32(0)), g.constant(np.float32(-3.4028235e38)))
    hidden = _encoder(g, x, mask, guarded=guarded)
    rng = np.random.default_rng(3)
    keep = np.arange(6)[None, :] < rng.integers(2, 7, size=(SAMPLES, 1))
    data = {"ids": rng.integers(0, 600, size=(SAMPLES, 6)), "keep": keep}
    return g.save(path, {"ids": (7, ["n", "t"]), "keep": (9, ["n", "t"])}, {"hidden": hidden}, data)


def older_transformer(opset: int, path: Path) -> Built:
    return _transformer(opset, path, guarded=False)


def newer_transformer(opset: int, path: Path) -> Built:
    return _transformer(opset, path, guarded=True)


def recurrent(opset: int, path: Path) -> Built:
    """An LSTM, a GRU and a Gemm on their last state."""
    g = Graph(opset)
    size = 8
    steps = g("Transpose", "x", perm=[1, 0, 2])
    _, hidden, _ = g("LSTM", steps, g.weight(1, 4 * size, 6), g.weight(1, 4 * size, size), outputs=3, hidden_size=size)
    _, other = g("GRU", steps, g.weight(1, 3 * size, 6), g.weight(1, 3 * size, size), outputs=2, hidden_size=size)
    state = g("Squeeze", g("Concat", hidden, other, axis=2), g.constant(np.array([0])))
    logits = g("Gemm", state, g.weight(2 * size, 4), g.weight(4))
    return g.save(path, {"x": (1, ["n", 5, 6])}, {"logits": logits}, {"x": _rows(5, 6)})


def several(opset: int, path: Path) -> Built:
    """Inputs by name, of two types, and three outputs; one of them is an input of another branch."""
    g = Graph(opset)
    hidden = g("Relu", g("Gemm", "features", g.weight(16, 8), g.weight(16), transB=1))
    scaled = g("Mul", hidden, g("Unsqueeze", g("Cast", "weight", to=1), g.constant(np.array([1]))))
    classes = g("Softmax", g("Gemm", scaled, g.weight(16, 4), g.weight(4)), axis=-1)
    value = g("MatMul", hidden, g.weight(16, 1))
    inputs = {"features": (1, ["n", 8]), "weight": (7, ["n"])}
    data = {"features": _rows(8), "weight": np.arange(SAMPLES) % 3 + 1}
    return g.save(path, inputs, {"classes": classes, "value": value, "hidden": hidden}, data)


def shared(opset: int, path: Path) -> Built:
    """One matrix read by three products, once transposed, and by a lookup."""
    g = Graph(opset)
    table = g.constant(weights(300, 16, seed=50, scale=0.5), "table")
    words = g("ReduceMax", g("Gather", table, "ids"), keepdims=0, axes=[1]) if opset < 18 else None
    if words is None:
        words = g("ReduceMax", g("Gather", table, "ids"), g.constant(np.array([1])), keepdims=0)
    square = g.weight(16, 16)
    first = g("Relu", g("MatMul", words, square))
    second = g("Relu", g("MatMul", first, square))
    scores = g("Gemm", second, table, g.weight(300), transB=1)
    ids = np.random.default_rng(8).integers(0, 300, size=(SAMPLES, 4))
    return g.save(path, {"ids": (7, ["n", 4])}, {"scores": scores}, {"ids": ids})


KINDS: dict[str, Callable[[int, Path], Built]] = {
    "cnn": cnn,
    "transformer-older-exporter": older_transformer,
    "transformer-newer-exporter": newer_transformer,
    "recurrent": recurrent,
    "several-inputs-and-outputs": several,
    "shared-weights": shared,
}


def pairwise(*factors: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Few cases in which every two values of different factors meet: always the one that brings most new pairs."""
    open_pairs = {
        (a, x, b, y)
        for (a, left), (b, right) in itertools.combinations(enumerate(factors), 2)
        for x in left
        for y in right
    }
    every = list(itertools.product(*factors))
    while open_pairs:
        best = max(every, key=lambda case: len(_pairs(case) & open_pairs))
        open_pairs -= _pairs(best)
        yield best


def _pairs(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(enumerate(case), 2)}
