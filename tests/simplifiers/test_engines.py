"""Every engine makes a graph smaller that has something to make smaller, and leaves its outputs as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelops.graphs.describe import signature, summary
from modelops.simplifiers import REGISTRY

ENGINES = ["onnxruntime", "onnxscript", "onnxsim", "onnxslim"]


def wordy(path: Path) -> Path:
    """y = x · W + b, with W turned around twice at run time, a detour over Identity, and a size computed in steps."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 8)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    nodes = [
        helper.make_node("Transpose", ["w"], ["w1"], name="turn", perm=[1, 0]),
        helper.make_node("Identity", ["x"], ["x1"], name="same"),
        helper.make_node("MatMul", ["x1", "w1"], ["h"], name="product"),
        helper.make_node("Constant", [], ["two"], name="two", value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Mul", ["b", "two"], ["b2"], name="twice"),
        helper.make_node("Add", ["h", "b2"], ["y"], name="bias"),
    ]
    graph = helper.make_graph(
        nodes,
        "wordy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def run(model: Path, x: Any) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_leaves_fewer_nodes_and_the_same_outputs(engine: str, tmp_path: Path) -> None:
    source, target = wordy(tmp_path / "source.onnx"), tmp_path / "target.onnx"
    REGISTRY.load(engine).parse({}).simplify(source, target, None)  # type: ignore[arg-type]
    assert summary(target)["nodes"] <= 3 < summary(source)["nodes"]
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    assert np.allclose(run(source, x), run(target, x), atol=1e-5)
    assert signature(target) == signature(source)


def test_onnxruntime_declares_no_domain_that_it_does_not_use(tmp_path: Path) -> None:
    source, target = wordy(tmp_path / "source.onnx"), tmp_path / "target.onnx"
    REGISTRY.load("onnxruntime").parse({}).simplify(source, target, None)  # type: ignore[arg-type]
    assert [entry.domain for entry in onnx.load(target).opset_import] == [""]
