"""Fusing keeps what a graph does: linear layers unfolded, sums left to kernels that are fast, attention as one node."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.core.tensors import Signature, TensorSpec
from modelops.graphs import files
from modelops.graphs.fusions import DOMAIN, part_skip
from modelops.graphs.seeded import masked_feeds
from modelops.graphs.unfolding import unfold


def saved(path: Path, nodes: list[Any], weights: dict[str, Any], width: int, shapes: dict[str, list[Any]]) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", width])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def run(model: Path, x: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def operators(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def linear(path: Path, back: list[str], *, turned: bool = False) -> Path:
    """y = the rows of x, flattened, through Gemm, and shaped back."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    weights = {"w": weight.T.copy() if turned else weight, "b": rng.normal(size=6).astype(np.float32)}
    weights |= {"flat": np.array([-1, 4]), "six": np.array([6])}
    nodes = [
        helper.make_node("Shape", ["x"], ["lead"], start=0, end=2),
        helper.make_node("Concat", ["lead", "six"], ["wide"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["x2"]),
        helper.make_node("Gemm", ["x2", "w", "b"], ["y2"], transB=int(turned)),
        helper.make_node("Reshape", ["y2", "wide"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    return saved(path, nodes, weights, 6, {"x2": ["rows", 4], "y2": ["rows", 6], "h": [*back, 6]})


@pytest.mark.parametrize("turned", [False, True])
def test_a_flattened_linear_layer_becomes_a_product_on_what_was_flattened(turned: bool, tmp_path: Path) -> None:
    source = linear(tmp_path / "source.onnx", ["batch", "sequence"], turned=turned)
    model = files.load(source)
    assert unfold(model) == 1
    files.save(model, tmp_path / "target.onnx")
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    assert np.allclose(run(source, x), run(tmp_path / "target.onnx", x), atol=1e-6)
    assert [node.op_type for node in model.graph if node.op_type in ("MatMul", "Add")] == ["MatMul", "Add"]


def test_rows_that_come_back_in_another_order_are_left_alone(tmp_path: Path) -> None:
    model = files.load(linear(tmp_path / "source.onnx", ["sequence", "batch"]))
    assert unfold(model) == 0 and operators(model)["Gemm"] == 1


def test_a_fused_sum_and_normalization_are_two_operators_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=4).astype(np.float32) for name in ("gamma", "beta", "bias")}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node(
            "SkipLayerNormalization", ["x", "r", "gamma", "beta", "bias"], ["n", "", "", "sum"], name="skip",
            domain=DOMAIN, epsilon=1e-5,
        ),
        helper.make_node("Mul", ["n", "sum"], ["y"]),
    ]  # fmt: skip
    source = saved(tmp_path / "source.onnx", nodes, weights, 4, {})
    model = files.load(source)
    node = next(node for node in model.graph if node.op_type == "SkipLayerNormalization")
    assert part_skip(model.graph, node)
    files.save(model, tmp_path / "target.onnx")
    assert operators(model)["Sum"] == operators(model)["LayerNormalization"] == 1
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    assert np.allclose(run(source, x), run(tmp_path / "target.onnx", x), atol=1e-5)


def test_masked_rows_are_whole_half_holed_and_empty() -> None:
    mask = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
    (feed,) = masked_feeds(Signature((mask,), ()))
    assert feed["attention_mask"].sum(axis=1).tolist() == [0, 8, 8, 8, 1, 16]
    assert masked_feeds(Signature((TensorSpec("x", "float32", ("batch", 3)),), ())) == []
